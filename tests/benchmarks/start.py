"""From the start of `slider train` to its first step, over a process that imports torch and diffusers and loads the pipeline.

    python -m tests.benchmarks.start

Cold: nothing is in the cache. Warm: all is. The first step is done when its line stands in metrics.jsonl.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .models import tiny_pipeline, write_run
from .timing import Row, Times, ratio, show

BARE = """
import sys, torch, diffusers
diffusers.StableDiffusionPipeline.from_pretrained(
    sys.argv[1], safety_checker=None, feature_extractor=None, requires_safety_checker=False)
"""


def process(command: Sequence[str], mark: Path | None = None) -> tuple[float, float]:
    """Seconds until a file has a line (or until the end), and the processor's seconds of the whole process."""
    before, started = os.times(), time.perf_counter()
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    taken = None
    while mark and running.poll() is None and taken is None:
        time.sleep(0.005)
        if mark.exists() and "\n" in mark.read_text():
            taken = time.perf_counter() - started
    _, said = running.communicate()
    assert running.returncode == 0, said
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return taken or time.perf_counter() - started, cpu


def rows(root: Path, repeats: int = 5) -> list[Row]:
    """Bare, cold and warm, in turn."""
    pipeline = tiny_pipeline("sd1", root)
    config = write_run("sd1", pipeline, root / "start", 64, max_train_steps=1)
    output, cache = root / "start" / "out", root / "start" / ".slider-cache"

    def train(warm: bool) -> tuple[float, float]:
        shutil.rmtree(output, ignore_errors=True)
        if not warm:
            shutil.rmtree(cache, ignore_errors=True)
        return process([sys.executable, "-m", "slider_plugin", "train", str(config)], output / "metrics.jsonl")

    works: dict[str, Callable[[], tuple[float, float]]] = {
        "bare": lambda: process([sys.executable, "-c", BARE, str(pipeline)]),
        "cold": lambda: train(warm=False),
        "warm": lambda: train(warm=True),
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            taken[name].append(work())
    times = {name: Times(tuple(w for w, _ in pairs), tuple(c for _, c in pairs)) for name, pairs in taken.items()}
    return [
        {
            "start": name,
            "s": round(times[name].median, 1),
            "bare, s": round(times["bare"].median, 1),
            "ratio (quartiles)": str(ratio(times[name].wall, times["bare"].wall)),
            "ratio of processor time": str(ratio(times[name].cpu, times["bare"].cpu)),
        }
        for name in ("cold", "warm")
    ]


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        found = rows(Path(name), given.repeats)
    show(found, given.json)
    return found


if __name__ == "__main__":
    main()

"""All benchmarks that a processor can run, in one command.

python -m tests.benchmarks
python -m tests.benchmarks --out results.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import cache, draws, memory, objective, pairing, start, steps
from .timing import table


def measure(root: Path, quick: bool) -> dict[str, list[dict[str, Any]]]:
    """The rows of each benchmark; `quick` runs every one, once, on the smallest models."""
    repeats, families = ("1", ["sd1"]) if quick else ("15", list(steps.TINY))
    pairs = ["--families", *families, "--repeats", repeats, *(["--no-middle"] if quick else [])]
    return {
        "step": steps.rows(root, families, not quick, 1 if quick else 30),
        "pairing": pairing.main([*pairs, "--json"]),
        "objective": objective.rows(root, 1 if quick else 20),
        "memory": memory.rows(root, families),
        "start": start.rows(root, 1 if quick else 5),
        "draws": draws.rows((10,) if quick else draws.COUNTS, 100 if quick else 2000),
        "cache": cache.main(["--json", "--counts", *(["8"] if quick else ["100", "1000", "10000"])]),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="each once, on the smallest models: shows that they run")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        results = measure(Path(name), given.quick)
    machine = {"torch": torch.__version__, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    report = {"machine": machine | {"platform": platform.platform()}, **results}
    for title, rows in results.items():
        print(f"\n{title}\n\n{table(rows)}")
    if given.out:
        given.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()

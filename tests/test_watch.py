"""What a run shows of itself while it trains."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from slider_plugin import console, run
from slider_plugin.configfile import read_config
from slider_plugin.errors import UserError
from slider_plugin.preflight import preflight
from slider_plugin.registry import Plugins
from slider_plugin.training import watch

Project = Callable[..., Path]


def train(config: Path, *flags: str) -> run.Outcome:
    return run.train(read_config(config, flags, Plugins.discover().facts)[0])


def test_strips_numbers_and_memory_reach_tensorboard_and_the_lines(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pictures of the validation on the way and of the last one are read back from the event file, pixel by pixel."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = project(
        "sd1", report_to="tensorboard", max_train_steps=2, validation_step_interval=1, validation_prompt="a circle",
        validation_num_inference_steps=1, validation_strengths=[-1, 1],
    )  # fmt: skip
    images = train(config).images
    assert images is not None
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["peak_memory_mb"] > 50 for row in rows)  # torch alone is more
    events = EventAccumulator(str(next((tmp_path / "out" / "logs").rglob("events.*")).parent))
    events.Reload()
    assert [e.step for e in events.Scalars("peak_memory_mb")] == [1, 2]
    tags = events.Tags()["images"]
    files = {f"validation/{path.stem}": path for path in images.glob("**/*.png")}
    assert "validation/contact_sheet" in tags and any("strip" in tag for tag in tags) and set(tags) <= set(files)
    for tag in tags:
        logged = events.Images(tag)
        assert [e.step for e in logged] == [1, 2]
        shown = Image.open(io.BytesIO(logged[-1].encoded_image_string)).convert("RGB")
        assert shown.tobytes() == Image.open(files[tag]).convert("RGB").tobytes()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("training")]
    assert "training 2/2 loss" in lines[-1] and "steps/s  process peak " in lines[-1] and lines[-1].endswith("0:00:00 left")


def test_the_time_left_is_that_of_the_steps_that_were_done_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From step 100 of 200 on, 10 steps in 100 s leave 90 steps of 10 s."""
    clock = iter([0.0, 100.0])
    monkeypatch.setattr(console.time, "perf_counter", lambda: next(clock))
    console.Ticker(200, 100, None, "training").tick(110, "note")
    assert capsys.readouterr().err == "training 110/200 note  0:15:00 left\n"


def test_the_peak_is_the_allocator_s_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fake = SimpleNamespace(
        max_memory_allocated=lambda device: 7_000_000, reset_peak_memory_stats=lambda device: calls.append(device.type)
    )
    monkeypatch.setattr(torch, "cuda", fake)
    assert watch.peak_memory(torch.device("cuda")) == (7_000_000, "cuda peak")
    watch.reset_peak_memory(torch.device("cuda"))
    watch.reset_peak_memory(torch.device("cpu"))
    assert calls == ["cuda"]


GROWING = """
import torch
from slider_plugin.training.watch import peak_memory
before, whose = peak_memory(torch.device("cpu"))
held = torch.ones(before // 4 + 10_000_000)  # float32: more than the peak so far
print(whose, before, held.numel() * 4, peak_memory(torch.device("cpu"))[0])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="another call measures it there")
def test_the_peak_of_a_process_grows_with_what_it_holds() -> None:
    """In a process of its own, whose peak is small."""
    printed = subprocess.run([sys.executable, "-c", GROWING], capture_output=True, text=True, check=True).stdout.split()
    before, held, after = map(int, printed[2:])
    assert printed[:2] == ["process", "peak"] and 5e7 < before < held <= after < before + held + 1e8


def test_a_tracker_that_is_not_installed_is_named_beforehand(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "is_tensorboard_available", lambda: False)
    config = read_config(project("sd1", report_to="tensorboard"), (), Plugins.discover().facts)[0]
    with pytest.raises(UserError, match=r"report_to: tensorboard is not installed; .*slider-plugin\[tensorboard\]"):
        preflight(config, Plugins.discover().load("sd1"))

"""Watching a run: its metrics as JSON lines (always) and in TensorBoard (on request), and Ctrl-C."""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from slider_plugin.config import RunConfig
from slider_plugin.errors import UserError
from slider_plugin.files import write_atomic
from slider_plugin.training.loop import StepReport

if TYPE_CHECKING:
    from accelerate import Accelerator

SMOOTHING = 0.9  # of the losses beside the progress bar


class Metrics:
    """One JSON line per optimizer step in `metrics.jsonl`, and the same to accelerate's trackers."""

    def __init__(self, config: RunConfig, done: int, accelerator: Accelerator) -> None:
        self._path, self._accelerator, self._config = config.output_dir / "metrics.jsonl", accelerator, config
        self._file: TextIO | None = None
        self._mean: dict[str, float] = {}
        self._done = done

    def __enter__(self) -> Metrics:
        _forget_later_steps(self._path, self._done)
        if self._config.report_to == "tensorboard":
            _start_trackers(self._accelerator, self._config)
        self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file:
            self._file.close()
        if self._config.report_to == "tensorboard":
            self._accelerator.end_training()

    def write(self, report: StepReport) -> None:
        """Write a step's metrics; flushed, so that a killed run has all lines."""
        assert self._file, "used outside its block"
        values = report.metrics()
        self._file.write(json.dumps({"step": report.step, **values}) + "\n")
        self._file.flush()
        self._accelerator.log(values, step=report.step)

    def note(self, report: StepReport) -> str:
        """What stands beside the progress bar: smoothed loss per sign, and steps per second."""
        for sign, loss in report.losses().items():
            self._mean[sign] = SMOOTHING * self._mean.get(sign, loss) + (1 - SMOOTHING) * loss
        marks = {"positive": "+", "negative": "-", "neutral": "0"}
        losses = " ".join(f"{marks[sign]}{value:.4f}" for sign, value in sorted(self._mean.items()) if math.isfinite(value))
        return f"loss {losses}  {1 / report.seconds:.1f} steps/s"


def _forget_later_steps(path: Path, done: int) -> None:
    """Drop the lines after the checkpoint that a run goes on from: those steps are done again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _step_of(line) <= done]
    if len(kept) != len(lines):
        write_atomic(path, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> float:
    """The step of a line; a line cut off by a kill counts as after everything."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _start_trackers(accelerator: Accelerator, config: RunConfig) -> None:
    if not accelerator.trackers and not accelerator.log_with:
        raise UserError("report_to tensorboard: tensorboard is not installed; pip install 'slider-plugin[tensorboard]'")
    accelerator.init_trackers(config.tracker_project_name)


class Interrupt:
    """Whether the user asked to stop."""

    def __init__(self) -> None:
        self.asked = False


@contextmanager
def interruptible(say: Callable[[str], None]) -> Iterator[Interrupt]:
    """Inside, the first Ctrl-C (or a termination signal) asks to stop after the step, and the second one stops at once."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield interrupt
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupt.asked:
            raise KeyboardInterrupt
        interrupt.asked = True
        say("stopping after this step, with a checkpoint; once more stops at once")

    before: dict[int, Any] = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

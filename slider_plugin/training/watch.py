"""Watching a run: its metrics as JSON lines (always) and in TensorBoard (on request, with pictures), and Ctrl-C."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, TextIO

import torch
from accelerate.utils import is_tensorboard_available

from slider_plugin.config import RunConfig
from slider_plugin.errors import UserError
from slider_plugin.files import write_atomic
from slider_plugin.training.reports import StepReport

if TYPE_CHECKING:
    from accelerate import Accelerator

    from slider_plugin.validation.render import Rendered

SMOOTHING = 0.9  # of the losses and of the rate beside the progress bar


class Metrics:
    """One JSON line per optimizer step in `metrics.jsonl`, and the same to accelerate's trackers."""

    def __init__(self, config: RunConfig, done: int, accelerator: Accelerator) -> None:
        self._path, self._accelerator, self._config = config.output_dir / "metrics.jsonl", accelerator, config
        self._file: TextIO | None = None
        self._mean: dict[str, float] = {}
        self._seconds: float | None = None
        self._done = done

    def __enter__(self) -> Metrics:
        _forget_later_steps(self._path, self._done)
        reset_peak_memory(self._accelerator.device)
        self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file:
            self._file.close()

    def write(self, report: StepReport) -> None:
        """Write a step's metrics; flushed, so that a killed run has all lines."""
        assert self._file, "used outside its block"
        values = report.metrics() | {"peak_memory_mb": round(peak_memory(self._accelerator.device)[0] / 1e6, 1)}
        self._file.write(json.dumps({"step": report.step, **values}) + "\n")
        self._file.flush()
        self._accelerator.log(values, step=report.step)

    def note(self, report: StepReport) -> str:
        """What stands beside the progress bar: smoothed loss per sign, steps per second, and the most memory so far."""
        for sign, loss in report.losses().items():
            self._mean[sign] = SMOOTHING * self._mean.get(sign, loss) + (1 - SMOOTHING) * loss
        marks = {"positive": "+", "negative": "-", "neutral": "0", "anchor": "anchor"}
        losses = " ".join(f"[{marks[sign]}] {value:.4f}" for sign, value in sorted(self._mean.items()) if math.isfinite(value))
        before = self._seconds or report.seconds
        self._seconds = SMOOTHING * before + (1 - SMOOTHING) * report.seconds
        memory, whose = peak_memory(self._accelerator.device)
        return f"loss {losses}  {1 / self._seconds:.1f} steps/s  {whose} {memory / 1e9:.2f} GB"


def peak_memory(device: torch.device) -> tuple[int, str]:
    """The most bytes that were in use, and whose they are: the device's allocator's, or the whole process's resident memory.

    An allocator's peak is that since `reset_peak_memory`; a process's is that of its life, loading and encoding included.
    """
    allocator = _allocator(device)
    if allocator is not None:
        return int(allocator.max_memory_allocated(device)), f"{device.type} peak"
    if sys.platform == "win32":
        import psutil  # which accelerate needs as well

        return int(psutil.Process().memory_info().peak_wset), "process peak"
    import resource

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # but bytes on a Mac
    return kilobytes * (1 if sys.platform == "darwin" else 1024), "process peak"


def reset_peak_memory(device: torch.device) -> None:
    """Begin to measure a device's peak anew, where it can be measured."""
    allocator = _allocator(device)
    if allocator is not None:
        allocator.reset_peak_memory_stats(device)


def _allocator(device: torch.device) -> Any:
    """`torch.cuda` or the like, where it keeps account of its memory; None on a processor."""
    module = getattr(torch, device.type, None)
    return module if hasattr(module, "max_memory_allocated") else None


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def check_trackers(config: RunConfig) -> None:
    """Raise UserError if what `report_to` names is not installed."""
    if config.report_to == "tensorboard" and not is_tensorboard_available():
        raise UserError("report_to: tensorboard is not installed; pip install 'slider-plugin[tensorboard]', or write none")


@contextmanager
def reporting(config: RunConfig, accelerator: Accelerator) -> Iterator[None]:
    """Inside, what `report_to` names takes numbers and pictures."""
    if config.report_to == "none":
        yield
        return
    accelerator.init_trackers(config.tracker_project_name)
    try:
        yield
    finally:
        accelerator.end_training()


def log_images(accelerator: Accelerator, drawn: Rendered, step: int) -> None:
    """Show the strips of a validation and its contact sheet to the trackers, under the names of their files."""
    import numpy
    from PIL import Image

    files = [*drawn.strips, *([drawn.contact_sheet] if drawn.contact_sheet else [])]
    for tracker in accelerator.trackers:
        for file in files:
            with Image.open(file) as image:
                pixels_1HWC = numpy.asarray(image.convert("RGB"))[None]
            tracker.log_images({f"validation/{file.stem}": pixels_1HWC}, step=step, dataformats="NHWC")


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

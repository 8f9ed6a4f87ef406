"""A run as the page knows it: the folder `runs/NAME` with its config.json, and what its output folder says about it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from slider_hooks import Family
from slider_plugin.config import BaseLoraConfig, BucketConfig, RunConfig
from slider_plugin.configfile import read_config
from slider_plugin.documents import read_document
from slider_plugin.errors import ConfigError, UserError
from slider_plugin.files import write_json
from slider_plugin.settle import NAMES_OF_PLACES, plain_name
from slider_plugin.ui.jobs import TRAIN, Job, Jobs
from slider_plugin.ui.schema import is_path
from slider_plugin.ui.workspace import HUB_ID, OutsideError, Workspace

RUNS = "runs"
NAME = re.compile(r"[a-z0-9]+(?:[-_][a-z0-9]+)*")
LONGEST_NAME = 40
SLIDER = "slider.safetensors"

HUB_KEYS = ("pretrained_model_name_or_path", "controlnet_model_name_or_path")
"""Keys that hold a folder, or the id of a model on the hub."""

SMOOTHING = 0.9  # of the losses that are shown as numbers
RATE_STEPS = 20  # steps over which the rate is taken


# --- Runs of a workspace ----------------------------------------------------------------------------------------------


def all_runs(workspace: Workspace) -> list[str]:
    """Names of the runs, the latest configuration first."""
    folder = workspace.root / RUNS
    found = [place for place in folder.iterdir() if (place / "config.json").is_file()] if folder.is_dir() else []
    found.sort(key=lambda place: (-(place / "config.json").stat().st_mtime, place.name))
    return [place.name for place in found if NAME.fullmatch(place.name)]


def open_run(workspace: Workspace, name: str) -> Run | None:
    """The run of that name; None if there is none, or no run could have that name."""
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        return None
    folder = workspace.inside(f"{RUNS}/{name}", writing=True)
    return Run(workspace, name, folder) if (folder / "config.json").is_file() else None


def new_run(workspace: Workspace, name: str, written: Mapping[str, Any]) -> Run:
    """Begin a run with this configuration. Raises UserError for a name that will not do, or is taken."""
    name = name.strip().lower()
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        raise UserError(f"a run's name has letters, digits, - and _, at most {LONGEST_NAME}: {name[:60]!r} will not do")
    folder = workspace.inside(f"{RUNS}/{name}", writing=True)
    if folder.exists():
        raise UserError(f"there is a run {name} already; choose another name")
    run = Run(workspace, name, folder)
    run.save({**written, "output_dir": str(folder / "output")})
    return run


# --- One run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run. Everything is read from disk when it is asked for."""

    workspace: Workspace
    name: str
    folder: Path

    @property
    def file(self) -> Path:
        """The configuration, which is what `slider train` takes."""
        return self.folder / "config.json"

    def written(self) -> dict[str, Any]:
        """What config.json holds. Raises UserError if that is no object of keys and values."""
        found = read_document(self.file)
        if not isinstance(found, dict):
            raise UserError(f"{self.workspace.shown(self.file)}: it must hold an object of keys and values")
        return found

    def save(self, written: Mapping[str, Any]) -> None:
        """Write config.json, whole or not at all."""
        write_json(self.file, written)

    def read(self, families: Callable[[str], Family]) -> tuple[RunConfig | None, list[str]]:
        """The configuration, and what is wrong with it; None if something is."""
        try:
            return read_within(self.workspace, self.file, families)[0], []
        except ConfigError as error:
            return None, list(error.problems)
        except UserError as error:
            return None, [str(error)]

    @property
    def output(self) -> Path:
        """Folder that the run writes. Raises OutsideError if config.json was made to name one outside."""
        try:
            named = self.written().get("output_dir")
        except UserError:
            named = None
        return self.workspace.inside(str(named), writing=True) if named else self.folder / "output"

    @property
    def slider(self) -> Path | None:
        """The finished slider."""
        path = self.output / SLIDER
        return path if path.is_file() else None

    @property
    def has_checkpoint(self) -> bool:
        return any(self.output.glob("checkpoint-*/state.json"))

    @property
    def total_steps(self) -> int:
        steps = self.written().get("max_train_steps")
        return steps if isinstance(steps, int) else int(RunConfig.model_fields["max_train_steps"].default)

    def status(self, jobs: Jobs) -> Status:
        """Where the run stands."""
        mine = jobs.of(self.name, TRAIN)
        return Status(self, mine[-1] if mine else None, jobs)


@dataclass(frozen=True)
class Status:
    """Where a run stands, from its latest job and from what its output folder holds."""

    run: Run
    job: Job | None
    jobs: Jobs

    @cached_property
    def state(self) -> str:
        """`new`, `queued`, `preparing`, `running`, `stopping`, `stopped`, `finished`, `failed` or `cut off`."""
        job = self.job
        if job is None or (job.ended is not None and job.started is None):  # never trained here, or taken out of the queue
            return "finished" if self.run.slider else "stopped" if self.run.has_checkpoint else "new"
        if job.is_active:
            return self._active(job)
        code = (job.ended or {}).get("code")
        if code is None:
            written = self.run.slider.stat().st_mtime if self.run.slider else 0.0
            return "finished" if written > float((job.started or {"time": math.inf})["time"]) else "cut off"
        return {0: "finished", 130: "stopped"}.get(int(code), "failed" if code > 0 else "cut off")

    def _active(self, job: Job) -> str:
        if job.started is None:
            return "queued"
        if job.is_stopping:
            return "stopping"
        path = self.run.output / "metrics.jsonl"
        return "running" if path.exists() and path.stat().st_mtime >= float(job.started["time"]) else "preparing"

    @property
    def is_active(self) -> bool:
        return self.state in ("queued", "preparing", "running", "stopping")

    @property
    def place(self) -> int:
        """How many jobs are in front of it in the queue."""
        waiting = [job.number for job in self.jobs.active()]
        return sum(number < self.job.number for number in waiting) if self.job else 0

    @cached_property
    def progress(self) -> Progress:
        return Progress(read_lines(self.run.output / "metrics.jsonl"), self.run.total_steps)

    @property
    def log(self) -> str:
        return self.job.log if self.job else ""

    @property
    def failure(self) -> list[str]:
        """What the log says went wrong: the lines from the last `error:` on."""
        lines = self.log.rstrip().splitlines()
        first = max((number for number, line in enumerate(lines) if line.startswith("error:")), default=None)
        return lines[first:][:20] if first is not None else lines[-5:]


# --- Numbers of a run -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """The metrics of a run so far."""

    lines: list[dict[str, Any]]
    total: int

    @property
    def step(self) -> int:
        return int(self.lines[-1]["step"]) if self.lines else 0

    @property
    def share(self) -> float:
        return min(1.0, self.step / max(1, self.total))

    @property
    def rate(self) -> float | None:
        """Steps per second, over the last ones."""
        seconds = [float(line["seconds"]) for line in self.lines[-RATE_STEPS:] if line.get("seconds")]
        return len(seconds) / sum(seconds) if seconds and sum(seconds) > 0 else None

    @property
    def left(self) -> str | None:
        """Time left at that rate."""
        rate = self.rate
        if rate is None:
            return None
        seconds = round(max(0, self.total - self.step) / rate)
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    @property
    def memory(self) -> str | None:
        """The most memory so far."""
        megabytes = next((line["peak_memory_mb"] for line in reversed(self.lines) if "peak_memory_mb" in line), None)
        return None if megabytes is None else f"{megabytes / 1000:.2f} GB"

    def losses(self) -> dict[str, list[tuple[float, float]]]:
        """(step, loss) of each sign that was trained."""
        signs: dict[str, list[tuple[float, float]]] = {}
        for line in self.lines:
            for key, value in line.items():
                if key.startswith("loss/") and isinstance(value, (int, float)) and math.isfinite(value):
                    signs.setdefault(key.removeprefix("loss/"), []).append((float(line["step"]), float(value)))
        return signs

    def smoothed(self) -> dict[str, float]:
        """The latest loss of each sign, smoothed."""
        return {sign: smooth(points)[-1][1] for sign, points in self.losses().items()}


def smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """An exponential moving average that begins as the mean of what there is."""
    mean, weight, found = 0.0, 0.0, []
    for step, value in points:
        mean, weight = SMOOTHING * mean + (1 - SMOOTHING) * value, SMOOTHING * weight + (1 - SMOOTHING)
        found.append((step, mean / weight))
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; the last line may be in the middle of being written."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), (int, float)):
            found.append(value)
    return found


# --- Configurations within the workspace ------------------------------------------------------------------------------


def read_within(workspace: Workspace, file: Path, families: Callable[[str], Family]) -> tuple[RunConfig, tuple[str, ...]]:
    """`read_config`, and nothing outside the workspace: neither what the file names nor what these files name.

    Raises:
        ConfigError: everything that is wrong.
    """
    written = read_document(file)
    if isinstance(written, dict):
        _refuse(_outside(workspace, written, RunConfig, file.parent), file.name)
    config, notes = read_config(file, (), families)
    _refuse(outside(workspace, config), file.name)
    return config, notes


def outside(workspace: Workspace, config: RunConfig) -> list[str]:
    """What is wrong with the paths of a configuration: all of them must lie in the workspace."""
    whole = config.model_dump(mode="json")
    lines = _outside(workspace, whole, RunConfig, workspace.root)
    for bucket in config.buckets:
        found = _outside(workspace, bucket.model_dump(mode="json"), BucketConfig, workspace.root)
        lines += [f"bucket {bucket.id!r}: {line}" for line in found]
    for number, lora in enumerate(config.base_loras, start=1):
        found = _outside(workspace, lora.model_dump(mode="json"), BaseLoraConfig, workspace.root)
        lines += [f"base_loras, entry {number}: {line}" for line in found]
    return lines


def _outside(workspace: Workspace, values: Mapping[str, Any], model: Any, beside: Path) -> list[str]:
    """One line for each key of one object whose path leads outside, wherever a relative one is looked for."""
    lines = []
    for key, value in values.items():
        name = plain_name(str(key))
        info = model.model_fields.get(name)
        if info is None or not isinstance(value, str) or not (is_path(info) or name in (*NAMES_OF_PLACES, *HUB_KEYS)):
            continue
        if (name in HUB_KEYS and HUB_ID.fullmatch(value)) or value in ("", "latest"):
            continue
        try:
            for base in (beside, workspace.root):
                workspace.inside(str(base / Path(value).expanduser()), writing=name in ("output_dir", "cache_dir"))
        except (OutsideError, RuntimeError) as error:
            lines.append(f"{name}: {error}")
    return lines


def _refuse(lines: Iterable[str], where: str) -> None:
    problems = [f"{where}: {line}" for line in lines]
    if problems:
        raise ConfigError(problems)

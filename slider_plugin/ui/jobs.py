"""Jobs of the page, on disk: what is queued, runs or has ended outlives the browser, the page's server and the queue's runner.

A job is a folder `.slider-ui/jobs/000007/`, in which each fact is a file that is written once:

    job.json      which run, which kind, the arguments of `slider`; it is queued from now on
    started.json  process id and its time of birth, as ids are used again
    stop          somebody asked it to stop
    ended.json    exit code; null where nobody saw it, or it never began
    log           what it said

The runner (`runner.py`) works them off one at a time, in order of their numbers.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from slider_plugin.errors import UserError
from slider_plugin.files import folder_replacing, write_atomic, write_json
from slider_plugin.ui.children import environment, python

TRAIN, RENDER, EXPORT = "train", "render", "export"
LOG_END = 64 * 1024
"""Bytes of a log that the page looks at."""


class BusyError(UserError):
    """The run has such a job already."""


@dataclass(frozen=True, slots=True)
class Job:
    """One job; every property is read from disk."""

    folder: Path
    run: str
    kind: str
    arguments: tuple[str, ...]
    created: float
    """Seconds since 1970."""

    @property
    def number(self) -> int:
        return int(self.folder.name)

    @property
    def started(self) -> dict[str, Any] | None:
        """`pid`, `born` and `time`."""
        return _read(self.folder / "started.json")

    @property
    def ended(self) -> dict[str, Any] | None:
        """`code` and `time`."""
        return _read(self.folder / "ended.json")

    @property
    def is_active(self) -> bool:
        """Queued or running, whether or not anybody looks after it."""
        if self.ended is not None:
            return False
        return self.started is None or self.process() is not None

    @property
    def is_stopping(self) -> bool:
        return (self.folder / "stop").exists()

    @property
    def log(self) -> str:
        """The end of what it said."""
        try:
            with (self.folder / "log").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_END))
                return file.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return ""

    def process(self) -> psutil.Process | None:
        """Its process, if that is still there and still itself."""
        started = self.started
        if started is None:
            return None
        try:
            process = psutil.Process(started["pid"])
            alive = abs(process.create_time() - started["born"]) < 2.0 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return None
        return process if alive else None

    def begin(self, process: subprocess.Popen[bytes]) -> None:
        """Note that it runs."""
        try:
            born = psutil.Process(process.pid).create_time()
        except psutil.NoSuchProcess:
            born = time.time()
        write_json(self.folder / "started.json", {"pid": process.pid, "born": born, "time": time.time()})

    def end(self, code: int | None) -> None:
        """Note that it has ended; None: nobody saw how, or it was taken out of the queue."""
        write_json(self.folder / "ended.json", {"code": code, "time": time.time()})


class Jobs:
    """All jobs of a workspace."""

    def __init__(self, state: Path) -> None:
        self._state, self._folder = state, state / "jobs"
        self._folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(state / "lock", timeout=30)
        """Held while a job is added, begun or taken out."""

    @property
    def workspace(self) -> Path:
        """Where jobs run."""
        return self._state.parent

    def all(self) -> list[Job]:
        """In the order in which they were asked for."""
        folders = sorted(place for place in self._folder.iterdir() if place.name.isdecimal())
        return [job for job in map(_job, folders) if job is not None]

    def of(self, run: str, kind: str) -> list[Job]:
        return [job for job in self.all() if job.run == run and job.kind == kind]

    def active(self) -> list[Job]:
        """Queued and running ones."""
        return [job for job in self.all() if job.is_active]

    def get(self, number: int) -> Job | None:
        return _job(self._folder / f"{number:06d}")

    def add(self, run: str, kind: str, arguments: list[str], files: dict[str, Any] | None = None) -> Job:
        """Put a job into the queue, and see to it that the queue is worked off.

        Args:
            run: name of the run.
            kind: `train`, `render` or `export`.
            arguments: those of `slider`; `{job}` in them is the job's folder.
            files: JSON files to put into the folder, by name.

        Raises:
            BusyError: such a job of this run is queued or runs. However many ask at once, one of them gets it.
        """
        with self.lock:
            if any(job.is_active for job in self.of(run, kind)):
                raise BusyError(f"{run}: it is {'being trained' if kind == TRAIN else 'at that'} already, or waits for it")
            number = max((job.number for job in self.all()), default=0) + 1
            folder = self._folder / f"{number:06d}"
            with folder_replacing(folder) as temporary:
                for name, value in (files or {}).items():
                    write_json(temporary / name, value)
                told = [argument.replace("{job}", str(folder)) for argument in arguments]
                write_json(temporary / "job.json", {"run": run, "kind": kind, "arguments": told, "created": time.time()})
        self.work()
        job = self.get(number)
        assert job is not None
        return job

    def stop(self, job: Job) -> None:
        """Take a queued job out; ask a running one to stop, as Ctrl-C does: a second time it stops at once."""
        with self.lock:
            if job.ended is not None:
                return
            if job.started is None:
                job.end(None)
                return
            write_atomic(job.folder / "stop", "")
            process = job.process()
            if process is not None:
                process.send_signal(signal.SIGINT)

    def work(self) -> None:
        """Start a runner; where there is one already, the new one waits for a moment and leaves."""
        subprocess.Popen(
            python("slider_plugin.ui.runner", str(self._state)), env=environment(),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            cwd=self._state.parent, start_new_session=True,
        )  # fmt: skip


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return found


def _job(folder: Path) -> Job | None:
    facts = _read(folder / "job.json")
    if facts is None:
        return None
    return Job(folder, facts["run"], facts["kind"], tuple(facts["arguments"]), facts["created"])

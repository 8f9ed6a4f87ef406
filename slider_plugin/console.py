"""What a run says: lines for people on standard error, results on standard output; a progress bar only on a terminal."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)

PROCESS = int(os.environ.get("RANK", "0"))
"""Which of the processes this is that a launcher has started."""

IS_MAIN = PROCESS == 0
"""Whether it is the one that speaks; from the others errors alone are heard."""

PLAIN_LINES = 20
"""How many progress lines a run prints where there is no terminal."""


def say(line: str) -> None:
    """One line about what goes on."""
    if IS_MAIN:
        err.print(escape(line))


def warn(line: str) -> None:
    """One line about something that may be wrong."""
    if IS_MAIN:
        err.print(f"[yellow]warning:[/] {escape(line)}")


def fail(line: str) -> None:
    """The message a command ends with."""
    err.print(f"[red]error:[/] {'' if IS_MAIN else f'process {PROCESS}: '}{escape(line)}")


class Ticker:
    """Progress through a known number of steps: a bar on a terminal, else a plain line now and then."""

    def __init__(self, total: int, done: int, progress: Progress | None, name: str) -> None:
        self._total, self._progress, self._name = total, progress, name
        self._every, self._done, self._started = max(1, total // PLAIN_LINES), done, time.perf_counter()
        self._task = progress.add_task(name, total=total, completed=done, note="") if progress else None

    def tick(self, done: int, note: str) -> None:
        """`done` of the total are done; `note` stands beside the bar."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, note=escape(note))
        elif done % self._every == 0 or done == self._total:
            say(f"{self._name} {done}/{self._total} {note}  {self._left(done)} left")

    def _left(self, done: int) -> str:
        """The time that is left at the rate so far, as the bar has it: hours, minutes, seconds."""
        seconds = round((time.perf_counter() - self._started) / max(1, done - self._done) * (self._total - done))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


@contextmanager
def ticking(name: str, total: int, done: int = 0) -> Iterator[Ticker]:
    """A ticker for the block."""
    if not err.is_terminal or not IS_MAIN:
        yield Ticker(total, done, None, name)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=err) as progress:
        yield Ticker(total, done, progress, name)

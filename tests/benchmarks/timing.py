"""What the benchmarks share: repetitions in turn, medians with their spread, and results as a table and as JSON.

Machines have other work and change their pace. What is compared is run in turn, and each repetition gives a ratio of its own.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

CPU = torch.device("cpu")
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one thing, one for each repetition."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    """Of this process, all threads: what other processes take away does not count."""

    @property
    def median(self) -> float:
        """Of the wall clock."""
        return statistics.median(self.wall)


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median and quartiles of the ratios of single repetitions."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def seconds(work: Callable[[], Any], device: torch.device = CPU) -> tuple[float, Any]:
    """How long it took by the wall clock, until the device was done, and what it gave."""
    started = time.perf_counter()
    answer = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, answer


def in_turn(
    works: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 2, device: torch.device = CPU
) -> dict[str, Times]:
    """Run each of the works once per repetition, in turn; the first repetitions are left out, as they warm up."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for repeat in range(repeats + warm_up):
        for name, work in works.items():
            cpu = time.process_time()
            wall, _ = seconds(work, device)
            if repeat >= warm_up:
                taken[name].append((wall, time.process_time() - cpu))
    return {name: Times(tuple(w for w, _ in pairs), tuple(c for _, c in pairs)) for name, pairs in taken.items()}


def ratio(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """Of two lists of seconds, repetition by repetition."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Ratio(middle, low, high)


def table(rows: Sequence[Row]) -> str:
    """Rows of one kind as a Markdown table."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([str(row.get(name, "")) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(rows: Sequence[Row], as_json: bool) -> None:
    """Print the results of one benchmark."""
    print(json.dumps(rows, indent=1) if as_json else table(rows), flush=True)

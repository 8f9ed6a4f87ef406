"""The peak memory of our step against that of a loop written by hand: same model, LoRA, samples, noise and optimizer.

    python -m tests.benchmarks.memory

Counted are the weights and the optimizer before a step, and what the processor's allocator gives out during it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .models import TINY, tiny_pipeline, write_run
from .steps import samples_of, trainer_and_twin
from .timing import Row, show

SIDE = 128
"""Of the images: activations should weigh more than the weights."""


def allocated(work: Callable[[], Any]) -> int:
    """The most bytes that the processor's allocator had given out during the work, beyond those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    assert changes, "the profiler recorded no memory"
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def held(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of a model's weights and of the optimizer's state."""

    def tensors() -> Iterator[Tensor]:
        yield from model.parameters()
        for state in optimizer.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value))

    return sum(tensor.nbytes for tensor in tensors())


def measure(family: str, root: Path) -> Row:
    trainer, bare, _ = trainer_and_twin(write_run(family, tiny_pipeline(family, root), root / f"{family}-memory", SIDE))
    steps = iter(samples_of(trainer, 2))
    trainer.optimizer_step()  # which makes the optimizer's state
    bare.step(next(steps))
    ours = held(trainer.components.denoiser, trainer.optimizer) + allocated(trainer.optimizer_step)
    theirs = held(bare.model, bare.optimizer) + allocated(lambda: bare.step(next(steps)))
    return {
        "model": f"`{family}` tiny",
        "bare, MB": round(theirs / 1e6, 1),
        "ours, MB": round(ours / 1e6, 1),
        "ratio": round(ours / theirs, 3),
    }


def rows(root: Path, families: Sequence[str] = tuple(TINY)) -> list[Row]:
    return [measure(family, root) for family in families]


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        found = rows(Path(name))
    show(found, given.json)
    return found


if __name__ == "__main__":
    main()

"""Our step against that of the published Concept Sliders' image sliders, written out: same model, LoRA, samples and noise.

    python -m tests.benchmarks.objective

The published step (rohitgandikota/sliders, trainscripts/imagesliders/train_lora-scale.py) predicts both images without the
adapter, which its loss never uses, and with it at +s and -s, and each prediction is a batch of two, without and with the
prompt, at guidance 1, where only the latter counts: 8 forwards of a sample. Ours has 2, and the same loss.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from slider_hooks import Conditioning

from .models import tiny_pipeline, write_run
from .steps import BareLoop, Sample, samples_of, trainer_and_twin, unet
from .timing import Row, in_turn, ratio, show


class Counted:
    """Counts the samples that go through a denoiser."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        self.samples = 0
        denoiser.register_forward_pre_hook(self._count)

    def _count(self, module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.samples += len(arguments[0])


def guided(model: torch.nn.Module, noisy_BCHW: Tensor, time_B: Tensor, told: Sequence[Conditioning]) -> Tensor:
    """`predict_noise` of trainscripts/imagesliders/train_util.py at guidance 1."""
    twice = unet(model, torch.cat([noisy_BCHW] * 2), torch.cat([time_B] * 2), [*told, *told])
    without_BCHW, with_BCHW = twice.chunk(2)
    return without_BCHW + 1.0 * (with_BCHW - without_BCHW)


class PublishedLoop(BareLoop):
    """The published step."""

    def step(self, samples: Sequence[Sample]) -> float:
        with torch.no_grad():
            for sample in samples:
                self.loss(Sample(0.0, sample.clean_BCHW, sample.told))
        return super().step(samples)


def rows(root: Path, repeats: int = 20) -> list[Row]:
    config = write_run("sd1", tiny_pipeline("sd1", root), root / "objective", 64)
    trainer, bare, _ = trainer_and_twin(config)
    bare.__class__, bare.forward = PublishedLoop, guided
    counts = {"ours": Counted(trainer.components.denoiser), "published": Counted(bare.model)}
    steps = iter(samples_of(trainer, repeats + 2))
    times = in_turn({"ours": trainer.optimizer_step, "published": lambda: bare.step(next(steps))}, repeats)
    return [
        {
            "model": "`sd1` tiny",
            "our forwards": counts["ours"].samples // (repeats + 2),
            "published forwards": counts["published"].samples // (repeats + 2),
            "our step, ms": round(1e3 * times["ours"].median, 1),
            "published step, ms": round(1e3 * times["published"].median, 1),
            "ratio (quartiles)": str(ratio(times["ours"].wall, times["published"].wall)),
        }
    ]


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        found = rows(Path(name), given.repeats)
    show(found, given.json)
    return found


if __name__ == "__main__":
    main()

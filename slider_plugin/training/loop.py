"""The training loop: one optimizer step is whole cycles of draws, each at its own strength.

A draw is trained with the adapter at the draw's scale until after its backward pass. The draws of one cycle share noise and
time, so that what the positive and the negative side have in common cancels in the adapter's gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slider_hooks import Components, Draw, Sampler
from slider_plugin.adapters.base import Adapter
from slider_plugin.data.encode import Batch, Encoded
from slider_plugin.errors import UserError
from slider_plugin.objectives.bucket import learning_loss, preservation_loss
from slider_plugin.training.noise import NoiseProcess
from slider_plugin.training.seeds import derived_seed, generator

if TYPE_CHECKING:
    from accelerate import Accelerator

    from slider_plugin.family import LoadedFamily


class NotFinite(UserError):
    """The loss or its gradient is not a number any more."""


@dataclass(slots=True, kw_only=True)
class Trainer:
    """All that a training step needs."""

    family: LoadedFamily
    components: Components
    adapter: Adapter
    data: Encoded
    sampler: Sampler
    noise: NoiseProcess
    accelerator: Accelerator
    optimizer: torch.optim.Optimizer
    schedule: Any
    """The learning-rate schedule."""

    seed: int
    cycle: int
    """Draws in one cycle: how many of the signs +, -, 0 there are."""

    draws_per_step: int
    """`gradient_accumulation_steps`, in whole cycles."""

    max_grad_norm: float
    bf16: bool
    """Arithmetic in bfloat16; not left to accelerate, whose precision is fixed for the life of a process."""

    step: int = 0
    """Optimizer steps done."""

    def run(self, steps: int, after: Callable[[StepReport], bool]) -> bool:
        """Train until `steps` are done, or until `after`, called with each step's report, asks to stop.

        Returns:
            Whether all steps are done.
        """
        while self.step < steps:
            report = self.optimizer_step()
            if after(report):
                return self.step >= steps
        return True

    def optimizer_step(self) -> StepReport:
        """One step of the optimizer over whole cycles. Raises NotFinite with the batch named, before any weight moves."""
        started = time.perf_counter()
        draws = [self._train_draw(next(self.sampler)) for _ in range(self.draws_per_step)]
        norm = self._clip()
        _assert_finite(draws, norm, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        learning_rate = self.schedule.get_last_lr()[0]
        self.schedule.step()
        self.step += 1
        return StepReport(self.step, draws, float(norm), learning_rate, time.perf_counter() - started)

    def _train_draw(self, draw: Draw) -> DrawReport:
        batch = self.data.batch(draw)
        torch.manual_seed(derived_seed(self.seed, "model", draw.position))  # for dropout
        with self.adapter.scaled(draw.scale):  # until after backward: checkpointing runs the forward again
            loss = self.loss(batch)
            self.accelerator.backward(loss / self.draws_per_step)
        return DrawReport(draw, loss.detach(), len(batch.files), tuple(str(f) for f in batch.files))

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a draw at the adapter's present scale, a float32 scalar."""
        cycle = batch.draw.position // self.cycle
        time_B = self.noise.draw_time(len(batch.files), generator(self.seed, "time", cycle))
        noise_BCHW = torch.randn(batch.clean_BCHW.shape, generator=generator(self.seed, "noise", cycle)).to(
            batch.clean_BCHW.device
        )
        noisy_BCHW = self.noise.add_noise(batch.clean_BCHW, noise_BCHW, time_B)

        def predict(noisy_BCHW: Tensor, time_B: Tensor) -> Tensor:
            told_B = self.noise.told(time_B).to(noisy_BCHW.device)
            with torch.autocast(noisy_BCHW.device.type, torch.bfloat16, enabled=self.bf16):
                answer_BCHW = self.family.predict(self.components, noisy_BCHW, told_B, batch.conditioning)
            return self.noise.output(answer_BCHW)

        def frozen(noisy_BCHW: Tensor, time_B: Tensor) -> Tensor:
            with self.adapter.scaled(0.0):  # not disabled: a process that skips the adapter would hang the others
                return predict(noisy_BCHW, time_B)

        if batch.draw.neutral:
            return preservation_loss(predict, frozen, noisy_BCHW, time_B)
        return learning_loss(predict, noisy_BCHW, time_B, self.noise.target(batch.clean_BCHW, noise_BCHW, time_B))

    def _clip(self) -> Tensor:
        limit = self.max_grad_norm if self.max_grad_norm > 0 else math.inf
        norm: Tensor = torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), limit)
        return norm


@dataclass(frozen=True, slots=True)
class DrawReport:
    """What one draw gave."""

    draw: Draw
    loss: Tensor
    samples: int
    files: tuple[str, ...]

    @property
    def sign(self) -> str:
        """positive, negative or neutral."""
        if self.draw.neutral:
            return "neutral"
        return "positive" if self.draw.scale > 0 else "negative"


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step gave."""

    step: int
    draws: list[DrawReport] = field(repr=False)
    grad_norm: float
    learning_rate: float
    seconds: float

    def losses(self) -> dict[str, float]:
        """Mean loss of each sign that was drawn."""
        signs: dict[str, list[float]] = {}
        for report in self.draws:
            signs.setdefault(report.sign, []).append(float(report.loss))
        return {sign: sum(values) / len(values) for sign, values in signs.items()}

    def metrics(self) -> dict[str, float]:
        """Everything, by name, for logs."""
        return {
            **{f"loss/{sign}": value for sign, value in self.losses().items()},
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            "seconds": self.seconds,
            "samples": float(sum(r.samples for r in self.draws)),
        }


def _assert_finite(draws: list[DrawReport], norm: Tensor, step: int) -> None:
    """One look at the device for the whole step."""
    if math.isfinite(float(norm)) and all(math.isfinite(float(r.loss)) for r in draws):
        return
    bad = next((r for r in draws if not math.isfinite(float(r.loss))), draws[-1])
    what = "loss" if not math.isfinite(float(bad.loss)) else "gradient"
    raise NotFinite(
        f"the {what} is not finite in optimizer step {step + 1}, bucket {bad.draw.bucket!r} at strength {bad.draw.scale:g} "
        f"({', '.join(bad.files)}). Lower learning_rate, or try mixed_precision no; the last checkpoint is unharmed"
    )

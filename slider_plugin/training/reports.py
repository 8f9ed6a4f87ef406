"""What draws and optimizer steps gave: losses by sign, norms, times."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from slider_hooks import Draw
from slider_plugin.data.drawn import ANCHOR
from slider_plugin.data.encode import Batch


@dataclass(frozen=True, slots=True)
class DrawReport:
    """What one draw gave."""

    draw: Draw
    loss: Tensor
    """Of the process's own share, until those of all are added up."""

    weight: float
    """What it is worth in the loss of the whole batch, 0 to 1."""

    samples: int
    """Of the whole batch."""

    files: tuple[str, ...]
    """Likewise."""

    @property
    def sign(self) -> str:
        """positive, negative, neutral or anchor."""
        if self.draw.bucket == ANCHOR:
            return "anchor"
        if self.draw.neutral:
            return "neutral"
        return "positive" if self.draw.scale > 0 else "negative"


def report_of(batch: Batch, loss: Tensor) -> DrawReport:
    """The report of a draw that was trained."""
    files = tuple(str(file) for file in batch.files)
    return DrawReport(batch.draw, loss.detach(), batch.part.weight, batch.part.whole, files)


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

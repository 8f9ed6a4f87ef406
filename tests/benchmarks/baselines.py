"""The published formulas written out, each as a trainer: what `quality` compares the objectives with.

Targets, rank, optimizer, learning rate, steps and samples in a step are ours, so that the formula alone differs; faults of the
published programs (one seed for all noise, a time that is not that of the latents) are left out. A neutral bucket
is left out, too: at strength 0 it has no gradient, so its share of a step goes to the signed ones.

    concept-text    L = || f_1(x_t, c_t) - (f_0(x_t, c_t) + eta (f_0(x_t, c+) - f_0(x_t, c-))) ||^2
                    +1 alone, one row of prompts a step, x_t drawn by the model at +1 with a guidance of 3 down to step k of
                    STEPS, k uniform (arXiv 2311.12092, eq. 7; rohitgandikota/sliders, trainscripts/textsliders)
    concept-image   L = || f_1(x_t, "") - target(x0, e, t) ||^2 + || f_-1(y_t, "") - target(y0, e, t) ||^2
                    matched pairs without captions, t of step k of STEPS (section 4.2; trainscripts/imagesliders)
    plain-bucket    L = || f_s(x_t, c) - target(x0, e, t) ||^2
                    each draw with noise and times of its own (SimpleTuner's sampling cycle)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from slider_hooks import Conditioning, Draw
from slider_plugin.data.encode import Batch
from slider_plugin.training.loop import Trainer
from slider_plugin.training.reports import DrawReport
from slider_plugin.training.rollout import rollout
from slider_plugin.training.seeds import generator

STEPS = 20
"""From noise to image. Published are 50; these models draw in 16, and the drawing is most of the time."""

GUIDANCE_OF_DRAWING = 3.0

KEYS: Mapping[str, Mapping[str, Any]] = {
    "concept-text": {"slider_objective": "text", "train_batch_size": 3, "signs_in_one_forward": "no"},
    "concept-image": {"slider_objective": "pair", "caption_dropout_probability": 1.0},
    "plain-bucket": {"slider_objective": "bucket"},
}
"""By baseline: what its configuration states beside the demo's recipe."""


def trainer(name: str, rows: Sequence[Mapping[str, str]], guidance: float) -> Any:
    """What makes the trainer of a baseline, in the place of `Trainer`.

    Args:
        name: one of `KEYS`.
        rows: of `concept-text`: target, positive and negative of each row. Their prompts and "" are those of the objective.
        guidance: of `concept-text`: eta.
    """
    if name == "concept-text":
        return partial(ConceptText, rows=rows, guidance=guidance)
    return {"concept-image": ConceptImage, "plain-bucket": PlainBucket}[name]


@dataclass(slots=True, kw_only=True)
class ConceptText(Trainer):
    """Concept Sliders from text."""

    rows: Sequence[Mapping[str, str]]
    guidance: float

    def _gradients(self, draws: Sequence[Draw]) -> list[DrawReport]:
        count = len(draws) * self.data.batch_size
        numbers = generator(self.seed, "concept-text", self.step)
        row = self.rows[int(torch.randint(len(self.rows), (), generator=numbers))]
        stop = int(torch.randint(1, STEPS, (), generator=numbers))
        assert self.data.blank_CHW is not None, "there are no images"
        noise_BCHW = torch.randn((count, *self.data.blank_CHW.shape), generator=numbers)
        with self.adapter.scaled(1.0):
            loss = self.formula(row, noise_BCHW, stop)
            self.accelerator.backward(loss)
        return [DrawReport(replace(draws[0], scale=1.0), loss.detach(), weight=1.0, samples=count, files=())]

    def formula(self, row: Mapping[str, str], noise_BCHW: Tensor, stop: int) -> Tensor:
        """The loss of one row at the scale 1, a scalar."""
        told = {name: self._told(text, len(noise_BCHW)) for name, text in {**row, "empty": ""}.items()}
        time_B = self.noise.at(1.0 - stop / STEPS, len(noise_BCHW))

        def guided(noisy_BCHW: Tensor, now_B: Tensor) -> Tensor:
            with_BCHW, without_BCHW = (self.predict(noisy_BCHW, now_B, told[name]) for name in ("target", "empty"))
            return without_BCHW + GUIDANCE_OF_DRAWING * (with_BCHW - without_BCHW)

        noisy_BCHW = rollout(self.noise, guided, noise_BCHW, time_B, stop)
        with torch.no_grad(), self.adapter.scaled(0.0):
            base_BCHW, more_BCHW, less_BCHW = (
                self.predict(noisy_BCHW, time_B, told[name]) for name in ("target", "positive", "negative")
            )
        wanted_BCHW = base_BCHW + self.guidance * (more_BCHW - less_BCHW)
        return (self.predict(noisy_BCHW, time_B, told["target"]) - wanted_BCHW).square().mean()

    def _told(self, prompt: str, count: int) -> Sequence[Conditioning]:
        return self.data.told([{}] * count, prompt)


class ConceptImage(Trainer):
    """Concept Sliders from pairs: our `pair` but for captions and times."""

    def _times(self, batch: Batch) -> Tensor:
        numbers = generator(self.seed, "time", batch.draw.position // self.cycle)
        stop_B = torch.randint(1, STEPS, (batch.part.whole,), generator=numbers)
        return self.noise.times(1.0 - stop_B / STEPS)


class PlainBucket(Trainer):
    """Buckets without shared noise."""

    def _noise(self, batch: Batch) -> Tensor:
        return Trainer._noise(self, self._in_a_cycle_of_its_own(batch))

    def _times(self, batch: Batch) -> Tensor:
        return Trainer._times(self, self._in_a_cycle_of_its_own(batch))

    def _in_a_cycle_of_its_own(self, batch: Batch) -> Batch:
        return replace(batch, draw=replace(batch.draw, position=batch.draw.position * self.cycle))

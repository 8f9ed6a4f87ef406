"""Text sliders: no image says what changes, but two prompts do.

Concept Sliders (arXiv 2311.12092, eq. 7) with both signs trained; c_t is the target, c+ and c- the ends of the concept, p the
attributes that are to be preserved, each put in front of both ends, eta the guidance::

    d     = mean over p of  f_0(x_t, (p, c+)) - f_0(x_t, (p, c-))
    T     = f_0(x_t, c_t) + s eta d                        at strength s, plus or minus
    T    <- T ||f_0(x_t, c_t)|| / ||T||                    where eta > 1, for each sample
    L     = || f_s(x_t, c_t) - T ||^2

With several attributes what they bring along cancels in d. The norm is the frozen answer's own, after the Flux notebook of
rohitgandikota/sliders and ai-toolkit's `norm_like`: without it a large eta trains contrast. All prompts are answered in one
forward without gradient. A share u of the strength aims at `f_0 + u (T - f_0)`.

x_t is a noised image of the buckets with a strength, at that strength, where there are any. Else the model draws it itself,
from noise to the drawn time, with the adapter at the drawn strength (`slider_plugin.training.rollout`). Neutral images are
preserved as with any objective, and so are anchors: prompts under which nothing may change (`losses.anchor_loss`).

Several sets of prompts take turns, cycle by cycle: one subject in one wording is learnt as that, and not as the concept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from slider_hooks import Ask, Objective, Question, UserError
from slider_plugin.config import TextConfig


class Text(Objective):
    """The frozen model's difference between two prompts is the direction."""

    data = "optional"

    def __init__(self, sets: Sequence[TextConfig], guidance: float = 1.0) -> None:
        """State the prompts.

        Args:
            sets: `slider_text`, at least one.
            guidance: `text_guidance`, eta.

        Raises:
            UserError: there is no set of prompts.
        """
        if not sets:
            raise UserError("slider_text: slider_objective text needs it: an object with target, positive and negative")
        self._sets, self._guidance = tuple(sets), guidance
        self.prompts = tuple(dict.fromkeys(text for one in sets for text in (one.target, *_ends(one))))
        self.anchors = tuple(dict.fromkeys(anchor for one in sets for anchor in one.anchors))

    def prompt(self, turn: int) -> str:
        return self._of(turn).target

    def asks(self, question: Question) -> Sequence[Ask]:
        ends = _ends(self._of(question.turn))
        return [question.ask, *(replace(question.ask, conditioning=question.told(prompt)) for prompt in ends)]

    def target(self, question: Question, frozen: Sequence[Tensor]) -> Tensor:
        base_BCHW, *ends = (answer_BCHW.float() for answer_BCHW in frozen)
        half = len(ends) // 2
        more_BCHW, less_BCHW = (torch.stack(side).mean(0) for side in (ends[:half], ends[half:]))
        target_BCHW = base_BCHW + question.draw.scale * self._guidance * (more_BCHW - less_BCHW)
        return norm_matched(target_BCHW, base_BCHW) if self._guidance > 1.0 else target_BCHW

    def _of(self, turn: int) -> TextConfig:
        return self._sets[turn % len(self._sets)]


def norm_matched(values_BCHW: Tensor, like_BCHW: Tensor) -> Tensor:
    """`values ||like|| / ||values||` for each sample."""
    norms = [tensor.flatten(1).norm(dim=1) for tensor in (like_BCHW, values_BCHW)]
    matched_BCHW: Tensor = values_BCHW * (norms[0] / norms[1].clamp_min(1e-12)).reshape(-1, *(1,) * (values_BCHW.ndim - 1))
    return matched_BCHW


def _ends(words: TextConfig) -> list[str]:
    """The positive prompts, then the negative ones, one of each for every attribute."""
    attributes = words.attributes or ("",)
    return [f"{attribute} {prompt}".strip() for prompt in (words.positive, words.negative) for attribute in attributes]

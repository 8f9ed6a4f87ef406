"""Matched pairs: x0 with more of the concept, y0 with less, else alike; one noise e and one time t for both.

`pair_target: noise`, the image sliders of Concept Sliders (arXiv 2311.12092, section 4.2)::

    L = || f_s(x_t) - target(x0, e, t) ||^2  +  || f_-s(y_t) - target(y0, e, t) ||^2

What the two images share cancels in the slider's gradient, since both signs see it with the same noise.

`pair_target: addift`, after ADDifT (hako-mikan/sd-webui-traintrain), which needs far fewer steps: no random noise is to be hit,
but the frozen model's own idea of it on the other image. At +s, and with x and y exchanged at -s::

    noise that f_s finds in x_t  ->  noise that f_0 finds in y_t

The noise that f_0 finds in y_t leads x_t away from y0 and beyond x0: `x_t = a x0 + b e` and `y_t = a y0 + b e`, so an answer
with the noise that was found in y_t stands for the clean image `(clean image that f_0 finds in y_t) + (x0 - y0)`. A model that
predicts noise answers with that noise itself; one that predicts v or a velocity answers with a mixture, linear in both parts::

    target = f_0(y_t) + truth(x0 - y0, 0, t)

with truth(x0, e, t) the right answer for x0 and e, so that the second term is 0 for epsilon and y0 - x0 for a flow. Without it
a flow model would be led from x0 to y0 wherever there is little noise. The whole distance between the two images is one
strength here, where `noise` has half of it on each side. Times are drawn as for everything else; the published trainer visits
five.

With `pair_mask` (a floor m from 0 to 1) the error is a weighted mean over the places of the latents::

    w = 1 where d >= 0.1 max(d), else m                    d = mean over channels of |x0 - y0|
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from slider_hooks import Ask, Objective, Question

DIFFERENT = 0.1
"""Share of a pair's largest difference from which on a place counts as different: what an autoencoder spreads lies below."""


class Pair(Objective):
    """Both images of a pair in one step, each at its side's strength."""

    data = "pairs"

    def __init__(self, target: Literal["noise", "addift"] = "noise", mask: float | None = None) -> None:
        """State the variant.

        Args:
            target: `pair_target`.
            mask: `pair_mask`, the weight of what does not differ, 0 to 1; None weighs all alike.
        """
        self._addift, self._floor = target == "addift", mask

    def asks(self, question: Question) -> Sequence[Ask]:
        if not self._addift:
            return ()
        other_BCHW = question.add_noise(_twin(question), question.noise)
        return [Ask(noisy=other_BCHW, time=question.ask.time, conditioning=question.ask.conditioning)]

    def target(self, question: Question, frozen: Sequence[Tensor]) -> Tensor:
        if not self._addift:
            return question.truth(question.clean, question.noise)
        (of_other_BCHW,) = frozen
        return of_other_BCHW.float() + question.truth(question.clean - _twin(question), torch.zeros_like(question.noise))

    def weight(self, question: Question) -> Tensor | None:
        return None if self._floor is None else difference_mask(question.clean, _twin(question), self._floor)


def difference_mask(one_BCHW: Tensor, other_BCHW: Tensor, floor: float) -> Tensor:
    """`(B, 1, H, W)`, 1 where two images differ and `floor` elsewhere; 1 everywhere if they are equal."""
    difference_B1HW = (one_BCHW - other_BCHW).abs().mean(1, keepdim=True)
    largest_B111 = difference_B1HW.flatten(1).amax(1).reshape(-1, *(1,) * (difference_B1HW.ndim - 1))
    return torch.where(difference_B1HW >= DIFFERENT * largest_B111, 1.0, floor)


def _twin(question: Question) -> Tensor:
    assert question.twin is not None, "an objective of pairs gets them"
    return question.twin

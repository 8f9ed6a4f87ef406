"""Unpaired buckets, the specification's own supervision.

For an image x0 of a bucket with strength s, noise e and time t (Concept Sliders' image sliders, arXiv 2311.12092, without
the pairing; SimpleTuner's sampling cycle)::

    L = || f_s(x_t, t, c) - target(x0, e, t) ||^2          f_s: the denoiser with the adapter at scale s

For an image of a neutral bucket nothing may change, at +s and -s in turn::

    L = || f_s(x_t, t, c) - f_0(x_t, t, c) ||^2            f_0: the frozen denoiser (scale 0), no gradient

Training a neutral image towards itself at +1 would teach it to the positive side, and at 0 it has no gradient.

Where time steps are weighed (min-SNR, arXiv 2303.09556), both losses are: they pull at the same weights at the same time, and a
weight on one alone would shift the balance between learning and preserving from one time to the next.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from slider_hooks import Objective, Question


class Bucket(Objective):
    """Each image is its own target, at its bucket's strength."""

    def target(self, question: Question, frozen: Sequence[Tensor]) -> Tensor:
        return question.truth(question.clean, question.noise)

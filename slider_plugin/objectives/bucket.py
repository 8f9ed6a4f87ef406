"""Unpaired buckets, the specification's own supervision.

For an image x0 of a bucket with strength s, noise e and time t (Concept Sliders' image sliders, arXiv 2311.12092, without
the pairing; SimpleTuner's sampling cycle)::

    L = || f_s(x_t, t, c) - target(x0, e, t) ||^2          f_s: the denoiser with the adapter at scale s

For an image of a neutral bucket nothing may change, at +s and -s in turn::

    L = || f_s(x_t, t, c) - f_0(x_t, t, c) ||^2            f_0: the frozen denoiser (scale 0), no gradient

Training a neutral image towards itself at +1 would teach it to the positive side, and at 0 it has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]
"""`(noisy_BCHW, time_B) -> prediction_BCHW` in the convention of the noise process."""


def learning_loss(predict: Predict, noisy_BCHW: Tensor, time_B: Tensor, target_BCHW: Tensor) -> Tensor:
    """Mean squared error towards the images' own target, a float32 scalar."""
    return (predict(noisy_BCHW, time_B).float() - target_BCHW.float()).square().mean()


def preservation_loss(predict: Predict, frozen: Predict, noisy_BCHW: Tensor, time_B: Tensor) -> Tensor:
    """Mean squared error towards the frozen model's prediction, a float32 scalar."""
    with torch.no_grad():
        target_BCHW = frozen(noisy_BCHW, time_B).float()
    return (predict(noisy_BCHW, time_B).float() - target_BCHW).square().mean()

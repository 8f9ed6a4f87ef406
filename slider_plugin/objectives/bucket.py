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

from torch import Tensor


def learning_loss(prediction_BCHW: Tensor, target_BCHW: Tensor, weight_B: Tensor | None = None) -> Tensor:
    """Mean squared error of `f_s` towards the images' own target, a float32 scalar; `weight_B` weighs the samples."""
    return _squared_error(prediction_BCHW, target_BCHW, weight_B)


def preservation_loss(prediction_BCHW: Tensor, frozen_BCHW: Tensor, weight_B: Tensor | None = None) -> Tensor:
    """Mean squared error of `f_s` towards `f_0`, a float32 scalar; `weight_B` weighs the samples."""
    return _squared_error(prediction_BCHW, frozen_BCHW, weight_B)


def _squared_error(answer_BCHW: Tensor, target_BCHW: Tensor, weight_B: Tensor | None) -> Tensor:
    """`mean_B(weight_B * mean_CHW((answer - target)^2))`."""
    error_BCHW = (answer_BCHW.float() - target_BCHW.float()).square()
    if weight_B is None:
        return error_BCHW.mean()
    return (weight_B.to(error_BCHW.device) * error_BCHW.flatten(1).mean(1)).mean()

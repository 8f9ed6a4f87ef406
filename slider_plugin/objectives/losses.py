"""Squared errors, and the one thing that every objective has in common: what a share of a strength is worth.

A share u of a strength s aims at the same share of the way (`share_of`)::

    target_u = f_0 + u (target - f_0)          at the scale u s

A target exists at the whole strength alone (an image, a prompt). What lies between is taken on the straight line from the
frozen answer, so that the answer is linear in the strength: `f_us = f_0 + u s D` meets every target_u if it meets target_1.
For text this is Attribute Control's `e_t + s (e_p - e_n)`, s drawn in each step (arXiv 2403.17064); for images its likeness.
"""

from __future__ import annotations

from torch import Tensor

ANCHOR_CAP = 0.01
"""How large the loss of an anchor may get, as a share of the mean square of the frozen answer: a drift of a tenth of it."""


def learning_loss(
    prediction_BCHW: Tensor, target_BCHW: Tensor, weight_B: Tensor | None = None, map_B1HW: Tensor | None = None
) -> Tensor:
    """Mean squared error of `f_s` towards its target, a float32 scalar.

    Args:
        prediction_BCHW: of the denoiser with the adapter.
        target_BCHW: what is right.
        weight_B: weighs the samples.
        map_B1HW: weighs the places of each sample, whose error is then the weighted mean over its places.
    """
    error_BCHW = (prediction_BCHW.float() - target_BCHW.float()).square()
    if map_B1HW is not None:
        map_BCHW = map_B1HW.to(error_BCHW).expand_as(error_BCHW)
        error_BCHW = error_BCHW * map_BCHW / _mean(map_BCHW)
    if weight_B is None:
        return error_BCHW.mean()
    return (weight_B.to(error_BCHW.device) * error_BCHW.flatten(1).mean(1)).mean()


def preservation_loss(prediction_BCHW: Tensor, frozen_BCHW: Tensor, weight_B: Tensor | None = None) -> Tensor:
    """Mean squared error of `f_s` towards `f_0`, a float32 scalar; `weight_B` weighs the samples."""
    return learning_loss(prediction_BCHW, frozen_BCHW, weight_B)


def anchor_loss(prediction_BCHW: Tensor, frozen_BCHW: Tensor, weight_B: Tensor | None = None) -> Tensor:
    """The same for an anchor, capped: `L min(1, cap / L)` with the second factor held fixed, `cap = 0.01 mean(f_0^2)`.

    An anchor that has drifted far would else outweigh the direction many times over (its gradient keeps its sense and loses its
    size). AkaneTendo25/musubi-tuner caps at five times the running median; this cap needs no history, so a run resumes exactly.
    """
    loss = preservation_loss(prediction_BCHW, frozen_BCHW, weight_B)
    cap = ANCHOR_CAP * frozen_BCHW.float().square().mean()
    return loss * (cap / loss.detach().clamp_min(1e-30)).clamp(max=1.0)


def share_of(frozen_BCHW: Tensor, target_BCHW: Tensor, share: float) -> Tensor:
    """`f_0 + u (target - f_0)`, in float32."""
    return frozen_BCHW.float() + share * (target_BCHW.float() - frozen_BCHW.float())


def _mean(map_BCHW: Tensor) -> Tensor:
    """Of each sample, in the shape of the batch."""
    return map_BCHW.flatten(1).mean(1).reshape(-1, *(1,) * (map_BCHW.ndim - 1))

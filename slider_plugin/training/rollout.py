"""Noisy latents that a model draws itself: from pure noise down to a time, deterministically.

At each step the answer is taken apart into the clean latents and the noise that it stands for, and these are mixed anew at the
next time: DDIM without noise of its own (arXiv 2010.02502, eq. 12). For a flow that is Euler's `x' = x + (sigma' - sigma) v`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from slider_plugin.training.noise import NoiseProcess

Predict = Callable[[Tensor, Tensor], Tensor]
"""`(noisy_BCHW, time_B) -> answer_BCHW`, in the convention of the noise process."""


def steps_to(process: NoiseProcess, time_B: Tensor, steps: int) -> int:
    """Of `steps` from pure noise to the image, those that lie before the earliest of some times; at least one.

    Several processes that draw parts of one batch take as many as the whole of it: FSDP wants the same number of forwards.
    """
    return max(1, math.ceil(steps * (1.0 - float(process.share(time_B).min()))))


@torch.no_grad()
def rollout(process: NoiseProcess, predict: Predict, noise_BCHW: Tensor, time_B: Tensor, steps: int) -> Tensor:
    """The latents that a model has drawn when it comes to `time_B`.

    Args:
        process: of the model.
        predict: the model's answer.
        noise_BCHW: standard normal, where it begins.
        time_B: where each sample ends, in the process's own unit.
        steps: from the beginning to there, at least 1.

    Returns:
        `(B, C, H, W)`, float32.
    """
    end_B = process.share(time_B)
    now_B, noisy_BCHW = process.times(torch.ones_like(end_B)), noise_BCHW
    for step in range(1, steps + 1):
        clean_BCHW, found_BCHW = process.apart(noisy_BCHW, predict(noisy_BCHW, now_B).float(), now_B)
        now_B = time_B if step == steps else process.times(1.0 - (1.0 - end_B) * step / steps)
        noisy_BCHW = process.add_noise(clean_BCHW, found_BCHW, now_B)
    return noisy_BCHW

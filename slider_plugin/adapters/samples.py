"""A strength per sample: how the scales of a batch reach the rows that a layer sees.

A layer of a denoiser sees `(B, ...)`, or `(B * n, ...)` where the model lays the frames or the tokens of all samples one behind
another, all of the first sample first. Whether a model does that is checked in `slider_plugin.training.pairing`; a number of
rows that cannot come from so many samples is found here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Scale = float | Sequence[float] | Tensor
"""One strength for all samples, or one for each: a sequence, or a tensor `(B,)`."""


class NotPerSample(Exception):
    """A layer sees rows that do not belong to one sample each, so that it cannot run each at its own strength."""


def scales_of_samples(scale: Scale) -> Tensor | None:
    """The scales `(B,)` in float32, or None where one scale is for all. Raises ValueError for any other shape."""
    if isinstance(scale, (int, float)):
        return None
    scales_B = torch.as_tensor(scale, dtype=torch.float32).detach()
    if scales_B.ndim != 1 or not len(scales_B):
        raise ValueError(f"a scale is one number, or one for each sample of the batch, not {tuple(scales_B.shape)}")
    return scales_B


def scaled_rows(values: Tensor, scales_B: Tensor, layer: str) -> Tensor:
    """Multiply the rows of each sample by its scale, in float32, and round once.

    Args:
        values: `(N, ...)`, N a whole multiple of B, the rows of the first sample first.
        scales_B: `(B,)`, float32, on the same device.
        layer: whose values they are, for messages.

    Returns:
        The same shape and dtype.

    Raises:
        NotPerSample: N is no multiple of B.
    """
    N, B = values.shape[0], len(scales_B)
    if values.ndim < 2 or N % B:
        raise NotPerSample(f"{layer} sees {N} rows for {B} samples")
    rows_N = scales_B if N == B else scales_B.repeat_interleave(N // B, output_size=N)
    return (values * rows_N.reshape(N, *(1,) * (values.ndim - 1))).to(values.dtype)

"""Latents as sequences of tokens, the way Flux and its descendants take them.

Shapes: B batch, C channels, h and w latent rows and columns (even), N = h/2 * w/2 tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def pack_2x2(latents_BChw: Tensor) -> Tensor:
    """`(B, C, h, w)` to `(B, N, 4C)`: each token is a 2x2 square, its channels outermost (diffusers pipeline_flux.py)."""
    B, C, h, w = latents_BChw.shape
    squares = latents_BChw.reshape(B, C, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(B, (h // 2) * (w // 2), C * 4)


def unpack_2x2(tokens_BND: Tensor, h: int, w: int) -> Tensor:
    """`(B, N, 4C)` back to `(B, C, h, w)`."""
    B, _, D = tokens_BND.shape
    squares = tokens_BND.reshape(B, h // 2, w // 2, D // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(B, D // 4, h, w)


def grid_ids(rows: int, columns: int, like: Tensor) -> Tensor:
    """Positions `(rows * columns, 3)` of image tokens, 0, row, column, on the device and in the dtype of `like`."""
    import torch

    ids = torch.zeros(rows, columns, 3, device=like.device, dtype=like.dtype)
    ids[..., 1] += torch.arange(rows, device=like.device, dtype=like.dtype)[:, None]
    ids[..., 2] += torch.arange(columns, device=like.device, dtype=like.dtype)[None, :]
    return ids.reshape(rows * columns, 3)

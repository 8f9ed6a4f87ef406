"""Images as vectors: the family's own latents, brought to a small grid, so that images of all sizes can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from slider_hooks import Components
from slider_plugin.data.media import pixels
from slider_plugin.loading import image_dtype
from slider_plugin.validation.samples import Picture, Sample, Sound, Video

if TYPE_CHECKING:
    from slider_plugin.family import LoadedFamily

GRID = 16
"""Places along each side of the grid, at most: a sixteenth of the side is fine enough to tell where things are."""

Array = np.ndarray


def pooled(latents: Tensor, grid: tuple[int, int]) -> Array:
    """One image's latents `(C, h, w)`, or `(C, f, h, w)` of a video whose frames are averaged, as float64 `(N,)`.

    Args:
        latents: what `encode_images` gave for it; of another rank (sound), the last axis counts as width.
        grid: (height, width) in places.
    """
    planes_CHW = _planes(latents)
    return functional.adaptive_avg_pool2d(planes_CHW, grid).flatten().double().numpy()


def grid_of(latents: Tensor) -> tuple[int, int]:
    """The grid for latents of this size: their own places where these are few."""
    height, width = _planes(latents).shape[-2:]
    return min(GRID, height), min(GRID, width)


def contrast(vectors_XN: Array, grid: tuple[int, int]) -> Array:
    """How much images differ between their places: the root mean square over channels of the deviation over places, `(X,)`."""
    places_XCL = vectors_XN.reshape(*vectors_XN.shape[:-1], -1, grid[0] * grid[1])
    contrast_X: Array = np.sqrt(places_XCL.var(-1).mean(-1))
    return contrast_X


def _planes(latents: Tensor) -> Tensor:
    """As `(C, h, w)`, float32 on the CPU."""
    values = latents.detach().float().cpu()
    if values.ndim >= 4:
        return values.flatten(1, -3).mean(1)
    return values if values.ndim == 3 else values.reshape(-1, 1, values.shape[-1])


def latents_of(family: LoadedFamily, components: Components, samples: Sequence[Sample]) -> Tensor:
    """The latents of drawn images, videos or sounds, `(B, ...)`, as those of training images are made."""
    media_B = torch.stack([_medium(sample) for sample in samples])
    if "video" in family.facts.modalities and media_B.ndim == 4:
        media_B = media_B.unsqueeze(2)
    return family.encode_images(components, media_B.to(_device(components), image_dtype(components)))


def _device(components: Components) -> torch.device:
    """Where images are encoded: the autoencoder's device, as the denoiser's blocks may wait elsewhere."""
    vae = getattr(components.pipeline, "vae", None)
    model = vae if isinstance(vae, torch.nn.Module) else components.denoiser
    return next(model.parameters()).device


def _medium(sample: Sample) -> Tensor:
    """`(3, H, W)`, `(3, F, H, W)` or `(channels, N)` in -1..1."""
    if isinstance(sample, Video):
        return torch.stack([pixels(frame.convert("RGB")) for frame in sample.frames], dim=1)
    if isinstance(sample, Sound):
        return torch.from_numpy(np.clip(sample.samples_CN, -1.0, 1.0))
    picture: Any = sample.image if isinstance(sample, Picture) else sample.still()
    return pixels(picture.convert("RGB"))

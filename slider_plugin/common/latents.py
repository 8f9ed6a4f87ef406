"""Normalisations of latents other than one scale and one shift.

Shapes: B batch, C channels, F frames, f latent frames, H and W pixels, h and w latent rows and columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def normalised_by_channel(vae: Any, frames_BCFHW: Tensor) -> Tensor:
    """The mode of a video autoencoder's posterior, `(z - latents_mean) / latents_std` by channel, `(B, C, f, h, w)`.

    The statistics are in the autoencoder's configuration (Wan, Qwen-Image: diffusers autoencoder_kl_wan.py).
    """
    from slider_plugin.loading import posterior_mode

    z_BCfhw: Tensor = posterior_mode(vae.encode(frames_BCFHW))
    statistics = vae.config.latents_mean, vae.config.latents_std
    mean, std = (z_BCfhw.new_tensor(by_channel).view(1, -1, 1, 1, 1) for by_channel in statistics)
    return (z_BCfhw - mean) / std

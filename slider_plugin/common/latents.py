"""Normalisations of latents other than one scale and one shift.

Shapes: B batch, C channels, F frames, f latent frames, H and W pixels, h and w latent rows and columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def normalised_by_channel(vae: Any, frames_BCFHW: Tensor) -> Tensor:
    """The mode of a video autoencoder's posterior, `(z - latents_mean) / latents_std` by channel, `(B, C, f, h, w)`.

    The statistics are in the autoencoder's configuration, C numbers (Wan, Qwen-Image: diffusers autoencoder_kl_wan.py) or as
    many for each latent frame, channel by channel (Cosmos 1: diffusers pipeline_cosmos_text2world.py:667-678).
    """
    from slider_plugin.loading import posterior_mode

    z_BCfhw: Tensor = posterior_mode(vae.encode(frames_BCFHW))
    channels, frames = z_BCfhw.shape[1:3]
    statistics = vae.config.latents_mean, vae.config.latents_std
    mean, std = (z_BCfhw.new_tensor(numbers).view(1, channels, -1, 1, 1)[:, :, :frames] for numbers in statistics)
    return (z_BCfhw - mean) / std


def normalised_by_buffers(vae: Any, frames_BCFHW: Tensor) -> Tensor:
    """The same for LTX's autoencoders, `(z - latents_mean) * scaling_factor / latents_std`, `(B, C, f, h, w)`.

    The statistics are buffers of the model, and not in its configuration (diffusers autoencoder_kl_ltx.py).
    """
    from slider_plugin.loading import posterior_mode

    z_BCfhw: Tensor = posterior_mode(vae.encode(frames_BCFHW))
    mean, std = (values.view(1, -1, 1, 1, 1).to(z_BCfhw) for values in (vae.latents_mean, vae.latents_std))
    normalised: Tensor = (z_BCfhw - mean) * vae.config.scaling_factor / std
    return normalised


def normalised_squares(vae: Any, images_BCHW: Tensor, epsilon: float) -> Tensor:
    """2x2 squares of the posterior's mode as channels, `(z - mean) / sqrt(variance + epsilon)` by channel, `(B, 4C, h, w)`.

    The statistics are those of the autoencoder's batch norm (Flux.2: diffusers pipeline_flux2.py:608-617).
    """
    from torch.nn.functional import pixel_unshuffle

    from slider_plugin.loading import posterior_mode

    z_BChw: Tensor = pixel_unshuffle(posterior_mode(vae.encode(images_BCHW)), 2)
    mean, variance = (values.view(1, -1, 1, 1).to(z_BChw) for values in (vae.bn.running_mean, vae.bn.running_var))
    normalised: Tensor = (z_BChw - mean) / (variance + epsilon).sqrt()
    return normalised

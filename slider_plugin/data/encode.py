"""Encode every image and every caption once, and deal them out as batches.

The families' own encoders run here and nowhere in the training step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from slider_hooks import BucketInfo, Components, Conditioning, Draw
from slider_plugin.config import RunConfig
from slider_plugin.control import SHOWN, encode_for_controlnet
from slider_plugin.data.buckets import Bucket
from slider_plugin.data.media import KINDS
from slider_plugin.errors import UserError
from slider_plugin.loading import image_dtype
from slider_plugin.training.seeds import generator
from slider_plugin.validation.samples import sampling_rate

if TYPE_CHECKING:
    from slider_plugin.family import LoadedFamily

T = TypeVar("T")

AT_ONCE = {"image": 8, "video": 1, "audio": 1}
"""Of each kind, how many are encoded in one go."""

PROMPTS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Batch:
    """What one draw trains on."""

    draw: Draw
    clean_BCHW: Tensor
    """Latents, float32 on the device."""

    conditioning: tuple[Conditioning, ...]
    """One per sample, on the device."""

    files: tuple[Path, ...]
    """For messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """All latents and prompts of a run, and how a draw becomes a batch."""

    buckets: dict[str, Bucket]
    latents: dict[tuple[str, Path], Tensor]
    """By bucket and file, `(C, H, W)` or what the family makes of its media, float32 on the CPU."""

    conditions: dict[tuple[str, Path], Conditioning]
    """By bucket and file, what the denoiser is told about the image itself, on the CPU."""

    prompts: dict[str, Conditioning]
    """By caption, on the CPU."""

    seed: int
    batch_size: int
    caption_dropout: float
    device: torch.device

    def infos(self) -> tuple[BucketInfo, ...]:
        """The buckets as the sampler sees them."""
        return tuple(bucket.info(self.batch_size) for bucket in self.buckets.values())

    def batch(self, draw: Draw) -> Batch:
        """The images and captions of a draw; the same for the same draw in any process."""
        samples = self.buckets[draw.bucket].batch(draw.epoch, draw.index, self.seed, self.batch_size)
        captions = self._with_dropout(draw, [s.caption for s in samples])
        keys = [(draw.bucket, s.item.path) for s in samples]
        clean_BCHW = torch.stack([self.latents[key] for key in keys]).to(self.device)
        told = [{**self.prompts[caption], **self.conditions[key]} for caption, key in zip(captions, keys, strict=True)]
        return Batch(draw, clean_BCHW, tuple(_to(c, self.device) for c in told), tuple(path for _, path in keys))

    def _with_dropout(self, draw: Draw, captions: list[str]) -> list[str]:
        if not self.caption_dropout:
            return captions
        lots = torch.rand(len(captions), generator=generator(self.seed, "caption", draw.position)).tolist()
        return ["" if lot < self.caption_dropout else caption for lot, caption in zip(lots, captions, strict=True)]


def encode_once(
    family: LoadedFamily, components: Components, buckets: Sequence[Bucket], config: RunConfig, device: torch.device
) -> Encoded:
    """Encode all images and captions of the buckets.

    Args:
        family: whose hooks `encode_images`, `condition_on_images` and `encode_prompts` are called.
        components: the loaded model, on its device.
        buckets: the opened buckets.
        config: the `RunConfig`.
        device: where batches will go.

    Raises:
        UserError: an image cannot be decoded after all, or an encoder gave values that are not finite.
    """
    captions = {c: None for bucket in buckets for item in bucket.items for c in item.captions}
    if config.caption_dropout_probability:
        captions[""] = None
    with torch.no_grad():
        encoded = {
            key: (z, told) for key, z, told in _encode_images(family, components, buckets, config.max_image_pixels, device)
        }
        return Encoded(
            buckets={bucket.name: bucket for bucket in buckets},
            latents={key: latents for key, (latents, _) in encoded.items()},
            conditions={key: told for key, (_, told) in encoded.items()},
            prompts=dict(_encode_prompts(family, components, list(captions))),
            seed=config.seed,
            batch_size=config.train_batch_size,
            caption_dropout=config.caption_dropout_probability,
            device=device,
        )


def _encode_images(
    family: LoadedFamily, components: Components, buckets: Sequence[Bucket], max_pixels: int, device: torch.device
) -> Iterator[tuple[tuple[str, Path], Tensor, Conditioning]]:
    dtype, frames = image_dtype(components), "video" in family.facts.modalities
    for bucket in buckets:
        kind = KINDS[bucket.config.dataset_type]
        rate = sampling_rate(components.pipeline) if bucket.config.dataset_type == "audio" else 0
        for places in bucket.shapes().values():
            for chunk in _chunks(places, AT_ONCE[bucket.config.dataset_type]):
                items = [bucket.items[i] for i in chunk]
                loaded = [kind.load(item.path, bucket.config, item.placement, max_pixels, rate) for item in items]
                media_B = torch.stack(loaded).to(device, dtype)
                if frames and media_B.ndim == 4:
                    media_B = media_B.unsqueeze(2)  # an image is a video of one frame
                latents_B = family.encode_images(components, media_B).float().cpu()
                told_B = family.condition_on_images(components, media_B)
                if components.control is not None:
                    twins = [kind.load(i.conditioning or i.path, bucket.config, i.placement, max_pixels, rate) for i in items]
                    shown_B = encode_for_controlnet(family, components, torch.stack(twins).to(device, dtype))
                    told_B = [{**told, SHOWN: shown} for told, shown in zip(told_B, shown_B, strict=True)]
                for item, latents, told in zip(items, latents_B, told_B, strict=True):
                    if not torch.isfinite(latents).all():
                        raise UserError(f"{item.path}: its latents are not finite; try mixed_precision no")
                    yield (bucket.name, item.path), latents.clone(), _kept(told)


def _encode_prompts(
    family: LoadedFamily, components: Components, captions: Sequence[str]
) -> Iterator[tuple[str, Conditioning]]:
    for chunk in _chunks(captions, PROMPTS_AT_ONCE):
        for caption, conditioning in zip(chunk, family.encode_prompts(components, chunk), strict=True):
            yield caption, _kept(conditioning)


def _kept(conditioning: Conditioning) -> Conditioning:
    return {name: tensor.detach().cpu().clone() for name, tensor in conditioning.items()}


def _to(conditioning: Conditioning, device: torch.device) -> Conditioning:
    return {name: tensor.to(device) for name, tensor in conditioning.items()}


def _chunks(values: Sequence[T], size: int) -> Iterable[Sequence[T]]:
    return (values[i : i + size] for i in range(0, len(values), size))

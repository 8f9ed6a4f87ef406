"""Kinds of training data: how their files are found, measured and read into tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slider_plugin.config import BucketConfig
from slider_plugin.data import audio, images, video
from slider_plugin.data.geometry import Placement, Size, excluded, place, placement

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Found:
    """One file as it will be trained, or why it is left out."""

    size: Size = (0, 0)
    """(width, height) in pixels, upright; (milliseconds, 1) for a sound."""

    placement: Placement | None = None
    left_out: str = ""


@dataclass(frozen=True, slots=True)
class Kind:
    """What `dataset_type` names."""

    noun: str
    suffixes: frozenset[str]
    find: Callable[[Path], list[Path]]
    look: Callable[[Path, BucketConfig, int, int, int, str], Found]
    """(path, bucket, max_pixels, alignment, seed, name): reads headers where that is enough."""

    load: Callable[[Path, BucketConfig, Placement, int, int], Tensor]
    """(path, bucket, placement, max_pixels, sampling rate) to float32 in -1..1: image `(3, H, W)`, video `(3, F, H, W)`,
    sound `(2, N)`."""


def problems_of(bucket: BucketConfig) -> list[str]:
    """What is wrong with a bucket's keys for its kind of data."""
    needs = {"video": "num_frames", "audio": "seconds"}.get(bucket.dataset_type)
    found = [f"dataset_type {bucket.dataset_type} needs {needs}: add it"] if needs and getattr(bucket, needs) is None else []
    foreign = {"num_frames": "video", "fps": "video", "seconds": "audio"}
    found += [
        f"{key} belongs to dataset_type {kind}: take it out, or set dataset_type"
        for key, kind in foreign.items()
        if getattr(bucket, key) is not None and bucket.dataset_type != kind
    ]
    return found


# --- Images -----------------------------------------------------------------------------------------------------------


def _look_at_image(path: Path, bucket: BucketConfig, max_pixels: int, alignment: int, seed: int, name: str) -> Found:
    return _sized(images.check_image(path, max_pixels), bucket, alignment, seed, name)


def _sized(size: Size, bucket: BucketConfig, alignment: int, seed: int, name: str) -> Found:
    if reason := excluded(*size, bucket):
        return Found(left_out=reason)
    return Found(size, placement(*size, bucket, alignment, seed, name))


def _load_image(path: Path, bucket: BucketConfig, where: Placement, max_pixels: int, rate: int) -> Tensor:
    return pixels(place(images.load_image(path, max_pixels), where))


def pixels(image: object) -> Tensor:
    """An RGB image as `(3, H, W)` float32 in -1..1."""
    import torch

    array_HWC = np.asarray(image, dtype=np.float32) / 127.5 - 1.0
    return torch.from_numpy(array_HWC).permute(2, 0, 1).contiguous()


# --- Videos -----------------------------------------------------------------------------------------------------------


def _clip(bucket: BucketConfig) -> video.Clip:
    return video.Clip(bucket.num_frames or 1, bucket.fps)


def _look_at_video(path: Path, bucket: BucketConfig, max_pixels: int, alignment: int, seed: int, name: str) -> Found:
    found = video.check_video(path, max_pixels)
    if found.frames < video.frames_needed(found, _clip(bucket)):
        rate = f" at {bucket.fps:g} fps" if bucket.fps else ""
        return Found(left_out=f"shorter than num_frames {bucket.num_frames}{rate}")
    return _sized((found.width, found.height), bucket, alignment, seed, name)


def _load_video(path: Path, bucket: BucketConfig, where: Placement, max_pixels: int, rate: int) -> Tensor:
    import torch

    return torch.stack([pixels(place(f, where)) for f in video.load_clip(path, _clip(bucket), max_pixels)], dim=1)


# --- Sounds -----------------------------------------------------------------------------------------------------------


def _look_at_sound(path: Path, bucket: BucketConfig, max_pixels: int, alignment: int, seed: int, name: str) -> Found:
    length, wanted = audio.seconds_of(path), bucket.seconds or 0.0
    if length < wanted:
        return Found(left_out=f"shorter than {wanted:g} seconds")
    whole, cut = (round(length * 1000), 1), (round(wanted * 1000), 1)
    return Found(whole, Placement(source=whole, resize_to=whole, offset=((whole[0] - cut[0]) // 2, 0), target=cut))


def _load_sound(path: Path, bucket: BucketConfig, where: Placement, max_pixels: int, rate: int) -> Tensor:
    import torch

    return torch.from_numpy(audio.load_sound(path, bucket.seconds or 0.0, rate))


KINDS: Mapping[str, Kind] = {
    "image": Kind("images", images.SUFFIXES, images.find_images, _look_at_image, _load_image),
    "video": Kind("videos", video.SUFFIXES, video.find_videos, _look_at_video, _load_video),
    "audio": Kind("sounds", audio.SUFFIXES, audio.find_sounds, _look_at_sound, _load_sound),
}

"""Conditioning images: for each training image one by the same name in another folder, of the same size, for a ControlNet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slider_plugin.config import BucketConfig
from slider_plugin.data.geometry import Size
from slider_plugin.data.images import check_image, find_images
from slider_plugin.errors import UserError


class UnpairedError(UserError):
    """An image has no conditioning image, or one that does not fit. The message is one line: the file and what is wrong."""


def conditioning_problems(bucket: BucketConfig) -> list[str]:
    """What is wrong with a bucket as a whole in a run with a ControlNet."""
    folder = bucket.conditioning_data_dir
    if bucket.dataset_type != "image":
        return [f"dataset_type {bucket.dataset_type}: a ControlNet is shown images; take controlnet out, or train on images"]
    if folder is None:
        return ["conditioning_data_dir is needed, since a ControlNet takes part: a folder of images by the same names"]
    if not folder.is_dir():
        return [
            f"conditioning_data_dir {folder} {'is not a folder' if folder.exists() else 'does not exist'}: correct the path"
        ]
    if folder.resolve() == bucket.instance_data_dir.resolve():
        return ["conditioning_data_dir is instance_data_dir: it must hold what the ControlNet is shown, such as outlines"]
    return []


class Twins:
    """The conditioning images of a bucket, by relative name without suffix: `a/cat.png` belongs to `a/cat.jpg`."""

    def __init__(self, bucket: BucketConfig) -> None:
        self._images = bucket.instance_data_dir
        self._folder = bucket.conditioning_data_dir or Path()
        self._files: dict[str, list[Path]] = {}
        for path in find_images(self._folder):
            self._files.setdefault(_stem(path, self._folder), []).append(path)

    def of(self, path: Path, size: Size, max_pixels: int) -> Path:
        """The conditioning image of a training image of this upright size. Raises UnpairedError, or ImageError if damaged."""
        found = self._files.get(_stem(path, self._images), [])
        if not found:
            raise UnpairedError(f"{path} has no conditioning image: {self._folder} needs {_stem(path, self._images)}.png")
        if len(found) > 1:
            raise UnpairedError(f"{path} has {len(found)} conditioning images ({found[0].name}, {found[1].name}): keep one")
        own = check_image(found[0], max_pixels)
        if own != size:
            raise UnpairedError(
                f"{found[0]} is {own[0]}x{own[1]}, and its image {path.name} is {size[0]}x{size[1]}: make it so"
            )
        return found[0]


def _stem(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def first_conditioning_image(buckets: Sequence[BucketConfig]) -> Path | None:
    """What a ControlNet is shown in validation where no image is named: the first one of the first bucket; None for none."""
    folders = [b.conditioning_data_dir for b in buckets if b.conditioning_data_dir is not None and not b.disabled]
    return next((images[0] for folder in folders if (images := find_images(folder))), None)

"""From the size of an image to the size it is trained at: pure arithmetic, no files.

An image is never distorted: it is resized with its own aspect until it covers the target, and the rest is cropped. Sizes
are compared as edges in pixels: the shorter edge (`pixel`), or the edge of a square of the same area (`area`, in
megapixels, and `pixel_area`).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from PIL import Image

from slider_plugin.config import BucketConfig

Size = tuple[int, int]
"""(width, height) in pixels."""

LONGEST = 20.0
"""Images whose sides differ by a larger factor are left out unless they are cropped square: a panorama of 20000x100 would
become a training image of a hundred thousand pixels' width."""

MEGAPIXELS = 20.0
"""A resolution in megapixels beyond this is an edge length with the wrong unit."""

_TOLERANCE = 1e-9  # sizes in megapixels are decimal fractions: 1.048576 must mean 1024 x 1024


@dataclass(frozen=True, slots=True)
class Placement:
    """How an image becomes a training image: `source` is resized to `resize_to`, then `target` is cut out at `offset`."""

    source: Size
    resize_to: Size
    offset: tuple[int, int]
    target: Size


def placement(width: int, height: int, bucket: BucketConfig, alignment: int, seed: int = 0, name: str = "") -> Placement:
    """Where an image of `width` x `height` goes. A random crop is decided by (seed, name), as latents are encoded once."""
    target = _target(width, height, bucket, alignment)
    scale = max(_cover(width, height, target), _downsampling(width, height, bucket))
    resized = (max(target[0], round(width * scale)), max(target[1], round(height * scale)))
    spare = (resized[0] - target[0], resized[1] - target[1])
    style = bucket.crop_style if bucket.crop else "center"
    return Placement(source=(width, height), resize_to=resized, offset=_offset(spare, style, seed, name), target=target)


def place(image: Image.Image, where: Placement) -> Image.Image:
    """The training image: LANCZOS where it shrinks, BICUBIC where it grows."""
    if image.size != where.source:
        raise ValueError(
            f"the image is {image.size[0]}x{image.size[1]}, but {where.source[0]}x{where.source[1]} was measured before"
        )
    # One pass that computes only what is kept equals resizing and then cropping, and its memory is that of the target.
    factors = [source / resized for source, resized in zip(where.source, where.resize_to, strict=True)]
    upper_left = [offset * factor for offset, factor in zip(where.offset, factors, strict=True)]
    ends = [(o + t) * f for o, t, f in zip(where.offset, where.target, factors, strict=True)]
    box = (*upper_left, *(min(end, float(limit)) for end, limit in zip(ends, where.source, strict=True)))
    shrinks = where.resize_to[0] < where.source[0]
    resample = Image.Resampling.LANCZOS if shrinks else Image.Resampling.BICUBIC
    return image.resize(where.target, resample, box=(box[0], box[1], box[2], box[3]))


def excluded(width: int, height: int, bucket: BucketConfig) -> str | None:
    """Why an image of this size is left out of the bucket, or None. The same words for every image, so they can be counted."""
    edge, smallest, aspect = _edge_of(width, height, bucket), bucket.minimum_image_size, width / height
    if smallest is not None and edge < _edge(smallest, bucket) * (1 - _TOLERANCE):
        return f"smaller than minimum_image_size {smallest:g} ({bucket.resolution_type})"
    if bucket.minimum_aspect_ratio is not None and aspect < bucket.minimum_aspect_ratio:
        return f"narrower than minimum_aspect_ratio {bucket.minimum_aspect_ratio:g}"
    if bucket.maximum_aspect_ratio is not None and aspect > bucket.maximum_aspect_ratio:
        return f"wider than maximum_aspect_ratio {bucket.maximum_aspect_ratio:g}"
    if not _square(bucket) and max(aspect, 1 / aspect) > LONGEST:
        return f"longer than {LONGEST:g}:1"
    return None


def geometry_problems(bucket: BucketConfig, alignment: int) -> list[str]:
    """What is wrong with a bucket's size keys, whatever its images are."""
    largest, down = bucket.maximum_image_size, bucket.target_downsample_size
    narrow, wide = bucket.minimum_aspect_ratio, bucket.maximum_aspect_ratio
    problems = _resolution_problems(bucket, alignment)
    if (largest is None) != (down is None):
        there, missing = ("maximum_image_size", "target_downsample_size")[:: 1 if down is None else -1]
        problems.append(f"{there} needs {missing}: set both, or neither")
    if largest is not None and down is not None and down > largest:
        problems.append(f"target_downsample_size {down:g} is above maximum_image_size {largest:g}: make it smaller")
    if narrow is not None and wide is not None and narrow > wide:
        problems.append(f"minimum_aspect_ratio {narrow:g} is above maximum_aspect_ratio {wide:g}: no image fits")
    return problems


def _resolution_problems(bucket: BucketConfig, alignment: int) -> list[str]:
    stated = f"resolution {bucket.resolution:g} with resolution_type {bucket.resolution_type}"
    if bucket.resolution_type == "area" and bucket.resolution > MEGAPIXELS:
        return [f"{stated} means {bucket.resolution:g} megapixels; for an edge in pixels use pixel_area or pixel"]
    edge = _edge(bucket.resolution, bucket)
    if edge >= alignment * (1 - _TOLERANCE):
        return []
    return [f"{stated} is an edge of {edge:g} pixels, less than aspect_bucket_alignment {alignment}: raise it"]


def _edge(value: float, bucket: BucketConfig) -> float:
    """A size in the bucket's unit as an edge in pixels."""
    return 1000.0 * math.sqrt(value) if bucket.resolution_type == "area" else value


def _edge_of(width: int, height: int, bucket: BucketConfig) -> float:
    return float(min(width, height)) if bucket.resolution_type == "pixel" else math.sqrt(width * height)


def _square(bucket: BucketConfig) -> bool:
    return bucket.crop and bucket.crop_aspect == "square"


def _target(width: int, height: int, bucket: BucketConfig, alignment: int) -> Size:
    edge = _edge(bucket.resolution, bucket)
    if _square(bucket):
        return _aligned(edge, alignment), _aligned(edge, alignment)
    scale = edge / _edge_of(width, height, bucket)
    return _aligned(width * scale, alignment), _aligned(height * scale, alignment)


def _aligned(length: float, alignment: int) -> int:
    return max(1, math.floor(length / alignment + 0.5)) * alignment


def _cover(width: int, height: int, target: Size) -> float:
    return max(target[0] / width, target[1] / height)


def _downsampling(width: int, height: int, bucket: BucketConfig) -> float:
    """The scale at which a large image is cropped; 0 where the crop is to show as much of the image as it can."""
    if not bucket.crop or bucket.maximum_image_size is None or bucket.target_downsample_size is None:
        return 0.0
    edge = _edge_of(width, height, bucket)
    large = edge > _edge(bucket.maximum_image_size, bucket) * (1 + _TOLERANCE)
    return _edge(bucket.target_downsample_size, bucket) / edge if large else 0.0


def _offset(spare: tuple[int, int], style: str, seed: int, name: str) -> tuple[int, int]:
    if style == "corner":
        return 0, 0
    if style != "random":
        return spare[0] // 2, spare[1] // 2
    digest = hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest()
    numbers = (int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big"))
    return numbers[0] * (spare[0] + 1) >> 64, numbers[1] * (spare[1] + 1) >> 64

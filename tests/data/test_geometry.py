"""Sizes: known answers for every key, and properties that hold for all images."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from slider_plugin.config import BucketConfig
from slider_plugin.data.geometry import Placement, excluded, geometry_problems, place, placement


def bucket(**keys: Any) -> BucketConfig:
    return BucketConfig(id="b", instance_data_dir=Path("images"), **keys)


def pixel(resolution: float, **keys: Any) -> BucketConfig:
    return bucket(resolution=resolution, resolution_type="pixel", **keys)


TARGETS: list[tuple[dict[str, Any], tuple[int, int], int, tuple[int, int]]] = [
    # pixel: the shorter edge
    ({"resolution": 512, "resolution_type": "pixel"}, (1000, 500), 64, (1024, 512)),
    ({"resolution": 512, "resolution_type": "pixel"}, (600, 1000), 64, (512, 832)),  # 853.3
    ({"resolution": 500, "resolution_type": "pixel"}, (600, 600), 64, (512, 512)),
    # pixel_area: the edge of a square of the same area
    ({"resolution": 1024, "resolution_type": "pixel_area"}, (3000, 3000), 64, (1024, 1024)),
    ({"resolution": 1024, "resolution_type": "pixel_area"}, (4000, 3000), 64, (1152, 896)),  # 1182.4 x 886.8
    ({"resolution": 1024, "resolution_type": "pixel_area"}, (900, 1600), 64, (768, 1344)),  # 768 x 1365.3
    ({"resolution": 512, "resolution_type": "pixel_area"}, (400, 300), 8, (592, 440)),  # 591.2 x 443.4, grown
    # area: megapixels
    ({"resolution": 1.048576, "resolution_type": "area"}, (4000, 3000), 64, (1152, 896)),
    ({"resolution": 0.25, "resolution_type": "area"}, (800, 800), 10, (500, 500)),
    # crops
    ({"resolution": 512, "resolution_type": "pixel", "crop": True}, (2000, 700), 64, (512, 512)),
    ({"resolution": 1.0, "resolution_type": "area", "crop": True}, (2000, 700), 64, (1024, 1024)),  # 1000 is nearest to 1024
    ({"resolution": 600, "crop": True}, (2000, 700), 8, (600, 600)),
    ({"resolution": 512, "resolution_type": "pixel", "crop": True, "crop_aspect": "preserve"}, (1000, 500), 64, (1024, 512)),
]


@pytest.mark.parametrize(("keys", "size", "alignment", "target"), TARGETS)
def test_targets(keys: dict[str, Any], size: tuple[int, int], alignment: int, target: tuple[int, int]) -> None:
    assert placement(*size, bucket(**keys), alignment).target == target


def test_a_side_is_never_shorter_than_the_alignment() -> None:
    assert placement(400, 100, bucket(resolution=64), 64).target == (128, 64)


def test_the_image_covers_the_target_and_little_is_lost() -> None:
    where = placement(4000, 3000, bucket(resolution=1024), 64)
    assert where == Placement(source=(4000, 3000), resize_to=(1195, 896), offset=(21, 0), target=(1152, 896))


def random_cases(count: int = 300) -> list[tuple[int, int, BucketConfig, int]]:
    numbers = random.Random(1)
    cases = []
    for _ in range(count):
        kind = numbers.choice(["pixel", "area", "pixel_area"])
        edge = numbers.choice([256, 512, 777, 1024])
        limits = (1.5, 1.1) if kind == "area" else (1200, 1100)
        keys = {
            "resolution": edge**2 / 1e6 if kind == "area" else edge,
            "resolution_type": kind,
            "crop": numbers.random() < 0.5,
            "crop_aspect": numbers.choice(["square", "preserve"]),
            "crop_style": numbers.choice(["random", "center", "centre", "corner"]),
            **numbers.choice([{}, {"maximum_image_size": limits[0], "target_downsample_size": limits[1]}]),
        }
        cases.append((numbers.randint(60, 3000), numbers.randint(160, 3000), bucket(**keys), numbers.choice([1, 8, 16, 64])))
    return cases


@pytest.mark.parametrize(("width", "height", "keys", "alignment"), random_cases())
def test_what_holds_for_every_image(width: int, height: int, keys: BucketConfig, alignment: int) -> None:
    where = placement(width, height, keys, alignment, seed=3, name="x.png")
    (tw, th), (rw, rh), (left, top) = where.target, where.resize_to, where.offset
    assert tw % alignment == th % alignment == 0 and min(tw, th) > 0
    assert 0 <= left <= rw - tw and 0 <= top <= rh - th
    # Not distorted: one scale gives both sides, each rounded to a pixel.
    assert max((rw - 0.5) / width, (rh - 0.5) / height) <= min((rw + 0.5) / width, (rh + 0.5) / height)
    if not keys.maximum_image_size:
        assert rw == tw or rh == th  # nothing is cropped on one side
    if not keys.crop or keys.crop_aspect == "preserve":
        edge = 1000 * keys.resolution**0.5 if keys.resolution_type == "area" else keys.resolution
        own = min(width, height) if keys.resolution_type == "pixel" else (width * height) ** 0.5
        for side, source in ((tw, width), (th, height)):
            assert abs(side - source * edge / own) <= alignment / 2 or side == alignment


# --- Where the crop is ------------------------------------------------------------------------------------------------


def offset(style: str, seed: int = 0, name: str = "") -> tuple[int, int]:
    return placement(1000, 500, pixel(500, crop=True, crop_style=style), 100, seed, name).offset


def test_crop_styles() -> None:
    assert offset("center") == offset("centre") == (250, 0)
    assert offset("corner") == (0, 0)


def test_a_random_crop_depends_on_seed_and_name_alone() -> None:
    assert offset("random", 1, "a.png") == offset("random", 1, "a.png")
    assert len({offset("random", seed, "a.png") for seed in range(20)}) > 10
    assert len({offset("random", 1, f"{name}.png") for name in range(20)}) > 10


def test_random_crops_reach_every_place() -> None:
    keys = pixel(8, crop=True)
    lefts = [placement(12, 8, keys, 8, 0, str(name)).offset[0] for name in range(2000)]
    counts = [lefts.count(left) for left in range(5)]
    assert sum(counts) == 2000 and min(counts) > 300


def test_a_random_crop_does_not_depend_on_hash_randomisation() -> None:
    code = (
        "from pathlib import Path; from slider_plugin.config import BucketConfig;"
        "from slider_plugin.data.geometry import placement;"
        "b = BucketConfig(id='b', instance_data_dir=Path('x'), crop=True, resolution=512);"
        "print(placement(3000, 512, b, 64, 7, 'a.png').offset)"
    )
    answers = set()
    for hash_seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        answers.add(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout)
    assert len(answers) == 1


def test_without_crop_the_style_is_ignored() -> None:
    assert placement(4000, 3000, bucket(resolution=1024, crop_style="corner"), 64).offset == (21, 0)


# --- Sizes that are limited -------------------------------------------------------------------------------------------

DOWNSAMPLED: dict[str, Any] = {"crop": True, "crop_style": "center", "maximum_image_size": 1000, "target_downsample_size": 800}


def test_a_large_image_is_downsampled_and_then_cropped() -> None:
    where = placement(3000, 2000, pixel(512, **DOWNSAMPLED), 64)
    assert where == Placement(source=(3000, 2000), resize_to=(1200, 800), offset=(344, 144), target=(512, 512))


def test_an_image_of_the_maximum_size_is_not_large() -> None:
    assert placement(1500, 1000, pixel(512, **DOWNSAMPLED), 64).resize_to == (768, 512)


def test_a_downsample_size_below_the_resolution_still_covers() -> None:
    assert placement(3000, 2000, pixel(896, **DOWNSAMPLED), 64).resize_to == (1344, 896)


def test_the_unit_of_the_limits_is_that_of_the_resolution() -> None:
    area = bucket(resolution=0.25, resolution_type="area", crop=True, maximum_image_size=1.0, target_downsample_size=0.64)
    assert placement(2000, 2000, area, 50).resize_to == (800, 800)
    edge = bucket(resolution=500, crop=True, maximum_image_size=1000, target_downsample_size=800)
    assert placement(2000, 2000, edge, 50).resize_to == (800, 800)


def test_without_crop_the_downsample_size_changes_nothing() -> None:
    limited = pixel(512, maximum_image_size=1000, target_downsample_size=800)
    assert placement(3000, 2000, limited, 64) == placement(3000, 2000, pixel(512), 64)


EXCLUDED: list[tuple[dict[str, Any], tuple[int, int], str | None]] = [
    ({}, (10, 10), None),
    ({"resolution_type": "pixel", "minimum_image_size": 512}, (512, 2000), None),
    ({"resolution_type": "pixel", "minimum_image_size": 512}, (511, 2000), "smaller than minimum_image_size 512 (pixel)"),
    ({"resolution_type": "pixel_area", "minimum_image_size": 512}, (256, 1024), None),
    (
        {"resolution_type": "pixel_area", "minimum_image_size": 512},
        (255, 1024),
        "smaller than minimum_image_size 512 (pixel_area)",
    ),
    ({"resolution_type": "area", "minimum_image_size": 1.048576}, (1024, 1024), None),
    (
        {"resolution_type": "area", "minimum_image_size": 1.048576},
        (1024, 1023),
        "smaller than minimum_image_size 1.04858 (area)",
    ),
    ({"minimum_aspect_ratio": 0.5}, (500, 1000), None),
    ({"minimum_aspect_ratio": 0.5}, (499, 1000), "narrower than minimum_aspect_ratio 0.5"),
    ({"maximum_aspect_ratio": 2}, (1000, 500), None),
    ({"maximum_aspect_ratio": 2}, (1001, 500), "wider than maximum_aspect_ratio 2"),
    ({}, (2000, 100), None),
    ({}, (2001, 100), "longer than 20:1"),
    ({}, (100, 2001), "longer than 20:1"),
    ({"crop": True}, (2001, 100), None),
    ({"crop": True, "crop_aspect": "preserve"}, (2001, 100), "longer than 20:1"),
]


@pytest.mark.parametrize(("keys", "size", "reason"), EXCLUDED)
def test_excluded(keys: dict[str, Any], size: tuple[int, int], reason: str | None) -> None:
    assert excluded(*size, bucket(**keys)) == reason


PROBLEMS: list[tuple[dict[str, Any], str]] = [
    (
        {"resolution": 32},
        "resolution 32 with resolution_type pixel_area is an edge of 32 pixels, less than aspect_bucket_alignment 64",
    ),
    ({"resolution": 1}, "less than aspect_bucket_alignment 64"),
    ({"resolution": 1024, "resolution_type": "area"}, "means 1024 megapixels; for an edge in pixels use pixel_area"),
    ({"maximum_image_size": 2048}, "maximum_image_size needs target_downsample_size: set both, or neither"),
    ({"target_downsample_size": 2048}, "target_downsample_size needs maximum_image_size: set both, or neither"),
    (
        {"maximum_image_size": 1024, "target_downsample_size": 2048},
        "target_downsample_size 2048 is above maximum_image_size 1024",
    ),
    ({"minimum_aspect_ratio": 2, "maximum_aspect_ratio": 1}, "minimum_aspect_ratio 2 is above maximum_aspect_ratio 1"),
]


@pytest.mark.parametrize(("keys", "problem"), PROBLEMS)
def test_problems(keys: dict[str, Any], problem: str) -> None:
    found = geometry_problems(bucket(**keys), 64)
    assert len(found) == 1 and problem in found[0]


def test_no_problems() -> None:
    assert geometry_problems(bucket(resolution=64), 64) == []
    assert geometry_problems(bucket(resolution=0.004096, resolution_type="area"), 64) == []
    assert geometry_problems(bucket(maximum_image_size=2048, target_downsample_size=1024), 64) == []


# --- Pixels -----------------------------------------------------------------------------------------------------------


def photo(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("size", "resample"),
    [((300, 200), Image.Resampling.LANCZOS), ((90, 61), Image.Resampling.BICUBIC)],
    ids=["shrinks", "grows"],
)
def test_place_equals_resizing_and_then_cropping(size: tuple[int, int], resample: Image.Resampling) -> None:
    image = photo(*size)
    where = placement(*size, pixel(128, crop=True), 64, seed=1, name="a.png")
    left, top = where.offset
    expected = image.resize(where.resize_to, resample).crop((left, top, left + 128, top + 128))
    placed = place(image, where)
    assert placed.size == (128, 128)
    assert np.abs(np.asarray(placed).astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_an_image_that_fits_is_not_touched() -> None:
    image = photo(128, 64)
    assert place(image, placement(128, 64, pixel(64), 64)).tobytes() == image.tobytes()
    cropped = place(image, placement(128, 64, pixel(64, crop=True, crop_style="center"), 64))
    assert cropped.tobytes() == image.crop((32, 0, 96, 64)).tobytes()


def test_a_circle_stays_round() -> None:
    y, x = np.mgrid[0:300, 0:500]
    disc = Image.fromarray((((x - 250) ** 2 + (y - 150) ** 2 < 100**2) * 255).astype(np.uint8)).convert("RGB")
    inside = np.asarray(place(disc, placement(500, 300, bucket(resolution=128), 64)))[..., 0] > 127
    assert abs(int(inside.any(axis=0).sum()) - int(inside.any(axis=1).sum())) <= 1


def test_a_panorama_costs_the_memory_of_its_target() -> None:
    image = Image.new("RGB", (30_000, 2), (10, 20, 30))
    where = placement(30_000, 2, pixel(1024, crop=True), 64)
    assert where.resize_to == (15_360_000, 1024)
    assert place(image, where).size == (1024, 1024)


def test_another_image_than_the_measured_one_is_refused() -> None:
    with pytest.raises(ValueError, match="the image is 64x128, but 128x64 was measured before"):
        place(photo(64, 128), placement(128, 64, pixel(64), 64))

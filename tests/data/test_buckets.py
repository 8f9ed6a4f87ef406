"""Real folders become buckets: what they hold, how they are dealt out, and every fault and warning in words."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import ExifTags, Image

from slider_hooks import BucketInfo
from slider_plugin.config import BucketConfig, RunConfig
from slider_plugin.data.buckets import Bucket, Buckets, open_buckets
from slider_plugin.errors import ConfigError

ALIGNMENT = 8
SEED = 7


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return tmp_path


def fill(folder: Path, count: int, size: tuple[int, int] = (32, 32), first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        Image.new("RGB", size, (number, 0, 0)).save(folder / f"image_{number:03}.png")
    return folder


def entry(folder: Path, name: str | None = None, **keys: Any) -> BucketConfig:
    defaults = {"resolution": 32, "caption_strategy": "filename", "slider_strength": 1.0}
    return BucketConfig(id=name or folder.name, instance_data_dir=folder, **{**defaults, **keys})


def opened(*entries: BucketConfig, alignment: int = ALIGNMENT, **keys: Any) -> Buckets:
    return open_buckets(RunConfig(model_family="sdxl", buckets=entries, **keys), alignment)


def only(*entries: BucketConfig, **keys: Any) -> Bucket:
    (bucket,) = opened(*entries, **keys).buckets
    return bucket


def problems(*entries: BucketConfig, **keys: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        opened(*entries, **keys)
    assert all("\n" not in problem for problem in caught.value.problems)
    return list(caught.value.problems)


def names(bucket: Bucket) -> list[str]:
    return [item.path.name for item in bucket.items]


def epoch_of(bucket: Bucket, epoch: int, batch_size: int, seed: int = SEED) -> list[list[str]]:
    batches = range(bucket.info(batch_size).batches)
    return [[sample.item.path.name for sample in bucket.batch(epoch, index, seed, batch_size)] for index in batches]


# --- What a bucket holds ----------------------------------------------------------------------------------------------


def test_a_bucket_knows_its_images(images: Path) -> None:
    fill(images / "plus", 2, (64, 48))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (64, 48)).save(images / "plus" / "turned.png", exif=exif)
    bucket = only(entry(images / "plus", slider_strength=1.5, probability=2, repeats=3))
    assert (bucket.name, bucket.strength, bucket.probability, bucket.repeats) == ("plus", 1.5, 2.0, 3)
    assert names(bucket) == ["image_000.png", "image_001.png", "turned.png"]
    assert [item.size for item in bucket.items] == [(64, 48), (64, 48), (48, 64)]
    assert [item.placement.target for item in bucket.items] == [(40, 24), (40, 24), (24, 40)]
    assert bucket.items[0].captions == ("image 000",)


def test_what_the_sampler_sees(images: Path) -> None:
    fill(images / "plus", 3)
    fill(images / "plus", 2, (64, 32), first=3)
    bucket = only(entry(images / "plus", slider_strength=-2, probability=0.5, repeats=1))
    # 6 and 4 images in an epoch, of two shapes
    assert bucket.info(4) == BucketInfo(name="plus", strength=-2.0, batches=2 + 1, samples=10, probability=0.5)
    assert [bucket.info(size).batches for size in (1, 2, 3, 100)] == [10, 5, 4, 2]


def test_buckets_keep_their_order_and_disabled_ones_are_left_out(images: Path) -> None:
    entries = [entry(fill(images / name, 1), disabled=name == "b") for name in ("z", "b", "a")]
    buckets = opened(*entries)
    assert [bucket.name for bucket in buckets.buckets] == list(buckets.by_name()) == ["z", "a"]
    assert [info.name for info in buckets.infos(1)] == ["z", "a"]


def test_a_disabled_bucket_may_be_wrong(images: Path) -> None:
    only(entry(fill(images / "a", 1)), entry(images / "missing", name="a", disabled=True))


def test_random_crops_follow_the_seed_of_the_run(images: Path) -> None:
    config = entry(fill(images / "a", 8, (96, 32)), crop=True)
    offsets = {seed: [item.placement.offset for item in only(config, seed=seed).items] for seed in (1, 2)}
    assert offsets[1] != offsets[2]
    assert len(set(offsets[1])) > 1
    assert offsets[1] == [item.placement.offset for item in only(config, seed=1).items]


def test_a_moved_folder_is_cropped_alike(images: Path) -> None:
    first = only(entry(fill(images / "a", 8, (96, 32)), crop=True))
    (images / "a").rename(images / "b")
    assert [i.placement for i in only(entry(images / "b", crop=True)).items] == [i.placement for i in first.items]


def test_a_fixed_subset(images: Path) -> None:
    fill(images / "a", 20)
    chosen = names(only(entry(images / "a", max_num_samples=5), seed=1))
    assert len(chosen) == 5 and chosen == sorted(chosen)
    assert chosen != names(only(entry(images / "a")))[:5]
    assert chosen == names(only(entry(images / "a", max_num_samples=5), seed=2))
    assert chosen != names(only(entry(images / "a", name="other", max_num_samples=5)))
    assert len(only(entry(images / "a", max_num_samples=99)).items) == 20


def test_a_subset_counts_only_images_that_can_be_used(images: Path) -> None:
    fill(images / "a", 10, (64, 32))
    fill(images / "a", 4, first=10)
    assert len(only(entry(images / "a", max_num_samples=4, maximum_aspect_ratio=1)).items) == 4


# --- Batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeats", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_every_image_appears_once_and_once_more_for_each_repeat(images: Path, repeats: int, batch_size: int) -> None:
    fill(images / "a", 7)
    fill(images / "a", 3, (64, 32), first=7)
    bucket = only(entry(images / "a", repeats=repeats))
    for epoch in range(3):
        shown = Counter(name for batch in epoch_of(bucket, epoch, batch_size) for name in batch)
        assert shown == dict.fromkeys(names(bucket), 1 + repeats)


def test_a_batch_has_one_shape_and_at_most_its_size(images: Path) -> None:
    fill(images / "a", 7)
    fill(images / "a", 3, (64, 32), first=7)
    bucket = only(entry(images / "a"))
    batches = [bucket.batch(0, index, SEED, 4) for index in range(bucket.info(4).batches)]
    assert all(len({sample.item.placement.target for sample in batch}) == 1 for batch in batches)
    assert sorted(len(batch) for batch in batches) == [3, 3, 4]


def test_fewer_images_than_the_batch_size(images: Path) -> None:
    bucket = only(entry(fill(images / "a", 1)))
    assert bucket.info(16).batches == 1
    assert epoch_of(bucket, 0, 16) == [["image_000.png"]]


def test_repeats_do_not_crowd_a_batch(images: Path) -> None:
    bucket = only(entry(fill(images / "a", 8), repeats=3))
    assert all(len(set(batch)) == 4 for epoch in range(5) for batch in epoch_of(bucket, epoch, 4))


def test_batches_are_shuffled_by_epoch_seed_and_name(images: Path) -> None:
    fill(images / "a", 12)
    bucket, other = only(entry(images / "a")), only(entry(images / "a", name="b"))
    orders = [epoch_of(bucket, 0, 4), epoch_of(bucket, 1, 4), epoch_of(bucket, 0, 4, seed=8), epoch_of(other, 0, 4)]
    assert len({str(order) for order in orders}) == 4
    # in any order of asking
    assert bucket.batch(0, 2, SEED, 4) == only(entry(images / "a")).batch(0, 2, SEED, 4)
    assert epoch_of(bucket, 0, 4) == orders[0]


def test_shapes_are_mixed_within_an_epoch(images: Path) -> None:
    fill(images / "a", 8)
    fill(images / "a", 8, (64, 32), first=8)
    bucket = only(entry(images / "a"))
    firsts = {bucket.batch(epoch, 0, SEED, 2)[0].item.placement.target for epoch in range(20)}
    assert len(firsts) == 2


def test_a_batch_that_does_not_exist(images: Path) -> None:
    bucket = only(entry(fill(images / "a", 3)))
    for index in (2, -1):
        with pytest.raises(IndexError, match=f"bucket 'a' has 2 batches in an epoch, batch {index} was asked for"):
            bucket.batch(0, index, SEED, 2)


def test_each_caption_variant_is_shown(images: Path) -> None:
    fill(images / "a", 1)
    (images / "a" / "image_000.txt").write_text("one\ntwo\nthree")
    bucket = only(entry(images / "a", caption_strategy="textfile"))
    shown = Counter(bucket.batch(epoch, 0, SEED, 1)[0].caption for epoch in range(300))
    assert set(shown) == {"one", "two", "three"} and min(shown.values()) > 60
    assert bucket.batch(5, 0, SEED, 1) == bucket.batch(5, 0, SEED, 1)


def test_batches_do_not_depend_on_hash_randomisation(images: Path) -> None:
    fill(images / "a", 12)
    code = (
        "import sys; from pathlib import Path; from slider_plugin.config import BucketConfig, RunConfig;"
        "from slider_plugin.data.buckets import open_buckets;"
        "b = BucketConfig(id='a', instance_data_dir=Path(sys.argv[1]), resolution=32, caption_strategy='filename',"
        "                 max_num_samples=9);"
        "bucket = open_buckets(RunConfig(model_family='sdxl', buckets=(b,)), 8).buckets[0];"
        "print([[s.item.path.name for s in bucket.batch(0, i, 7, 3)] for i in range(3)]); print('torch' in sys.modules)"
    )
    answers = set()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run(
            [sys.executable, "-c", code, str(images / "a")], env=env, capture_output=True, text=True, check=True
        )
        answers.add(run.stdout)
    expected = epoch_of(only(entry(images / "a", max_num_samples=9, slider_strength=None)), 0, 3)
    assert answers == {f"{expected}\nFalse\n"}


# --- Problems ---------------------------------------------------------------------------------------------------------


def test_no_buckets(images: Path) -> None:
    assert problems() == ["there is no bucket: add one to data_backend_config, or enable one"]
    assert problems(entry(fill(images / "a", 1), disabled=True)) == problems()


def test_a_missing_folder_and_a_file_in_its_place(images: Path) -> None:
    (images / "file").touch()
    assert problems(entry(images / "missing"), entry(images / "file")) == [
        f"bucket 'missing': instance_data_dir {images / 'missing'} does not exist: correct the path",
        f"bucket 'file': instance_data_dir {images / 'file'} is not a folder: correct the path",
    ]


def test_an_empty_folder(images: Path) -> None:
    (images / "a").mkdir()
    (images / "a" / "scan.tif").touch()
    suffixes = ".avif, .bmp, .jpeg, .jpg, .png, .webp"
    assert problems(entry(images / "a")) == [f"bucket 'a': no images in {images / 'a'}: add some ({suffixes})"]


def test_an_unreadable_image_is_an_error_that_names_it(images: Path) -> None:
    bad = fill(images / "a", 2) / "bad.jpg"
    bad.write_bytes(b"nothing")
    wrong = f"{bad}: not a png, jpg, webp, avif or bmp image, or damaged; remove it, or set skip_unreadable_images"
    assert problems(entry(images / "a")) == [f"bucket 'a': {wrong}"]
    buckets = opened(entry(images / "a"), entry(fill(images / "b", 2), slider_strength=-1), skip_unreadable_images=True)
    assert buckets.warnings == (f"bucket 'a': left out: {wrong}",)
    assert names(buckets.buckets[0]) == ["image_000.png", "image_001.png"]


def test_a_truncated_image_is_found_without_training(images: Path) -> None:
    path = fill(images / "a", 1, (200, 200)) / "image_000.png"
    path.write_bytes(path.read_bytes()[:-20])
    assert "image_000.png: the file is damaged" in problems(entry(images / "a"))[0]


def test_an_image_of_too_many_pixels(images: Path) -> None:
    (problem,) = problems(entry(fill(images / "a", 1)), max_image_pixels=1000)
    assert "image_000.png: its 32x32 pixels are more than max_image_pixels 1000" in problem


def test_nothing_but_unreadable_images(images: Path) -> None:
    (images / "a").mkdir()
    (images / "a" / "bad.jpg").touch()
    assert problems(entry(images / "a"), skip_unreadable_images=True) == [
        f"bucket 'a': none of the images in {images / 'a'} can be used: 1 unreadable"
    ]


def test_long_lists_are_shortened(images: Path) -> None:
    (images / "a").mkdir()
    for number in range(25):
        (images / "a" / f"{number:02}.png").touch()
    lines = problems(entry(images / "a"))
    assert len(lines) == 21
    assert "19.png: the file is empty" in lines[19]
    assert lines[20] == "bucket 'a': ... and 5 more like these"


def test_missing_and_empty_captions_are_listed(images: Path) -> None:
    fill(images / "a", 3)
    (images / "a" / "image_000.txt").write_text("fine")
    (images / "a" / "image_001.txt").touch()
    first, second = problems(entry(images / "a", caption_strategy="textfile"))
    assert "image_001.txt: the caption of image_001.png is empty" in first
    assert "image_002.png: no caption file beside it" in second


def test_an_instance_prompt_that_is_missing_is_said_once(images: Path) -> None:
    assert problems(entry(fill(images / "a", 3), caption_strategy="instanceprompt")) == [
        "bucket 'a': caption_strategy instanceprompt needs an instance_prompt: add one"
    ]


def test_ids_are_unique(images: Path) -> None:
    fill(images / "a", 1)
    assert problems(entry(images / "a"), entry(images / "a"), entry(images / "a", name="b")) == [
        "2 buckets have the id 'a': give each its own"
    ]


def test_all_images_left_out_with_reasons_counted(images: Path) -> None:
    fill(images / "a", 2, (16, 16))
    fill(images / "a", 1, (96, 32), first=2)
    assert problems(entry(images / "a", minimum_image_size=32, maximum_aspect_ratio=2)) == [
        f"bucket 'a': none of the images in {images / 'a'} can be used: "
        "2 smaller than minimum_image_size 32 (pixel_area), 1 wider than maximum_aspect_ratio 2"
    ]


def test_size_keys_are_checked(images: Path) -> None:
    (first, second) = problems(entry(fill(images / "a", 1), target_downsample_size=64), alignment=64)
    assert "resolution 32 with resolution_type pixel_area is an edge of 32 pixels" in first
    assert "target_downsample_size needs maximum_image_size" in second


def test_everything_is_reported_at_once(images: Path) -> None:
    fill(images / "a", 1)
    (images / "a" / "bad.png").touch()
    found = problems(
        entry(images / "missing"), entry(images / "a", resolution=4), entry(images / "a", caption_strategy="textfile")
    )
    expected = ["have the id 'a'", "does not exist", "resolution 4", "bad.png", "bad.png", "no caption file"]
    assert len(found) == len(expected)
    assert all(part in problem for part, problem in zip(expected, found, strict=True))


# --- Warnings ---------------------------------------------------------------------------------------------------------


def warned(images: Path, *facts: dict[str, Any]) -> list[str]:
    entries = []
    for name, keys in zip("abcdef", facts, strict=False):
        count = keys.pop("count", 2)
        entries.append(entry(fill(images / name, count), **keys))
    warnings = opened(*entries).warnings
    assert all("\n" not in warning for warning in warnings)
    return list(warnings)


def test_nothing_to_warn_of(images: Path) -> None:
    facts = [{"slider_strength": 1}, {"slider_strength": -1}, {"slider_strength": 0, "count": 5}]
    assert warned(images, *facts) == []


def test_unequal_sides_are_counted_with_repeats(images: Path) -> None:
    warning = "positive buckets show 6 images an epoch and negative ones 3 (repeats included)"
    (line,) = warned(images, {"slider_strength": 1, "repeats": 2}, {"slider_strength": -1, "count": 3})
    assert line.startswith(warning)


def test_repeats_even_out_the_sides(images: Path) -> None:
    assert warned(images, {"slider_strength": 1, "repeats": 2}, {"slider_strength": -1, "count": 6}) == []


@pytest.mark.parametrize(("strength", "there", "missing"), [(1, "positive", "negative"), (-1, "negative", "positive")])
def test_one_side_alone(images: Path, strength: float, there: str, missing: str) -> None:
    (line,) = warned(images, {"slider_strength": strength}, {"slider_strength": 0})
    assert line.startswith(f"there are {there} buckets and no {missing} one")


def test_neutral_by_omission(images: Path) -> None:
    (line,) = warned(images, {"slider_strength": 1}, {"slider_strength": -1}, {"slider_strength": None})
    assert line.startswith("bucket 'c' has no slider_strength: its images are used to preserve")


def test_only_neutral_buckets(images: Path) -> None:
    first, second = warned(images, {"slider_strength": 0}, {"slider_strength": None})
    assert first.startswith("every bucket is neutral")
    assert second.startswith("bucket 'b' has no slider_strength")


def test_probability_zero(images: Path) -> None:
    (line,) = warned(images, {"slider_strength": 1, "probability": 0}, {"slider_strength": -1})
    assert line.startswith("bucket 'a' has probability 0")


@pytest.mark.parametrize(("strengths", "lines"), [((1, -4), 0), ((0.5, -2.5), 1), ((1, -1, 0), 0)])
def test_strengths_of_very_different_size(images: Path, strengths: tuple[float, ...], lines: int) -> None:
    found = warned(images, *({"slider_strength": strength} for strength in strengths))
    assert len(found) == lines
    assert all(line.startswith("slider_strength is as small as 0.5 and as large as 2.5") for line in found)


def test_images_that_are_left_out_are_counted(images: Path) -> None:
    fill(images / "a", 2, (16, 16), first=10)
    fill(images / "a", 1, (96, 32), first=20)
    fill(images / "a", 2)
    a = entry(images / "a", minimum_image_size=32, maximum_aspect_ratio=2)
    assert opened(a, entry(fill(images / "b", 2), slider_strength=-1)).warnings == (
        "bucket 'a': left out: 2 images smaller than minimum_image_size 32 (pixel_area)",
        "bucket 'a': left out: 1 image wider than maximum_aspect_ratio 2",
    )

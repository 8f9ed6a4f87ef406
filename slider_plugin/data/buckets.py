"""Buckets: the image, video or sound folders of a run, scanned, checked, and dealt out in batches of one shape.

Scanning reads headers, not pixels. Everything that is wrong with any bucket is reported in one go.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from slider_hooks import BucketInfo
from slider_plugin.config import BucketConfig, RunConfig
from slider_plugin.data.captions import CaptionError, caption_problems, captions_of
from slider_plugin.data.conditioning import Twins, UnpairedError, conditioning_problems
from slider_plugin.data.geometry import Placement, Size, geometry_problems
from slider_plugin.data.images import ImageError
from slider_plugin.data.media import KINDS, Kind, problems_of
from slider_plugin.errors import ConfigError, UserError

LISTED = 20
"""Files of one bucket and one kind of fault that are named; the rest is counted."""

FAR_APART = 4.0
"""Strengths whose sizes differ by a larger factor are worth a warning."""

T = TypeVar("T")
Plan = list[list[tuple[int, int]]]
"""The batches of an epoch: for each image its place in `Bucket.items` and in its captions."""


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a bucket: its caption variants (at least one), its upright size, how it becomes a training image."""

    path: Path
    captions: tuple[str, ...]
    size: Size
    placement: Placement
    conditioning: Path | None = None
    """The image of the same size that a ControlNet is shown with it."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a batch, with the caption it is shown under this time."""

    item: Item
    caption: str


@dataclass(slots=True, eq=False)
class Bucket:
    """One folder of images that stand for one strength."""

    name: str
    strength: float | None
    probability: float
    repeats: int
    items: tuple[Item, ...]
    config: BucketConfig
    order: str = ""
    """What the order of its images is drawn from; buckets of a pair have it in common. "" is the name."""

    _latest: tuple[tuple[int, int, int], Plan] | None = field(default=None, init=False, repr=False)

    def info(self, batch_size: int) -> BucketInfo:
        """What the sampler sees."""
        sizes = [len(members) * (1 + self.repeats) for members in self.shapes().values()]
        batches = sum(math.ceil(size / batch_size) for size in sizes)
        return BucketInfo(
            name=self.name, strength=self.strength, batches=batches, samples=sum(sizes), probability=self.probability
        )

    def shapes(self) -> dict[Size, list[int]]:
        """Places in `items` by target size: what may stand in one batch."""
        groups: dict[Size, list[int]] = {}
        for place, item in enumerate(self.items):
            groups.setdefault(item.placement.target, []).append(place)
        return groups

    def batch(self, epoch: int, index: int, seed: int, batch_size: int) -> list[Sample]:
        """Batch `index` of an epoch; the same for the same arguments in any process.

        In an epoch every image appears `1 + repeats` times, shuffled. All images of a batch have one target size; the last
        batch of a size may be smaller.
        """
        plan = self._plan(epoch, seed, batch_size)
        if not 0 <= index < len(plan):
            raise IndexError(f"bucket {self.name!r} has {len(plan)} batches in an epoch, batch {index} was asked for")
        return [Sample(self.items[place], self.items[place].captions[choice]) for place, choice in plan[index]]

    def _plan(self, epoch: int, seed: int, batch_size: int) -> Plan:
        key, latest = (epoch, seed, batch_size), self._latest
        if latest is None or latest[0] != key:
            self._latest = latest = (key, self._make_plan(*key))
        return latest[1]

    def _make_plan(self, epoch: int, seed: int, batch_size: int) -> Plan:
        numbers = random.Random(
            f"{seed}/{epoch}/{self.order or self.name}"
        )  # a text seed is hashed with SHA-512, not with hash()
        batches: list[list[int]] = []
        for members in self.shapes().values():
            # Pass after pass, so that an image does not meet itself in a batch if it can be helped.
            order = [place for _ in range(1 + self.repeats) for place in _shuffled(members, numbers)]
            batches += [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        return [[(place, self._choice(place, numbers)) for place in batch] for batch in _shuffled(batches, numbers)]

    def _choice(self, place: int, numbers: random.Random) -> int:
        return int(numbers.random() * len(self.items[place].captions))


@dataclass(frozen=True, slots=True)
class Buckets:
    """All buckets of a run, and warnings of one line each."""

    buckets: tuple[Bucket, ...]
    warnings: tuple[str, ...]

    def by_name(self) -> dict[str, Bucket]:
        """For the names that draws carry."""
        return {bucket.name: bucket for bucket in self.buckets}

    def infos(self, batch_size: int) -> tuple[BucketInfo, ...]:
        """What the sampler is built from."""
        return tuple(bucket.info(batch_size) for bucket in self.buckets)


def open_buckets(config: RunConfig, alignment: int, optional: bool = False) -> Buckets:
    """Scan the folders of all buckets that are not disabled.

    Args:
        config: the run; folders are absolute.
        alignment: sides of training images are multiples of this, in pixels.
        optional: whether prompts say what changes, so that there may be no buckets, or neutral ones alone.

    Raises:
        ConfigError: everything that is wrong with any bucket.
    """
    wanted = [bucket for bucket in config.buckets if not bucket.disabled]
    scans = [_scan(bucket, config, alignment) for bucket in wanted]
    if optional and not wanted:
        return Buckets((), ())
    problems = _together(wanted) + [problem for scan in scans for problem in scan.problems()]
    if problems:
        raise ConfigError(problems, where="the buckets")
    buckets = tuple(scan.bucket() for scan in scans)
    return Buckets(buckets, (*(line for scan in scans for line in scan.warnings()), *_warnings(buckets, optional)))


# --- Scanning one folder ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Scan:
    """What was found in one bucket's folder."""

    config: BucketConfig
    skip_unreadable: bool
    faults: list[str]  # of the bucket as a whole
    items: list[Item] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    captionless: list[str] = field(default_factory=list)
    unpaired: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def problems(self) -> list[str]:
        lines = [*self.faults, *_shortened([] if self.skip_unreadable else self.unreadable)]
        lines += [*_shortened(self.captionless), *_shortened(self.unpaired)]
        skipped = self.left_out or (self.unreadable and self.skip_unreadable)
        if skipped and not (self.items or self.captionless or self.unpaired):
            lines.append(f"none of the {self.kind.noun} in {self.config.instance_data_dir} can be used: {self._reasons()}")
        return [f"bucket {self.config.id!r}: {line}" for line in lines]

    def warnings(self) -> list[str]:
        lines = [f"left out: {line}" for line in _shortened(self.unreadable)]
        lines += [f"left out: {_counted(count, self.kind)} {reason}" for reason, count in sorted(self.left_out.items())]
        return [f"bucket {self.config.id!r}: {line}" for line in lines]

    def _reasons(self) -> str:
        counts = self.left_out + Counter({"unreadable": len(self.unreadable)})  # a sum of counters drops what is 0
        return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))

    def bucket(self) -> Bucket:
        c = self.config
        items = tuple(sorted(self.items, key=lambda item: _name(item.path, c)))
        return Bucket(c.id, c.slider_strength, c.probability, c.repeats, items, c)

    @property
    def kind(self) -> Kind:
        return KINDS[self.config.dataset_type]


def _scan(bucket: BucketConfig, config: RunConfig, alignment: int) -> _Scan:
    captions_wrong = caption_problems(bucket)
    faults = problems_of(bucket) + (conditioning_problems(bucket) if config.has_controlnet else [])
    scan = _Scan(bucket, config.skip_unreadable_images, faults + geometry_problems(bucket, alignment) + captions_wrong)
    if faults:
        return scan
    twins = Twins(bucket) if config.has_controlnet else None
    for path in _candidates(bucket, scan.faults):
        if len(scan.items) == bucket.max_num_samples:
            break
        try:
            _look_at(path, scan, config, alignment, twins, captioned=not captions_wrong)
        except UnpairedError as error:
            scan.unpaired.append(str(error))
        except ImageError as error:
            scan.unreadable.append(str(error))
        except CaptionError as error:
            scan.captionless.append(str(error))
    return scan


def _look_at(path: Path, scan: _Scan, config: RunConfig, alignment: int, twins: Twins | None, captioned: bool) -> None:
    name = _name(path, scan.config)
    found = scan.kind.look(path, scan.config, config.max_image_pixels, alignment, config.seed, name)
    if found.placement is None:
        scan.left_out[found.left_out] += 1
        return
    captions = captions_of(path, scan.config) if captioned else ()
    conditioning = twins.of(path, found.size, config.max_image_pixels) if twins else None
    scan.items.append(Item(path, captions, found.size, found.placement, conditioning))


def _candidates(bucket: BucketConfig, faults: list[str]) -> list[Path]:
    """The images of a folder in the order in which they are taken; what is wrong with the folder goes to `faults`."""
    folder, kind = bucket.instance_data_dir, KINDS[bucket.dataset_type]
    if not folder.is_dir():
        state = "is not a folder" if folder.exists() else "does not exist"
        faults.append(f"instance_data_dir {folder} {state}: correct the path")
        return []
    try:
        found = kind.find(folder)
    except UserError as error:
        faults.append(str(error))
        return []
    if not found:
        faults.append(f"no {kind.noun} in {folder}: add some ({', '.join(sorted(kind.suffixes))})")
    return found if bucket.max_num_samples is None else sorted(found, key=lambda path: _lot(path, bucket))


def _lot(path: Path, bucket: BucketConfig) -> bytes:
    """Decides which images a fixed subset takes: neither their order in the folder nor the run's seed changes it."""
    return hashlib.sha256(f"{bucket.id}/{_name(path, bucket)}".encode("utf-8", "surrogateescape")).digest()


def _name(path: Path, bucket: BucketConfig) -> str:
    return path.relative_to(bucket.instance_data_dir).as_posix()


# --- All buckets together ---------------------------------------------------------------------------------------------


def _together(wanted: Sequence[BucketConfig]) -> list[str]:
    if not wanted:
        return ["there is no bucket: add one to data_backend_config, or enable one"]
    counts = Counter(bucket.id for bucket in wanted)
    return [f"{count} buckets have the id {name!r}: give each its own" for name, count in counts.items() if count > 1]


def _warnings(buckets: Sequence[Bucket], optional: bool) -> list[str]:
    positive = [bucket for bucket in buckets if (bucket.strength or 0) > 0]
    negative = [bucket for bucket in buckets if (bucket.strength or 0) < 0]
    return [
        *([] if optional and not (positive or negative) else _one_sided(positive, negative)),
        *_far_apart(positive + negative),
        *(line for bucket in buckets for line in _of_one(bucket)),
    ]


def _one_sided(positive: Sequence[Bucket], negative: Sequence[Bucket]) -> list[str]:
    if not positive and not negative:
        return ["every bucket is neutral: nothing says where the slider goes; give buckets a slider_strength"]
    if not positive or not negative:
        there, missing = ("positive", "negative") if positive else ("negative", "positive")
        return [f"there are {there} buckets and no {missing} one: the other direction is learnt from its mirror alone"]
    plus, minus = _samples(positive), _samples(negative)
    if plus == minus:
        return []
    counts = f"positive buckets show {_images(plus)} an epoch and negative ones {minus} (repeats included)"
    return [f"{counts}: the end of each epoch is one-sided; even them out with images or repeats"]


def _far_apart(signed: Sequence[Bucket]) -> list[str]:
    sizes = sorted(abs(bucket.strength or 0.0) for bucket in signed)
    if not sizes or sizes[-1] <= FAR_APART * sizes[0]:
        return []
    return [f"slider_strength is as small as {sizes[0]:g} and as large as {sizes[-1]:g}: the large ones will outweigh the rest"]


def _of_one(bucket: Bucket) -> list[str]:
    lines = []
    if bucket.strength is None:
        kept = "its images are used to preserve what the slider must not change"
        lines.append(f"bucket {bucket.name!r} has no slider_strength: {kept}; write 0 if that is meant")
    if bucket.probability == 0:
        lines.append(
            f"bucket {bucket.name!r} has probability 0: it is drawn only when others of its sign have given all they have"
        )
    return lines


def _samples(buckets: Iterable[Bucket]) -> int:
    return sum(len(bucket.items) * (1 + bucket.repeats) for bucket in buckets)


def _counted(count: int, kind: Kind) -> str:
    return f"{count} {kind.noun}" if count != 1 else f"1 {kind.noun.removesuffix('s')}"


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _shortened(lines: Sequence[str]) -> list[str]:
    more = len(lines) - LISTED
    return [*lines[:LISTED], f"... and {more} more like these"] if more > 0 else list(lines)


def _shuffled(values: Sequence[T], numbers: random.Random) -> list[T]:
    # Of the random module, only random() is promised to be the same in every Python version.
    keys = [numbers.random() for _ in values]
    return [values[place] for place in sorted(range(len(values)), key=keys.__getitem__)]

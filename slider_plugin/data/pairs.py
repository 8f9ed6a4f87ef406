"""Matched pairs: for each image with more of the concept one by the same name with less of it, drawn together.

The image sliders of Concept Sliders (arXiv 2311.12092, section 4.2; rohitgandikota/sliders, train_lora-scale.py) train on such
pairs, each with the same noise and time for both sides. What the two images share then cancels in the slider's gradient.
"""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slider_hooks import Draw, Sampler
from slider_plugin.data.buckets import Bucket, Item
from slider_plugin.errors import ConfigError, UserError

if TYPE_CHECKING:
    from torch import Tensor

LISTED = 10
"""Faults of one pair of buckets that are named; the rest is counted."""


def matched(buckets: Sequence[Bucket]) -> dict[str, str]:
    """The positive buckets by name, each with its negative one: that of the same strength with the other sign.

    Both are put into one order, in which their images are drawn.

    Raises:
        ConfigError: a bucket has no other side, or images lack a twin, or have one of another size or crop, or the same image.
    """
    positive, negative = _by_strength(buckets, 1), _by_strength(buckets, -1)
    problems = _levels(positive, negative)
    pairs = {positive[size][0].name: negative[size][0].name for size in positive if size in negative}
    by_name = {bucket.name: bucket for bucket in buckets}
    for one, other in pairs.items():
        problems += _shortened(_faults(by_name[one], by_name[other]))
    if problems:
        raise ConfigError(problems, where="the pairs")
    for one, other in pairs.items():
        for bucket in (by_name[one], by_name[other]):
            stems = _stems(bucket)
            bucket.items, bucket.order = tuple(stems[stem][0] for stem in sorted(stems)), f"pair {one}"
    return pairs


def _by_strength(buckets: Sequence[Bucket], sign: int) -> dict[float, list[Bucket]]:
    levels: dict[float, list[Bucket]] = {}
    for bucket in buckets:
        if (bucket.strength or 0.0) * sign > 0:
            levels.setdefault(abs(bucket.strength or 0.0), []).append(bucket)
    return levels


def _levels(positive: Mapping[float, list[Bucket]], negative: Mapping[float, list[Bucket]]) -> list[str]:
    """What is wrong with the strengths."""
    if not positive and not negative:
        return ["slider_objective pair: every bucket is neutral; give two buckets a slider_strength, such as 1 and -1"]
    lines = []
    for own, others, sign in ((positive, negative, -1), (negative, positive, 1)):
        for size, buckets in own.items():
            if size not in others:
                lines.append(f"bucket {buckets[0].name!r} has no other side: none has slider_strength {sign * size:g}")
            if len(buckets) > 1:
                names = " and ".join(repr(bucket.name) for bucket in buckets)
                lines.append(f"buckets {names} have one slider_strength, and each has one twin; put their images together")
    return lines


def _faults(one: Bucket, other: Bucket) -> list[str]:
    """What is wrong with the images of two buckets."""
    lines = []
    if one.repeats != other.repeats:
        lines.append(f"bucket {one.name!r}: repeats {one.repeats}, and {other.repeats} in {other.name!r}; both need the same")
    own, others = _stems(one), _stems(other)
    for bucket, names in ((one, own), (other, others)):
        twice = sorted(name for name, items in names.items() if len(items) > 1)
        lines += [
            f"bucket {bucket.name!r}: {name} is there {len(names[name])} times, with other endings; keep one" for name in twice
        ]
    for bucket, missing in ((other, own.keys() - others.keys()), (one, others.keys() - own.keys())):
        lines += [
            f"bucket {bucket.name!r}: {name} has no twin in {bucket.config.instance_data_dir}" for name in sorted(missing)
        ]
    for name in sorted(own.keys() & others.keys()):
        lines += _twins(own[name][0], others[name][0])
    return lines


def _twins(one: Item, other: Item) -> list[str]:
    if one.size != other.size:
        sizes = f"{one.size[0]}x{one.size[1]} and {other.size[0]}x{other.size[1]}"
        return [f"{one.path} and {other.path} are {sizes}: a pair has one size"]
    if one.placement != other.placement:
        return [f"{one.path} and {other.path} are cropped differently: give both buckets the same keys for size and crop"]
    if filecmp.cmp(one.path, other.path, shallow=False):
        return [f"{one.path} and {other.path} are the same image: nothing says what changes"]
    return []


def assert_different(
    latents: Mapping[tuple[str, Path], Tensor], buckets: Mapping[str, Bucket], twins: Mapping[str, str]
) -> None:
    """Raise UserError if the images of a pair have the same latents: one picture in two files, which `matched` cannot see.

    Args:
        latents: by bucket and file.
        buckets: by name, put in order by `matched`.
        twins: what `matched` gave.
    """
    for one, other in twins.items():
        for item, twin in zip(buckets[one].items, buckets[other].items, strict=True):
            if latents[one, item.path].equal(latents[other, twin.path]):
                raise UserError(f"{item.path} and {twin.path} show the same image: nothing says what changes; replace one")


def _stem(item: Item, bucket: Bucket) -> str:
    return item.path.relative_to(bucket.config.instance_data_dir).with_suffix("").as_posix()


def _stems(bucket: Bucket) -> dict[str, list[Item]]:
    names: dict[str, list[Item]] = {}
    for item in bucket.items:
        names.setdefault(_stem(item, bucket), []).append(item)
    return names


def _shortened(lines: Sequence[str]) -> list[str]:
    more = len(lines) - LISTED
    return [*lines[:LISTED], f"... and {more} more like these"] if more > 0 else list(lines)


class PairSampler:
    """Round after round: a positive draw, its twin, and where there are neutral buckets a neutral one.

    The order is that of two samplers, one over the positive buckets and one over the neutral ones.
    """

    def __init__(
        self, positive: Sampler, neutral: Sampler | None, twins: Mapping[str, str], strengths: Mapping[str, float]
    ) -> None:
        """Pair the draws.

        Args:
            positive: over the positive buckets alone.
            neutral: over the neutral ones alone, or None.
            twins: name of the negative bucket by that of the positive one.
            strengths: of the negative buckets, by name.
        """
        self._positive, self._neutral, self._twins, self._strengths = positive, neutral, dict(twins), dict(strengths)
        self._position = 0
        self._rest: list[Draw] = []

    def __iter__(self) -> Iterator[Draw]:
        return self

    def __next__(self) -> Draw:
        if not self._rest:
            self._rest = self._round()
        draw = replace(self._rest.pop(0), position=self._position)
        self._position += 1
        return draw

    def _round(self) -> list[Draw]:
        draw = next(self._positive)
        twin = self._twins[draw.bucket]
        both = [draw, replace(draw, bucket=twin, scale=self._strengths[twin])]
        return both if self._neutral is None else [*both, next(self._neutral)]

    def state_dict(self) -> dict[str, Any]:
        """The position between two rounds. Raises ValueError inside of one."""
        if self._rest:
            raise ValueError("the sampler of pairs is inside a round, and saves its position between rounds alone")
        neutral = None if self._neutral is None else self._neutral.state_dict()
        return {"position": self._position, "positive": self._positive.state_dict(), "neutral": neutral}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved position. Raises ValueError if it was saved with other buckets."""
        if "positive" not in state or (state["neutral"] is None) != (self._neutral is None):
            raise ValueError("the position was saved with other buckets, or without slider_objective pair")
        self._positive.load_state_dict(state["positive"])
        if self._neutral is not None:
            self._neutral.load_state_dict(state["neutral"])
        self._position, self._rest = int(state["position"]), []

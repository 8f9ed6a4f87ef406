"""The two ends of a concept: the positive and the negative images of the buckets, or pictures of words by the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from slider_hooks import Components, PromptEntry
from slider_plugin.data.buckets import Bucket, Item
from slider_plugin.data.encode import Encoded
from slider_plugin.data.geometry import place
from slider_plugin.data.images import load_image
from slider_plugin.errors import UserError
from slider_plugin.report.axis import Axis, fit_axis
from slider_plugin.report.scorers import Words
from slider_plugin.report.vectors import grid_of, latents_of, pooled
from slider_plugin.validation.plan import Shot
from slider_plugin.validation.render import DrawSettings, ScalableAdapter, draw_batches
from slider_plugin.validation.samples import Sample

if TYPE_CHECKING:
    from slider_plugin.family import LoadedFamily

Array = np.ndarray

MOST_PIXELS = 64_000_000
WORD_SEEDS = 8
"""Pictures of each word."""

SIDES = ("positive", "negative")


@dataclass(frozen=True, slots=True)
class Ends:
    """Both ends, the positive one first."""

    vectors: tuple[Array, Array]
    """Pooled latents `(B, N)` of each side."""

    grid: tuple[int, int]
    images: tuple[tuple[Image.Image, ...], tuple[Image.Image, ...]]
    """The same as pictures, for a scorer; empty where none is asked."""

    source: str
    """`images` or `words`."""

    def axis(self) -> Axis:
        """The direction between them. Raises UserError if there is none."""
        return fit_axis(*self.vectors, self.grid)


def sides_of(buckets: Sequence[Bucket]) -> tuple[list[tuple[Bucket, Item]], list[tuple[Bucket, Item]]]:
    """The positive and the negative images, each in the order of their names: what matches by name has the same place."""

    def of(sign: int) -> list[tuple[Bucket, Item]]:
        found = [(bucket, item) for bucket in buckets if sign * (bucket.strength or 0.0) > 0 for item in bucket.items]
        return sorted(found, key=lambda pair: (pair[1].path.stem, str(pair[1].path)))

    return of(1), of(-1)


def of_buckets(data: Encoded, pictures: bool) -> Ends:
    """The ends from encoded training images; with `pictures` also as pictures."""
    sides = sides_of(list(data.buckets.values()))
    if not all(sides):
        raise UserError(
            f"the report needs positive and negative images, and the buckets hold {len(sides[0])} and {len(sides[1])}; name "
            "buckets of both signs, or give --positive and --negative words"
        )
    first_bucket, first_item = sides[0][0]
    grid = grid_of(data.latents[first_bucket.name, first_item.path])
    positive_BN, negative_BN = (np.stack([pooled(data.latents[b.name, i.path], grid) for b, i in side]) for side in sides)
    plus, minus = (tuple(_picture(item) for _, item in side) if pictures else () for side in sides)
    return Ends((positive_BN, negative_BN), grid, (plus, minus), "images")


def _picture(item: Item) -> Image.Image:
    try:
        return place(load_image(Path(item.path), MOST_PIXELS), item.placement)
    except OSError as error:
        raise UserError(f"--scorer sees images alone, and {item.path} is none ({error}); leave it out") from error


def of_words(
    family: LoadedFamily, components: Components, adapter: ScalableAdapter, words: Words, settings: DrawSettings
) -> Ends:
    """The ends as the model itself draws them at strength 0, the same seeds for both.

    Where a slider is supervised by text alone there are no images; what it should do is what the words do.
    """
    entries = {
        text: PromptEntry(name=side, prompt=text) for side, text in zip(SIDES, (words.positive, words.negative), strict=True)
    }
    shots = [Shot(entry, seed, 0.0) for entry in entries.values() for seed in range(WORD_SEEDS)]
    latents: dict[Shot, Array] = {}
    pictures: dict[Shot, Image.Image] = {}
    grids: list[tuple[int, int]] = []

    def take(batch: Sequence[Shot], samples: Sequence[Sample]) -> None:
        for shot, values, sample in zip(batch, latents_of(family, components, samples), samples, strict=True):
            grids.append(grid_of(values))
            latents[shot], pictures[shot] = pooled(values, grids[0]), sample.still().convert("RGB")

    draw_batches(family, components, adapter, [(0.0, shots)], settings, take)
    sides = [[shot for shot in shots if shot.entry.name == side] for side in SIDES]
    positive_BN, negative_BN = (np.stack([latents[shot] for shot in side]) for side in sides)
    plus, minus = (tuple(pictures[shot] for shot in side) for side in sides)
    return Ends((positive_BN, negative_BN), grids[0], (plus, minus), "words")

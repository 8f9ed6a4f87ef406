"""What a report draws: prompts and seeds at strengths, each picture kept as a small vector; a few remain for the strip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from slider_hooks import Components, PromptEntry
from slider_plugin.report.axis import Axis, likeness, spread
from slider_plugin.report.scores import Curves
from slider_plugin.report.vectors import contrast, latents_of, pooled
from slider_plugin.validation import strips
from slider_plugin.validation.plan import Shot
from slider_plugin.validation.render import DrawSettings, ScalableAdapter, draw_batches
from slider_plugin.validation.samples import Sample

if TYPE_CHECKING:
    from slider_plugin.family import LoadedFamily

Array = np.ndarray

Score = Callable[[Sequence[Image.Image]], Array]
"""How much of the concept images show, by another model: `(B,)`, any unit."""

STRIP_ROWS = 4
STRIP_EDGE = 512  # longest edge of a picture in the strip, in pixels


@dataclass(frozen=True, slots=True)
class Request:
    """What is drawn."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    strengths: tuple[float, ...]
    """Rising, with 0 among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What was drawn."""

    request: Request
    grid: tuple[int, int]
    vectors_PQSN: Array
    """Pooled latents."""

    scores_PQS: Array | None
    """Of the scorer, where there is one."""

    pictures: dict[tuple[int, int], Image.Image]
    """By prompt and strength, of the first seed, for the strip."""


def draw(
    family: LoadedFamily,
    components: Components,
    adapter: ScalableAdapter,
    request: Request,
    settings: DrawSettings,
    grid: tuple[int, int],
    score: Score | None = None,
) -> Drawn:
    """Draw every prompt with every seed at every strength.

    The latents are those of the decoded picture, encoded as training images are: what a pipeline calls latents is packed and
    scaled in a way of its own in many families, and could not be compared with those of images.

    Args:
        family: the family with its hooks.
        components: the model, with the adapter injected.
        adapter: the slider.
        request: what is drawn.
        settings: size, steps, guidance.
        grid: latents are pooled to this many places, those of the images that the axis is made of.
        score: what scores the pictures besides.

    Raises:
        PluginError: a hook of the family answered something that cannot be used.
    """
    shots = {
        Shot(PromptEntry(name=str(p), prompt=prompt), seed, strength): (p, q, s)
        for s, strength in enumerate(request.strengths)
        for p, prompt in enumerate(request.prompts)
        for q, seed in enumerate(request.seeds)
    }
    taken = _Taken(family, components, grid, score, shots)
    by_scale = [(strength, [shot for shot in shots if shot.scale == strength]) for strength in request.strengths]
    draw_batches(family, components, adapter, by_scale, settings, taken.take)
    return taken.drawn(request)


class _Taken:
    """Collects what is drawn."""

    def __init__(
        self,
        family: LoadedFamily,
        components: Components,
        grid: tuple[int, int],
        score: Score | None,
        places: dict[Shot, tuple[int, int, int]],
    ) -> None:
        self._family, self._components, self._grid, self._score, self._places = family, components, grid, score, places
        self._vectors: dict[tuple[int, int, int], Array] = {}
        self._scores: dict[tuple[int, int, int], float] = {}
        self._pictures: dict[tuple[int, int], Image.Image] = {}

    def take(self, shots: Sequence[Shot], samples: Sequence[Sample]) -> None:
        latents_B = latents_of(self._family, self._components, samples)
        stills = [sample.still().convert("RGB") for sample in samples]
        scores_B = self._score(stills) if self._score else np.zeros(len(stills))
        for shot, latents, still, value in zip(shots, latents_B, stills, scores_B, strict=True):
            place = self._places[shot]
            self._vectors[place] = pooled(latents, self._grid)
            self._scores[place] = float(value)
            if place[1] == 0 and place[0] < STRIP_ROWS:
                still.thumbnail((STRIP_EDGE, STRIP_EDGE), Image.Resampling.LANCZOS)
                self._pictures[place[0], place[2]] = still

    def drawn(self, request: Request) -> Drawn:
        shape = (len(request.prompts), len(request.seeds), len(request.strengths))
        vectors_PQSN = np.zeros((*shape, len(next(iter(self._vectors.values())))))
        scores_PQS = np.zeros(shape)
        for place, vector_N in self._vectors.items():
            vectors_PQSN[place], scores_PQS[place] = vector_N, self._scores[place]
        return Drawn(
            request=request,
            grid=self._grid,
            vectors_PQSN=vectors_PQSN,
            scores_PQS=scores_PQS if self._score else None,
            pictures=self._pictures,
        )


def curves_of(drawn: Drawn, axis: Axis | None, unit: float, trained: float) -> Curves:
    """The response curves of what was drawn.

    Args:
        drawn: the pictures as vectors.
        axis: of the latents; None where only the scorer tells what the concept is: then all change of latents counts as moved.
        unit: where there is a scorer, its distance from negative to positive images.
        trained: the largest strength that was trained.
    """
    strengths = drawn.request.strengths
    zero = strengths.index(0.0)
    change_PQSN = drawn.vectors_PQSN - drawn.vectors_PQSN[:, :, zero : zero + 1]
    if drawn.scores_PQS is not None:
        response_PQS = (drawn.scores_PQS - drawn.scores_PQS[:, :, zero : zero + 1]) / unit
    else:
        assert axis is not None, "without a scorer the axis is what the response is measured on"
        response_PQS = axis.along(change_PQSN)
    beside_PQSN = axis.beside(drawn.vectors_PQSN) if axis else _plain(drawn.vectors_PQSN, zero)
    spread_S = np.array([spread(beside_PQSN[:, :, s]) for s in range(len(strengths))])
    contrast_S = contrast(drawn.vectors_PQSN, drawn.grid).mean(axis=(0, 1))
    return Curves(
        strengths=strengths,
        response_PQS=response_PQS,
        kept_PQS=_kept(beside_PQSN, zero, axis.chance if axis else None),
        spread_S=spread_S / spread_S[zero] if spread_S[zero] > 0 else np.ones(len(strengths)),
        contrast_S=contrast_S / max(float(contrast_S[zero]), 1e-12),
        trained=trained,
        evenness=axis.evenness if axis else 1.0,
    )


def _plain(vectors_PQSN: Array, zero: int) -> Array:
    """Latents as deviations from their mean at strength 0, where there are no images that say what else to compare with."""
    plain_PQSN: Array = vectors_PQSN - vectors_PQSN[:, :, zero].mean(axis=(0, 1))
    return plain_PQSN


def _kept(beside_PQSN: Array, zero: int, chance: float | None) -> Array:
    """The cosine between each picture and the same one at strength 0, from 0 (that of different pictures) to 1 (equal).

    A cosine, since contrast and light may be the concept itself: what counts is the pattern, not its size. Different pictures
    are those of different prompts. Seeds of one prompt may look much alike, and a small change of them be most of what tells
    them apart; so with one prompt the training images' `chance` stands for that, or, without any, 0.
    """
    unit_PQSN = beside_PQSN / np.maximum(np.linalg.norm(beside_PQSN, axis=-1, keepdims=True), 1e-12)
    cosine_PQS = (unit_PQSN * unit_PQSN[:, :, zero : zero + 1]).sum(-1)
    prompts, seeds, _, size = beside_PQSN.shape
    if prompts > 1:
        chance = likeness(beside_PQSN[:, :, zero].reshape(-1, size), np.repeat(np.arange(prompts), seeds))
    chance = min(chance or 0.0, 1.0 - 1e-6)
    kept_PQS: Array = (cosine_PQS - chance) / (1.0 - chance)
    return kept_PQS


def strip(drawn: Drawn) -> Image.Image:
    """Prompts below each other at the first seed, strengths rising from left to right."""
    labels = [strips.format_strength(strength) for strength in drawn.request.strengths]
    rows = [
        (prompt, strips.strip([drawn.pictures[p, s] for s in range(len(labels))], labels, framed=False))
        for p, prompt in enumerate(drawn.request.prompts[:STRIP_ROWS])
    ]
    return strips.contact_sheet(rows)

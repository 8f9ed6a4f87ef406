"""What an image of the procedural world shows, read off its pixels, and how well a slider moves it.

The prompts, the seeds, the strengths and every measure here were fixed before any slider was tuned. Image arrays are
float32 `(H, W, 3)` in 0..1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slider_plugin.demo import world

PROMPTS: tuple[tuple[str, str, str], ...] = (
    ("red", "circle", "mint"),
    ("blue", "square", "sand"),
    ("green", "triangle", "pink"),
    ("orange", "square", "sky"),
    ("purple", "triangle", "white"),
    ("teal", "circle", "pink"),
    ("red", "triangle", "sky"),
    ("blue", "circle", "white"),
)
"""Held-out (colour, shape, background): in no bucket."""

SEEDS = (1000, 1001, 1002, 1003)
STRENGTHS = tuple(round(-1.0 + 0.25 * i, 2) for i in range(9))

LIGHT_RANGE = world.LIGHT[1] - world.LIGHT[0]
AREA_RANGE = np.pi * (world.RADIUS[1] ** 2 - world.RADIUS[0] ** 2)
PLACE_RANGE = 0.4  # of the image side, from one end to the other
COLOUR_RANGE = 0.8  # distance of two saturated colours' chromaticities


def prompt(colour: str, shape: str, background: str) -> str:
    """The caption of a scene that says nothing about size, light or place."""
    return world.caption(world.Scene(colour=colour, shape=shape, background=background, radius=0.25, light=0.7, x=0.5, y=0.5))


@dataclass(frozen=True, slots=True)
class Attributes:
    """What is measured of one image."""

    brightness: float
    """Mean over the pixels of the largest channel, 0..1. Every colour of the world has the same one under the same light."""

    size: float
    """Share of the image that the shape covers, 0..1."""

    place: tuple[float, float]
    """Centre of the shape, in units of the image side."""

    colour: tuple[float, float, float]
    """Chromaticity of the shape: mean colour divided by its sum; zeros where no shape is seen."""

    background: tuple[float, float, float]
    """Chromaticity of the background, likewise."""

    hue: float
    """How far the shape's hue is turned from that of the prompt's colour, in degrees, -180 to 180; 0 where no shape is seen."""

    @property
    def position(self) -> float:
        """How far right the shape is, 0..1."""
        return self.place[0]

    @property
    def elevation(self) -> float:
        """How far up the shape is, 0..1."""
        return 1.0 - self.place[1]


def measure(image: np.ndarray, colour: str, background: str) -> Attributes:
    """Read the attributes off an image that should show a shape of one colour on a background of another.

    Each pixel is projected onto the line from the background's colour to the shape's, both under the image's own light;
    the middle half of that line counts in part, so that the size changes smoothly.
    """
    brightness = float(image.max(axis=2).mean())
    light = brightness / world.PALETTE_VALUE
    start, end = world.palette(background) * light, world.palette(colour) * light
    axis = end - start
    share = np.clip((image - start) @ axis / max(float(axis @ axis), 1e-6), 0.0, 1.0)
    shape = np.clip((share - 0.25) / 0.5, 0.0, 1.0)
    return Attributes(
        brightness=brightness,
        size=float(shape.mean()),
        place=_centre(shape),
        colour=_chromaticity(image, shape * (share > 0.75)),
        background=_chromaticity(image, (1.0 - shape) * (share < 0.25)),
        hue=_turn(image, world.palette(colour)),
    )


def _turn(image: np.ndarray, colour: np.ndarray) -> float:
    """Hue of what is saturated, whatever its colour, against that of a colour; backgrounds are pale."""
    high, low = image.max(axis=2), image.min(axis=2)
    saturation = (high - low) / np.maximum(high, 1e-6)
    weight = np.clip((saturation - PALE) / (1.0 - PALE), 0.0, 1.0)
    if float(weight.sum()) < 1.0:
        return 0.0
    mean = (_circular(image) * weight).sum() / weight.sum()
    own = complex(_circular(colour[None, None])[0, 0])
    return float(np.degrees(np.angle(mean / own)))


def _circular(image: np.ndarray) -> np.ndarray:
    """A colour without its grey as a complex number, whose angle is its hue (red 0, green 120, blue 240 degrees)."""
    corners = np.exp(2j * np.pi * np.arange(3) / 3)
    circular: np.ndarray = image @ corners
    return circular


def _centre(weight: np.ndarray) -> tuple[float, float]:
    total = float(weight.sum())
    if total < 1.0:  # less than a pixel: nowhere in particular
        return 0.5, 0.5
    height, width = weight.shape
    x = float(weight.sum(axis=0) @ (np.arange(width) + 0.5)) / total / width
    y = float(weight.sum(axis=1) @ (np.arange(height) + 0.5)) / total / height
    return x, y


def _chromaticity(image: np.ndarray, weight: np.ndarray) -> tuple[float, float, float]:
    total = float(weight.sum())
    if total < 1.0:
        return 0.0, 0.0, 0.0
    mean = (image * weight[..., None]).sum(axis=(0, 1)) / total
    red, green, blue = (mean / max(float(mean.sum()), 1e-6)).tolist()
    return red, green, blue


PALE = 0.5
"""Saturation below which a pixel is background: backgrounds have at most 0.39, colours at least 0.83."""

OWN = {"position": "place", "elevation": "place", "hue": "colour"}
"""Changes that are a concept's own, where its name is another."""

Changes = Mapping[str, Callable[[Attributes, Attributes], float]]

CHANGES: Changes = {
    "size": lambda a, b: abs(a.size - b.size) / AREA_RANGE,
    "brightness": lambda a, b: abs(a.brightness - b.brightness) / (LIGHT_RANGE * world.PALETTE_VALUE),
    "place": lambda a, b: _distance(a.place, b.place) / PLACE_RANGE,
    "colour": lambda a, b: _distance(a.colour, b.colour) / COLOUR_RANGE,
    "background": lambda a, b: _distance(a.background, b.background) / COLOUR_RANGE,
}
"""How far an attribute moved between two images, in units of its range in the world."""


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    return float(np.linalg.norm(np.subtract(a, b)))


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation, -1..1, with mean ranks for ties; 0 if either is constant."""
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (x, y)]
    centred = [r - r.mean() for r in ranks]
    norm = float(np.linalg.norm(centred[0]) * np.linalg.norm(centred[1]))
    return float(centred[0] @ centred[1]) / norm if norm else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: np.ndarray = (last - counts + 1 + last) / 2.0
    return means[inverse]


@dataclass(frozen=True, slots=True)
class Score:
    """How well a slider works, over all prompts and seeds."""

    monotonicity: float
    """Mean of the Spearman correlations between strength and attribute, one per prompt and seed."""

    monotonicity_p10: float
    """Their 10th percentile."""

    response: tuple[tuple[float, float], ...]
    """(strength, mean attribute)."""

    balance: float
    """Of the changes of the mean attribute from strength 0 to the two ends, the smaller over the larger, 0..1; 0 if both go one
    way."""

    ratio: float
    """Mean attribute at the largest strength over that at the smallest."""

    preservation: Mapping[str, float]
    """How far everything else moved at +1 and -1: for each other attribute the mean over prompts, seeds and both signs of
    its change against strength 0, in units of its range in the world (0 is perfect), and their `mean`."""


def score(concept: str, images: Mapping[tuple[int, int], Mapping[float, Attributes]]) -> Score:
    """Score a slider for a concept.

    Args:
        concept: the attribute that should move: `size`, `brightness`, `hue`, `position` or `elevation`.
        images: for each (prompt, seed) the attributes by strength; the strengths hold -1, 0 and 1.
    """
    strengths = sorted(next(iter(images.values())))
    correlations = [spearman(strengths, [float(getattr(row[s], concept)) for s in strengths]) for row in images.values()]
    response = [(s, float(np.mean([getattr(row[s], concept) for row in images.values()]))) for s in strengths]
    moved = {
        name: float(np.mean([change(row[s], row[0.0]) for row in images.values() for s in (-1.0, 1.0)]))
        for name, change in CHANGES.items()
        if name != OWN.get(concept, concept)
    }
    return Score(
        monotonicity=float(np.mean(correlations)),
        monotonicity_p10=float(np.percentile(correlations, 10)),
        response=tuple(response),
        balance=_balance([value - dict(response)[0.0] for _, value in (response[0], response[-1])]),
        ratio=response[-1][1] / max(response[0][1], 1e-9),
        preservation=moved | {"mean": float(np.mean(list(moved.values())))},
    )


def _balance(ends: Sequence[float]) -> float:
    low, high = ends
    if low * high >= 0.0:
        return 0.0
    return min(abs(low), abs(high)) / max(abs(low), abs(high))

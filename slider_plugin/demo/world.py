"""The procedural world of the bundled fixtures: scenes, their images, their captions.

A scene is one flat shape on a flat background under one light. Every colour has the same HSV value (`PALETTE_VALUE`), so
that the largest channel of a pixel tells the light and nothing else: size and brightness can then be measured apart.

Image arrays are float32 `(H, W, 3)` in 0..1, sRGB as stored in a PNG.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass, replace

import numpy as np

RESOLUTION = 64  # pixels, both sides
PALETTE_VALUE = 0.9  # the largest channel of every colour under full light

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.90, 0.15),
    "blue": (0.10, 0.20, 0.90),
    "orange": (0.90, 0.50, 0.05),
    "purple": (0.60, 0.10, 0.90),
    "teal": (0.05, 0.90, 0.85),
}
BACKGROUNDS = {
    "white": (0.90, 0.90, 0.90),
    "sand": (0.90, 0.80, 0.55),
    "sky": (0.60, 0.75, 0.90),
    "mint": (0.65, 0.90, 0.72),
    "pink": (0.90, 0.65, 0.75),
}
RADIUS = (0.12, 0.40)  # of the image side
LIGHT = (0.35, 1.0)  # factor on every colour
SMALL, LARGE = 0.21, 0.31  # a caption may say "small" below, "large" above
DIM, BRIGHT = 0.55, 0.80  # a caption may say "in dim light" below, "in bright light" above
LEFT, RIGHT = 0.44, 0.56  # a caption may say "on the left" below, "on the right" above
SUPERSAMPLING = 4


@dataclass(frozen=True, slots=True)
class Scene:
    """What one image shows.

    `radius` is that of a circle with the shape's own area, in units of the image side, so that "size" means the same
    for every shape. `x` and `y` are the centre, in the same units, from the upper left corner.
    """

    shape: str
    colour: str
    background: str
    radius: float
    light: float
    x: float
    y: float
    turn: float = 0.0
    """Of the shape's colour round the circle of hues, in degrees; its saturation and its largest channel stay."""

    def with_(self, **changes: float | str) -> Scene:
        """This scene with some attributes changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


def random_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene; a circle always fits into the image, and the corners of other shapes may just leave it."""
    radius = float(rng.uniform(*RADIUS))
    room = max(0.0, 0.46 - radius)
    offset = min(room, 0.2)
    return Scene(
        shape=str(rng.choice(SHAPES)),
        colour=str(rng.choice(list(COLOURS))),
        background=str(rng.choice(list(BACKGROUNDS))),
        radius=radius,
        light=float(rng.uniform(*LIGHT)),
        x=0.5 + float(rng.uniform(-offset, offset)),
        y=0.5 + float(rng.uniform(-offset, offset)),
    )


def _polygon(shape: str) -> np.ndarray:
    """Vertices `(N, 2)` of a polygon whose area is pi, that of the unit circle."""
    if shape == "square":
        points = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=np.float64)
    elif shape == "triangle":
        points = np.array([(math.sin(a), -math.cos(a)) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)])
    else:
        raise ValueError(f"no such shape: {shape!r} (one of {', '.join(SHAPES)})")
    x, y = points.T
    area = 0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))
    return points * math.sqrt(math.pi / area)


def _coverage(scene: Scene, resolution: int) -> np.ndarray:
    """How much of each pixel the shape covers, `(H, W)` in 0..1."""
    n = resolution * SUPERSAMPLING
    grid = (np.arange(n) + 0.5) / n
    u, v = np.meshgrid((grid - scene.x) / scene.radius, (grid - scene.y) / scene.radius)
    if scene.shape == "circle":
        inside = u * u + v * v <= 1.0
    else:
        inside = np.zeros((n, n), dtype=bool)
        points = _polygon(scene.shape)
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):  # even-odd rule
            if y0 == y1:
                continue
            crosses = (v > min(y0, y1)) & (v <= max(y0, y1))
            inside ^= crosses & (u < (x1 - x0) * (v - y0) / (y1 - y0) + x0)
    blocks = inside.reshape(resolution, SUPERSAMPLING, resolution, SUPERSAMPLING)
    coverage: np.ndarray = blocks.mean(axis=(1, 3)).astype(np.float32)
    return coverage


def render(scene: Scene, resolution: int = RESOLUTION) -> np.ndarray:
    """The image of a scene: float32 `(H, W, 3)` in 0..1."""
    coverage = _coverage(scene, resolution)[..., None]
    shape = turned(COLOURS[scene.colour], scene.turn)
    background = np.asarray(BACKGROUNDS[scene.background], dtype=np.float32)
    image: np.ndarray = np.clip((coverage * shape + (1.0 - coverage) * background) * scene.light, 0.0, 1.0)
    return image.astype(np.float32)


def caption(scene: Scene, size: bool = False, light: bool = False, place: bool = False) -> str:
    """A caption; the three optional attributes are mentioned on request and only where they are pronounced."""
    size_word = ""
    if size:
        size_word = "small " if scene.radius < SMALL else "large " if scene.radius > LARGE else ""
    words = f"{size_word}{scene.colour} {scene.shape}"
    text = f"{'an' if words[0] in 'aeiou' else 'a'} {words} on a {scene.background} background"
    if place and not LEFT <= scene.x <= RIGHT:
        text += " on the left" if scene.x < LEFT else " on the right"
    if light and not DIM <= scene.light <= BRIGHT:
        text += " in dim light" if scene.light < DIM else " in bright light"
    return text


def random_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption as the base models are trained on: each optional attribute is mentioned four times in ten."""
    size, light, place = rng.random(3) < 0.4
    return caption(scene, size=bool(size), light=bool(light), place=bool(place))


def turned(colour: tuple[float, float, float], degrees: float) -> np.ndarray:
    """A colour `(3,)` with another hue, float32."""
    if not degrees:
        return np.asarray(colour, dtype=np.float32)
    hue, saturation, value = colorsys.rgb_to_hsv(*colour)
    other: np.ndarray = np.asarray(colorsys.hsv_to_rgb((hue + degrees / 360.0) % 1.0, saturation, value), dtype=np.float32)
    return other


def palette(name: str) -> np.ndarray:
    """The colour of a shape or a background under full light, float32 `(3,)`."""
    return np.asarray((COLOURS | BACKGROUNDS)[name], dtype=np.float32)

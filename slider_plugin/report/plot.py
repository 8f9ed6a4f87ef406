"""The response plot: mean response with its 95 % band, preservation below, the usable interval shaded. Pillow alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from slider_plugin.validation.strips import format_strength

SIZE = (960, 640)
SCALE = 2  # drawn larger and brought down, which smooths the lines

_LEFT, _RIGHT, _TOP = 92, 28, 56
_UPPER, _LOWER = (56, 400), (450, 570)  # rows of the two panels
_INK, _GREY, _RULE = (28, 28, 30), (110, 110, 115), (224, 224, 228)
_LINE, _BAND, _KEPT, _USABLE = (20, 92, 170), (206, 222, 241), (52, 128, 74), (246, 244, 236)

Point = tuple[float, float]


def response_plot(report: Mapping[str, Any]) -> Image.Image:
    """Plot a report (the keys of `card`)."""
    canvas = Image.new("RGB", (SIZE[0] * SCALE, SIZE[1] * SCALE), "white")
    pen = _Pen(ImageDraw.Draw(canvas))
    strengths = report["strengths"]
    x = _axis(strengths[0], strengths[-1], _LEFT, SIZE[0] - _RIGHT)
    low = min(0.0, *report["response"], *report["response_low"])
    high = max(0.0, *report["response"], *report["response_high"])
    margin = 0.06 * max(high - low, 0.1)
    y = _axis(low - margin, high + margin, _UPPER[1], _UPPER[0])
    kept = _axis(0.0, 1.0, _LOWER[1], _LOWER[0])
    usable = report["usable"]
    for top, bottom in (_UPPER, _LOWER):
        pen.box((x(usable["min"]), top), (x(usable["max"]), bottom), _USABLE)
    _grid(pen, x, strengths, y, _ticks(low - margin, high + margin), kept)
    band = [(x(s), y(v)) for s, v in zip(strengths, report["response_high"], strict=True)]
    band += reversed([(x(s), y(v)) for s, v in zip(strengths, report["response_low"], strict=True)])
    pen.area(band, _BAND)
    pen.line([(x(strengths[0]), y(0.0)), (x(strengths[-1]), y(0.0))], _GREY, 1)
    pen.curve([(x(s), y(v)) for s, v in zip(strengths, report["response"], strict=True)], _LINE)
    pen.curve([(x(s), kept(v)) for s, v in zip(strengths, report["preservation"], strict=True)], _KEPT)
    pen.text((_LEFT, _TOP - 14), "Response: 1 is the distance from the negative to the positive images (band: 95 %)", _LINE, 17)
    pen.text((_LEFT, _LOWER[0] - 14), "Preservation: 1 leaves everything else as it was", _KEPT, 17)
    pen.text((_LEFT, SIZE[1] - 14), "Strength; the usable interval is shaded", _GREY, 15)
    return canvas.resize(SIZE, Image.Resampling.LANCZOS)


def _axis(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / ((high - low) or 1.0) * (end - start)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers."""
    steps = (0.05, 0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0)
    step = next((s for s in steps if (high - low) / s <= 6), (high - low) / 5)
    first = int(low / step) - 1
    return [round(step * n, 6) for n in range(first, first + 16) if low <= step * n <= high]


def _grid(
    pen: _Pen,
    x: Callable[[float], float],
    strengths: Sequence[float],
    y: Callable[[float], float],
    ticks: Sequence[float],
    kept: Callable[[float], float],
) -> None:
    for value in ticks:
        pen.line([(_LEFT, y(value)), (SIZE[0] - _RIGHT, y(value))], _RULE, 1)
        pen.text((_LEFT - 10, y(value)), f"{value + 0.0:g}", _GREY, 15, "rm")
    for value in (0.0, 0.5, 1.0):
        pen.line([(_LEFT, kept(value)), (SIZE[0] - _RIGHT, kept(value))], _RULE, 1)
        pen.text((_LEFT - 10, kept(value)), f"{value:g}", _GREY, 15, "rm")
    every = -(-len(strengths) // 11)
    for strength in strengths[::every]:
        pen.text((x(strength), _LOWER[1] + 8), format_strength(strength), _INK, 15, "mt")


class _Pen:
    """Draws at `SCALE`, in the coordinates of the finished picture."""

    def __init__(self, draw: ImageDraw.ImageDraw) -> None:
        self._draw = draw

    def _at(self, points: Sequence[Point]) -> list[Point]:
        return [(px * SCALE, py * SCALE) for px, py in points]

    def line(self, points: Sequence[Point], fill: tuple[int, int, int], width: int) -> None:
        self._draw.line(self._at(points), fill=fill, width=width * SCALE, joint="curve")

    def curve(self, points: Sequence[Point], fill: tuple[int, int, int]) -> None:
        """A line with its points marked."""
        self.line(points, fill, 3)
        for px, py in self._at(points):
            self._draw.ellipse((px - 5 * SCALE, py - 5 * SCALE, px + 5 * SCALE, py + 5 * SCALE), fill=fill)

    def area(self, points: Sequence[Point], fill: tuple[int, int, int]) -> None:
        self._draw.polygon(self._at(points), fill=fill)

    def box(self, corner: Point, other: Point, fill: tuple[int, int, int]) -> None:
        self._draw.rectangle(self._at([corner, other]), fill=fill)

    def text(self, where: Point, text: str, fill: tuple[int, int, int], size: int, anchor: str = "lm") -> None:
        (place,) = self._at([where])
        self._draw.text(place, text, font=ImageFont.load_default(size * SCALE), fill=fill, anchor=anchor)

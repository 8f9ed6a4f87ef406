"""Line charts as SVG, drawn on the server: nothing is loaded for them, and they are kept as they are in a saved page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 900, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 26
MOST_POINTS = 320
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Line:
    """One curve; `style` is its class in the style sheet."""

    name: str
    style: str
    points: Points
    faint: Points = ()
    """The same before smoothing."""

    band: Sequence[tuple[float, float, float]] = ()
    """(x, low, high) around it."""


def chart(title: str, lines: Sequence[Line], x_label: str, logarithmic: bool = False, half: bool = False) -> Markup:
    """A chart of all lines over one pair of axes; a screen reader hears the title and each line's last value.

    `half` is for a chart of half the page's width, whose letters would else be half as large.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return Markup("")
    axes = _Axes.around(lines, logarithmic)
    parts = [*axes.grid(x_label)]
    for line in lines:
        if line.band:
            parts.append(axes.area(line))
        if line.faint:
            parts.append(axes.path(line.faint, f"line faint {line.style}"))
        parts.append(axes.path(line.points, f"line {line.style}"))
    spoken = "; ".join(f"{line.name} {line.points[-1][1]:.3g}" for line in lines)
    body = Markup("").join(parts)
    return Markup(
        '<figure class="chart{half}"><figcaption>{title}<span class="legend">{legend}</span></figcaption>'
        '<svg viewBox="0 0 {w} {h}" role="img" aria-label="{title}: {spoken}">{body}</svg></figure>'
    ).format(
        half=" half" if half else "", title=title, spoken=spoken, w=WIDTH, h=HEIGHT, body=body,
        legend=Markup("").join(Markup('<span class="key {}">{}</span>').format(line.style, line.name) for line in lines),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Axes:
    low_x: float
    high_x: float
    low_y: float
    high_y: float
    logarithmic: bool

    @classmethod
    def around(cls, lines: Sequence[Line], logarithmic: bool) -> _Axes:
        xs = [x for line in lines for x, _ in line.points]
        ys = [y for line in lines for _, y in (*line.points, *line.faint)]
        ys += [y for line in lines for _, low, high in line.band for y in (low, high)]
        positive = [y for y in ys if y > 0]
        logarithmic = logarithmic and len(positive) == len(ys)
        low, high = (min(ys), max(ys)) if not logarithmic else (math.log10(min(positive)), math.log10(max(positive)))
        room = (high - low) * 0.06 or max(abs(high), 1.0) * 0.1
        return cls(min(xs), max(max(xs), min(xs) + 1e-9), low - room, high + room, logarithmic)

    def place(self, x: float, y: float) -> tuple[float, float]:
        y = math.log10(y) if self.logarithmic else y
        across = (x - self.low_x) / (self.high_x - self.low_x)
        up = (y - self.low_y) / (self.high_y - self.low_y)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Points, style: str) -> Markup:
        places = [self.place(x, y) for x, y in thinned(points)]
        if len(places) == 1:
            return Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(style, *places[0])
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        return Markup('<polyline class="{}" points="{}"/>').format(style, drawn)

    def area(self, line: Line) -> Markup:
        upper = [self.place(x, high) for x, _, high in line.band]
        lower = [self.place(x, low) for x, low, _ in reversed(line.band)]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in (*upper, *lower))
        return Markup('<polygon class="band {}" points="{}"/>').format(line.style, drawn)

    def grid(self, x_label: str) -> list[Markup]:
        parts = []
        for tick in _ticks(self.low_y, self.high_y, 4):
            y = HEIGHT - BOTTOM - (tick - self.low_y) / (self.high_y - self.low_y) * (HEIGHT - TOP - BOTTOM)
            ends = (LEFT, WIDTH - RIGHT, y, y)
            parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(*ends))
            parts.append(_text(LEFT - 6, y + 4, "end", _short(10**tick if self.logarithmic else tick)))
        for tick in _ticks(self.low_x, self.high_x, 6):
            x = LEFT + (tick - self.low_x) / (self.high_x - self.low_x) * (WIDTH - LEFT - RIGHT)
            parts.append(_text(x, HEIGHT - 9, "middle", _short(tick)))
        parts.append(_text(WIDTH - RIGHT, TOP - 2, "end", x_label))
        return parts


def _text(x: float, y: float, anchor: str, words: str) -> Markup:
    return Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, words)


def thinned(points: Points) -> Points:
    """At most `MOST_POINTS` of them, evenly, with the last one."""
    if len(points) <= MOST_POINTS:
        return points
    return [points[round(i * (len(points) - 1) / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]


def _ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers between two ends."""
    rough = (high - low) / wanted
    size = 10 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= rough)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]


def _short(value: float) -> str:
    return f"{value:.3g}"

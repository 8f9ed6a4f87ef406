"""The report as JSON, which other programs read: these keys keep their names and meanings.

`step`, `family`, `adapter` (file name), `strengths` (rising), for each strength `response` (mean, in units of the distance
from the negative to the positive images), `response_low` and `response_high` (95 % bootstrap interval over prompts and seeds)
and `preservation` (1: all else stays, 0: as of another prompt or image); of the strengths that were trained `monotonicity`,
`range`, `balance`, `linearity`, `smoothness` (see `scores.Scores`); `usable` with `min` and `max`; `flags`, each with `code`
and `text`; `verdict`, a sentence; `strip` and `plot`, file names beside the report; `prompts`; `seeds`.

Besides: `trained` (the largest strength), `score` (0..1, by which checkpoints are compared), `confidence` (95 % intervals of
the scores), `ends` (why `usable` ends), `measure` (what the response was measured with).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from slider_plugin.files import replacing, write_json
from slider_plugin.report.flags import Flag, flags_of, verdict
from slider_plugin.report.plot import response_plot
from slider_plugin.report.scores import Curves, Scores, preservation, resampled, response, scores

CERTAIN = ("monotonicity", "range", "balance", "linearity")
"""Scores with an interval."""

ENOUGH = 0.5
"""A range that is worth no more points: -1 to +1 spans half of the distance between the images."""

REPORT, STRIP, PLOT = "report.json", "strip.png", "response.png"


@dataclass(frozen=True, slots=True)
class Card:
    """A finished report."""

    curves: Curves
    scores: Scores
    certain: Mapping[str, tuple[float, float]]
    flags: list[Flag]
    verdict: str
    low_S: np.ndarray
    high_S: np.ndarray

    @property
    def score(self) -> float:
        """0..1: monotonicity, root of the balance, range (`ENOUGH` is 1) and preservation, multiplied."""
        s = self.scores
        return float(max(0.0, s.monotonicity) * s.balance**0.5 * min(1.0, max(0.0, s.range) / ENOUGH) * s.preservation)

    @property
    def codes(self) -> set[str]:
        """The codes of its flags."""
        return {flag.code for flag in self.flags}


def card_of(curves: Curves, seed: int, separation: float) -> Card:
    """Score what was measured.

    Args:
        curves: what was measured.
        seed: of the bootstrap.
        separation: of the axis.
    """
    found = scores(curves)
    low, high = resampled(curves, seed, _numbers)
    certain = {name: (float(low[i]), float(high[i])) for i, name in enumerate(CERTAIN)}
    flags = flags_of(found, certain, curves.trained, separation)
    count = len(CERTAIN)
    return Card(curves, found, certain, flags, verdict(found, certain, flags, curves.trained), low[count:], high[count:])


def _numbers(curves: Curves) -> list[float]:
    found = scores(curves)
    return [*(getattr(found, name) for name in CERTAIN), *response(curves).tolist()]


def as_json(card: Card, about: Mapping[str, Any]) -> dict[str, Any]:
    """The report's keys; `about` has those that are no numbers: step, family, adapter, prompts, seeds, measure."""
    s = card.scores
    return {
        **about,
        "strengths": list(card.curves.strengths),
        "response": _rounded(response(card.curves)),
        "response_low": _rounded(card.low_S),
        "response_high": _rounded(card.high_S),
        "preservation": _rounded(preservation(card.curves)),
        **{name: round(getattr(s, name), 4) for name in ("monotonicity", "range", "balance", "linearity", "smoothness")},
        "usable": {"min": s.usable[0], "max": s.usable[1]},
        "ends": {"min": s.ends[0], "max": s.ends[1]},
        "trained": card.curves.trained,
        "score": round(card.score, 4),
        "confidence": {name: _rounded(np.array(ends)) for name, ends in card.certain.items()},
        "flags": [{"code": flag.code, "text": flag.text} for flag in card.flags],
        "verdict": card.verdict,
        "strip": STRIP,
        "plot": PLOT,
    }


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) + 0.0 for value in values]


def write(folder: Path, report: Mapping[str, Any], strip: Image.Image) -> Path:
    """Write `report.json`, `strip.png` and `response.png` into a folder, the JSON last; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in ((STRIP, strip), (PLOT, response_plot(report))):
        with replacing(folder / name) as temporary:
            picture.save(temporary, format="PNG")
    write_json(folder / REPORT, dict(report))
    return folder / REPORT

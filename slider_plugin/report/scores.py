"""How well a slider does, from its response curves alone: pure numbers, no model.

A response is measured in units of the distance from the mean negative to the mean positive image (`axis`): 1 means that far.
Arrays carry prompts P, seeds Q and strengths S; strengths rise and hold 0, where every response is 0 by definition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray

STALLED = 0.1
"""A step of the strengths counts as no response when it is below this share of the slope around 0."""

KEPT = 0.4
"""Preservation below this is another picture. Good sliders of the tiny world keep 0.54 and more at their trained strengths."""

ALIKE = 0.5
"""Pictures that differ less than this share of what they do at strength 0 have become alike; times what the concept takes."""

FOLDED = 0.75
"""A response that falls back below this share of its peak, within the strengths that were trained, has folded back."""

DRAWS = 1000
"""Resamplings of the bootstrap."""

BAND = (2.5, 97.5)
"""Percentiles of a 95 % interval."""


@dataclass(frozen=True, slots=True)
class Curves:
    """What was measured of one slider."""

    strengths: tuple[float, ...]
    """Rising, with 0 among them."""

    response_PQS: Array
    """Along the axis, against strength 0."""

    kept_PQS: Array
    """Everything else: likeness to the picture at strength 0 beside the axis; 1 is the same, 0 as of another picture."""

    spread_S: Array
    """How much the pictures of one strength differ among each other, as a share of that at strength 0."""

    contrast_S: Array
    """How much one picture differs between its places, as a share of that at strength 0."""

    trained: float = 1.0
    """The largest strength that was trained."""

    evenness: float = 1.0
    """0..1: how much less the images of one end of the axis differ than those of the other: dark pictures differ less."""

    @property
    def zero(self) -> int:
        """The place of strength 0."""
        return self.strengths.index(0.0)

    def within(self) -> list[int]:
        """Places of the strengths that were trained, or of all where fewer than three of these were drawn."""
        inside = [i for i, s in enumerate(self.strengths) if abs(s) <= self.trained + 1e-9]
        return inside if len(inside) >= 3 else list(range(len(self.strengths)))


@dataclass(frozen=True, slots=True)
class Scores:
    """Numbers about the strengths that were trained, and the interval of those that can be used."""

    monotonicity: float
    """-1..1: mean over prompts and seeds of the Spearman correlation of strength and response; a constant one counts as 0."""

    range: float
    """Mean response at the largest strength less that at the smallest."""

    balance: float
    """0..1: the smaller side's response over the larger one's; 0 where a side goes the other way."""

    linearity: float
    """0..1: R squared of the straight line through 0."""

    smoothness: float
    """0..1: 1 less the deviation of the steps between strengths over their mean; 0 is all in one jump."""

    preservation: float
    """0..1: the lower one of both ends; 1 leaves everything else alone, 0 is another picture."""

    usable: tuple[float, float]
    """The strengths around 0 between which the response goes on rising, the rest is preserved and pictures differ."""

    ends: tuple[str, str]
    """Why the interval ends there: `drawn` (no stronger one was drawn), `stalled`, `moved` or `alike`."""

    folded: bool
    """Whether a side falls back within the strengths that were trained."""


def scores(curves: Curves) -> Scores:
    """Score the mean curve and, for monotonicity, each one of it."""
    inside, mean_S = curves.within(), response(curves)
    at = np.asarray(curves.strengths)[inside]
    kept_S = preservation(curves)
    low, high = _usable(curves, mean_S, kept_S)
    return Scores(
        monotonicity=float(spearman(at, curves.response_PQS[:, :, inside]).mean()),
        range=float(mean_S[inside[-1]] - mean_S[inside[0]]),
        balance=balance(mean_S[inside[0]], mean_S[inside[-1]]),
        linearity=_linearity(at, mean_S[inside]),
        smoothness=_smoothness(at, mean_S[inside]),
        preservation=float(min(kept_S[inside[0]], kept_S[inside[-1]])),
        usable=(curves.strengths[low[0]], curves.strengths[high[0]]),
        ends=(low[1], high[1]),
        folded=_folded(mean_S[inside], inside.index(curves.zero)),
    )


def response(curves: Curves) -> Array:
    """The mean response over prompts and seeds, `(S,)`."""
    mean_S: Array = curves.response_PQS.mean(axis=(0, 1))
    return mean_S


def preservation(curves: Curves) -> Array:
    """How much of everything else stays, `(S,)` in 0..1."""
    kept_S: Array = np.clip(curves.kept_PQS.mean(axis=(0, 1)), 0.0, 1.0)
    return kept_S


def balance(low: float, high: float) -> float:
    """The smaller one of two sides over the larger one, 0..1, for responses at a minus and at a plus strength.

    A slider that goes the wrong way on both sides has its balance, too: the direction is another fault.
    """
    sides = (-low, high) if high - low >= 0 else (low, -high)
    return float(max(0.0, min(sides)) / max(sides)) if max(sides) > 0 else 0.0


def spearman(at_S: Array, values_XS: Array) -> Array:
    """Rank correlations of `(S,)` with each row of `(..., S)`, -1..1, with mean ranks for ties; 0 where either is constant."""
    one_S, other_XS = (_centred_ranks(np.asarray(values, dtype=np.float64)) for values in (at_S, values_XS))
    norm_X = np.linalg.norm(one_S) * np.linalg.norm(other_XS, axis=-1)
    correlation_X: Array = np.where(norm_X > 0, other_XS @ one_S / np.maximum(norm_X, 1e-12), 0.0)
    return correlation_X


def _centred_ranks(values_XS: Array) -> Array:
    below = (values_XS[..., None, :] < values_XS[..., :, None]).sum(-1)
    equal = (values_XS[..., None, :] == values_XS[..., :, None]).sum(-1)
    ranks_XS = below + equal / 2.0
    centred_XS: Array = ranks_XS - ranks_XS.mean(-1, keepdims=True)
    return centred_XS


def _linearity(at: Array, mean_S: Array) -> float:
    total = float(((mean_S - mean_S.mean()) ** 2).sum())
    slope = float(at @ mean_S) / max(float(at @ at), 1e-12)
    return max(0.0, 1.0 - float(((mean_S - slope * at) ** 2).sum()) / total) if total > 0 else 0.0


def _smoothness(at: Array, mean_S: Array) -> float:
    """After CSM, the deviation of the gaps (FreeSliders, evaluation/metrics.py); here steps back count, and width does not."""
    slopes = np.diff(mean_S) / np.diff(at)
    mean = abs(float(slopes.mean()))
    return max(0.0, 1.0 - float(slopes.std()) / mean) if mean > 0 else 0.0


def _folded(mean_S: Array, zero: int) -> bool:
    sign = np.sign(mean_S[-1] - mean_S[0]) or 1.0
    sides = (sign * mean_S[zero:], -sign * mean_S[zero::-1])
    return any(float(side.max()) > 0 and float(side[-1]) < FOLDED * float(side.max()) for side in sides)


# --- What can be used -------------------------------------------------------------------------------------------------


def _usable(curves: Curves, mean_S: Array, kept_S: Array) -> tuple[tuple[int, str], tuple[int, str]]:
    """Go outwards from 0 until something ends; on each side the last place that is good, and what ended it."""
    inside = curves.within()
    sign = float(np.sign(mean_S[inside[-1]] - mean_S[inside[0]])) or 1.0
    slope = abs(_slope_at_zero(curves, mean_S))

    def walk(step: int) -> tuple[int, str]:
        place = curves.zero
        while 0 <= place + step < len(curves.strengths):
            following = place + step
            if reason := _why_not(curves, sign * mean_S, kept_S, slope, place, following):
                return place, reason
            place = following
        return place, "drawn"

    return walk(-1), walk(1)


def _slope_at_zero(curves: Curves, mean_S: Array) -> float:
    """Response per unit of strength between the neighbours of 0."""
    low, high = max(0, curves.zero - 1), min(len(mean_S) - 1, curves.zero + 1)
    width = curves.strengths[high] - curves.strengths[low]
    return float(mean_S[high] - mean_S[low]) / width if width else 0.0


def _why_not(curves: Curves, mean_S: Array, kept_S: Array, slope: float, place: int, following: int) -> str:
    """Why strength `following` is not good any more; "" if it is."""
    rise = (mean_S[following] - mean_S[place]) / (curves.strengths[following] - curves.strengths[place])
    if min(curves.spread_S[following], curves.contrast_S[following]) < ALIKE * curves.evenness:
        return "alike"
    if kept_S[following] < KEPT:
        return "moved"
    return "stalled" if rise <= 0 or rise < STALLED * slope else ""


# --- How sure -----------------------------------------------------------------------------------------------------------


def resampled(curves: Curves, seed: int, number: Callable[[Curves], Sequence[float]]) -> tuple[Array, Array]:
    """Ends of the 95 % bootstrap intervals of some numbers, over prompts and seeds.

    Prompts and seeds are crossed factors, so both are drawn with replacement and independently (the pigeonhole bootstrap: Owen,
    Annals of Applied Statistics 2007). One prompt with one seed says nothing about others: the interval is then that point.

    Args:
        curves: what was measured.
        seed: of the resampling.
        number: gives the numbers of some curves.
    """
    rng = np.random.default_rng(seed)
    prompts, seeds = curves.response_PQS.shape[:2]
    found = []
    for _ in range(DRAWS if prompts * seeds > 1 else 1):
        places = np.ix_(rng.integers(prompts, size=prompts), rng.integers(seeds, size=seeds))
        found.append(number(_part(curves, places)))
    low, high = np.percentile(np.asarray(found, dtype=np.float64), BAND, axis=0)
    return low, high


def _part(curves: Curves, places: tuple[Array, ...]) -> Curves:
    return Curves(
        curves.strengths,
        curves.response_PQS[places],
        curves.kept_PQS[places],
        curves.spread_S,
        curves.contrast_S,
        curves.trained,
        curves.evenness,
    )

"""What is wrong with a slider, and what it does, in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slider_plugin.report.axis import SEEN
from slider_plugin.report.scores import Scores

NO_EFFECT = 0.1
"""A range below this share of the distance between negative and positive images is none."""

ONE_SIDED = 0.4
"""Balance below which one side does not work."""

UNEVEN = 0.8
"""Monotonicity below which strength and response do not rise together."""


@dataclass(frozen=True, slots=True)
class Flag:
    """One fault."""

    code: str
    """`wrong_direction`, `no_effect`, `one_sided`, `broken`, `saturated`, `uneven` or `weak_axis`."""

    text: str


def flags_of(scores: Scores, certain: Mapping[str, tuple[float, float]], trained: float, separation: float) -> list[Flag]:
    """What is wrong, the worst first.

    Args:
        scores: of the slider.
        certain: 95 % intervals by the name of the score.
        trained: the largest strength that was trained.
        separation: of the axis (`axis.Axis`); 1 where a scorer was asked instead.
    """
    ruined = _ruined(scores, trained)
    found = [ruined if ruined and scores.range > -NO_EFFECT else _direction(scores, certain)]
    if not any(found) or found == [ruined]:
        found = [ruined or _folded(scores), _side(scores)]
    if not any(found):
        found = [_uneven(scores), _saturated(scores, trained)]
    if separation < SEEN:
        found.append(
            Flag(
                "weak_axis",
                f"latents alone tell positive from negative images in {separation:.0%} of cases (chance is 50 %), so these "
                "numbers say little; name a model that sees the concept with --scorer",
            )
        )
    return [flag for flag in found if flag]


def _direction(scores: Scores, certain: Mapping[str, tuple[float, float]]) -> Flag | None:
    low, high = certain["range"]
    if scores.range < 0 and high < 0 and scores.range <= -NO_EFFECT:
        text = "plus strengths show less of the concept, and minus strengths more: are the buckets' strengths swapped?"
        return Flag("wrong_direction", text)
    if abs(scores.range) < NO_EFFECT or low <= 0.0 <= high:
        text = "strength hardly changes the concept: train longer, or at a higher learning rate"
        return Flag("no_effect", text)
    return None


def _ruined(scores: Scores, trained: float) -> Flag | None:
    early = [(edge, why) for edge, why in zip(scores.usable, scores.ends, strict=True) if abs(edge) < trained - 1e-9]
    for edge, why in early:
        if why == "alike":
            return Flag("broken", f"beyond {edge:+g} pictures become alike or lose their contrast: lower the learning rate")
        if why == "moved":
            return Flag("broken", f"beyond {edge:+g} little of the picture is left as it was: lower the learning rate")
    return None


def _folded(scores: Scores) -> Flag | None:
    text = "the response turns back before the trained strength: lower the learning rate, or train shorter"
    return Flag("broken", text) if scores.folded else None


def _side(scores: Scores) -> Flag | None:
    if scores.balance >= ONE_SIDED:
        return None
    text = "one sign of the strength works, and the other one hardly: are its images right, and is there room at strength 0?"
    return Flag("one_sided", text)


def _uneven(scores: Scores) -> Flag | None:
    if abs(scores.monotonicity) >= UNEVEN:
        return None
    return Flag("uneven", "strength and response do not rise together in all pictures: train longer, or with more images")


def _saturated(scores: Scores, trained: float) -> Flag | None:
    edges = [
        f"{e:+g}" for e, why in zip(scores.usable, scores.ends, strict=True) if why == "stalled" and abs(e) < trained - 1e-9
    ]
    return Flag("saturated", f"beyond {' and '.join(edges)} more strength changes nothing more") if edges else None


def verdict(scores: Scores, certain: Mapping[str, tuple[float, float]], flags: list[Flag], trained: float) -> str:
    """The report in one sentence."""
    faults = [flag for flag in flags if flag.code != "weak_axis"] or flags
    if faults:
        text = faults[0].text if faults[0].text.endswith("?") else f"{faults[0].text}."
        return f"{faults[0].code.replace('_', ' ').capitalize()}: {text}"
    low, high = certain["range"]
    return (
        f"Works: from -{trained:g} to +{trained:g} the concept moves {scores.range:.2f} of the way from the negative to the "
        f"positive images (95 %: {low:.2f} to {high:.2f}), monotonicity {scores.monotonicity:.2f}, balance "
        f"{scores.balance:.2f}, {scores.preservation:.0%} of the rest preserved; usable from {scores.usable[0]:+g} to "
        f"{scores.usable[1]:+g}."
    )

"""Scores and flags on curves that were written down: each fault is found, and a good slider has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from slider_plugin.errors import UserError
from slider_plugin.report.calibrate import FRACTION, calibration_of
from slider_plugin.report.card import Card, as_json, card_of
from slider_plugin.report.plot import SIZE, response_plot
from slider_plugin.report.scores import Curves, balance, scores, spearman

AT = tuple(-2.0 + 0.5 * i for i in range(9))
KEYS = {
    "step", "family", "adapter", "strengths", "response", "response_low", "response_high", "preservation", "monotonicity",
    "range", "balance", "linearity", "smoothness", "usable", "flags", "verdict", "strip", "plot", "prompts", "seeds",
}  # fmt: skip


def curves(answer: Callable[[np.ndarray], np.ndarray], noise: float = 0.02, **other: Any) -> Curves:
    """Three prompts and four seeds that answer to strength alike, but for a little noise; 0 at strength 0."""
    at = np.array(AT)
    rng = np.random.default_rng(0)
    response = answer(at) * rng.uniform(0.9, 1.1, (3, 4, 1)) + noise * rng.standard_normal((3, 4, 9)) * (at != 0)
    flat: dict[str, Any] = {"kept_PQS": np.full((3, 4, 9), 0.8), "spread_S": np.ones(9), "contrast_S": np.ones(9)}
    return Curves(AT, response, **(flat | other))


def card(answer: Callable[[np.ndarray], np.ndarray], **other: Any) -> Card:
    return card_of(curves(answer, **other), seed=0, separation=1.0)


def test_a_straight_slider_has_full_marks_and_no_flag() -> None:
    done = card(lambda s: 0.4 * s, noise=0.0)
    found = done.scores
    assert (found.monotonicity, found.balance, found.linearity) == (pytest.approx(1.0),) * 3
    assert found.smoothness == pytest.approx(1.0)
    assert found.range == pytest.approx(0.8, rel=0.05)
    assert found.usable == (-2.0, 2.0) and found.ends == ("drawn", "drawn")
    assert not done.flags and done.verdict.startswith("Works: from -1 to +1 the concept moves 0.8")
    assert done.score == pytest.approx(0.8)  # what is preserved is what is missing


def test_known_answers() -> None:
    """By hand: responses -0.2, 0, 0.4 at -1, 0, 1."""
    found = scores(Curves((-1.0, 0.0, 1.0), np.array([[[-0.2, 0.0, 0.4]]]), np.ones((1, 1, 3)), np.ones(3), np.ones(3)))
    assert found.range == pytest.approx(0.6)
    assert found.balance == pytest.approx(0.5)
    mean = 0.2 / 3  # the line through 0 is 0.3 s; residuals 0.1, 0, 0.1
    total = (-0.2 - mean) ** 2 + mean**2 + (0.4 - mean) ** 2
    assert found.linearity == pytest.approx(1 - 0.02 / total)
    assert found.smoothness == pytest.approx(1 - 0.1 / 0.3)  # slopes 0.2 and 0.4
    assert balance(-0.3, 0.3) == pytest.approx(1.0) and balance(0.1, 0.4) == 0.0 and balance(0.3, -0.3) == pytest.approx(1.0)
    assert spearman(np.array([1, 2, 3, 4, 5]), np.array([2, 1, 4, 3, 5])) == pytest.approx(0.8)
    assert spearman(np.array([1, 2, 3]), np.array([5, 5, 5])) == 0.0


def test_all_in_one_jump_is_not_smooth() -> None:
    found = scores(curves(lambda s: np.where(s > 0.75, 0.5, 0.0), noise=0.0))
    assert found.smoothness == 0.0


@pytest.mark.parametrize(
    ("flag", "answer", "other"),
    [
        ("wrong_direction", lambda s: -0.4 * s, {}),
        ("no_effect", lambda s: 0.01 * s, {}),
        ("one_sided", lambda s: np.where(s > 0, 0.4 * s, 0.04 * s), {}),
        ("saturated", lambda s: 0.3 * np.clip(s, -0.5, 0.5), {}),
        ("broken", lambda s: 0.4 * s, {"kept_PQS": np.full((3, 4, 9), 0.2)}),
        ("broken", lambda s: 0.4 * s, {"spread_S": np.array([0.1, 0.1, 0.2, 0.8, 1, 1, 1, 1, 1])}),
        ("broken", lambda s: 0.4 * s, {"contrast_S": np.array([1, 1, 1, 1, 1, 0.8, 0.1, 0.1, 0.1])}),
        ("broken", lambda s: np.where(s > 0.5, 0.1, 0.4 * s), {}),
        ("broken", lambda s: 0.01 * s, {"kept_PQS": np.full((3, 4, 9), 0.2)}),
        ("uneven", lambda s: np.where(np.abs(s) == 0.5, -0.2 * s, 0.3 * s), {}),
    ],
)
def test_each_fault_is_flagged(flag: str, answer: Callable[[np.ndarray], np.ndarray], other: dict[str, Any]) -> None:
    done = card(answer, **other)
    assert done.flags[0].code == flag
    assert done.verdict.rstrip(".") == f"{flag.replace('_', ' ').capitalize()}: {done.flags[0].text}"
    assert done.verdict[-1] in ".?" and not done.verdict.endswith("?.")


def test_pictures_may_become_as_uniform_as_the_concept_makes_them() -> None:
    dark = np.array([0.2, 0.25, 0.3, 0.6, 1, 1.2, 1.4, 1.5, 1.5])
    assert card(lambda s: 0.4 * s, spread_S=dark).codes == {"broken"}
    assert not card(lambda s: 0.4 * s, spread_S=dark, evenness=0.2).flags


def test_only_what_was_trained_is_judged() -> None:
    """Beyond the trained strength a slider may saturate: the usable interval says so, and no flag."""
    done = card(lambda s: 0.4 * np.clip(s, -1, 1))
    assert not done.flags and done.scores.usable == (-1.0, 1.0) and done.scores.ends == ("stalled", "stalled")
    half = card(lambda s: 0.4 * np.clip(s, -1, 1), trained=2.0)
    assert half.codes == {"saturated"}


def test_an_axis_that_tells_nothing_apart_is_said() -> None:
    done = card_of(curves(lambda s: 0.4 * s), seed=0, separation=0.55)
    assert done.codes == {"weak_axis"} and "55%" in done.verdict


def test_intervals_hold_the_mean_and_are_its_seed() -> None:
    measured = curves(lambda s: 0.4 * s)
    first, second = card_of(measured, 3, 1.0), card_of(measured, 3, 1.0)
    other = card_of(measured, 4, 1.0)
    assert np.array_equal(first.low_S, second.low_S) and not np.array_equal(first.low_S, other.low_S)
    low, high = first.certain["range"]
    assert low < first.scores.range < high and high - low < 0.2
    assert (first.low_S <= first.curves.response_PQS.mean((0, 1)) + 1e-12).all()
    one = Curves(AT, measured.response_PQS[:1, :1], np.ones((1, 1, 9)), np.ones(9), np.ones(9))
    lonely = card_of(one, 0, 1.0)
    assert lonely.certain["range"] == (pytest.approx(lonely.scores.range),) * 2


def test_the_report_has_its_keys_and_its_plot() -> None:
    about = {"step": 5, "family": "any", "adapter": "a.safetensors", "prompts": ["a"], "seeds": [1]}
    report = as_json(card(lambda s: 0.4 * s), about)
    assert set(report) >= KEYS
    assert report["usable"] == {"min": -2.0, "max": 2.0} and report["response"][4] == 0.0
    picture = response_plot(report)
    assert picture.size == SIZE
    colours = {colour for _, colour in picture.getcolors(1_000_000)}
    assert (20, 92, 170) in colours and (52, 128, 74) in colours, "both curves are drawn"
    flat = response_plot(as_json(card(lambda s: 0.0 * s, noise=0.0), about))
    assert flat.size == SIZE


# --- Calibration --------------------------------------------------------------------------------------------------------


def test_one_becomes_the_strength_that_reaches_the_fraction() -> None:
    for slope in (0.2, 0.4, 1.6):
        found = calibration_of(card(lambda s, slope=slope: slope * s, noise=0.0))
        assert found.factor == pytest.approx(FRACTION / slope, rel=0.06) and not found.at_edge
        assert found.high == pytest.approx(2.0 / found.factor)


def test_an_edge_before_the_fraction_is_said() -> None:
    found = calibration_of(card(lambda s: 0.15 * np.clip(s, -1, 1), noise=0.0))
    assert found.at_edge and found.factor == 1.0
    assert found.reached == pytest.approx(0.15, rel=0.06) and (found.low, found.high) == (-1.0, 1.0)


@pytest.mark.parametrize("answer", [lambda s: -0.4 * s, lambda s: 0.001 * s])
def test_a_slider_that_does_nothing_right_is_not_calibrated(answer: Callable[[np.ndarray], np.ndarray]) -> None:
    with pytest.raises(UserError, match="--calibrate: there is nothing to scale"):
        calibration_of(card(answer))

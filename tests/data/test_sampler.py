"""The cycle: hand-written sequences, measured probabilities, and positions that can be saved anywhere."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections import Counter
from itertools import islice, pairwise
from typing import Any

import pytest

from slider_hooks import BucketInfo, Draw, Sampler
from slider_plugin.data.sampler import CycleSampler, _Weights, cycle_length


def info(name: str, strength: float | None, batches: int = 1, **keys: Any) -> BucketInfo:
    return BucketInfo(**{"name": name, "strength": strength, "batches": batches, "samples": batches, **keys})


def trio(plus: int, minus: int, neutral: int) -> list[BucketInfo]:
    """One bucket of each sign, as far as it has batches."""
    all_three = [("plus", 1.0, plus), ("minus", -1.0, minus), ("zero", 0.0, neutral)]
    return [info(name, strength, batches) for name, strength, batches in all_three if batches]


def take(sampler: CycleSampler, count: int) -> list[Draw]:
    return list(islice(sampler, count))


def signs(buckets: list[BucketInfo], count: int, **keys: Any) -> str:
    strengths = {bucket.name: bucket.strength or 0 for bucket in buckets}
    draws = take(CycleSampler(buckets, 1, **keys), count)
    return " ".join("+" if strengths[d.bucket] > 0 else "-" if strengths[d.bucket] < 0 else "0" for d in draws)


# --- The cycle --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "two_epochs"),
    [
        ((2, 2, 2), "+ - 0 + - 0" + " + - 0 + - 0"),
        ((2, 4, 4), "+ - 0 + - 0 - 0 - 0" + " + - 0 + - 0 - 0 - 0"),
        ((4, 2, 4), "+ - 0 + - 0 + 0 + 0" + " + - 0 + - 0 + 0 + 0"),
        ((4, 4, 2), "+ - 0 + - 0 + - + -" + " + - 0 + - 0 + - + -"),
        ((1, 3, 5), "+ - 0 - 0 - 0 0 0" + " + - 0 - 0 - 0 0 0"),
        ((5, 1, 2), "+ - 0 + 0 + + +" + " + - 0 + 0 + + +"),
        ((3, 3, 0), "+ - + - + -" + " + - + - + -"),
        ((3, 1, 0), "+ - + +" + " + - + +"),
        ((2, 0, 3), "+ 0 + 0 0" + " + 0 + 0 0"),
        ((0, 2, 1), "- 0 -" + " - 0 -"),
        ((2, 0, 0), "+ +" + " + +"),
        ((0, 0, 2), "0 0" + " 0 0"),
    ],
)
def test_the_cycle(counts: tuple[int, int, int], two_epochs: str) -> None:
    assert signs(trio(*counts), 2 * sum(counts)) == two_epochs


def test_the_order_of_the_configuration_does_not_matter() -> None:
    assert signs(trio(2, 4, 4)[::-1], 10) == "+ - 0 + - 0 - 0 - 0"


def test_several_buckets_of_a_sign_share_its_turn() -> None:
    buckets = [info("p1", 1), info("p2", 0.5), info("n1", -1), info("n2", -2), info("n3", -0.5), info("z", None, 2)]
    assert signs(buckets, 7) == "+ - 0 + - 0 -"


@pytest.mark.parametrize("seed", range(20))
def test_an_epoch_gives_every_batch_once(seed: int) -> None:
    buckets = [info("p1", 1, 3), info("p2", 2, 5), info("n", -1, 4), info("z1", 0, 2), info("z2", None, 1)]
    sampler = CycleSampler(buckets, seed)
    for epoch in range(3):
        draws = take(sampler, 15)
        assert {draw.epoch for draw in draws} == {epoch}
        shown = {bucket.name: [d.index for d in draws if d.bucket == bucket.name] for bucket in buckets}
        assert shown == {bucket.name: list(range(bucket.batches)) for bucket in buckets}


def test_positions_count_on_across_epochs() -> None:
    assert [draw.position for draw in take(CycleSampler(trio(1, 2, 3), 1), 20)] == list(range(20))


def test_scales() -> None:
    buckets = [info("p", 1.5, 2), info("n", -0.5, 2), info("zero", 0.0, 1), info("none", None, 1)]
    draws = take(CycleSampler(buckets, 1, neutral_scale=2.0), 6)
    assert [draw.scale for draw in draws] == [1.5, -0.5, 2.0, 1.5, -0.5, -2.0]
    assert [draw.neutral for draw in draws] == [False, False, True] * 2


def test_neutral_scales_alternate_across_epochs() -> None:
    draws = take(CycleSampler(trio(1, 1, 3), 1, neutral_scale=0.7), 5 * 6)
    assert [draw.scale for draw in draws if draw.neutral] == [0.7, -0.7] * 9


def test_minus_zero_is_neutral() -> None:
    draw = next(CycleSampler([info("z", -0.0)], 1))
    assert draw == Draw(position=0, epoch=0, bucket="z", index=0, scale=1.0, neutral=True)


@pytest.mark.parametrize(("counts", "length"), [((1, 1, 1), 3), ((1, 1, 0), 2), ((0, 0, 3), 1), ((2, 0, 2), 2)])
def test_cycle_length(counts: tuple[int, int, int], length: int) -> None:
    assert cycle_length([*trio(*counts), *(info(f"more {b.name}", b.strength) for b in trio(*counts))]) == length


# --- Chance -----------------------------------------------------------------------------------------------------------

MANY = 20_000


def shares(buckets: list[BucketInfo], **keys: Any) -> dict[str, float]:
    """How often each bucket is drawn, as long as none is exhausted."""
    counts = Counter(draw.bucket for draw in take(CycleSampler(buckets, 5, **keys), MANY))
    return {bucket.name: counts[bucket.name] / MANY for bucket in buckets}


def test_uniform_draws_by_probability_alone() -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 0.5, "d": 0.01}
    found = shares([info(n, 1, MANY, probability=w, samples=10 ** (i + 1)) for i, (n, w) in enumerate(weights.items())])
    assert found == pytest.approx({name: weight / 3.51 for name, weight in weights.items()}, abs=0.01)
    assert 0 < found["d"] < 0.006


def test_auto_weighting_draws_by_probability_times_samples() -> None:
    facts = {"a": (1.0, 100), "b": (2.0, 100), "c": (0.5, 1000)}
    buckets = [info(name, 1, MANY, probability=weight, samples=samples) for name, (weight, samples) in facts.items()]
    assert shares(buckets, weighting="auto-weighting") == pytest.approx({"a": 1 / 8, "b": 2 / 8, "c": 5 / 8}, abs=0.01)


def test_probabilities_hold_inside_a_sign_only() -> None:
    found = shares([info("p", 1, MANY, probability=1000), info("n1", -1, MANY), info("n2", -1, MANY, probability=3)])
    assert found == pytest.approx({"p": 1 / 2, "n1": 1 / 8, "n2": 3 / 8}, abs=0.01)


def test_after_one_has_left_the_others_keep_their_shares() -> None:
    rest = [info(name, 1, MANY, probability=weight) for name, weight in (("a", 1.0), ("b", 3.0))]
    counts = Counter(draw.bucket for draw in take(CycleSampler([info("gone", 1, 5, probability=4.0), *rest], 3), MANY))
    assert counts["gone"] == 5
    assert counts["a"] / MANY == pytest.approx(0.25, abs=0.01)


def test_probability_zero_comes_last() -> None:
    buckets = [info("never", 1, 2, probability=0), info("p", 1, 3), info("n", -1, 6)]
    order = [draw.bucket for draw in take(CycleSampler(buckets, 1), 11) if draw.bucket != "n"]
    assert order == ["p", "p", "p", "never", "never"]


@pytest.mark.parametrize("weighting", ["uniform", "auto-weighting"])
def test_probability_zero_everywhere(weighting: str) -> None:
    buckets = [info(name, 1, MANY, probability=0) for name in "ab"]
    assert shares(buckets, weighting=weighting) == pytest.approx({"a": 0.5, "b": 0.5}, abs=0.02)


@pytest.mark.parametrize("probability", [5e-324, 1e-300, 1e308])
def test_extreme_probabilities(probability: float) -> None:
    assert shares([info(name, 1, MANY, probability=probability) for name in "ab"])["a"] == pytest.approx(0.5, abs=0.02)


def test_a_negligible_probability_is_still_served() -> None:
    buckets = [info("tiny", 1, 1, probability=1e-320), info("huge", 1, 50, probability=1e300)]
    assert [draw.bucket for draw in take(CycleSampler(buckets, 1), 51)] == ["huge"] * 50 + ["tiny"]


def test_many_removals_leave_no_rounding_behind() -> None:
    buckets = [info(str(i), 1, 1, probability=10.0 ** (i % 30 - 15)) for i in range(997)]
    sampler = CycleSampler(buckets, 2)
    for epoch in range(3):
        draws = take(sampler, 997)
        assert len({draw.bucket for draw in draws}) == 997 and {draw.epoch for draw in draws} == {epoch}


def test_rounding_never_finds_one_that_has_left() -> None:
    for gone in ((), (2,), (1, 2), (0, 2)):
        weights = _Weights(range(3), [0.1, 0.2, 0.3])
        weights.refill([leaf not in gone for leaf in range(3)])
        assert weights.find(1.0) == max({0, 1, 2} - set(gone))
        assert weights.find(0.0) == min({0, 1, 2} - set(gone))


def test_consecutive_draws_are_independent() -> None:
    names = [draw.bucket for draw in take(CycleSampler([info(name, 1, MANY) for name in "ab"], 9), MANY)]
    pairs = Counter(pairwise(names))
    assert all(count / MANY == pytest.approx(0.25, abs=0.015) for count in pairs.values()) and len(pairs) == 4


# --- Determinism and saved positions ----------------------------------------------------------------------------------

MIXED = [
    info("p1", 1, 3, probability=2.0),
    info("p2", 0.5, 2, probability=0),
    info("n1", -1, 5),
    info("n2", -2, 1, probability=0.3),
    info("z1", 0, 2),
    info("z2", None, 3),
]
LENGTH = 3 * sum(bucket.batches for bucket in MIXED)


def test_the_sequence_is_fixed() -> None:
    """Written down, so that no release changes what a seed means without being noticed."""
    names = " ".join(draw.bucket for draw in take(CycleSampler(MIXED, 42), 16))
    assert names == "p1 n1 z1 p1 n2 z1 p1 n1 z2 p2 n1 z2 p2 n1 z2 n1"


def test_seeds_differ() -> None:
    orders = {tuple(draw.bucket for draw in take(CycleSampler(MIXED, seed), LENGTH)) for seed in range(50)}
    assert len(orders) > 45
    assert take(CycleSampler(MIXED, 2**63 - 1), LENGTH) != take(CycleSampler(MIXED, 0), LENGTH)


@pytest.mark.parametrize("position", range(LENGTH + 1))
def test_every_position_can_be_saved_and_restored(position: int) -> None:
    expected = take(CycleSampler(MIXED, 4), LENGTH + 20)
    running = CycleSampler(MIXED, 4)
    take(running, position)
    state = json.loads(json.dumps(running.state_dict()))
    restored = CycleSampler(MIXED, 4)
    take(restored, 7)  # what it did before does not matter
    restored.load_state_dict(state)
    assert restored.state_dict() == state
    assert take(restored, LENGTH + 20 - position) == expected[position:]
    assert take(running, 20) == expected[position : position + 20]


def test_a_saved_position_does_not_move_on() -> None:
    sampler = CycleSampler(MIXED, 4)
    state = sampler.state_dict()
    take(sampler, 5)
    assert state == CycleSampler(MIXED, 4).state_dict()


OTHERS = {
    "fewer": MIXED[:-1],
    "order": MIXED[::-1],
    "batches": [*MIXED[:-1], info("z2", None, 4)],
    "samples": [*MIXED[:-1], info("z2", None, 3, samples=9)],
    "name": [*MIXED[:-1], info("z3", None, 3)],
    "strength": [*MIXED[:-1], info("z2", 1.0, 3)],
    "probability": [*MIXED[:-1], info("z2", None, 3, probability=2)],
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_position_of_other_buckets_is_refused(other: str) -> None:
    sampler = CycleSampler(OTHERS[other], 4)
    with pytest.raises(ValueError, match="the saved sampler position belongs to other buckets"):
        sampler.load_state_dict(CycleSampler(MIXED, 4).state_dict())
    assert take(sampler, 10) == take(CycleSampler(OTHERS[other], 4), 10)


def test_a_position_of_another_seed_or_weighting_is_refused() -> None:
    state = CycleSampler(MIXED, 4).state_dict()
    with pytest.raises(ValueError, match="has seed 4, this run 5"):
        CycleSampler(MIXED, 5).load_state_dict(state)
    with pytest.raises(ValueError, match="has weighting 'uniform', this run 'auto-weighting'"):
        CycleSampler(MIXED, 4, "auto-weighting").load_state_dict(state)


@pytest.mark.parametrize(
    "damage",
    [{"left": [1]}, {"left": [99] * 6}, {"left": [-1] * 6}, {"left": None}, {"position": -1}, {"epoch": "1"}, {"turn": None}],
)
def test_a_damaged_position_is_refused_and_changes_nothing(damage: dict[str, Any]) -> None:
    sampler = CycleSampler(MIXED, 4)
    with pytest.raises(ValueError, match="the saved sampler position is damaged"):
        sampler.load_state_dict({**sampler.state_dict(), "position": 3, **damage})
    assert take(sampler, 10) == take(CycleSampler(MIXED, 4), 10)


# --- What it accepts, and what it costs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("buckets", "keys", "message"),
    [
        ([], {}, "at least one bucket"),
        ([info("a", 1), info("a", -1)], {}, "same name"),
        ([info("a", 1, 0)], {}, "bucket 'a' has no batches"),
        ([info("a", 1, probability=-1)], {}, "bucket 'a' has probability -1"),
        ([info("a", 1, probability=float("nan"))], {}, "bucket 'a' has probability nan"),
        ([info("a", float("nan"))], {}, "bucket 'a' has strength nan"),
        ([info("a", 1)], {"weighting": "fair"}, "unknown weighting 'fair'; there are uniform and auto-weighting"),
        ([info("a", 1)], {"neutral_scale": 0.0}, "neutral_scale must be a positive number"),
    ],
)
def test_what_cannot_be_sampled(buckets: list[BucketInfo], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CycleSampler(buckets, 1, **keys)


def test_it_is_a_sampler_of_the_contract() -> None:
    sampler = CycleSampler(MIXED, 1)
    assert isinstance(sampler, Sampler)
    assert iter(sampler) is sampler


def test_a_hundred_thousand_buckets() -> None:
    buckets = [info(str(i), (1.0, -1.0, 0.0)[i % 3], 3, probability=1 + i % 5) for i in range(100_000)]
    tracemalloc.start()
    sampler = CycleSampler(buckets, 1)
    size = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size < 50_000_000
    start = time.perf_counter()
    take(sampler, 20_000)
    # 6 microseconds a draw where this was written; a search through all buckets takes milliseconds.
    assert (time.perf_counter() - start) / 20_000 < 200e-6

"""The default sampler: round the signs that exist, positive, negative, neutral, and inside a sign by weight.

Every draw is one batch of one bucket. A bucket that has given all its batches leaves until the next epoch; a sign without
buckets leaves the cycle, and the others keep their turns. With 2 positive, 4 negative and 4 neutral batches an epoch is
`+ - 0 + - 0 - 0 - 0`.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from slider_hooks import BucketInfo, Draw

WEIGHTINGS = ("uniform", "auto-weighting")

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def cycle_length(buckets: Sequence[BucketInfo]) -> int:
    """Draws in one round of the cycle: how many of positive, negative and neutral exist."""
    return len({_sign(bucket) for bucket in buckets})


class CycleSampler:
    """The documented cycle, as an endless sequence of draws that depends on the seed and the position alone.

    Inside a sign the weight of a bucket is its probability (`uniform`), or probability times samples (`auto-weighting`). A
    bucket with probability 0 is drawn, by equal weight, only when nothing else of its sign is left. Neutral draws take
    `+neutral_scale` and `-neutral_scale` in turn, across epochs. When all buckets have given all their batches, a new epoch
    starts at the first sign. A draw costs O(log n) in the number of buckets.
    """

    def __init__(
        self, buckets: Sequence[BucketInfo], seed: int, weighting: str = "uniform", neutral_scale: float = 1.0
    ) -> None:
        _check(buckets, weighting, neutral_scale)
        self._buckets = tuple(buckets)
        self._seed = seed
        self._weighting = weighting
        self._neutral_scale = neutral_scale
        self._key = _mix(seed & _MASK)
        self._full = array("q", (bucket.batches for bucket in self._buckets))
        self._signs = [_tiers(self._buckets, sign, weighting) for sign in (1, -1, 0)]
        self._position = self._epoch = self._neutral_draws = 0
        self._start_epoch()

    def __iter__(self) -> Iterator[Draw]:
        return self

    def __next__(self) -> Draw:
        tree = self._next_tree()
        if tree is None:
            self._epoch += 1
            self._start_epoch()
            tree = self._next_tree()
        assert tree is not None, "a bucket has at least one batch"
        leaf = tree.find(_unit(self._key, self._position))
        place = tree.members[leaf]
        left = self._left[place]
        self._left[place] = left - 1
        if left == 1:
            tree.remove(leaf)
        return self._draw(place, self._full[place] - left)

    def state_dict(self) -> dict[str, Any]:
        """The position as JSON: counters, and the batches left of each bucket in order."""
        return {
            "position": self._position,
            "epoch": self._epoch,
            "turn": self._turn,
            "neutral_draws": self._neutral_draws,
            "left": self._left.tolist(),
            "seed": self._seed,
            "weighting": self._weighting,
            "fingerprint": _fingerprint(self._buckets),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved position.

        Raises:
            ValueError: the state was saved with other buckets, another seed or another weighting, or is damaged. The
                sampler is then as it was.
        """
        self._refuse_other(state)
        left = _batches_left(state, self._full)
        numbers = [_count(state, key) for key in ("position", "epoch", "turn", "neutral_draws")]
        self._position, self._epoch, self._turn, self._neutral_draws = numbers
        self._turn %= len(self._signs)
        self._left = left
        for tree in self._trees():
            tree.refill(left)

    def _start_epoch(self) -> None:
        self._turn = 0
        self._left = self._full[:]
        for tree in self._trees():
            tree.refill(self._left)

    def _trees(self) -> list[_Weights]:
        return [tree for tiers in self._signs for tree in tiers]

    def _next_tree(self) -> _Weights | None:
        """The buckets whose turn it is. The turn moves on from the sign that is drawn, so that nobody's turn is lost."""
        for step in range(len(self._signs)):
            sign = (self._turn + step) % len(self._signs)
            for tree in self._signs[sign]:
                if tree.total > 0:
                    self._turn = (sign + 1) % len(self._signs)
                    return tree
        return None

    def _draw(self, place: int, index: int) -> Draw:
        bucket = self._buckets[place]
        scale = bucket.strength or 0.0
        neutral = scale == 0
        if neutral:
            scale = -self._neutral_scale if self._neutral_draws % 2 else self._neutral_scale
            self._neutral_draws += 1
        position = self._position
        self._position += 1
        return Draw(position=position, epoch=self._epoch, bucket=bucket.name, index=index, scale=scale, neutral=neutral)

    def _refuse_other(self, state: Mapping[str, Any]) -> None:
        ours = {"seed": self._seed, "weighting": self._weighting, "fingerprint": _fingerprint(self._buckets)}
        other = [key for key, value in ours.items() if state.get(key) != value]
        if "fingerprint" in other:
            what = "names, strengths, probabilities, numbers of images or the batch size"
            raise ValueError(
                f"the saved sampler position belongs to other buckets ({what} differ): restore them, or start anew"
            )
        for key in other:
            raise ValueError(f"the saved sampler position has {key} {state.get(key)!r}, this run {ours[key]!r}: use the former")


class _Weights:
    """Weighted choice among buckets that leave one by one: a binary tree of sums.

    `sums[1]` is the total, `sums[n]` that of its children 2n and 2n + 1, and the second half are the leaves. A sum is always
    computed from its two children, never by subtracting, so no rounding error builds up, and the sums depend only on who
    is left, not on the order in which others went.
    """

    __slots__ = ("_half", "_sums", "_weights", "members")

    def __init__(self, members: Sequence[int], weights: Sequence[float]) -> None:
        self.members = array("q", members)
        self._weights = array("d", weights)
        self._half = 1 << (len(weights) - 1).bit_length() if weights else 1
        self._sums = array("d", bytes(16 * self._half))

    @property
    def total(self) -> float:
        """0 exactly when nobody is left."""
        return self._sums[1]

    def refill(self, left: Sequence[int]) -> None:
        """Take in every member with batches left."""
        sums, half = self._sums, self._half
        for leaf, (member, weight) in enumerate(zip(self.members, self._weights, strict=True)):
            sums[half + leaf] = weight if left[member] else 0.0
        for node in range(half - 1, 0, -1):
            sums[node] = sums[2 * node] + sums[2 * node + 1]

    def remove(self, leaf: int) -> None:
        """Let one member go."""
        sums = self._sums
        node = self._half + leaf
        sums[node] = 0.0
        while node > 1:
            node //= 2
            sums[node] = sums[2 * node] + sums[2 * node + 1]

    def find(self, unit: float) -> int:
        """The leaf at the fraction `unit` (0 to 1, without 1) of the total weight; never one that has left."""
        sums, half = self._sums, self._half
        rest, node = unit * sums[1], 1
        while node < half:
            node *= 2
            # The second condition catches a rest that rounding has pushed beyond the last weight.
            if rest >= sums[node] and sums[node + 1] > 0:
                rest -= sums[node]
                node += 1
        return node - half


# --- Buckets ----------------------------------------------------------------------------------------------------------


def _sign(bucket: BucketInfo) -> int:
    strength = bucket.strength or 0.0
    return (strength > 0) - (strength < 0)


def _tiers(buckets: Sequence[BucketInfo], sign: int, weighting: str) -> tuple[_Weights, _Weights]:
    """The buckets of one sign: those with a probability, then those without one, which come last."""
    members = [place for place, bucket in enumerate(buckets) if _sign(bucket) == sign]
    # The largest is 1: sums cannot overflow. One that is too small beside it counts as 0.
    largest = max((buckets[place].probability for place in members), default=0.0) or 1.0
    weights = {place: buckets[place].probability / largest for place in members}
    if weighting == "auto-weighting":
        weights = {place: weight * buckets[place].samples for place, weight in weights.items()}
    first = [place for place in members if weights[place] > 0]
    last = [place for place in members if not weights[place] > 0]
    return _Weights(first, [weights[place] for place in first]), _Weights(last, [1.0] * len(last))


def _check(buckets: Sequence[BucketInfo], weighting: str, neutral_scale: float) -> None:
    if not buckets:
        raise ValueError("a sampler needs at least one bucket")
    if len({bucket.name for bucket in buckets}) != len(buckets):
        raise ValueError("two buckets have the same name")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"unknown weighting {weighting!r}; there are {' and '.join(WEIGHTINGS)}")
    if not (math.isfinite(neutral_scale) and neutral_scale > 0):
        raise ValueError(f"neutral_scale must be a positive number, not {neutral_scale!r}")
    for bucket in buckets:
        _check_bucket(bucket)


def _check_bucket(bucket: BucketInfo) -> None:
    if bucket.batches < 1:
        raise ValueError(f"bucket {bucket.name!r} has no batches")
    if not (math.isfinite(bucket.probability) and bucket.probability >= 0):
        raise ValueError(f"bucket {bucket.name!r} has probability {bucket.probability!r}; it must be 0 or more")
    if bucket.strength is not None and not math.isfinite(bucket.strength):
        raise ValueError(f"bucket {bucket.name!r} has strength {bucket.strength!r}; it must be a number")


def _fingerprint(buckets: Sequence[BucketInfo]) -> str:
    facts = [[b.name, b.strength or 0.0, b.batches, b.samples, float(b.probability)] for b in buckets]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


# --- Saved positions --------------------------------------------------------------------------------------------------


def _count(state: Mapping[str, Any], key: str) -> int:
    value = state.get(key)
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"the saved sampler position is damaged: {key} is {value!r}")
    return value


def _batches_left(state: Mapping[str, Any], full: Sequence[int]) -> array[int]:
    left = state.get("left")
    if not isinstance(left, list) or len(left) != len(full):
        raise ValueError("the saved sampler position is damaged: it does not say how many batches are left of each bucket")
    if not all(isinstance(n, int) and 0 <= n <= most for n, most in zip(left, full, strict=True)):
        raise ValueError("the saved sampler position is damaged: more batches are left than there are")
    return array("q", left)


# --- Random numbers ---------------------------------------------------------------------------------------------------


def _mix(value: int) -> int:
    """The output function of splitmix64 (Steele, Lea and Flood 2014): every bit of the result depends on every bit given."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _unit(key: int, position: int) -> float:
    """The random number of a position, 0 to 1 without 1: counted, not carried, so any position can be resumed at."""
    return (_mix((key + (position + 1) * _GOLDEN) & _MASK) >> 11) * 2.0**-53

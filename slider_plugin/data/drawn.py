"""Draws without an image of their own: those of a text slider, and anchors, which keep their place in every cycle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from slider_hooks import BucketInfo, Draw, Sampler

TEXT = {1.0: "(text +)", -1.0: "(text -)"}
"""Names that stand for buckets where a text slider has none with a strength; by their strength."""

ANCHOR = "(anchor)"
"""The same for all anchors."""


def text_infos(batches: int, batch_size: int) -> tuple[BucketInfo, ...]:
    """What the sampler sees of a text slider without images: as many draws of each sign as neutral buckets have, if any."""
    batches = max(1, batches)
    return tuple(
        BucketInfo(name=name, strength=strength, batches=batches, samples=batches * batch_size)
        for strength, name in TEXT.items()
    )


class AnchorSampler:
    """Another sampler's draws, and after each of its cycles one of an anchor.

    Anchors take turns, and all of them have had `+scale` before they have `-scale`.
    """

    def __init__(self, others: Sampler, cycle: int, anchors: int, scale: float) -> None:
        """Go round with an anchor.

        Args:
            others: the sampler of everything else.
            cycle: draws of it in one cycle.
            anchors: how many there are.
            scale: at which they are kept, plus and minus.
        """
        self._others, self._cycle, self._anchors, self._scale = others, cycle, anchors, scale
        self._position = 0

    def __iter__(self) -> Iterator[Draw]:
        return self

    def __next__(self) -> Draw:
        number, place = divmod(self._position, self._cycle + 1)
        draw = self._anchor(number) if place == self._cycle else next(self._others)
        draw = replace(draw, position=self._position)
        self._position += 1
        return draw

    def _anchor(self, number: int) -> Draw:
        scale = -self._scale if number // self._anchors % 2 else self._scale
        return Draw(position=0, epoch=0, bucket=ANCHOR, index=number, scale=scale, neutral=True)

    def state_dict(self) -> dict[str, Any]:
        """The position."""
        return {"position": self._position, "others": self._others.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved position. Raises ValueError if it was saved with other buckets."""
        if "others" not in state:
            raise ValueError("the position was saved without anchors")
        self._others.load_state_dict(state["others"])
        self._position = int(state["position"])

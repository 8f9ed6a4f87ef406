"""What a report is about: the words that are drawn, and the facts beside its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slider_plugin.data.buckets import Bucket
from slider_plugin.report.ends import Ends, sides_of
from slider_plugin.report.probe import Request

if TYPE_CHECKING:
    from slider_plugin.family import LoadedFamily

CAPTIONS = 4
"""Prompts that are taken from the data where the configuration has none."""


def captions_of(buckets: Sequence[Bucket]) -> tuple[str, ...]:
    """A few captions of positive and negative images in turn."""
    captions = dict.fromkeys(item.captions[0] for pair in zip(*sides_of(buckets), strict=False) for _, item in pair)
    return tuple(captions)[:CAPTIONS]


def facts_about(
    family: LoadedFamily, adapter: str, step: int, request: Request, scorer: str | None, ends: Ends
) -> dict[str, Any]:
    """The keys of a report that are no numbers."""
    axis = ends.axis() if scorer is None else None
    return {
        "step": step,
        "family": family.facts.name,
        "adapter": adapter,
        "prompts": list(request.prompts),
        "seeds": list(request.seeds),
        "measure": {
            "kind": "latents" if scorer is None else "extension" if scorer == "extension" else Path(scorer).name,
            "ends": ends.source,
            "images": [len(side) for side in ends.vectors],
            "separation": None if axis is None else round(axis.separation, 4),
        },
    }

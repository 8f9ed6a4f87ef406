"""What the adapter learns from: one small class for each objective, with its formula above it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slider_hooks import Objective

BUILT_IN = ("bucket", "pair", "text")


def built_in(name: str, config: Mapping[str, Any]) -> Objective | None:
    """The objective of a run with this configuration; None for a name that is not among `BUILT_IN`."""
    if name == "bucket":
        from slider_plugin.objectives.bucket import Bucket

        return Bucket()
    if name == "pair":
        from slider_plugin.objectives.pair import Pair

        return Pair(config["pair_target"], config["pair_mask"])
    if name == "text":
        from slider_plugin.config import TextConfig
        from slider_plugin.objectives.text import Text

        return Text([TextConfig.model_validate(words) for words in config["slider_text"]], config["text_guidance"])
    return None

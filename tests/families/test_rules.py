"""Every rule of the test kit on every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from slider_plugin.registry import Plugins
from slider_plugin.testing.rules import RULES
from slider_plugin.testing.subject import Subject

FAMILIES = sorted(Path(__file__).parents[2].joinpath("slider_plugin", "architectures").glob("[!_]*.py"))


DIFFERENT = {
    ("ltx2", "training_asks_what_the_pipeline_asks"): "trains with the sound stream cut off, draws with it",
    ("minimax_h3", "training_asks_what_the_pipeline_asks"): "trains without the rows of sound, draws with them",
    ("ideogram4", "training_asks_what_the_pipeline_asks"): "draws with its text padded to 2048 tokens, which it masks",
}
"""Rules that a family breaks on purpose."""


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", [path.stem for path in FAMILIES])
def test_rule(family: str, rule: str, tiny_folders: Callable[[str], Path]) -> None:
    subject = Subject.load(Plugins.discover().load(family), tiny_folders(family))
    if (family, rule) not in DIFFERENT:
        RULES[rule](subject)
        return
    with pytest.raises((AssertionError, RuntimeError, TypeError)):  # once it holds, the entry above has to go
        RULES[rule](subject)

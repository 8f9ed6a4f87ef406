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


TOGETHER = "a_saved_slider_answers_the_same_in_a_new_process"
"""The rule that test_reload.py runs for all families in one process."""


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != TOGETHER])
@pytest.mark.parametrize("family", [path.stem for path in FAMILIES])
def test_rule(family: str, rule: str, tiny_folders: Callable[[str], Path]) -> None:
    subject = Subject.load(Plugins.discover().load(family), tiny_folders(family))
    if (family, rule) not in DIFFERENT:
        RULES[rule](subject)
        return
    with pytest.raises((AssertionError, RuntimeError, TypeError)):  # once it holds, the entry above has to go
        RULES[rule](subject)

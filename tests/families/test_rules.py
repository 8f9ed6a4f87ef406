"""Every rule of the test kit on every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from slider_plugin.registry import Plugins
from slider_plugin.testing.rules import RULES
from slider_plugin.testing.subject import Subject

FAMILIES = sorted(Path(__file__).parents[2].joinpath("slider_plugin", "architectures").glob("[!_]*.py"))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", [path.stem for path in FAMILIES])
def test_rule(family: str, rule: str, tiny_folders: Callable[[str], Path]) -> None:
    RULES[rule](Subject.load(Plugins.discover().load(family), tiny_folders(family)))

"""What slider-plugin asks of every family, on the tiny model of this one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from slider_plugin.testing import RULES, Subject

pytest_plugins = ["slider_plugin.testing"]


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule: str, slider_subject: Callable[[str], Subject]) -> None:
    RULES[rule](slider_subject("my_model"))

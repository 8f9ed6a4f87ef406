"""The kit that families are tested with, ours and everybody's: tiny pipelines of real classes, and rules that hold on them.

In a package's own tests::

    import pytest
    from slider_plugin.testing import RULES

    pytest_plugins = ["slider_plugin.testing"]

    @pytest.mark.parametrize("rule", RULES)
    def test_rule(rule, slider_subject):
        RULES[rule](slider_subject("my_family"))

On the command line, `slider plugins check my_family` runs the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slider_plugin.testing.rules import RULES
    from slider_plugin.testing.subject import PROMPTS, Subject

__all__ = ["PROMPTS", "RULES", "Subject"]

pytest_plugins = ["slider_plugin.testing.fixtures"]
"""What pytest finds here when a test names this package as a plugin."""

_HOMES = {"RULES": "rules", "PROMPTS": "subject", "Subject": "subject"}


def __getattr__(name: str) -> Any:
    """Import what is asked for, and torch with it: a family's `tiny` imports this package for its parts alone."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

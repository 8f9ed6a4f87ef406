"""Errors that are the user's to mend: they end a command with one clear message and exit code 2."""

from __future__ import annotations

from collections.abc import Iterable

from slider_hooks.errors import UserError

__all__ = ["ConfigError", "PluginError", "UserError"]


class ConfigError(UserError):
    """Everything that is wrong with a configuration, found in one go."""

    def __init__(self, problems: Iterable[str], where: str = "the configuration") -> None:
        self.problems = tuple(problems)
        count = "a problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{count} in {where}:\n" + "\n".join(f"  - {p}" for p in self.problems))


class PluginError(UserError):
    """A plugin could not be found, loaded or used; the message names family, distribution and the way out."""

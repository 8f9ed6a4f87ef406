"""How the page's child processes start: with no way to import a file of the workspace by the name of a library."""

from __future__ import annotations

import os
import sys


def python(*arguments: str) -> list[str]:
    """The command of a child; `-P` keeps the folder that it starts in out of its search path."""
    return [sys.executable, "-P", "-m", *arguments]


def environment(**more: str) -> dict[str, str]:
    """This process's, and more. An entry of PYTHONPATH that is empty or relative would be the folder that a child starts in."""
    inherited = dict(os.environ)
    if given := inherited.pop("PYTHONPATH", ""):
        kept = [os.path.abspath(entry) for entry in given.split(os.pathsep) if entry]
        inherited["PYTHONPATH"] = os.pathsep.join(kept)
    return inherited | more

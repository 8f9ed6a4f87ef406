"""The one folder that the page may read and write, and the paths in it.

Whatever comes from the browser and means a path goes through `Workspace`, which follows links first and judges then.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slider_plugin.errors import UserError

STATE = ".slider-ui"
"""Folder of the page's own state in the workspace: jobs and their logs."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class OutsideError(UserError):
    """A path that leads out of the workspace, or into the page's own state."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a folder's listing."""

    name: str
    path: str
    """As the page shows and sends it."""

    is_folder: bool


@dataclass(frozen=True, slots=True)
class Workspace:
    """A folder, and others from which may be read."""

    root: Path
    """Absolute, links followed."""

    readable: tuple[Path, ...] = ()
    """Folders outside that the user named on the command line, for models; absolute, links followed."""

    @classmethod
    def open(cls, root: Path, readable: tuple[Path, ...] = ()) -> Workspace:
        """Raises UserError for what is no folder."""
        for folder in (root, *readable):
            if not folder.is_dir():
                raise UserError(f"{folder} is no folder; make it, or name another one")
        return cls(root.resolve(), tuple(folder.resolve() for folder in readable))

    @property
    def state(self) -> Path:
        """Folder of the page's own files."""
        return self.root / STATE

    def inside(self, text: str, writing: bool = False) -> Path:
        """The real path that a text from the browser means; relative ones begin at the workspace.

        Args:
            text: the path; `~` has no meaning.
            writing: whether something is to be written there, which only the workspace itself allows.

        Raises:
            OutsideError: it leads outside, by `..`, by a link or by being absolute, or it is no path at all.
        """
        try:
            place = (self.root / text).resolve()
            place.exists()  # which a name that is too long fails at, and resolving it does not
        except (OSError, ValueError, RuntimeError) as error:  # a zero byte, a name too long, a circle of links
            raise OutsideError(f"{_short(text)!r} is no path: {error}") from error
        roots = (self.root,) if writing else (self.root, *self.readable)
        if not any(place.is_relative_to(root) for root in roots):
            extra = "" if writing else "; folders elsewhere are named with `slider ui --read FOLDER`"
            raise OutsideError(f"{_short(text)!r} is outside the workspace {self.root}{extra}")
        if place.is_relative_to(self.state):
            raise OutsideError(f"{_short(text)!r} is the page's own folder; choose another one")
        return place

    def shown(self, path: Path | str) -> str:
        """A path as the page shows it: relative to the workspace where it is in it."""
        path = Path(path)
        return path.relative_to(self.root).as_posix() or "." if path.is_relative_to(self.root) else str(path)

    def listing(self, folder: Path) -> list[Entry]:
        """Folders, then files, that may be read; hidden ones and those that lead outside are left out."""
        found = [entry for entry in folder.iterdir() if not entry.name.startswith(".") and self._may_read(entry)]
        found.sort(key=lambda entry: (not entry.is_dir(), entry.name.lower()))
        return [Entry(entry.name, self.shown(entry), entry.is_dir()) for entry in found]

    def parents(self, folder: Path) -> Iterator[Entry]:
        """The way from the folder's root down to it."""
        root = next(root for root in (self.root, *self.readable) if folder.is_relative_to(root))
        for place in reversed([folder, *folder.parents]):
            if place.is_relative_to(root):
                yield Entry(place.name or str(place), self.shown(place), True)

    def _may_read(self, path: Path) -> bool:
        try:
            self.inside(str(path))
        except OutsideError:
            return False
        return True


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."

"""What files hold, as SHA-256, without reading gigabytes again at every start.

A file counts as unchanged while its size and both of its times are: the time of its content, which tools may set, and that of
its entry, which they cannot.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from slider_plugin import console
from slider_plugin.data.images import find_images
from slider_plugin.files import write_json

FORMAT = 1
SETTLED_NS = 2_000_000_000
"""A file that changed less than this before it was read may change again without its times showing it: file systems count in
steps of up to two seconds (FAT). It is read again next time."""

Stamp = tuple[int, int, int]
"""Size in bytes, time of the content and time of the entry in nanoseconds."""


class Digests:
    """SHA-256 of files, kept in one JSON file. Two processes may use it at once; what one of them loses is read again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = _read(path)
        self._used: dict[str, tuple[Stamp, str]] = {}
        self._new = False

    def of(self, path: Path) -> str:
        """The digest of a file; of a folder of frames, that of its images in order. Raises OSError if it cannot be read."""
        if path.is_dir():
            return hashlib.sha256("/".join(self.of(image) for image in find_images(path)).encode()).hexdigest()
        name, stamp = str(path), _stamp(path)
        known = self._known.get(name)
        if known is not None and known[0] == stamp:
            self._used[name] = known
            return known[1]
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if time.time_ns() - max(stamp[1:]) > SETTLED_NS:
            self._note(name, stamp, digest)
        return digest

    def note(self, path: Path, digest: str) -> None:
        """Take the digest of a file for granted, which was just written whole."""
        self._note(str(path), _stamp(path), digest)

    def save(self) -> None:
        """Write down what is new, beside what other processes have written; files that are gone are left out."""
        if not self._new:
            return
        merged = {**_read(self._path), **self._used}
        there = {name: known for name, known in merged.items() if name in self._used or os.path.lexists(name)}
        kept = {name: [*stamp, digest] for name, (stamp, digest) in there.items()}
        write_json(self._path, {"format": FORMAT, "files": kept})
        self._new = False

    def _note(self, name: str, stamp: Stamp, digest: str) -> None:
        self._known[name] = self._used[name] = (stamp, digest)
        self._new = True


def _stamp(path: Path) -> Stamp:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read(path: Path) -> dict[str, tuple[Stamp, str]]:
    try:
        written: Any = json.loads(path.read_text(encoding="utf-8"))
        if written["format"] != FORMAT:
            return {}
        return {str(n): ((int(a), int(b), int(c)), str(digest)) for n, (a, b, c, digest) in written["files"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        console.say(f"{path} is damaged ({type(error).__name__}); files are read again")
        return {}

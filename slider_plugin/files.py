"""Writing files whole or not at all, and names that every file system accepts.

Whatever a run writes appears under its name complete and flushed, or not at all: it is written beside its place under a
temporary name, flushed to the disk and renamed. A killed run leaves at most a `.tmp-...` entry, which nothing reads.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slider_plugin.errors import UserError

TEMPORARY = ".tmp-"
"""How the names of unfinished files and folders begin; whoever lists a folder skips them."""

_SLUG_LENGTH = 40
_HASH_LENGTH = 10
_PLAIN = re.compile(r"[a-z0-9]+(?:[-_][a-z0-9]+)*")
_HASHED = re.compile(rf".*-[0-9a-f]{{{_HASH_LENGTH}}}")
_RESERVED = re.compile(r"con|prn|aux|nul|com[0-9]|lpt[0-9]")


# --- Whole or not at all ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; what is written there takes its place if the block succeeds.

    The temporary name has the suffix of `path`, from which Pillow and others tell the format.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        _flush_file(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush_folder(path.parent)


@contextlib.contextmanager
def folder_replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it is renamed to `path` if the block succeeds, and removed if it fails.

    Raises:
        UserError: something is at `path` already. Nothing is ever overwritten.
    """
    _refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        _flush_tree(temporary)
        # Again, since another process may have been faster: a rename silently replaces an empty folder on POSIX.
        _refuse_existing(path)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # the first error is the one to report
        raise
    _flush_folder(path.parent)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file whole or not at all; text is UTF-8 with the line ends that it has."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON, whole or not at all; NaN and infinity, which are not JSON, raise ValueError."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # Half a surrogate pair, which JSON may hold and UTF-8 may not, becomes `\udXXX`: that is how JSON itself spells it.
    write_atomic(path, text.encode("utf-8", "backslashreplace"))


def remove_leftovers(folder: Path) -> None:
    """Remove what killed runs left unfinished in a folder that one run writes to at a time."""
    for path in folder.glob(f"{TEMPORARY}*") if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix:  # one without is a trial whether the folder can be written, of a process that lives
            path.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}{path.suffix[:16]}")


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise UserError(f"{path} exists already and is not overwritten: remove it, or choose another folder")


def _flush_file(path: Path) -> None:
    with path.open("rb+") as file:  # Windows flushes only what is open for writing
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make renames in `folder` durable, where the system can."""
    if os.name == "nt":  # no handle to a folder; NTFS journals the rename itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


def _flush_tree(folder: Path) -> None:
    for place, _, names in os.walk(folder):
        for name in names:
            _flush_file(Path(place, name))
        _flush_folder(Path(place))


# --- Names and places -------------------------------------------------------------------------------------------------


def safe_name(text: str, index: int | None = None) -> str:
    """A file name, without suffix, for any text: lower-case ASCII letters, digits, `-` and `_`, at most 60 or so.

    Different texts get different names, also where file systems ignore case or normalise Unicode: a text that is not
    itself such a name loses what cannot stay and gains a hash of the whole. The index, if given, stands in front.

    >>> safe_name("portrait", 3), safe_name("A red cat!", 4)
    ('03_portrait', '04_a-red-cat-79377c0038')
    """
    keep = (
        _PLAIN.fullmatch(text)
        and len(text) <= _SLUG_LENGTH
        and not _HASHED.fullmatch(text)  # could be the name of another text
        and not _RESERVED.fullmatch(text)  # Windows takes them for devices
    )
    name = text if keep else _hashed_name(text)
    return name if index is None else f"{index:02d}_{name}"


def _hashed_name(text: str) -> str:
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_text).strip("-")[:_SLUG_LENGTH].strip("-")
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_LENGTH]
    return f"{slug or 'text'}-{digest}"


def check_writable(folder: Path) -> None:
    """Raise UserError if `folder` cannot be written to, or made; leaves nothing behind."""
    try:
        existing = _nearest_existing(folder)
        _check_names(existing, folder)
        if not existing.is_dir():
            what = "is a file" if existing.is_file() else "is not a folder"
            raise UserError(f"cannot write to {folder}: {existing} {what}; choose another folder")
        _probe(existing)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"cannot write to {folder}: {reason}; choose another folder or change its permissions") from error


def _nearest_existing(folder: Path) -> Path:
    place = Path(os.path.abspath(folder))
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    return place


def _check_names(existing: Path, folder: Path) -> None:
    """Raise what the system says to the folders that would have to be made, unless it is that they do not exist."""
    for name in Path(os.path.abspath(folder)).relative_to(existing).parts:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            (existing / name).lstat()


def _probe(folder: Path) -> None:
    """Make a file and remove it: permission bits do not tell of read-only mounts, quotas and network shares."""
    probe = folder / f"{TEMPORARY}{secrets.token_hex(8)}"
    os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    probe.unlink()

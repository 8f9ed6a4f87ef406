"""Latents and prompt embeddings on disk, found again by what made them, and read through a memory map.

In the cache folder there is one folder for each fingerprint (`fingerprint.py`), and in it shards: safetensors files that hold
whole encoded batches and are named after their own SHA-256. A shard appears whole or not at all, so a run that is killed
leaves what it has written, and processes that fill one cache at once can at worst write the same twice.

Shards instead of a file for each image, measured with 10,000 latents of 4 KiB (tests/benchmarks/cache.py, --layouts): a file
each takes 30 s to write, since each is flushed to the disk, 215 ms to open and 82 MB; shards of 64 take 0.4 s, 10 ms and
43 MB. Reading costs 10 microseconds either way. At 1024 pixels a shard holds some 60 latents.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from slider_plugin import console
from slider_plugin.config import RunConfig
from slider_plugin.data.digests import Digests
from slider_plugin.errors import UserError
from slider_plugin.files import check_writable, write_atomic, write_json

K = TypeVar("K")
V = TypeVar("V")

Entry = Mapping[str, Tensor]
"""What is kept for one image or one caption: named tensors without a batch dimension, on the CPU."""

FOLDER = ".slider-cache"
SUFFIX = ".safetensors"
SHARD_BYTES = 64 * 2**20
SHARD_SECONDS = 10.0
"""A shard is written when it holds that many bytes, or its first batch is that old: no more work is lost."""


def cache_folder(config: RunConfig) -> Path:
    """`cache_dir`, or a folder beside `output_dir`, which runs there share. Absolute."""
    return (config.cache_dir or config.output_dir.absolute().parent / FOLDER).expanduser().absolute()


def check_cache(config: RunConfig) -> None:
    """Raise UserError if the cache folder cannot be written, or is inside a folder of images."""
    folder = cache_folder(config)
    for bucket in config.buckets:
        of_user = [place for place in (bucket.instance_data_dir, bucket.conditioning_data_dir) if place and not bucket.disabled]
        for place in of_user:
            if folder.resolve().is_relative_to(place.resolve()):
                raise UserError(
                    f"cache_dir: {folder} is inside {place}, the images of bucket {bucket.id!r}; "
                    "set cache_dir to a folder outside"
                )
    try:
        check_writable(folder)
    except UserError as error:
        raise UserError(f"cache_dir: {error}") from error


class Store(Protocol):
    """Where encodings are kept."""

    def __contains__(self, key: str) -> bool: ...

    def content(self, path: Path) -> str:
        """What stands in keys for the content of a file. Raises UserError if it cannot be read."""
        ...

    def refresh(self) -> None:
        """Take in what other processes have written meanwhile."""
        ...

    def add(self, entries: Mapping[str, Entry]) -> None:
        """Keep an encoded batch."""
        ...

    def finish(self) -> None:
        """Nothing more is added: write what is not written yet. Only then entries can be read."""
        ...

    def names(self, key: str) -> Sequence[str]:
        """Names of the tensors of an entry. Raises KeyError if there is none."""
        ...

    def tensor(self, key: str, name: str) -> Tensor:
        """One tensor of an entry, on the CPU; the same memory at every call."""
        ...


class Memory:
    """Encodings in memory, for one run: where nothing can be told of what makes them."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def content(self, path: Path) -> str:
        return str(path)

    def refresh(self) -> None:
        """Nobody else writes here."""

    def add(self, entries: Mapping[str, Entry]) -> None:
        self._entries.update(entries)

    def finish(self) -> None:
        """All is where it stays."""

    def names(self, key: str) -> Sequence[str]:
        return list(self._entries[key])

    def tensor(self, key: str, name: str) -> Tensor:
        return self._entries[key][name]


class Cache:
    """Encodings of one fingerprint on disk. Values come back bit for bit."""

    def __init__(self, folder: Path, fingerprint: str, digests: Digests, about: Mapping[str, Any] | None = None) -> None:
        """Open a cache, or begin one.

        Args:
            folder: the cache folder.
            fingerprint: of what encodes.
            digests: knows what shards hold.
            about: for people who wonder what a folder is; written beside the shards.
        """
        self._place, self._digests = folder / fingerprint, digests
        self._shards: set[str] = set()
        self._entries: dict[str, tuple[Any, Sequence[str]]] = {}
        self._pending: dict[str, Entry] = {}
        self._pending_bytes, self._pending_since = 0, 0.0
        with _told(folder):
            self._place.mkdir(parents=True, exist_ok=True)
            if not (self._place / "about.json").exists():
                write_json(self._place / "about.json", dict(about or {}))
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._entries or key in self._pending

    def content(self, path: Path) -> str:
        try:
            return self._digests.of(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error

    def refresh(self) -> None:
        for path in sorted(self._place.glob(f"*{SUFFIX}")):
            if path.name not in self._shards and not path.name.startswith("."):
                self._open(path)

    def add(self, entries: Mapping[str, Entry]) -> None:
        if not self._pending:
            self._pending_since = time.monotonic()
        self._pending.update(entries)
        self._pending_bytes += sum(tensor.nbytes for entry in entries.values() for tensor in entry.values())
        if self._pending_bytes >= SHARD_BYTES or time.monotonic() - self._pending_since >= SHARD_SECONDS:
            self._flush()

    def finish(self) -> None:
        self._flush()
        with _told(self._place):
            self._digests.save()

    def _flush(self) -> None:
        if self._pending:
            with _told(self._place):
                self._open(self._write(self._pending))
            self._pending, self._pending_bytes = {}, 0

    def names(self, key: str) -> Sequence[str]:
        return self._entries[key][1]

    def tensor(self, key: str, name: str) -> Tensor:
        tensor: Tensor = self._entries[key][0].get_tensor(f"{key}/{name}")
        return tensor

    def _write(self, entries: Mapping[str, Entry]) -> Path:
        tensors = {f"{key}/{name}": tensor.contiguous() for key, entry in entries.items() for name, tensor in entry.items()}
        data = save(tensors, {"entries": json.dumps({key: list(entry) for key, entry in entries.items()})})
        digest = hashlib.sha256(data).hexdigest()
        path = self._place / f"{digest}{SUFFIX}"
        if not path.exists():  # another process may have written the same
            write_atomic(path, data)
            self._digests.note(path, digest)
        return path

    def _open(self, path: Path) -> None:
        """Take in a shard, if it is what was written; else remove it, so that it is encoded again."""
        try:
            if self._digests.of(path) != path.stem:
                raise ValueError("its content is not what was written")
            shard = safe_open(path, "pt")
            entries = json.loads(shard.metadata()["entries"])
        except FileNotFoundError:  # another process has found it damaged
            return
        except OSError as error:
            raise UserError(f"cache_dir: {path} cannot be read ({error.strerror or error}); name another folder") from error
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            console.say(f"{path} is damaged ({error}); what it held is encoded again")
            path.unlink(missing_ok=True)
            return
        self._shards.add(path.name)
        self._entries.update((key, (shard, names)) for key, names in entries.items())


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Errors of the file system as one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cache_dir: {folder} cannot be used ({reason}); make room, or name another folder") from error


class Kept(Mapping[K, V]):
    """What a store keeps, by what a run calls it; read when it is asked for."""

    def __init__(self, names: Collection[K], read: Callable[[K], V]) -> None:
        self._names, self._read = names, read

    def __getitem__(self, name: K) -> V:
        return self._read(name)

    def __iter__(self) -> Iterator[K]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

"""The arguments of a call as a flat table of leaves: a denoiser takes tensors in lists and dictionaries, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Path = tuple[str | int, ...]
"""Where a leaf is: the number or name of the argument, then indices and keys."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments."""


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Everything that is no list, tuple or dictionary, with its place."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from leaves(part, (*path, key))
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from leaves(part, (*path, index))
    else:
        yield path, value


def table(call: Call) -> dict[Path, Any]:
    """The leaves of a call by place: positional arguments by number, the others by name."""
    arguments, named = call
    return dict(leaves(dict(enumerate(arguments)) | named))


def mapped(change: Callable[[Path, Any], Any], value: Any, path: Path = ()) -> Any:
    """The same tree with other leaves."""
    if isinstance(value, dict):
        return {key: mapped(change, part, (*path, key)) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [mapped(change, part, (*path, index)) for index, part in enumerate(value)]
        return tuple(parts) if isinstance(value, tuple) else parts
    return change(path, value)


def changed_call(change: Callable[[Path, Any], Any], call: Call) -> Call:
    """A call with other leaves."""
    arguments, named = call
    return tuple(mapped(change, value, (place,)) for place, value in enumerate(arguments)), mapped(change, named)

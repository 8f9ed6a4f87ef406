"""From names of modules to regular expressions over names, matched as a whole, as families state them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from slider_plugin.targets import alternatives

BELOW = r"\..+"
"""Everything in a module."""


class Names:
    """The adaptable modules of one denoiser, and expressions for sets of them.

    Args:
        denoiser: tells blocks, whose number may be any, from places in a row such as `to_out.0`.
        adaptable: names of the modules that expressions are matched against, in the order of the model.
    """

    def __init__(self, denoiser: nn.Module, adaptable: Sequence[str]) -> None:
        self._denoiser = denoiser
        self._adaptable = tuple(adaptable)

    def expression(self, wanted: Iterable[str]) -> str:
        """One that matches exactly the modules wanted; "" for none."""
        chosen = set(wanted)
        patterns: dict[str, list[str]] = {}
        for name in self._adaptable:
            if name in chosen:
                patterns.setdefault(self.pattern(name), []).append(name)
        exact = [part for pattern, names in patterns.items() for part in self._exact(pattern, names, chosen)]
        return "|".join(_folded(exact))

    def covering(self, wanted: set[str], may_cover: Callable[[str], bool]) -> str:
        """One that matches all modules wanted, by whole subtrees where these hold nothing that it may not cover."""
        parts: dict[str, None] = {}
        for name in self._adaptable:
            if name in wanted:
                parts.setdefault(self._widest(name, may_cover))
        trees = [part.removesuffix(BELOW) for part in parts if part.endswith(BELOW)]
        single = [part for part in parts if not part.endswith(BELOW)]
        folded = [alternative for part in _folded(trees) for alternative in alternatives(part)]
        return "|".join([*_folded(single), *(tree + BELOW for tree in folded)])

    def _widest(self, name: str, may_cover: Callable[[str], bool]) -> str:
        steps = name.split(".")
        for length in range(1, len(steps)):
            pattern = self.pattern(".".join(steps[:length])) + BELOW
            if all(may_cover(other) for other in self._adaptable if re.fullmatch(pattern, other)):
                return pattern
        pattern = self.pattern(name)
        fits = all(may_cover(other) for other in self._adaptable if re.fullmatch(pattern, other))
        return pattern if fits else re.escape(name)

    def _exact(self, pattern: str, names: list[str], chosen: set[str]) -> list[str]:
        matched = {name for name in self._adaptable if re.fullmatch(pattern, name)}
        return [pattern] if matched <= chosen else [re.escape(name) for name in names]

    def pattern(self, name: str) -> str:
        """A name with any number in the place of a block's."""
        steps = name.split(".")
        return r"\.".join(
            r"\d+" if is_block(self._denoiser, ".".join(steps[: place + 1])) else re.escape(step).replace(r"\-", "-")
            for place, step in enumerate(steps)
        )


def is_block(denoiser: nn.Module, module: str) -> bool:
    """Whether a module is a numbered one of a list whose modules have parts: such lists are longer in larger models."""
    holder, _, last = module.rpartition(".")
    if not last.isdigit() or not isinstance(denoiser.get_submodule(holder), nn.ModuleList):
        return False
    return bool(list(denoiser.get_submodule(module).children()))


def in_blocks(denoiser: nn.Module, module: str) -> bool:
    """Whether a module lies in such a block."""
    steps = module.split(".")
    return any(is_block(denoiser, ".".join(steps[:length])) for length in range(1, len(steps)))


def _folded(patterns: Sequence[str]) -> list[str]:
    r"""Patterns that begin alike as one: `a\.x` and `a\.y` are `a\.(x|y)`; and heads with the same tails that end alike."""
    tails: dict[str, list[str]] = {}
    for pattern in patterns:
        head, tail = _split(pattern)
        tails.setdefault(head, []).append(tail)
    heads: dict[str, list[str]] = {}
    for head, ends in tails.items():
        heads.setdefault(_either(ends), []).append(head)
    return [part for end, beginnings in heads.items() for part in _with_heads(beginnings, end)]


def _split(pattern: str) -> tuple[str, str]:
    r"""Head and tail of a pattern at its last name; a place in a row belongs to the name before it: `to_out\.0`."""
    steps = pattern.split(r"\.")
    length = 2 if len(steps) > 2 and steps[-1].isdigit() else 1
    return r"\.".join(steps[:-length]), r"\.".join(steps[-length:])


def _with_heads(heads: Sequence[str], end: str) -> list[str]:
    steps = [head.split(r"\.") for head in heads]
    alike = 0
    while len(heads) > 1 and all(len(own) > alike + 1 and own[-1 - alike] == steps[0][-1 - alike] for own in steps):
        alike += 1
    if not alike:
        return [rf"{head}\.{end}" if head else _bare(end) for head in heads]
    beginnings = [r"\.".join(own[:-alike]) for own in steps]
    return [r"\.".join([_either(beginnings), *steps[0][-alike:], end])]


def _either(parts: Sequence[str]) -> str:
    return f"({'|'.join(parts)})" if len(parts) > 1 else parts[0]


def _bare(end: str) -> str:
    """Names at the root need no group around them."""
    return end[1:-1] if end.startswith("(") else end

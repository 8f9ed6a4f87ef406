"""Find plugins without importing them: one row for each, with whether it may be used, and if not, why and what to do.

pluggy's own loader is not used: it stops at the first broken plugin, and skips clashing names silently.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, EntryPoint, distributions
from importlib.util import find_spec
from typing import Literal

from slider_hooks import ARCHITECTURES, EXTENSIONS
from slider_plugin import loose
from slider_plugin.errors import PluginError
from slider_plugin.lint import nearest

HOST = "slider-plugin"
"""Our own distribution: what it brings is built in, and wins over a third party's family of the same name."""

BLOCK = "SLIDER_PLUGIN_BLOCK"
"""Environment variable: comma-separated plugins to leave out, as `family`, `distribution` or `distribution:family`."""

ALLOW = "SLIDER_PLUGIN_ALLOW"
"""Environment variable: if set, the only third-party plugins to use, in the same words. Empty: built-ins alone."""

LOOSE = "(file)"
"""What stands for the distribution of a plugin that is not installed."""

Status = Literal["available", "blocked", "shadowed", "clash", "missing", "broken"]
Kind = Literal["architecture", "extension"]
KINDS: dict[str, Kind] = {ARCHITECTURES: "architecture", EXTENSIONS: "extension"}


@dataclass(frozen=True)
class PluginRow:
    """One installed plugin, as `slider plugins list` shows it. The field names are the keys of its JSON."""

    family: str | None
    """The family's name; None for an extension, which serves every family."""

    distribution: str
    version: str

    target: str
    """Where the entry point leads: `module` or `module:attribute`."""

    status: Status
    """`broken` is found only by a check, which imports."""

    error: str | None
    """Why it cannot be used, and what to do about it."""

    kind: Kind
    name: str
    """Name of the entry point."""

    @property
    def builtin(self) -> bool:
        return canonical(self.distribution) == HOST

    @property
    def key(self) -> str:
        """What names this row alone in `SLIDER_PLUGIN_BLOCK`."""
        return f"{self.distribution}:{self.name}"

    def __str__(self) -> str:
        what = f"family {self.name}" if self.kind == "architecture" else f"extension {self.name}"
        if self.distribution == LOOSE:
            return f"{what} ({self.target})"
        return f"{what} ({self.distribution} {self.version}, {self.target}, {locate(self.target) or 'no file'})"

    def way_out(self) -> str:
        """What to do about a plugin that does not work."""
        if self.distribution == LOOSE:
            return f"mend it, or leave it out of --plugin and {loose.EXTRA}"
        if self.builtin:
            return f"reinstall {HOST} (`pip install --force-reinstall --no-deps {HOST}`, or `pip install -e .` in a checkout)"
        return f"update it, remove it with `pip uninstall {self.distribution}`, or leave it out with {BLOCK}={self.key}"


def canonical(name: str) -> str:
    """A distribution's name as package indexes compare it (PEP 503); here for families and `distribution:family` as well."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> Iterator[EntryPoint]:
    """The entry points of both groups in this environment, the first on `sys.path` first.

    Not `importlib.metadata.entry_points()`: that keeps the first of two metadata folders of one distribution, so a stale
    `.egg-info` in a checkout would hide the real installation.
    """
    found = [(dist, point) for dist in distributions() for point in dist.entry_points if point.group in KINDS]
    yield from (point for _, point in sorted(found, key=lambda pair: pair[0].read_text("METADATA") is None))


def locate(target: str) -> str | None:
    """The file that a target names, without running any of the plugin's code; None where there is none."""
    module = re.split(r"[:\[]", target, maxsplit=1)[0].strip()
    if not all(part.isidentifier() for part in module.split(".")):
        return None
    top, *rest = module.split(".")
    try:
        spec = find_spec(top)
    except ValueError:  # a module without a spec, such as __main__
        return None
    for part in rest:
        spec = _submodule(spec, part)
    return spec.origin if spec else None  # a folder without code, such as a left-over __pycache__, has no origin


def _submodule(parent: ModuleSpec | None, name: str) -> ModuleSpec | None:
    # `find_spec("a.b")` would import `a`, which is the plugin's code; its folders can be searched without that.
    if parent is None or parent.submodule_search_locations is None:
        return None
    return PathFinder.find_spec(name, list(parent.submodule_search_locations))


def read(points: Iterable[EntryPoint]) -> list[PluginRow]:
    """One row for each entry point, sorted; of a distribution that is on the path twice the first counts, and it alone."""
    owners: dict[str, Distribution | None] = {}
    rows = []
    for point in points:
        if point.group not in KINDS:
            continue
        row = _row(point, point.dist)
        if owners.setdefault(canonical(row.distribution), point.dist) is point.dist:
            rows.append(row)
    return sorted(rows, key=lambda row: (row.kind, row.name, canonical(row.distribution)))


def _row(point: EntryPoint, dist: Distribution | None) -> PluginRow:
    kind = KINDS[point.group]
    return PluginRow(
        family=point.name if kind == "architecture" else None,
        distribution=(dist and dist.name) or "unknown",
        version=(dist and dist.version) or "unknown",
        target=point.value,
        status="available",
        error=None,
        kind=kind,
        name=point.name,
    )


def missing(rows: list[PluginRow]) -> list[PluginRow]:
    """Mark the rows whose module is not there, as after moving a file without installing again."""
    why = "{0}: {0.distribution} {0.version} says that it is in {0.target}, which does not exist. Way out: {1}"
    return [row if locate(row.target) else replace(row, status="missing", error=why.format(row, row.way_out())) for row in rows]


def choose(rows: list[PluginRow], environ: Mapping[str, str]) -> list[PluginRow]:
    """Block what `SLIDER_PLUGIN_BLOCK` names, and every third party that `SLIDER_PLUGIN_ALLOW` does not name if it is set."""
    block, allow = _words(rows, environ, BLOCK), _words(rows, environ, ALLOW)

    def judge(row: PluginRow) -> PluginRow:
        if _names(row) & block:
            return replace(row, status="blocked", error=f"named in {BLOCK}; take it out of there to use it")
        if ALLOW in environ and not row.builtin and not _names(row) & allow:
            return replace(row, status="blocked", error=f"not named in {ALLOW}; add {row.key} there to use it")
        return row

    return [judge(row) for row in rows]


def _names(row: PluginRow) -> set[str]:
    """What a variable may call a row; case, `-` and `_` make no difference."""
    return {canonical(row.name), canonical(row.distribution), canonical(row.key)}


def _words(rows: list[PluginRow], environ: Mapping[str, str], variable: str) -> set[str]:
    words = [word for part in environ.get(variable, "").split(",") if (word := part.strip())]
    known = {name for row in rows for name in _names(row)}
    unknown = [word for word in words if canonical(word) not in known]
    if unknown and rows:  # without any plugin the trouble is another one, and whoever asks for a family is told
        spellings = sorted({spelling for row in rows for spelling in (row.name, row.distribution, row.key)})
        raise PluginError(
            f"{variable} names what is not installed: {', '.join(word + nearest(word, spellings) for word in unknown)}. Write "
            f"family, distribution or distribution:family. Installed: {', '.join(row.key for row in rows)}"
        )
    return {canonical(word) for word in words}


def settle(rows: list[PluginRow]) -> list[PluginRow]:
    """Decide who owns a family's name: the built-in if there is one, else nobody where two distributions want it."""
    usable = [row for row in rows if row.status == "available" and row.kind == "architecture"]
    return [_rank(row, [o for o in usable if o.name == row.name and o != row]) if row in usable else row for row in rows]


def _rank(row: PluginRow, rivals: list[PluginRow]) -> PluginRow:
    builtin = next((rival for rival in rivals if rival.builtin), None)
    if row.builtin or not rivals:
        return row
    if builtin:
        why = f"{row} has the name of a built-in family, and {builtin.distribution} {builtin.version} wins"
        return replace(row, status="shadowed", error=f"{why}. Way out: leave the built-in one out with {BLOCK}={builtin.key}")
    return replace(row, status="clash", error=_clash(sorted((row, *rivals), key=lambda claim: claim.key)))


def _clash(claims: list[PluginRow]) -> str:
    names = " and ".join(f"{claim.distribution} {claim.version}" for claim in claims)
    files = ", ".join(locate(claim.target) or claim.target for claim in claims)
    installed = [claim for claim in claims if claim.distribution != LOOSE]
    blocks = " or ".join(f"{BLOCK}={claim.key}" for claim in installed)
    removals = " or ".join(f"`pip uninstall {claim.distribution}`" for claim in installed)
    way_out = f"leave one out with {blocks}, or remove one with {removals}"
    return f"family {claims[0].name} is claimed by {names} ({files}). Way out: {way_out}"

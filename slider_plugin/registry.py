"""Find plugins without importing them, load the one family that was asked for, and name who is to blame when that fails.

pluggy's own loader is not used: it stops at the first broken plugin, skips clashing names silently, and lets any plugin answer
for every family. Here each entry point becomes a row, one family is imported on demand, and its hooks are called through a
manager that holds the host's defaults and that family alone.
"""

from __future__ import annotations

import importlib
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, EntryPoint, distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from slider_hooks import (
    ARCHITECTURES,
    CONTRACT,
    EXTENSIONS,
    Family,
)
from slider_plugin import loose
from slider_plugin.errors import PluginError
from slider_plugin.family import LoadedFamily
from slider_plugin.lint import lint, lint_extension, nearest

HOST = "slider-plugin"
"""Our own distribution: what it brings is built in, and wins over a third party's family of the same name."""

BLOCK = "SLIDER_PLUGIN_BLOCK"
"""Environment variable: comma-separated plugins to leave out, as `family`, `distribution` or `distribution:family`."""

ALLOW = "SLIDER_PLUGIN_ALLOW"
"""Environment variable: if set, the only third-party plugins to use, in the same words. Empty: built-ins alone."""

STRICT = "SLIDER_PLUGIN_STRICT"
"""Environment variable: at 1, any plugin that cannot be used stops every command, also those that do not need it."""

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


# --- Discovery: nothing is imported ----------------------------------------------------------------------------------


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


def _loose_rows(environ: Mapping[str, str]) -> list[PluginRow]:
    """One row for each family that is tried without being installed; these are imported here."""
    rows = []
    for target in loose.targets(environ):
        unnamed = Path(target).stem if loose.is_file(target) else target
        row = PluginRow(None, LOOSE, "", target, "available", None, "architecture", unnamed)
        plugin = import_target(row)
        name = getattr(getattr(plugin, "FAMILY", None), "name", unnamed)  # without a FAMILY, admit() says so
        row = replace(row, family=name, name=name, version=loose.version(target))
        admit(row, plugin)
        rows.append(row)
    return rows


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


# --- The registry ----------------------------------------------------------------------------------------------------


class Plugins:
    """The plugins of this environment. Only what is asked for is imported, once."""

    def __init__(self, rows: Sequence[PluginRow]) -> None:
        self._rows = tuple(rows)
        self._imported: dict[str, Any] = {}

    @classmethod
    def discover(cls, entry_points: Iterable[EntryPoint] | None = None, environ: Mapping[str, str] | None = None) -> Plugins:
        """Read the entry points of this environment, or those given; nothing of a plugin is imported.

        Raises PluginError if `SLIDER_PLUGIN_BLOCK` or `SLIDER_PLUGIN_ALLOW` names what is not there.
        """
        variables = os.environ if environ is None else environ
        rows = read(installed() if entry_points is None else entry_points)
        plugins = cls(settle([*choose(missing(rows), variables), *_loose_rows(variables)]))
        plugins._assert_files_count()
        if variables.get(STRICT, "0") not in ("", "0"):
            plugins._assert_all_usable()
        return plugins

    def _assert_files_count(self) -> None:
        """A file that was named is meant to be used: raise PluginError if another plugin has its family's name."""
        for row in self._rows:
            if row.distribution == LOOSE and row.status != "available":
                raise PluginError(f"{row} is {row.status}: {row.error}")

    def _assert_all_usable(self) -> None:
        bad = [row for row in self.rows(check=True) if row.status not in ("available", "blocked")]
        if bad:
            lines = "\n".join(f"  - {row.key} is {row.status}: {row.error}" for row in bad)
            raise PluginError(f"{STRICT} is set, and {len(bad)} plugins cannot be used:\n{lines}")

    def rows(self, check: bool = False) -> list[PluginRow]:
        """Every plugin, sorted. With `check` each usable one is imported and linted, and none can harm another."""
        return [self._checked(row) if check and row.status == "available" else row for row in self._rows]

    def families(self) -> list[str]:
        """Names of the families that can be asked for."""
        return [row.name for row in self._rows if row.family and row.status == "available"]

    def facts(self, name: str) -> Family:
        """The facts of one family, by its name, another spelling of it, or an alias."""
        plugin = self._import(self._find(name))
        family: Family = plugin.FAMILY
        return family

    def load(self, name: str) -> LoadedFamily:
        """One family, ready to be called."""
        row = self._find(name)
        return LoadedFamily(row, self._import(row), importlib.import_module("slider_plugin.defaults"), self.extensions())

    def name_of(self, target: str) -> str:
        """The family's name in a file or module that `SLIDER_PLUGIN_EXTRA` names."""
        return next(row.name for row in self._rows if row.distribution == LOOSE and row.target == target)

    def extensions(self) -> list[tuple[PluginRow, Any]]:
        """The extensions that serve every family, by distribution and name. Raises PluginError if one cannot be used:
        going on without it would be another run than the one that was set up."""
        rows = [row for row in self._rows if row.kind == "extension" and row.status not in ("blocked", "available")]
        if rows:
            raise PluginError("; ".join(f"extension {row.key} is {row.status}: {row.error}" for row in rows))
        usable = [row for row in self._rows if row.kind == "extension" and row.status == "available"]
        return [(row, self._import(row)) for row in sorted(usable, key=lambda row: (canonical(row.distribution), row.name))]

    def _checked(self, row: PluginRow) -> PluginRow:
        try:
            self._import(row)
        except PluginError as error:
            return replace(row, status="broken", error=str(error))
        return row

    def _find(self, name: str) -> PluginRow:
        usable = {row.name: row for row in self._rows if row.family and row.status == "available"}
        for spelling in (name, name.replace("-", "_"), _plain(name)):
            if spelling in usable:
                return usable[spelling]
        ours, broken = self._by_alias(name, [row for row in usable.values() if row.builtin])
        unusable = [row for row in self._rows if row.family == _plain(name)]
        if not ours and not unusable:  # only now is it worth importing what others wrote
            ours, more = self._by_alias(name, [row for row in usable.values() if not row.builtin])
            broken += more
        if ours:
            return ours
        raise PluginError(_refusal(name, unusable, list(usable), broken))

    def _by_alias(self, name: str, rows: list[PluginRow]) -> tuple[PluginRow | None, list[str]]:
        """The row whose family has this alias, and the rows that could not be asked."""
        broken: list[str] = []
        for row in rows:
            try:
                if _plain(name) in map(_plain, self._import(row).FAMILY.aliases):
                    return row, broken
            except PluginError:
                broken.append(row.key)
        return None, broken

    def _import(self, row: PluginRow) -> Any:
        if row.key not in self._imported:
            self._imported[row.key] = admit(row, import_target(row))
        return self._imported[row.key]


def _plain(name: str) -> str:
    return name.replace("-", "_").lower()


def _refusal(name: str, unusable: list[PluginRow], usable: list[str], broken: list[str]) -> str:
    if unusable:
        reasons = [str(row.error) if row.status == "clash" else f"{row.key} is {row.status}: {row.error}" for row in unusable]
        return "; ".join(dict.fromkeys(reasons))  # both sides of a clash have one reason
    if not usable:
        return (
            f"there is no family {name!r}, nor any other: this environment has no plugin of the group {ARCHITECTURES}. "
            f"In a checkout, run `pip install -e .` once; entry points exist only after an installation"
        )
    unread = f". Not looked into, as they are broken: {', '.join(broken)} (`slider plugins list --check`)" if broken else ""
    return f"there is no family {name!r}{nearest(_plain(name), usable)}; there are {', '.join(usable)}{unread}"


def import_target(row: PluginRow) -> Any:
    """Import one plugin. The only place where any exception is caught: what a plugin raises while it is imported is unknown."""
    try:
        if row.distribution == LOOSE and loose.is_file(row.target):
            return loose.import_file(Path(row.target))
        return EntryPoint(row.name, row.target, ARCHITECTURES).load()
    except PluginError:
        raise
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {error}"
        contract = ".".join(map(str, CONTRACT))
        install = _install_first(row, error)
        raise PluginError(
            f"{row} cannot be imported (contract {contract} here): {what}. Way out: {install}{row.way_out()}"
        ) from error


def _install_first(row: PluginRow, error: BaseException) -> str:
    """The way out that comes first where a library is missing, rather than a module of the plugin's own."""
    library = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return f"install what brings the module {library!r}, " if library and library != row.target.partition(".")[0] else ""


def admit(row: PluginRow, plugin: Any) -> Any:
    """Refuse a plugin of another contract, or one with findings, all of them at once."""
    family = getattr(plugin, "FAMILY", None)
    if row.kind == "architecture" and isinstance(family, Family):
        _compare_contracts(row, family.contract)
    findings = lint(plugin, row.name) if row.kind == "architecture" else lint_extension(plugin)
    if findings:
        raise PluginError(f"{row} cannot be used:\n" + "\n".join(f"  - {f}" for f in findings) + f"\nWay out: {row.way_out()}")
    return plugin


def _compare_contracts(row: PluginRow, theirs: tuple[int, int]) -> None:
    wrote, here = (".".join(map(str, version)) for version in (theirs, CONTRACT))
    if theirs[0] != CONTRACT[0]:
        raise PluginError(f"{row} is written for contract {wrote}, and this host has {here}. Way out: {row.way_out()}")
    if theirs > CONTRACT:
        line = f"{row} is written for contract {wrote}, and this host has {here}: what is new has no effect; update {HOST}"
        warnings.warn(line, stacklevel=2)

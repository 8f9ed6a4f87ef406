"""Load the one family that was asked for, and name who is to blame when that fails.

`discovery.py` makes a row of each entry point. Here one family is imported on demand, and its hooks are called through a
manager that holds the host's defaults and that family alone: with pluggy's own loader any plugin could answer for every family.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from slider_hooks import ARCHITECTURES, CONTRACT, Family
from slider_plugin import loose
from slider_plugin.discovery import HOST, LOOSE, PluginRow, canonical, choose, installed, missing, read, settle
from slider_plugin.errors import PluginError
from slider_plugin.family import LoadedFamily
from slider_plugin.lint import lint, lint_extension, nearest

STRICT = "SLIDER_PLUGIN_STRICT"
"""Environment variable: at 1, any plugin that cannot be used stops every command, also those that do not need it."""


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

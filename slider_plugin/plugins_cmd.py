"""What `slider plugins list` prints: a table for people, JSON for programs. The keys of the JSON are an interface."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from slider_plugin.discovery import PluginRow

KEYS = ("family", "distribution", "version", "target", "status", "error", "kind", "name")
STYLES = {"available": "green", "blocked": "dim", "shadowed": "yellow"}
"""Colours of the statuses; every other one is an error."""


def as_json(rows: Sequence[PluginRow]) -> str:
    """A list of objects, one for each row in the order given, with the keys of `KEYS`."""
    return json.dumps([{key: asdict(row)[key] for key in KEYS} for row in rows], indent=2, ensure_ascii=False)


def render_table(rows: Sequence[PluginRow]) -> RenderableType:
    """A table for `rich.print`, with the reason below it for each plugin that cannot be used."""
    from rich.console import Group
    from rich.table import Column, Table

    columns = [Column(header, overflow="fold") for header in ("name", "kind", "distribution", "target", "status")]
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        source = f"{row.distribution} {row.version}"
        table.add_row(*map(_plain, (row.name, row.kind, source, row.target)), _plain(row.status, STYLES.get(row.status, "red")))
    if not rows:
        return _plain("No plugins are installed. In a checkout, run `pip install -e .` once.")
    return Group(table, *(_plain(f"\n{row.name}: {row.error}", STYLES.get(row.status, "red")) for row in rows if row.error))


def _plain(text: str, style: str = "") -> Text:
    """Text without markup: a target or an error message may hold square brackets."""
    from rich.text import Text

    return Text(text, style=style)

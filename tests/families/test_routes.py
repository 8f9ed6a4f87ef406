"""Every route on every family: what happens is what routes.json says, which the table in docs/families.md is made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from families.routes import FAMILIES, FIRST, OUTCOMES, ROUTES, outcome

EXPECTED = json.loads(OUTCOMES.read_text(encoding="utf-8"))
CELLS = [
    pytest.param(family, route, marks=() if family in FIRST else pytest.mark.slow) for family in FAMILIES for route in ROUTES
]


@pytest.mark.parametrize(("family", "route"), CELLS)
def test_route(family: str, route: str, tiny_folders: Callable[[str], Path]) -> None:
    assert outcome(family, route, tiny_folders(family)) == EXPECTED[family][route]


def test_the_file_has_every_cell_and_no_other() -> None:
    assert {family: set(routes) for family, routes in EXPECTED.items()} == {family: set(ROUTES) for family in FAMILIES}

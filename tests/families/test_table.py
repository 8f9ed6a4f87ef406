"""The table of families in docs/families.md is what the code says, and what was tried."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from slider_plugin.errors import UserError
from slider_plugin.family_table import COLUMNS, all_rows, main, markdown, read_outcomes, row_of
from slider_plugin.registry import Plugins

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def test_the_page_holds_the_table_of_the_code() -> None:
    block = re.search(r"<!-- families: .*?-->\n(.*?)<!-- /families -->", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert block
    assert block[1] == markdown(all_rows(read_outcomes())), "renew it: python -m slider_plugin.family_table"


def test_what_is_refused_stands_below_the_table_with_its_reason() -> None:
    tried = {**dict.fromkeys(COLUMNS, "yes"), "controlnet": "-", "full": "its weights are read"}
    row = row_of(Plugins.discover().load("sd1"), tried)
    assert row.routes == ("yes", "yes", "no", "-", "yes")
    assert "\n* `sd1`: full is refused: its weights are read; " in markdown([row])


def test_without_a_file_of_what_was_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "routes.json")]) == 2
    assert "there is no such file; run this in a checkout" in capsys.readouterr().err


def test_a_family_that_was_not_tried() -> None:
    outcomes = read_outcomes()
    del outcomes["sd1"]["full"]
    with pytest.raises(UserError, match=r"routes\.json has not every route of sd1: run python tests/families/routes\.py"):
        all_rows(outcomes)

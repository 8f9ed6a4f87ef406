"""README's table of families is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from slider_plugin.family_table import all_rows, markdown

README = Path(__file__).parents[2] / "README.md"


def test_readme_holds_the_table_of_the_code() -> None:
    block = re.search(r"<!-- families: .*?-->\n(.*?)<!-- /families -->", README.read_text(encoding="utf-8"), re.DOTALL)
    assert block
    assert block[1] == markdown(all_rows()), "renew it: python -m slider_plugin.family_table"

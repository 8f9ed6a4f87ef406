"""The probe, which knows no family, proposes what each family states; hooks/PROBE.md says so and is held to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from slider_hooks import Targets
from slider_plugin.probing.agreement import PAGE, page, row_of
from slider_plugin.registry import Plugins

FAMILIES = sorted(Path(__file__).parents[2].joinpath("slider_plugin", "architectures").glob("[!_]*.py"))

NOT_PROBED = {
    "anima": "modular pipeline",
    "longcat_image": "its folder has no text_processor",
    "minimax_h3": "modular pipeline",
    "omnigen": "which diffusers does not have here",
}
"""Families whose tiny folder is no pipeline that diffusers can load and draw with here, and what the probe says."""


@pytest.mark.parametrize("name", [path.stem for path in FAMILIES])
def test_the_proposal_is_the_family_s_own(name: str, tiny_folders: Callable[[str], Path]) -> None:
    row = row_of(Plugins.discover().load(name), tiny_folders(name))
    assert set(row.differing) <= set(row.unsure), "the probe is wrong about these without saying so"
    assert f"| {' | '.join(row.cells())} |\n" in PAGE.read_text(encoding="utf-8"), (
        "renew it: python -m slider_plugin.probing.agreement"
    )
    if name in NOT_PROBED:
        assert row.tiny is None and NOT_PROBED[name] in row.why
    else:
        assert row.tiny is not None and row.published is not None and len(row.unsure) <= 1


def test_the_page_is_about_these_families_alone() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.startswith(page([]))
    rows = text.removeprefix(page([])).splitlines()
    assert [row.split("|")[1].strip(" `") for row in rows] == [path.stem for path in FAMILIES]


def test_a_wrong_expression_is_noticed(tiny_folders: Callable[[str], Path]) -> None:
    family = Plugins.discover().load("pixart")
    cross = Targets(self_attention=r"transformer_blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)", io=r"pos_embed\.proj")
    family.facts = replace(family.facts, targets=cross)
    row = row_of(family, tiny_folders("pixart"))
    assert {"transformer_blocks.0.attn2.to_k", "transformer_blocks.27.attn2.to_k", "proj_out"} <= set(row.differing)
    assert row.cells()[3].startswith("no: ")

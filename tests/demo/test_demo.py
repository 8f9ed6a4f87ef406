"""`slider demo` end to end, and (slow) the bars it is held to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slider_plugin.cli import execute
from slider_plugin.demo import bundle, measure

KEYS = {"family", "concept", "steps", "seconds", "monotonicity", "monotonicity_p10", "response", "preservation"}


def demo(output: Path, *flags: str) -> dict[str, Any]:
    assert execute(["demo", "--output", str(output), *flags]) == 0
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    return report


def test_demo_writes_strip_slider_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PROMPTS", measure.PROMPTS[:4])
    monkeypatch.setattr(measure, "SEEDS", measure.SEEDS[:1])
    report = demo(tmp_path, "--family", "z_image", "--concept", "brightness", "--steps", "3")
    assert set(report) >= KEYS
    assert (report["steps"], len(report["response"])) == (3, 9)
    assert (tmp_path / "strip.png").is_file()
    assert (tmp_path / report["adapter"]).is_file()
    again = demo(tmp_path, "--family", "z_image", "--concept", "brightness", "--steps", "3")  # keeps the first run's folder
    assert again["response"] == report["response"]
    assert (tmp_path / "run-2").is_dir()


def test_what_the_demo_writes_is_what_train_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slider_plugin.configfile import read_config
    from slider_plugin.demo.run import write_config
    from slider_plugin.registry import Plugins

    config, notes = read_config(write_config("sd1", "size", None, tmp_path), (), Plugins.discover().facts)
    assert not notes
    assert [b.slider_strength for b in config.buckets] == [1.0, -1.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("family", bundle.FAMILIES)
@pytest.mark.parametrize("concept", bundle.CONCEPTS)
def test_the_bars(family: str, concept: str, tmp_path: Path) -> None:
    """The bars are for size; brightness is held to those for monotonicity because it reaches them."""
    report = demo(tmp_path, "--family", family, "--concept", concept)
    assert report["monotonicity"] >= 0.95
    assert report["monotonicity_p10"] >= 0.8
    assert report["response"][-1][1] >= (1.6 if concept == "size" else 1.4) * report["response"][0][1]

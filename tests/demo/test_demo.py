"""`slider demo` end to end, and (slow) the bars it is held to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from slider_plugin.adapters.attach import plan_targets
from slider_plugin.cli import execute
from slider_plugin.configfile import read_config
from slider_plugin.demo import bundle, measure
from slider_plugin.demo.run import ADAPTERS, write_config
from slider_plugin.preflight import meta_denoiser
from slider_plugin.registry import Plugins

KEYS = {"family", "concept", "adapter_kind", "steps", "seconds", "monotonicity", "monotonicity_p10", "response", "preservation"}


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


def test_a_lycoris_slider_is_drawn_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report tells the adapter, the file is lycoris-lora's, and at strength 0 it draws what a LoRA draws there."""
    monkeypatch.setattr(measure, "PROMPTS", measure.PROMPTS[:1])
    monkeypatch.setattr(measure, "SEEDS", measure.SEEDS[:1])
    reports = {a: demo(tmp_path, "--adapter", a, "--steps", "2") for a in ("lora", "full")}
    assert reports["full"]["adapter_kind"] == "full"
    assert all(name.startswith("lycoris_") for name in load_file(tmp_path / reports["full"]["adapter"]))
    at = {adapter: dict(map(tuple, report["response"])) for adapter, report in reports.items()}
    assert at["full"][0.0] == at["lora"][0.0]
    assert len(set(at["full"].values())) > 1
    assert (tmp_path / reports["lora"]["adapter"]).is_file(), "one adapter's file is not written over another's"


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", bundle.FAMILIES)
def test_what_the_demo_writes_is_what_train_reads(family: str, adapter: str, tmp_path: Path) -> None:
    config, notes = read_config(write_config(family, "size", adapter, None, tmp_path), (), Plugins.discover().facts)
    assert not notes
    assert [b.slider_strength for b in config.buckets] == [1.0, -1.0, 0.0]
    assert (config.lycoris.algo if config.lycoris else "lora") == adapter
    assert (config.lycoris.linear_dim if config.lycoris else config.lora_rank) == 8


def test_every_adapter_wraps_the_slider_targets(tmp_path: Path) -> None:
    """But for what `full` leaves out: the layers whose weights the model reads."""
    loaded = Plugins.discover().load("z_image")
    denoiser = meta_denoiser(loaded, str(bundle.fixtures() / "tiny" / "z_image"))
    wrapped = {}
    for adapter in ADAPTERS:
        config, _ = read_config(write_config("z_image", "size", adapter, None, tmp_path), (), Plugins.discover().facts)
        wrapped[adapter] = set(plan_targets(config, loaded, denoiser).modules)
    assert len(wrapped["lora"]) > 10 and wrapped["lokr"] == wrapped["lora"]
    assert wrapped["lora"] - wrapped["full"] == {"t_embedder.mlp.0", "t_embedder.mlp.2"}


def test_an_adapter_that_the_demo_has_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["demo", "--adapter", "boft", "--output", str(tmp_path / "demo")]) == 2
    assert "--adapter: 'boft' is not among lora, lokr, full" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", bundle.FAMILIES)
@pytest.mark.parametrize("concept", ["size", "brightness"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_bars(family: str, concept: str, adapter: str, tmp_path: Path) -> None:
    """The bars are for size; brightness is held to those for monotonicity because it reaches them. See docs/quality.md."""
    report = demo(tmp_path, "--family", family, "--concept", concept, "--adapter", adapter)
    assert report["monotonicity"] >= 0.95
    assert report["monotonicity_p10"] >= 0.8
    assert report["response"][-1][1] >= (1.6 if concept == "size" else 1.4) * report["response"][0][1]

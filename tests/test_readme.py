"""README's guide is true: every JSON of it is read, and every command of it runs, on the bundled tiny Z-Image."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open

from slider_plugin.cli import execute
from slider_plugin.configfile import read_config
from slider_plugin.demo import bundle
from slider_plugin.lycoris_config import DOCUMENTED
from slider_plugin.registry import Plugins

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "README.md").read_text(encoding="utf-8")
TITLE = "From two folders to a slider, in six steps"
SMALL = {"resolution": 64, "max_train_steps": 2, "validation_num_inference_steps": 2, "mixed_precision": "no", "lora_rank": 4}
"""What is changed for a tiny model, besides its place."""


def guide() -> str:
    found = re.search(rf"^## {re.escape(TITLE)}\n(.*?)(?=^## )", PAGE, re.DOTALL | re.MULTILINE)
    assert found
    return found[1]


def files() -> dict[str, Any]:
    """The guide's JSON, by the name of the file that it belongs into."""
    named = re.findall(r"^`([\w.]+)`:\n\n```json\n(.*?)^```", guide(), re.DOTALL | re.MULTILINE)
    pages = PAGE + "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    assert len(named) == pages.count("```json"), "each block of JSON in README or docs/ is a named file of the guide"
    return {name: json.loads(text) for name, text in named}


def commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", guide(), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image_folder: Callable[..., Path]) -> Path:
    """A folder with the guide's files and the three folders of images that it speaks of; the current one."""
    for name, value in files().items():
        (tmp_path / name).write_text(json.dumps(value))
    for name, light in (("smiling", 220), ("serious", 40), ("ordinary", 120)):
        image_folder(tmp_path / "data" / name, 4, light, (64, 64))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_guide_s_files_are_read_as_they_stand(place: Path) -> None:
    facts = Plugins.discover().facts
    for flags in ((), ("--lora_type", "lycoris", "--lycoris_config", "lycoris_config.json")):
        config, notes = read_config(Path("config.json"), flags, facts)
        assert not notes
    assert (config.model_family, config.slider_lora_target, config.lora_type) == ("z_image", True, "lycoris")
    assert config.pretrained_model_name_or_path == facts("z_image").flavours["turbo"].model
    assert [b.slider_strength for b in config.buckets] == [0.5, -0.5, 0.0]
    assert {p.name: p.adapter_strength for p in config.prompts} == {"plain": None, "slider_plus": 1.2, "slider_minus": -1.2}
    assert config.lycoris and config.lycoris.apply_preset.target_module == DOCUMENTED["most models"]


def test_the_guide_s_commands_run_word_by_word(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny = {"pretrained_model_name_or_path": str(bundle.fixtures() / "tiny" / "z_image")}
    (place / "config.json").write_text(json.dumps(files()["config.json"] | tiny | SMALL))
    said = {line: run(line, capfd) for line in commands()}
    modules = assert_said(said)
    assert_sliders(place)
    assert_presets(modules, capfd)
    assert_pictures(place)


def run(line: str, capfd: pytest.CaptureFixture[str]) -> str:
    """Run one line as a shell would, and return what it said."""
    program, *words = shlex.split(line, comments=True)
    assert program == "slider"
    target = words.pop() if ">" in words else None
    code = execute([word for word in words if word != ">"])
    printed = capfd.readouterr()
    assert code == 0, f"{line}\n{printed.err}"
    if target is not None:
        Path(target).write_text(printed.out)
    return " ".join((printed.out + printed.err).split())


def assert_said(said: dict[str, str]) -> str:
    """What the page promises is said; returns how many modules a LoRA wraps."""
    doctor, *_, lycoris = (text for line, text in said.items() if line.startswith(("slider doctor", "slider train")))
    assert "LoRA of rank 4" in doctor
    taken, found = re.search(r"its (\d+) verified slider targets are taken", lycoris), re.search(r"(\d+) modules \(", doctor)
    assert taken and found and taken[1] == found[1]
    assert any("resumed from" in text for text in said.values())
    return found[1]


def assert_sliders(place: Path) -> None:
    for folder, adapter in (("smile", "lora"), ("smile-lokr", "lycoris")):
        with safe_open(place / folder / "slider.safetensors", "pt") as opened:
            facts = opened.metadata()
        assert (facts["slider.family"], facts.get("slider.adapter", "lora")) == ("z_image", adapter)


def assert_presets(modules: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The printed presets wrap what a LoRA wraps, but for what `full` leaves out with a line."""
    for algo, strict in (("lokr", "true"), ("full", "false")):
        keys = f"--lora_type lycoris --lycoris_config z_image_{algo}.json --output_dir new --strict {strict}"
        said = run(f"slider doctor config.json {keys}", capfd)
        counted = re.search(r"(\d+) modules \(", said)
        left_out = said.count("algo full leaves out")
        assert counted and (algo == "full") == bool(left_out)
        assert int(counted[1]) == int(modules) - (2 if left_out else 0)  # both layers of the time embedding


def assert_pictures(place: Path) -> None:
    """Prompts are drawn at their own strengths, and the slider changes what is drawn."""
    trained = place / "smile" / "validation_images"
    assert len(list(trained.rglob("*plain*_scale+1.png"))) and len(list(trained.rglob("*slider_plus*_scale+1.2.png")))
    for folder in (trained, place / "smile" / "validation", place / "smile-lokr" / "validation"):
        (minus,), (base,) = folder.rglob("*slider_minus*_scale-1.2.png"), folder.rglob("*slider_minus*_base.png")
        with Image.open(minus) as changed, Image.open(base) as plain:
            assert changed.tobytes() != plain.tobytes()
    assert list((place / "sailor").rglob("*validation*_scale+1.png"))

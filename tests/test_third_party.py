"""Families of third parties that go further than the built-in ones: one with no class of diffusers, one that changes one hook.

A site folder on the path holds what pip would have put there; nothing of the host knows these packages.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from slider_hooks import LoadRequest, TargetRequest, UserError
from slider_plugin.reference import reference_targets
from slider_plugin.registry import Plugins
from slider_plugin.targets_cmd import target_facts
from slider_plugin.testing import RULES, Subject

ROOT = Path(__file__).parents[1]
DIT, MID = (ROOT / "fixtures" / name for name in ("third-party-dit", "third-party-sdxl"))
PACKAGES = {"glyph": DIT, "sdxl_mid": MID}
DISTRIBUTIONS = ("slider-plugin", "slider-family-glyph", "slider-family-sdxl-mid")


@pytest.fixture(scope="session")
def third_party_site(tmp_path_factory: pytest.TempPathFactory, place_package: Callable[[Path, Path], None]) -> Path:
    """Both packages, installed."""
    folder = tmp_path_factory.mktemp("third-party-site")
    for package in PACKAGES.values():
        place_package(package, folder)
    return folder


@pytest.fixture(autouse=True)
def installed(third_party_site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both packages can be used here and in the processes that a test starts; one thread, as the models are small."""
    monkeypatch.syspath_prepend(str(third_party_site))
    monkeypatch.setenv("PYTHONPATH", str(third_party_site))
    monkeypatch.setenv("SLIDER_PLUGIN_ALLOW", ",".join(DISTRIBUTIONS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def slider(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "slider_plugin", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", PACKAGES)
def test_every_rule_holds(family: str, rule: str, tiny_folders: Callable[[str], Path]) -> None:
    RULES[rule](Subject.load(Plugins.discover().load(family), tiny_folders(family)))


def test_the_host_names_neither() -> None:
    host = [path for folder in ("slider_plugin", "hooks") for path in (ROOT / folder).rglob("*.py")]
    words = re.compile(r"glyph_?dit|slider_family_glyph|sdxl_mid", re.IGNORECASE)
    assert not [path for path in host if words.search(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("family", PACKAGES)
def test_their_facts_are_read_without_torch(family: str, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'diffusers', 'transformers', 'safetensors')))\n"
        f"from slider_plugin.registry import Plugins; print(Plugins.discover().facts({family!r}).name)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == family, done.stderr


# --- Glyph: nothing of it is diffusers' -------------------------------------------------------------------------------


def test_glyph_trains_validates_and_exports(project: Callable[..., Path], tmp_path: Path) -> None:
    """The images of the one side are brighter than those of the other, and so is what the slider then draws."""
    config = project(
        "glyph", max_train_steps=200, learning_rate=1e-2, lora_rank=8, train_batch_size=4, validation_prompt="a circle",
        validation_num_inference_steps=10,
    )  # fmt: skip
    done = slider(tmp_path, "train", str(config))
    assert done.returncode == 0, done.stderr
    assert "8 slider target modules: 4 self, 2 io, 2 time" in done.stderr
    with safe_open(tmp_path / "out" / "slider.safetensors", "pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
    assert {"dit.blocks.1.attn.qkv.lora_A.weight", "dit.patch_out.lora_B.weight"} < keys and len(keys) == 16
    assert (metadata["slider.family"], metadata["slider.plugin"]) == ("glyph", "slider-family-glyph")
    drawn = slider(tmp_path, "validate", str(config), "--validation_prompt", "a square")
    assert drawn.returncode == 0, drawn.stderr
    for folder in ("validation_images/step_000200", "validation/step_000000"):
        assert (tmp_path / "out" / folder / "contact_sheet.png").is_file()
        dark, bright = (brightness(tmp_path / "out" / folder, f"scale{strength}") for strength in ("-0.5", "+0.5"))
        assert dark + 20 < bright


def brightness(folder: Path, kind: str) -> float:
    """Mean value 0..255 of the one image of a kind."""
    (path,) = folder.glob(f"*_{kind}.png")
    return float(np.asarray(Image.open(path)).mean())


def test_glyph_trains_in_bfloat16_with_checkpointing(project: Callable[..., Path], tmp_path: Path) -> None:
    config = project("glyph", mixed_precision="bf16", gradient_checkpointing=True, max_train_steps=2)
    done = slider(tmp_path, "train", str(config), "--validation_prompt", "a circle", "--validation_num_inference_steps", "2")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(0 < line["loss/positive"] < 10 and 0 < line["grad_norm"] < 10 for line in lines)


def test_glyph_s_targets_are_shown_without_weights(tmp_path: Path) -> None:
    done = slider(tmp_path, "targets", "glyph", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["model_class"], facts["matched"], facts["by_kind"]) == ("GlyphDiT", 28, {"self": 24, "io": 2, "time": 2})
    assert facts["forbidden_matched"] == [] and facts["dead"] == []


DAMAGES: dict[str, Callable[[Path], object]] = {
    "it has no glyph.json": lambda folder: (folder / "glyph.json").unlink(),
    "it has no weights.safetensors": lambda folder: (folder / "weights.safetensors").unlink(),
    "glyph.json is damaged": lambda folder: (folder / "glyph.json").write_text("{"),
    "is of format 2": lambda folder: (folder / "glyph.json").write_text('{"format": 2}'),
    "do not fit, or one is damaged (KeyError": lambda folder: (folder / "glyph.json").write_text('{"format": 1}'),
    "size mismatch": lambda folder: (folder / "glyph.json").write_text(
        json.dumps(json.loads((folder / "glyph.json").read_text()) | {"text": {"width": 16, "heads": 2}})
    ),
    "do not fit, or one is damaged (SafetensorError": lambda folder: os.truncate(folder / "weights.safetensors", 1000),
}


@pytest.mark.parametrize("words", DAMAGES)
def test_glyph_says_what_is_wrong_with_a_folder(words: str, tmp_path: Path) -> None:
    family = Plugins.discover().load("glyph")
    assert family.facts.tiny is not None
    family.facts.tiny(tmp_path / "model")
    DAMAGES[words](tmp_path / "model")
    with pytest.raises(UserError, match=re.escape(words)):
        family.load_components(LoadRequest(model=str(tmp_path / "model"), dtype=torch.float32))


def test_glyph_refuses_sizes_that_it_cannot_cut(tiny_folders: Callable[[str], Path]) -> None:
    subject = Subject.load(Plugins.discover().load("glyph"), tiny_folders("glyph"))
    with pytest.raises(UserError, match="squares of 4 pixels, and 30x32 is no multiple"):
        subject.family.encode_images(subject.components, torch.zeros(1, 3, 32, 30))
    with pytest.raises(UserError, match="squares of 4 pixels, and 32x30 is no multiple"):
        subject.family.build_pipeline(subject.components)(prompt=["a circle"], height=30, width=32)


# --- SDXL, deepest attention: one hook ---------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", ["base-1.0", "turbo"])
def test_the_deepest_targets_are_some_of_sdxl_s(flavour: str) -> None:
    plugins = Plugins.discover()
    mid, whole = (set(reference_targets(plugins.load(name), flavour).modules) for name in ("sdxl_mid", "sdxl"))
    assert mid < whole
    assert (len(mid), len(whole)) == (252, 306)
    assert {name.split(".attentions")[0] for name in mid} == {"mid_block", "down_blocks.2", "up_blocks.0"}


def test_explicit_and_standard_targets_stay_sdxl_s(tiny_folders: Callable[[str], Path]) -> None:
    plugins = Plugins.discover()
    denoiser = Subject.load(plugins.load("sdxl_mid"), tiny_folders("sdxl_mid")).denoiser
    for request in (TargetRequest(slider=False), TargetRequest(slider=True, explicit=("attn2.to_k",))):
        mid, whole = (plugins.load(name).resolve_lora_targets(denoiser, None, request) for name in ("sdxl_mid", "sdxl"))
        assert mid == whole


def test_one_hook_alone_differs_from_sdxl() -> None:
    """The re-exported hooks are all that SDXL has: if it gets another one, the package has to name it, too."""
    plugins = Plugins.discover()
    mid, whole = (plugins.load(name).describe()["hooks"] for name in ("sdxl_mid", "sdxl"))
    assert {hook for hook in whole if mid[hook] != whole[hook]} == {"resolve_lora_targets"}
    assert len((MID / "slider_family_sdxl_mid.py").read_text().splitlines()) < 30


def test_what_is_shown_of_its_targets_is_what_it_answers() -> None:
    facts = target_facts(Plugins.discover().load("sdxl_mid"))
    assert (facts.matched, facts.by_kind) == (252, {"self": 240, "proj": 12})
    (pattern,) = facts.patterns
    assert "down_blocks" in pattern and re.fullmatch(pattern, "mid_block.attentions.0.proj_in")


# --- As their authors build and test them -------------------------------------------------------------------------------


@pytest.mark.slow
def test_glyph_s_own_tests_pass(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(DIT / "tests")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(RULES)} passed" in done.stdout


@pytest.mark.slow
def test_the_packages_build(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(DIT), str(MID)]
    subprocess.run(command, check=True, timeout=600)
    names = [name for wheel in tmp_path.glob("*.whl") for name in zipfile.ZipFile(wheel).namelist()]
    code = {f"slider_family_glyph/{name}.py" for name in ("__init__", "files", "model", "sampler")}
    assert {name for name in names if name.endswith(".py")} == {*code, "slider_family_sdxl_mid.py"}
    assert sum(name.endswith("entry_points.txt") for name in names) == 2

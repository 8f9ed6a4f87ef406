"""The model card: its code runs, its words are only words, and it names the files that are there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from slider_hooks import LoadRequest
from slider_plugin.card import MARK, CardFacts, card, code, escaped
from slider_plugin.cli import execute
from slider_plugin.registry import Plugins
from slider_plugin.stages.card import _loader

Project = Callable[..., Path]
SMALL = {
    "max_train_steps": 1,
    "validation_prompt": 'a red "circle" | it\'s *bold*',
    "validation_num_inference_steps": 2,
    "validation_strengths": [-1, 0, 1],
    "slider_positive": "brighter <b>",
    "slider_negative": "darker | [x](http://e.vil)",
}
FACTS = CardFacts(
    header={
        "slider.recommended_min": "-2", "slider.recommended_max": "1", "slider.positive": "old", "slider.negative": "young",
    },
    family=Plugins.discover().facts("sd1"),
    model="org/model",
    is_hub_id=True,
    file="slider.safetensors",
    comfyui_file="slider_comfyui.safetensors",
    pipeline="StableDiffusionPipeline",
    loader="pipeline",
    adapter="lora",
    makes="image",
    prompt="a photo",
)  # fmt: skip


def program(text: str) -> str:
    found = re.search(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert found
    return found[1]


def front_matter(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    read: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return read


@pytest.fixture
def trained(
    project: Project, tmp_path: Path, tiny_folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Train a slider; gives its card. The current folder is then the card's, with the model in it by its own name."""

    def train(family: str = "sd1", **keys: Any) -> str:
        assert execute(["train", str(project(family, **SMALL | keys))]) == 0
        out = tmp_path / "out"
        monkeypatch.chdir(out)
        (out / family).symlink_to(tiny_folders(family))
        return (out / "README.md").read_text(encoding="utf-8")

    return train


LOKR = {
    "lora_type": "lycoris",
    "lycoris": {"algo": "lokr", "linear_dim": 2, "linear_alpha": 1, "apply_preset": {"target_module": ["attn1.to_q"]}},
}


@pytest.mark.parametrize(("family", "keys"), [("sd1", {}), ("sd1", LOKR), ("z_image", {"resolution": 64})], ids=str)
def test_the_card_s_code_draws_each_end(family: str, keys: dict[str, Any], trained: Callable[..., str]) -> None:
    exec(program(trained(family, **keys)), {})
    low, base, high = (Image.open(f"strength{s}.png").tobytes() for s in ("-0.5", "+0", "+0.5"))
    assert low != base != high and low != high


def test_a_run_writes_card_second_file_and_words(trained: Callable[..., str], capfd: pytest.CaptureFixture[str]) -> None:
    text = trained()
    out = Path.cwd()
    assert f"model card: {out / 'README.md'}" in " ".join(capfd.readouterr().err.split())
    for name in ("slider.safetensors", "slider_comfyui.safetensors"):
        assert (out / name).is_file() and f"`{name}`" in text
        with safe_open(out / name, "pt") as opened:
            told = opened.metadata()
        assert (told["slider.positive"], told["slider.negative"]) == (SMALL["slider_positive"], SMALL["slider_negative"])
        assert told["slider.learning_rate"] == "0.001" and told["modelspec.resolution"] == "32x32"
    with safe_open(out / "slider_comfyui.safetensors", "pt") as opened:
        assert all(key.startswith("lora_unet_") for key in opened.keys())  # noqa: SIM118
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(pictures) == 1 and all((out / picture).is_file() for picture in pictures)
    told = front_matter(text)
    assert told["pipeline_tag"] == "text-to-image" and "sd1" in told["tags"] and "base_model" not in told
    assert "bucket more | 4 files at strength +0.5" in text and "| steps | 1 |" in text and "learning rate | 0.001" in text
    assert ", height=32, width=32, num_inference_steps=2, guidance_scale=7.5, generator" in text
    assert str(out.parent) not in text, "nothing about this machine"


def test_what_a_user_wrote_is_only_text(trained: Callable[..., str]) -> None:
    text = trained()
    assert "| above 0 | brighter \\<b\\> |" in text and "<b>" not in text.replace("\\<b\\>", "")
    assert "| below 0 | darker \\| \\[x\\](http\\://e.vil) |" in text
    assert SMALL["validation_prompt"] in eval(f"({re.search(r'prompt=(.*?), height', text)[1]},)")  # type: ignore[index]


@pytest.mark.parametrize(
    "wild", ["a\n\n# b", "```\nrm", "<script>", "![x](y)", "a|b", "&lt;", "---", "@me www.x.y", "\u202eabc", "'''\"\"\"\\"]
)
def test_no_text_becomes_markup_or_code(wild: str) -> None:
    shown = escaped(wild)
    assert "\n" not in shown and not re.search(r"(?<!\\)[<>`|\[\]#&@]|www\.", shown)
    facts = replace(FACTS, prompt=wild, model=wild, header={**FACTS.header, "slider.positive": wild})
    text = card(facts)
    assert text.count("\n## ") == 3 and text.count("\n# ") == 1
    calls: list[str] = []
    fake = SimpleNamespace(from_pretrained=lambda model, **_: calls.append(model))
    lines = code(facts).splitlines()
    (loading,) = (line for line in lines if line.startswith("pipe = "))
    exec(loading.removesuffix(".to(device)"), {"StableDiffusionPipeline": fake, "dtype": None})
    assert calls == [wild]
    assert front_matter(text)["base_model"] == wild
    compile(code(facts), "card", "exec")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter": "controlnet"}, 'load_lora_adapter("slider.safetensors", prefix="controlnet")'),
        ({"pipeline": None}, "diffusers has no loader for it"),
        ({"loader": "denoiser"}, 'pipe.unet.load_lora_adapter(".", weight_name="slider.safetensors", prefix="unet"'),
        ({"load": {"load_into_transformer_2": True}}, "load_into_transformer_2=True)"),
        ({"makes": "video"}, "export_to_video"),
        ({"makes": "audio", "sampling_rate": 16000}, ".numpy().T, 16000)"),
        ({"makes": "video", "wants_image": True}, 'image=load_image("first.png")'),
        ({"comfyui_file": None}, "not all modules of this slider have one there"),
        ({"family": Plugins.discover().facts("flux2")}, "Key names of other programs are not verified for Flux.2"),
        ({"family": Plugins.discover().facts("flux")}, "`slider.safetensors` is for them, too (ComfyUI)"),
        ({}, "<lora:slider_comfyui:-1>"),
        ({"adapter": "lycoris"}, "has the keys of lycoris-lora"),
    ],
)
def test_the_card_says_what_holds(changes: dict[str, Any], said: str) -> None:
    facts = replace(FACTS, **changes)
    text = card(facts)
    assert said in text
    if "```python" in text:
        compile(program(text), "card", "exec")


def test_the_card_names_what_must_be_loaded_as_well(trained: Callable[..., str], tmp_path: Path) -> None:
    style = tmp_path / "private" / "style.safetensors"
    style.parent.mkdir()
    state = {
        f"unet.conv_in.lora_{part}.weight": torch.zeros(size) for part, size in (("A", (2, 4, 3, 3)), ("B", (32, 2, 1, 1)))
    }
    save_file(state, style)
    text = trained(base_loras=[{"path": str(style), "weight": 0.8}], validation_disable=True)
    assert "| base LoRA, to be loaded as well | style at 0.8 |" in text and "private" not in text


def test_somebody_s_own_readme_stays(project: Project, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("my notes")
    assert execute(["train", str(project("sd1", **SMALL))]) == 0
    assert (tmp_path / "out" / "README.md").read_text() == "my notes"
    assert "stays as it is; no model card is written" in " ".join(capfd.readouterr().err.split())
    assert MARK not in (tmp_path / "out" / "README.md").read_text()


def test_a_user_s_targets_without_a_name_elsewhere_leave_the_slider_written(
    project: Project, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    targets = ["patch_embedding"]
    assert (
        execute(["train", str(project("wan", **SMALL | {"peft_lora_target_modules": targets, "validation_disable": True}))])
        == 0
    )
    assert (tmp_path / "out" / "slider.safetensors").is_file()
    assert not (tmp_path / "out" / "slider_comfyui.safetensors").exists()
    text = (tmp_path / "out" / "README.md").read_text()
    assert "list(drawn.frames[0])" in program(text) and "num_frames=1" in text
    assert "no second file for ComfyUI: none of the modules" in " ".join(capfd.readouterr().err.split())
    assert "not all modules of this slider have one there" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("value", ["", "x" * 201, 3])
def test_words_that_are_none_are_refused(project: Project, value: Any, capfd: pytest.CaptureFixture[str]) -> None:
    config = project("sd1", slider_positive=value)
    assert execute(["doctor", str(config)]) == 2
    assert "slider_positive" in capfd.readouterr().err
    assert json.loads(config.read_text())["slider_positive"] == value


def test_how_diffusers_loads_is_asked_of_its_classes(tiny_folders: Callable[[str], Path]) -> None:
    family = Plugins.discover().load("pixart")
    loaded = family.load_components(LoadRequest(model=str(tiny_folders("pixart")), dtype=torch.float32))
    assert _loader(loaded.pipeline, loaded.denoiser) == "none"


def test_the_card_s_code_draws_videos(trained: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers writes mp4 with OpenCV or imageio, which are not needed here: what it would write is looked at."""
    written: dict[str, Any] = {}
    monkeypatch.setattr("diffusers.utils.export_to_video", lambda frames, path: written.update({path: frames}))
    exec(program(trained("wan", validation_num_video_frames=5, validation_disable=True)), {})
    assert list(written) == ["strength-0.5.mp4", "strength+0.mp4", "strength+0.5.mp4"]
    low, base, high = (torch.stack([torch.as_tensor(frame) for frame in frames]) for frames in written.values())
    assert base.shape[0] == 5 and not torch.equal(low, base) and not torch.equal(high, base)

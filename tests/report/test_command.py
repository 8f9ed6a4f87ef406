"""`slider report` on tiny random pipelines: what it writes, what it refuses, and whom it asks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from site_packages import Site

from slider_plugin import report_cmd
from slider_plugin.cli import execute
from slider_plugin.config import RunConfig
from slider_plugin.errors import UserError
from slider_plugin.registry import Plugins
from slider_plugin.report.scorers import Seer
from slider_plugin.report.sets import SliderSet

Project = Callable[..., Path]
DRAW = {"validation_num_inference_steps": 2, "learning_rate": 5e-3, "max_train_steps": 3}
FEW = ("--strengths", "-1,-0.5,0,0.5,1", "--seeds", "2", "--prompt", "a red circle", "--prompt", "a blue square")


@pytest.fixture
def slider(project: Project, tmp_path: Path) -> Path:
    assert execute(["train", str(project("sd1", **DRAW))]) == 0
    return tmp_path / "out" / "slider.safetensors"


def report(*words: object) -> int:
    return execute(["report", *map(str, words)])


@pytest.mark.parametrize("family", ["sd1", "z_image"])
def test_a_report_is_written_beside_the_slider(
    project: Project, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(["train", str(project(family, **DRAW))]) == 0
    capsys.readouterr()
    assert report(tmp_path / "out" / "slider.safetensors", *FEW) == 0
    folder = tmp_path / "out" / "report"
    said = capsys.readouterr().out.splitlines()
    written = json.loads((folder / "report.json").read_text())
    assert said[0] == written["verdict"] and str(folder / "report.json") in said
    assert (written["step"], written["family"], written["adapter"]) == (3, family, "slider.safetensors")
    assert written["strengths"] == [-1.0, -0.5, 0.0, 0.5, 1.0] and written["trained"] == 0.5
    assert written["prompts"] == ["a red circle", "a blue square"] and written["seeds"] == [1, 2]
    assert written["response"][2] == 0.0 and written["preservation"][2] == 1.0
    assert any(written["response"]), "the slider changes what is drawn"
    assert written["measure"] == {"kind": "latents", "ends": "images", "images": [4, 4], "separation": 1.0}
    for name in ("strip", "plot"):
        with Image.open(folder / written[name]) as picture:
            assert picture.width > 300
    assert report(tmp_path / "out" / "slider.safetensors", *FEW, "--json") == 0
    assert json.loads(capsys.readouterr().out) == written, "a report is its seeds"


def test_prompts_are_captions_where_there_are_none(slider: Path) -> None:
    assert report(slider, "--strengths", "-1,1", "--seeds", "1") == 0
    written = json.loads((slider.parent / "report" / "report.json").read_text())
    assert written["prompts"] == [f"a photo of a circle {i}" for i in range(4)] and written["strengths"] == [-1.0, 0.0, 1.0]


def test_what_is_wrong_is_said_together_and_before_a_model_is_loaded(
    slider: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slider_plugin.stages.load_model", lambda *_: pytest.fail("a model is loaded"))
    config = json.loads((slider.parent / "config.json").read_text())
    config["buckets"] = [bucket for bucket in config["buckets"] if bucket["slider_strength"] > 0]
    config.pop("data_backend_config", None)
    (slider.parent / "one.json").write_text(json.dumps(config))
    words = ("--config", slider.parent / "one.json", "--strengths", "1,2", "--seeds", "0", "--scorer", "nowhere")
    assert report(slider, *words, "--prompt", "a") == 2
    said = " ".join(capsys.readouterr().err.split())
    for part in ("none of one sign", "--strengths: a report needs", "--seeds: at least one", "--scorer nowhere: there is no"):
        assert part in said
    assert report(slider, "--strengths", "one") == 2 and "is no list of numbers" in capsys.readouterr().err
    assert report() == 2 and "give the file of a slider" in capsys.readouterr().err
    assert report(slider.parent / "checkpoint-000003" / "adapter.safetensors") == 2
    assert "there is no config.json beside" in " ".join(capsys.readouterr().err.split())


def test_a_slider_of_another_family_is_refused(
    slider: Path, tiny_folders: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ("--model_family", "z_image", "--pretrained_model_name_or_path", tiny_folders("z_image"))
    assert report(slider, *FEW, *keys) == 2
    assert "is a slider of sd1, and model_family is z_image" in " ".join(capsys.readouterr().err.split())


def test_a_text_slider_is_measured_by_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [{"target": "a person", "positive": "an old person", "negative": "a young person"}]
    config = RunConfig(model_family="sd1", slider_objective="text", slider_text=words)
    given: list[tuple[str, str]] = []

    def stop(config: Any, adapter: Path, folder: Path, options: Any) -> None:
        given.append((options.words.positive, options.words.negative))
        raise UserError("stop")

    monkeypatch.setattr("slider_plugin.report.command.report", stop)
    for positive, negative in (("", ""), ("tall", "short")):
        with pytest.raises(UserError, match="stop"):
            report_cmd.run(config, [Path("x")], None, report_cmd.asked(None, [], 1, None, positive, negative, False))
    assert given == [("an old person", "a young person"), ("tall", "short")]


def test_words_stand_in_for_images(slider: Path) -> None:
    config = json.loads((slider.parent / "config.json").read_text())
    config["buckets"] = config["buckets"][:1]
    config.pop("data_backend_config", None)
    (slider.parent / "words.json").write_text(json.dumps(config))
    words = ("--config", slider.parent / "words.json", "--positive", "a huge circle", "--negative", "a tiny dot")
    assert report(slider, *FEW, *words) == 0
    written = json.loads((slider.parent / "report" / "report.json").read_text())
    assert (written["measure"]["ends"], written["measure"]["images"]) == ("words", [8, 8])


# --- Scorers ------------------------------------------------------------------------------------------------------------


BRIGHT = """
from slider_hooks import hookimpl

ASKED = []


@hookimpl
def score_images(family, images, positive, negative):
    ASKED.append((family.name, len(images), positive, negative))
    return [{answer} for image in images]
"""


def use(site: Site, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    site.module("bright.py", BRIGHT.format(answer=answer))
    site.install("dist-bright", {"bright": "bright"}, kind="extensions")
    monkeypatch.setenv("SLIDER_PLUGIN_ALLOW", "slider-plugin,dist-bright,dist_bright")


def test_an_extension_scores_pictures(slider: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    use(site, monkeypatch, "image.convert('L').resize((1, 1)).getpixel((0, 0)) / 255")
    assert report(slider, *FEW, "--scorer", "extension", "--positive", "bright") == 0
    written = json.loads((slider.parent / "report" / "report.json").read_text())
    assert written["measure"]["kind"] == "extension" and any(written["response"])
    import sys

    asked = sys.modules["bright"].ASKED
    assert asked[0] == ("sd1", 4, "bright", "") and sum(count for _, count, _, _ in asked) == 8 + 2 * 2 * 5


def test_a_scorer_that_does_not_see_the_concept_or_answers_nonsense(
    slider: Path, site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(slider, *FEW, "--scorer", "extension") == 2
    assert "no installed extension answers score_images" in capsys.readouterr().err
    use(site, monkeypatch, "0.5")
    assert report(slider, *FEW, "--scorer", "extension") == 2
    assert "finds no more of the concept in the positive images" in " ".join(capsys.readouterr().err.split())
    site.module("bright.py", BRIGHT.format(answer="float('nan')"))
    import sys

    del sys.modules["bright"]
    assert report(slider, *FEW, "--scorer", "extension") == 2
    assert "a score is a finite number" in " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, tiny_folders: Callable[[str], Path]) -> Path:
    """A tiny random CLIP with the tokenizer of the tiny Stable Diffusion."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(tiny_folders("sd1") / "tokenizer")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(
            text_config=small | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id},
            vision_config=small | {"image_size": 32, "patch_size": 16},
            projection_dim=8,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


def test_a_clip_s_score_is_the_cosine_to_the_words(clip: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    images = [Image.new("RGB", (48, 48), colour) for colour in ("red", "black")]
    model: Any = CLIPModel.from_pretrained(clip)
    given: Any = CLIPProcessor.from_pretrained(clip)(text=["big", "small"], images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        answer = model(**given)
    cosines = answer.image_embeds @ answer.text_embeds.T  # which transformers has normalised
    seer = Seer(clip, torch.device("cpu"))
    line = seer.read(["big"]) - seer.read(["small"])
    assert np.allclose((seer.see(images) @ line.T)[:, 0], (cosines[:, 0] - cosines[:, 1]).numpy(), atol=1e-6)


def test_a_siglip_reads_words_at_the_length_it_was_trained_with(clip: Path, tmp_path: Path) -> None:
    """Whatever its tokenizer says; and in small letters."""
    from transformers import AutoTokenizer, SiglipConfig, SiglipImageProcessor, SiglipModel

    tokenizer = AutoTokenizer.from_pretrained(clip)
    tokenizer.model_max_length = 10**30  # as that of SigLIP 2
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    text = small | {"vocab_size": len(tokenizer), "max_position_embeddings": 12}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 16})).eval()
    for part in (model, tokenizer, SiglipImageProcessor(size={"height": 32, "width": 32})):
        part.save_pretrained(tmp_path)
    ids = tokenizer(["big", "small"], padding="max_length", max_length=12, return_tensors="pt").input_ids
    image = Image.new("RGB", (32, 32), "red")
    pixels = torch.full((1, 3, 32, 32), -1.0)
    pixels[:, 0] = 1.0
    with torch.no_grad():
        answer = model(input_ids=ids, pixel_values=pixels)
    seer = Seer(tmp_path, torch.device("cpu"))
    assert seer._how(["Big"])["text"] == ["big"], "this tokenizer would make it small itself, and that of SigLIP 2 would not"
    assert np.allclose(seer.read(["Big", "SMALL"]), answer.text_embeds.numpy(), atol=1e-6)  # which transformers has normalised
    assert np.allclose(seer.see([image]), answer.image_embeds.numpy(), atol=1e-6)


def test_a_report_by_clip_from_a_folder(slider: Path, clip: Path) -> None:
    assert report(slider, *FEW, "--scorer", clip) == 0
    written = json.loads((slider.parent / "report" / "report.json").read_text())
    assert written["measure"]["kind"] == clip.name and any(written["response"])


def test_a_model_without_text_reads_no_words(slider: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    folder = tmp_path / "dino"
    Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    ).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    assert report(slider, *FEW, "--scorer", folder) == 0
    assert report(slider, *FEW, "--scorer", folder, "--positive", "big", "--negative", "small") == 2
    assert "reads no words" in " ".join(capsys.readouterr().err.split())


# --- Calibration --------------------------------------------------------------------------------------------------------


def calibrated(slider: Path) -> tuple[Path, float]:
    """The calibrated file of a slider whose report is good, and its factor."""
    from slider_plugin.report.calibrate import calibrate
    from slider_plugin.report.card import card_of
    from slider_plugin.report.scores import Curves

    at = (-2.0, -1.0, 0.0, 1.0, 2.0)
    response = 0.2 * np.array(at)[None, None] * np.ones((1, 2, 1))
    card = card_of(Curves(at, response, np.ones((1, 2, 5)), np.ones(5), np.ones(5)), 0, 1.0)
    made = calibrate(slider, card, Plugins.discover().facts("sd1"))
    with safe_open(made, "pt") as opened:
        return made, json.loads(opened.metadata()["slider.calibration"])["factor"]


def test_a_calibrated_lora_at_one_is_the_old_one_at_the_factor(slider: Path) -> None:
    made, factor = calibrated(slider)
    assert factor == pytest.approx(1.25) and made.name == "slider_calibrated.safetensors"
    old, new = load_file(slider), load_file(made)
    assert old.keys() == new.keys()
    for name in old:
        expected = old[name] * (1.25 if ".lora_B." in name else 1.0)
        assert torch.equal(new[name], expected) and new[name].dtype == torch.float32
    with safe_open(made, "pt") as opened:
        facts = opened.metadata()
    assert (facts["slider.recommended_min"], facts["slider.recommended_max"]) == ("-1.6", "1.6")
    assert json.loads(facts["slider.strengths"]) == [-0.4, 0.4]
    assert facts["modelspec.usage_hint"].startswith("strength -1.6 to 1.6")
    assert json.loads(facts["slider.calibration"]) == {
        "factor": 1.25, "fraction": 0.25, "one_is": "full_strength", "reached": 0.25,
    }  # fmt: skip


@pytest.mark.parametrize("algo", ["lokr", "loha", "full", "diag-oft"])
def test_a_calibrated_lycoris_file_is_the_old_one_at_the_factor_or_refused(
    project: Project, tmp_path: Path, algo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from slider_plugin.adapters.attach import attach_file

    written = {"algo": algo, "linear_dim": 4, "linear_alpha": 4, "apply_preset": {"target_module": ["attn1.to_q", "conv_in"]}}
    (tmp_path / "lycoris.json").write_text(json.dumps(written))
    keys = {"lora_type": "lycoris", "lycoris_config": "lycoris.json", "learning_rate": 1e-2}
    config = project("sd1", **DRAW | keys)
    assert execute(["train", str(config)]) == 0
    slider = tmp_path / "out" / "slider.safetensors"
    if algo == "diag-oft":
        assert report(slider, *FEW, "--calibrate") == 2
        assert "not linear in its weights" in " ".join(capsys.readouterr().err.split())
        return
    made, factor = calibrated(slider)
    answers = []
    for file, scale in ((slider, factor), (made, 1.0)):
        from slider_hooks import LoadRequest

        family = Plugins.discover().load("sd1")
        model = json.loads(config.read_text())["pretrained_model_name_or_path"]
        components = family.load_components(LoadRequest(model=model, dtype=torch.float32))
        adapter = attach_file(file, family, components)
        torch.manual_seed(0)
        noisy = torch.randn(1, components.denoiser.config.in_channels, 8, 8)
        told = family.encode_prompts(components, ["a red circle"])
        with torch.no_grad(), adapter.scaled(scale):
            answers.append(family.predict(components, noisy, torch.tensor([500]), told))
        with torch.no_grad(), adapter.scaled(0.0):
            base = family.predict(components, noisy, torch.tensor([500]), told)
    change = float((answers[0] - base).abs().max())
    assert change > 1e-5 and float((answers[0] - answers[1]).abs().max()) < 1e-3 * change


def test_a_calibrated_file_is_not_calibrated_again(slider: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, _ = calibrated(slider)
    assert report(made, *FEW, "--calibrate") == 2
    assert "is calibrated already" in " ".join(capsys.readouterr().err.split())


# --- Sets ---------------------------------------------------------------------------------------------------------------


def test_a_set_draws_each_slider_alone_and_their_sum(load: Callable[[str], tuple[Any, Any]]) -> None:
    """Two LoRAs of other ranks on other modules: the linear layers' changes are those of each, and add up."""
    _, components = load("sd1")
    modules = [n for n, m in components.denoiser.named_modules() if n.endswith(("attn1.to_q", "attn1.to_k"))]
    layers = dict(components.denoiser.named_modules())
    rng = torch.Generator().manual_seed(0)
    states: list[dict[str, dict[str, torch.Tensor]]] = []
    for rank, names in ((2, modules[:3]), (5, modules[1:])):
        shapes = {name: layers[name].weight.shape for name in names}
        states.append(
            {
                name: {"lora_A": torch.randn(rank, i, generator=rng), "lora_B": torch.randn(o, rank, generator=rng)}
                for name, (o, i) in shapes.items()
            }
        )
    bases = {name: layers[name].weight.detach().clone() for name in modules}
    inputs = {name: torch.randn(3, bases[name].shape[1], generator=rng) for name in modules}
    together = SliderSet(components.denoiser, states)
    wrapped = dict(components.denoiser.named_modules())
    for weights, scale in (((1.0, 0.0), 1.0), ((0.0, 1.0), -0.5), ((1.0, 1.0), 2.0)):
        with torch.no_grad(), together.weighted(weights) as one, one.scaled(scale):
            for name in modules:
                change = sum(
                    w * state[name]["lora_B"] @ state[name]["lora_A"]
                    for w, state in zip(weights, states, strict=True)
                    if name in state
                )
                expected = inputs[name] @ (bases[name] + scale * change).T
                assert torch.allclose(wrapped[name](inputs[name]) - _bias(layers[name]), expected, atol=1e-3), name


def _bias(layer: Any) -> Any:
    return 0.0 if layer.bias is None else layer.bias


def test_the_leakage_matrix_of_two_sliders(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = project("sd1", **DRAW)
    for name, rank in (("a", "4"), ("b", "2")):
        assert execute(["train", str(config), "--output_dir", str(tmp_path / name), "--lora_rank", rank]) == 0
    capsys.readouterr()
    files = [tmp_path / name / "slider.safetensors" for name in ("a", "b")]
    assert report(*files, *FEW, "--output", tmp_path / "set") == 0
    matrix = json.loads((tmp_path / "set" / "leakage.json").read_text())
    assert matrix["sliders"] == ["a/slider", "b/slider"]
    assert [row[i] for i, row in enumerate(matrix["leak"])] == [1.0, 1.0]
    alone = []
    for file in files:
        assert report(file, *FEW) == 0
        alone.append(json.loads((file.parent / "report" / "report.json").read_text())["range"])
    assert [row[i] for i, row in enumerate(matrix["range"])] == pytest.approx(alone, abs=2e-3)
    assert "range on the axis of" in capsys.readouterr().out
    with Image.open(tmp_path / "set" / "sum.png") as picture:
        assert picture.width > 300
    (tmp_path / "b" / "config.json").unlink()
    assert report(*files, *FEW, "--calibrate") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "there is no config.json beside it" in said and "they are for one slider" in said

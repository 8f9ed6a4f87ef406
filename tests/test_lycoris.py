"""LyCORIS: the specification's presets on every family, strength of every algorithm, files that lycoris-lora reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lycoris
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from slider_plugin.adapters.lycoris_build import plan_of
from slider_plugin.adapters.lycoris_network import LycorisAdapter, LycorisFile
from slider_plugin.cli import execute
from slider_plugin.errors import UserError
from slider_plugin.lycoris_config import ALGORITHMS, DOCUMENTED, LycorisConfig, problems_of
from slider_plugin.registry import Plugins
from slider_plugin.targets import adaptable_modules
from slider_plugin.testing import reload
from slider_plugin.testing.rules import bucket_loss, inputs_of, layers_mirror
from slider_plugin.testing.subject import PROMPTS, Subject

Folders = Callable[[str], Path]
OTHERS = ("sdxl", "z_image", "flux", "sd3", "wan", "kandinsky5_image")
SIZES: dict[str, dict[str, Any]] = {
    "lora": {},
    "locon": {"use_tucker": True},
    "loha": {},
    "lokr": {},
    "lokr whole": {"full_matrix": True},
    "lokr both": {"decompose_both": True, "factor": 4},
    "full": {},
    "glora": {},
    "ia3": {},
    "diag-oft": {},
}


def config(algo: str = "lokr", **more: Any) -> LycorisConfig:
    preset = more.pop("apply_preset", {"target_module": DOCUMENTED["most models"]})
    return LycorisConfig(
        algo=algo.split()[0], linear_dim=2, linear_alpha=1.0, apply_preset=preset, **{**SIZES.get(algo, {}), **more}
    )


def subject_of(family: str, tiny_folders: Folders) -> Subject:
    return Subject.load(Plugins.discover().load(family), tiny_folders(family))


def trained(subject: Subject, chosen: LycorisConfig) -> LycorisAdapter:
    """A network with weights that are not zero."""
    adapter = LycorisAdapter(subject.family.facts, subject.denoiser, chosen)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter


def slider_modules(subject: Subject) -> set[str]:
    return set(subject.targets().modules)


# --- Presets ----------------------------------------------------------------------------------------------------------


FAMILIES = sorted(p.stem for p in Path(__file__).parents[1].joinpath("slider_plugin", "architectures").glob("[!_]*.py"))
EXPECTED = json.loads((Path(__file__).parent / "presets.json").read_text())
"""By family and documented list: how many modules are wrapped on its tiny model, by the list's own endings or by the family's
expression; or that the list reaches text there, and is refused."""


def outcome(subject: Subject, kind: str) -> str:
    try:
        plan = plan_of(subject.family.facts, subject.denoiser, config(apply_preset={"target_module": DOCUMENTED[kind]}))
    except UserError as error:
        assert "reaches cross-attention or text" in str(error)
        return "reaches text"
    own, found = slider_modules(subject), set(plan.modules)
    endings = {
        n for n in (dict(subject.denoiser.named_modules())) if any(n == e or n.endswith(f".{e}") for e in DOCUMENTED[kind])
    }
    if not any("verified slider targets are taken" in line for line in plan.warnings):
        assert found == endings & set(adaptable_modules(subject.denoiser))
        return f"{len(found)} by ending"
    assert found == own
    (line,) = plan.warnings
    pasted = json.loads(line.partition('"apply_preset": ')[2])
    again = plan_of(subject.family.facts, subject.denoiser, config(apply_preset=pasted))
    assert set(again.modules) == own and not again.warnings
    return f"{len(found)} by family"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_documented_presets_wrap_what_they_mean(family: str, tiny_folders: Folders) -> None:
    """By ending where their entries name attention, else the verified expression, said aloud with the preset to paste."""
    subject = subject_of(family, tiny_folders)
    assert {kind: outcome(subject, kind) for kind in DOCUMENTED} == EXPECTED[family]


def test_the_specification_s_own_pairs_are_never_refused() -> None:
    """The list that it writes for a family trains that family's attention."""
    for family in FAMILIES:
        kind = "Kandinsky 5" if family.startswith("kandinsky") else "most models"
        assert EXPECTED[family][kind] != "reaches text", family
    for family in ("flux", "flux2", "chroma", "auraflow"):
        assert EXPECTED[family]["Flux, Chroma, AuraFlow"].endswith("by ending")


def test_a_name_is_not_the_beginning_of_another(tiny_folders: Folders) -> None:
    """lycoris-lora matches from a name's beginning: `attn1.to_q` would reach HiDream's text branch `attn1.to_q_t`."""
    subject = subject_of("hidream", tiny_folders)
    preset = {"target_module": ["attn1.to_q"]}
    modules = plan_of(subject.family.facts, subject.denoiser, config(apply_preset=preset)).modules
    assert modules and all(name.endswith("attn1.to_q") for name in modules)


def test_lycoris_own_words_keep_their_meaning(tiny_folders: Folders) -> None:
    subject = subject_of("sd1", tiny_folders)

    def wrapped(**preset: Any) -> list[str]:
        return list(plan_of(subject.family.facts, subject.denoiser, config(apply_preset=preset)).modules)

    classes = wrapped(target_module=["Attention"], exclude_name=[r".*attn2.*"])
    assert classes and all("attn1" in name for name in classes)
    names = wrapped(target_module=[], target_name=[r".*attn1\.to_q$"])
    assert names and all(name.endswith("attn1.to_q") for name in names)
    assert wrapped(target_module=[], target_name=["*attn1.to_q"], use_fnmatch=True) == names
    both = wrapped(target_module=["attn1.to_q"], target_name=["conv_in"])
    assert set(both) == {*names, "conv_in"}
    assert "conv_in" not in wrapped(target_module=["attn1.to_q", "conv_in"], enable_conv=False)
    mapped = wrapped(target_module=[], name_algo_map={r".*attn1\.to_q$": {"algo": "loha"}})
    assert mapped == names


def test_one_network_s_preset_is_not_the_next_one_s(tiny_folders: Folders) -> None:
    before = {name: getattr(lycoris.LycorisNetwork, name) for name in vars(lycoris.LycorisNetwork) if name.isupper()}
    subject = subject_of("sd1", tiny_folders)
    plan_of(subject.family.facts, subject.denoiser, config(apply_preset={"target_module": ["attn1.to_q"], "use_fnmatch": True}))
    assert {name: getattr(lycoris.LycorisNetwork, name) for name in before} == before


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ({"target_module": ["attn9.to_q"]}, "names no module of UNet2DConditionModel: attn9.to_q. Nearest names: "),
        ({"target_module": []}, "names no module of UNet2DConditionModel: it is empty"),
        ({"target_module": ["attn2.to_k"]}, "reaches cross-attention or text: "),
        ({"target_module": ["Attention"]}, "put these into exclude_name"),
        ({}, 'without target_module lycoris-lora wraps every layer, so write "target_module": []'),
        ({"target_name": ["conv_in"]}, 'write "target_module": []'),
    ],
)
def test_presets_that_cannot_be_meant(preset: dict[str, Any], said: str, tiny_folders: Folders) -> None:
    subject = subject_of("sd1", tiny_folders)
    with pytest.raises(UserError) as caught:
        plan_of(subject.family.facts, subject.denoiser, config(apply_preset=preset))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_entries_that_name_nothing_are_reported_and_no_attention_is_a_warning(tiny_folders: Folders) -> None:
    subject = subject_of("sd1", tiny_folders)
    plan = plan_of(subject.family.facts, subject.denoiser, config(apply_preset={"target_module": ["conv_in", "atn1.to_q"]}))
    assert plan.modules == ("conv_in",)
    assert "atn1.to_q name no module" in plan.warnings[0] and "wraps no attention" in plan.warnings[1]


# --- Strength ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", SIZES)
def test_every_algorithm_mirrors(algo: str, tiny_folders: Folders) -> None:
    """0 is the base bit for bit; per layer, on the input that it really gets, -1 is the opposite of +1; each has a gradient."""
    subject = subject_of("sd1", tiny_folders)
    assert_mirrors(subject, algo, {"target_module": DOCUMENTED["most models"]})


@pytest.mark.parametrize("family", OTHERS)
def test_loha_mirrors_on_other_families(family: str, tiny_folders: Folders) -> None:
    """families/test_routes.py does this and more with LoKr and full, on all families."""
    subject = subject_of(family, tiny_folders)
    expression = subject.family.facts.targets.slider()
    assert_mirrors(subject, "loha", {"target_module": [], "target_name": [f"(?:{expression})$"]})


def assert_mirrors(subject: Subject, algo: str, preset: dict[str, Any]) -> None:
    latents, text = subject.latents(2), subject.conditioning(PROMPTS)
    with torch.no_grad():
        base = subject.predict(latents, text)
    adapter = trained(subject, config(algo, apply_preset=preset))
    with torch.no_grad(), adapter.scaled(0.0):
        assert torch.equal(subject.predict(latents, text), base), "at scale 0 the model is not the base"
    with adapter.scaled(1.0):
        bucket_loss(subject, positive=True).backward()
    still = [
        name for name, parameter in adapter.named_parameters() if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    assert not still, still[:3]
    layers_mirror(subject.denoiser, adapter, inputs_of(subject, subject.denoiser, adapter.modules))


def test_an_algorithm_that_does_not_mirror_is_found_by_measuring(
    tiny_folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lycoris.modules.lokr import LokrModule

    real = LokrModule.forward

    def bent(self: Any, x: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        kept, self.multiplier = self.multiplier, abs(self.multiplier)
        try:
            answer: torch.Tensor = real(self, x, *rest, **named)
            return answer
        finally:
            self.multiplier = kept

    monkeypatch.setattr(LokrModule, "forward", bent)
    with pytest.raises(UserError, match=r"LokrModule cannot be used: a slider must mirror.* on .* it misses that by"):
        LycorisAdapter(Plugins.discover().facts("sd1"), subject_of("sd1", tiny_folders).denoiser, config())


def test_dropout_is_on_in_training_and_off_in_drawing(tiny_folders: Folders) -> None:
    """Also after a frozen prediction in the middle of a step, which is made without gradients."""
    subject = subject_of("sd1", tiny_folders)
    adapter = trained(subject, config("lora", module_dropout=0.5))
    latents, text = subject.latents(1), subject.conditioning()

    def answers() -> list[torch.Tensor]:
        return [subject.predict(latents, text).detach() for _ in range(3)]

    with adapter.scaled(1.0):
        with torch.no_grad(), adapter.scaled(1.0):
            drawn = answers()
        learnt = answers()
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[1], drawn[2])
    assert not (torch.equal(learnt[0], learnt[1]) and torch.equal(learnt[1], learnt[2]))


def test_the_multiplier_is_a_float_and_kept(tiny_folders: Folders) -> None:
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    found = []
    for multiplier, scale in ((1.0, 0.5), (0.5, 1.0)):
        subject = subject_of("sd1", tiny_folders)
        adapter = trained(subject, config(multiplier=multiplier))
        with torch.no_grad(), adapter.scaled(scale):
            found.append(subject.predict(subject.latents(2), subject.conditioning(PROMPTS)))
    assert torch.allclose(*found, atol=1e-6) and latents.shape


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiplier", [1.0, 0.5])
@pytest.mark.parametrize("algo", SIZES)
def test_a_file_answers_through_the_ecosystem_s_own_loader(
    algo: str, multiplier: float, tiny_folders: Folders, tmp_path: Path
) -> None:
    if algo == "diag-oft" and multiplier != 1.0:
        assert any("cannot hold one" in problem for problem in problems_of({"algo": algo, "multiplier": multiplier}))
        return
    subject = subject_of("sd1", tiny_folders)
    adapter = trained(subject, config(algo, multiplier=multiplier))
    here = reload.answers(subject, adapter)
    file = reload.save(subject, adapter, tmp_path / "slider.safetensors")
    with safe_open(file, "pt") as opened:
        facts = opened.metadata()
    assert facts["slider.adapter"] == "lycoris" and json.loads(facts["slider.lycoris"])["apply_preset"]

    other = subject_of("sd1", tiny_folders)
    saved = LycorisConfig.model_validate(json.loads(facts["slider.lycoris"]))
    there = reload.answers(other, LycorisFile(other.denoiser, load_file(file), "it", saved))
    for scale, answer in here.items():
        assert torch.allclose(answer, there[scale], atol=1e-5), (scale, float((answer - there[scale]).abs().max()))
    assert torch.equal(there["+0"], here["+0"])
    if algo != "ia3":  # its loader takes one argument too few in lycoris-lora 4.1.3
        network, _ = lycoris.create_lycoris_from_weights(1.0, str(file), subject_of("sd1", tiny_folders).denoiser)
        assert len(network.loras) == len(adapter.modules)


def test_a_checkpoint_is_taken_back_exactly_and_another_one_refused(tiny_folders: Folders) -> None:
    first = trained(subject_of("sd1", tiny_folders), config())
    tensors = first.tensors()
    second = LycorisAdapter(Plugins.discover().facts("sd1"), subject_of("sd1", tiny_folders).denoiser, config())
    second.load_tensors(tensors, "checkpoint-1")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = LycorisAdapter(Plugins.discover().facts("sd1"), subject_of("sd1", tiny_folders).denoiser, config("loha"))
    with pytest.raises(UserError, match=r"checkpoint-1: .* use the model and the lycoris_config"):
        other.load_tensors(tensors, "checkpoint-1")


def test_a_file_for_another_model_is_refused(tiny_folders: Folders, tmp_path: Path) -> None:
    subject = subject_of("flux", tiny_folders)
    file = reload.save(subject, trained(subject, config()), tmp_path / "slider.safetensors")
    with pytest.raises(UserError, match=r"it does not fit this model: it has no layer lycoris_"):
        LycorisFile(subject_of("sd1", tiny_folders).denoiser, load_file(file), "it")


# --- Runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folders: Folders, image_folder: Any
) -> Callable[..., Path]:
    monkeypatch.chdir(tmp_path)
    entries = [
        {"id": side, "instance_data_dir": str(image_folder(tmp_path / side, 2, light)), "slider_strength": strength}
        for side, light, strength in (("more", 220, 1.0), ("less", 40, -1.0))
    ]

    def write(family: str, lycoris_config: Any, **keys: Any) -> Path:
        Path("buckets.json").write_text(json.dumps(entries))
        Path("lycoris_config.json").write_text(json.dumps(lycoris_config))
        values = {
            "model_family": family, "pretrained_model_name_or_path": str(tiny_folders(family)), "lora_type": "lycoris",
            "lycoris_config": "lycoris_config.json", "data_backend_config": "buckets.json", "resolution": 32,
            "output_dir": "out", "max_train_steps": 2, "mixed_precision": "no", "validation_prompt": "a circle",
            "validation_strengths": [1],
            "validation_num_inference_steps": 1, "validation_lycoris_strength": 0.5, "learning_rate": 0.01,
        }  # fmt: skip
        Path("config.json").write_text(json.dumps(values | keys))
        return Path("config.json")

    return write


PRESET = {"algo": "lokr", "multiplier": 1.0, "linear_dim": 4, "linear_alpha": 1,
          "apply_preset": {"target_module": list(DOCUMENTED["most models"])}}  # fmt: skip


@pytest.mark.parametrize(("family", "algo"), [("sd1", "lokr"), ("z_image", "full"), ("sd1", "ia3")])
def test_a_run_trains_validates_exports_and_goes_on(
    family: str, algo: str, run_folder: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    path = run_folder(family, PRESET | {"algo": algo})
    assert execute(["doctor", str(path)]) == 0
    assert f", {algo}" in capfd.readouterr().out
    assert execute(["train", str(path), "--max_train_steps", "1"]) == 0
    once = load_file("out/slider.safetensors")
    assert all(name.startswith("lycoris_") for name in once)
    Path("out/slider.safetensors").unlink()
    assert execute(["train", str(path), "--resume_from_checkpoint", "latest"]) == 0
    resumed = load_file("out/slider.safetensors")
    assert execute(["train", str(path), "--output_dir", "straight"]) == 0
    straight = load_file("straight/slider.safetensors")
    assert all(torch.equal(resumed[name], straight[name]) for name in straight), "a resumed run ends elsewhere"
    assert any(not torch.equal(once[name], straight[name]) for name in straight)
    assert execute(["validate", str(path)]) == 0


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ({"algo": "boft"}, "lycoris_config.json: algo: 'boft' cannot be used: a slider must mirror"),
        ({"algo": "dylora"}, "DyLoRA draws another rank in each call"),
        ({"algo": "tlora"}, "masks its rank by the timestep"),
        ({"algo": "lorka"}, "lycoris-lora has no algorithm 'lorka'; it is one of lora"),
        ({"algo": "lokr", "dora_wd": True}, "dora_wd: it cannot be used"),
        ({"algo": "diag-oft", "rescaled": True}, "rescaled: it cannot be used: its trained scale stays"),
        ({"algo": "diag-oft", "multiplier": 0.5}, "multiplier: Diag-OFT's file cannot hold one"),
        ({"algo": "full", "bypass_mode": True}, "bypass_mode: algo full has none"),
        ({"linear_dimm": 3}, "lycoris_config.json: linear_dimm: no such key; did you mean linear_dim?"),
        ({"linear_dim": 0}, "linear_dim"),
        ({"multiplier": "x"}, "multiplier"),
        ({"apply_preset": {"target_modul": []}}, "lycoris_config.json: apply_preset: target_modul: no such key"),
        ({"apply_preset": {"name_algo_map": {"x": {"algo": "boft"}}}}, "apply_preset: name_algo_map: x: algo: 'boft'"),
        ([1], "it must hold an object of keys and values"),
    ],
)
def test_a_wrong_file_is_told_before_loading(
    preset: Any, said: str, run_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(["train", str(run_folder("sd1", preset))]) == 2
    assert said in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_missing_file_and_a_wrong_combination(run_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = run_folder("sd1", PRESET)
    for keys, said in (
        (["--lycoris_config", "nowhere.json"], "lycoris_config: there is no file"),
        (["--lycoris_config", ""], "lycoris_config is needed, since lora_type is lycoris"),
    ):
        assert execute(["train", str(path), *keys]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("family", ["sd1", "flux", "z_image"])
def test_the_preset_to_paste_wraps_the_slider_targets(
    family: str, tiny_folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(["targets", family, "--lycoris", "lokr"]) == 0
    pasted = LycorisConfig.model_validate(json.loads(capsys.readouterr().out))
    subject = subject_of(family, tiny_folders)
    assert set(plan_of(subject.family.facts, subject.denoiser, pasted).modules) == slider_modules(subject)
    assert execute(["targets", family, "--lycoris", "boft"]) == 2


def test_every_algorithm_is_tested() -> None:
    assert {name.split()[0] for name in SIZES} == set(ALGORITHMS)

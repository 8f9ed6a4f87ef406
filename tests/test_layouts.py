"""Exported files load elsewhere: every module, equal weights, through the loaders of diffusers and lycoris-lora."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from slider_hooks import Layout, TargetRequest
from slider_plugin.adapterfile import read_adapter
from slider_plugin.adapters.attach import attach_file
from slider_plugin.adapters.lycoris_network import LycorisAdapter
from slider_plugin.cli import execute
from slider_plugin.errors import UserError
from slider_plugin.export import ExportError, export_diffusers, slider_metadata
from slider_plugin.export.command import comfyui_file, export_file
from slider_plugin.export.layouts import from_layout, layout_of, needs_own_file, stems, to_layout
from slider_plugin.export.metadata import flipped, for_programs
from slider_plugin.lint import lint_family
from slider_plugin.lycoris_config import LycorisConfig
from slider_plugin.pipelines import layers_of, load_file
from slider_plugin.registry import Plugins
from slider_plugin.targets import resolve_targets
from slider_plugin.testing.subject import PROMPTS, Subject

RANK = 4
UNETS, SAME = ("sd1", "sd2", "sdxl"), ("flux", "sd3", "auraflow", "pixart", "krea2")
OFFERED = [
    *((name, to) for name in UNETS for to in ("diffusers", "kohya", "comfyui", "lycoris")),
    *((name, to) for name in (*SAME, "z_image", "qwen_image", "wan") for to in ("diffusers", "comfyui", "lycoris")),
]
LOADED = [(name, to) for name, to in OFFERED if name != "pixart" or to == "lycoris"]
"""diffusers loads no LoRA into PixArt."""


def every_layer(denoiser: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """All that a LoRA can be in, as targets of a user's own may be, and not the slider's alone."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
    return {n: m for n, m in denoiser.named_modules() if isinstance(m, kinds) and getattr(m, "groups", 1) == 1}


def random_state(shapes: dict[str, torch.Size], seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Factors for layers by the shapes of their weights."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        down = torch.randn(RANK, *shape[1:], generator=generator)
        up = torch.randn(shape[0], RANK, *(1 for _ in shape[2:]), generator=generator)
        state[name] = {"lora_A": 0.1 * down, "lora_B": 0.1 * up}
    return state


def header(family: str, **more: Any) -> dict[str, str]:
    facts: dict[str, Any] = {
        "family": family, "flavour": None, "plugin": "slider-plugin", "plugin_version": "1.2", "targets": r"a\.b",
        "targets_source": "slider", "strengths": [-0.5, 1.5], "steps": 100, "seed": 42, "base_model": "org/model",
        "objective": "bucket", "adapter": {"slider.rank": "4", "slider.alpha": "2"}, "positive": "old", "negative": "young",
    }  # fmt: skip
    return slider_metadata(**{**facts, **more})


@pytest.fixture
def slider(tmp_path: Path, tiny_folders: Callable[[str], Path]) -> Callable[..., tuple[Path, dict[str, dict[str, Tensor]]]]:
    """A slider's diffusers file on the targets of a family, or on every layer that a LoRA can be in, and what is in it."""

    def write(name: str, everywhere: bool = False) -> tuple[Path, dict[str, dict[str, Tensor]]]:
        subject = Subject.load(Plugins.discover().load(name), tiny_folders(name))
        family, components = subject.family, subject.components
        known = every_layer(components.denoiser)
        request = TargetRequest(slider=True)
        names = known if everywhere else resolve_targets(family, components.denoiser, request, RANK).modules
        state = random_state({n: known[n].weight.shape for n in names})
        path = tmp_path / "slider.safetensors"
        export_diffusers(state, dict.fromkeys(state, 0.5), family.facts.denoiser, header(name), path, torch.float32)
        return path, {n: {"lora_A": f["lora_A"], "lora_B": 0.5 * f["lora_B"]} for n, f in state.items()}

    return write


def said(capfd: pytest.CaptureFixture[str]) -> str:
    return " ".join(capfd.readouterr().err.split())


# --- through the programs' own loaders --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "to"), LOADED)
def test_every_offered_layout_loads_with_every_module_and_equal_weights(
    name: str, to: str, slider: Any, tiny_folders: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    path, meant = slider(name)
    assert execute(["export", str(path), "--to", to, "--verify", "--model", str(tiny_folders(name))]) == 0
    left = ["patch_embedding"] if (name, to) == ("wan", "comfyui") else []
    text = said(capfd)
    assert f"loads all {len(meant) - len(left)} modules" in text
    assert all(f"left out, since readers of this layout cannot take it: {module};" in text for module in left)
    assert path.with_stem(f"slider_{to}").is_file()


@pytest.mark.parametrize(("name", "to"), [("sd1", "kohya"), ("sdxl", "kohya"), ("wan", "comfyui"), ("z_image", "comfyui")])
def test_a_layout_has_a_name_for_every_layer_of_the_model(
    name: str, to: str, slider: Any, tiny_folders: Callable[[str], Path]
) -> None:
    """Also for those that a user's own targets may reach: SDXL's size embedding, Wan's cross-attention."""
    path, meant = slider(name, everywhere=True)
    written = export_file(path, to, model=str(tiny_folders(name)))
    left = 1 if name == "wan" else 0
    assert written.report.modules == len(meant) - left
    assert f"loads all {len(meant) - left} modules" in written.notes[-1]


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@pytest.mark.parametrize("strength", [1.0, -1.0])
def test_a_unet_answers_in_kohya_s_layout_as_in_diffusers(
    name: str, strength: float, slider: Any, tiny_folders: Callable[[str], Path]
) -> None:
    path, _ = slider(name)
    answers = []
    for file in (path, export_file(path, "kohya").report.path):
        subject = Subject.load(Plugins.discover().load(name), tiny_folders(name))
        pipeline = subject.components.pipeline
        latents, text = subject.latents(2), subject.conditioning(PROMPTS)
        with torch.no_grad():
            base = subject.predict(latents, text)
            load_file(pipeline, file, "slider")
            for _, layer in layers_of(pipeline.unet, "slider").items():
                for weight in (layer.lora_A["slider"].weight, layer.lora_B["slider"].weight):
                    weight.data = weight.data.clone()  # aligned: a file's own buffer may take another path of arithmetic
            pipeline.set_adapters("slider", strength)
            answers.append(subject.predict(latents, text))
        assert not torch.equal(answers[-1], base)
    assert torch.equal(*answers)


# --- keys -------------------------------------------------------------------------------------------------------------


def keys(path: Path) -> set[str]:
    return set(safetensors.torch.load_file(path))


def test_keys_are_those_that_each_program_knows(slider: Any) -> None:
    path, _ = slider("sdxl", everywhere=True)
    kohya = keys(export_file(path, "kohya").report.path)
    block = "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"
    for name in ("conv_in", "time_embedding_linear_1", "label_emb_0_0", "label_emb_0_2", block):
        stem = f"lora_unet_{name}"
        assert {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"} <= kohya
    assert not [key for key in kohya if "add_embedding" in key]
    alphas = {k: t for k, t in safetensors.torch.load_file(path.with_stem("slider_kohya")).items() if k.endswith(".alpha")}
    assert {(t.dtype, t.shape, float(t)) for t in alphas.values()} == {(torch.float32, torch.Size([]), float(RANK))}


def test_wan_s_keys_are_those_of_the_original_model(slider: Any) -> None:
    path, _ = slider("wan")
    native = {key.rpartition(".lora_")[0] for key in keys(export_file(path, "comfyui").report.path)}
    block = {f"diffusion_model.blocks.0.self_attn.{part}" for part in "qkvo"}
    assert block | {f"diffusion_model.{n}" for n in ("head.head", "time_embedding.0", "time_embedding.2")} <= native
    assert not [name for name in native if "patch_embedding" in name or "attn1" in name]


@pytest.mark.parametrize("name", SAME)
def test_where_one_file_serves_all_the_keys_are_the_same(name: str, slider: Any) -> None:
    path, _ = slider(name)
    assert keys(export_file(path, "comfyui").report.path) == keys(path)
    assert not needs_own_file(Plugins.discover().facts(name))


def test_only_what_was_verified_is_declared() -> None:
    plugins = Plugins.discover()
    declared = {name for name in plugins.families() if plugins.facts(name).layouts}
    assert declared == {name for name, _ in OFFERED}
    assert {name for name in declared if needs_own_file(plugins.facts(name))} == {*UNETS, "wan"}


def test_names_that_would_be_read_by_half_are_refused() -> None:
    flat, native = Layout(prefix="lora_unet_", flat=True), Plugins.discover().facts("wan").layouts["comfyui"]
    with pytest.raises(UserError, match=r"a\.b_c and a_b\.c would both be lora_unet_a_b_c"):
        stems(flat, ["a.b_c", "a_b.c"])
    with pytest.raises(UserError, match=r"blocks\.0\.norm2 has no name in this layout"):
        stems(native, ["blocks.0.norm2"])
    with pytest.raises(UserError, match="left out: patch_embedding"):
        stems(native, ["patch_embedding"])


def test_the_map_back_notices_what_is_missing_strange_or_of_another_alpha() -> None:
    layout, state = Layout(prefix="lora_unet_", flat=True), random_state({"a.b": torch.Size([3, 5])})
    tensors, _ = to_layout(state, layout)
    assert from_layout(tensors, layout, ["a.b"])["a.b"]["lora_B"].equal(state["a.b"]["lora_B"])
    doubled = tensors | {"lora_unet_a_b.alpha": torch.tensor(2.0 * RANK)}
    assert from_layout(doubled, layout, ["a.b"])["a.b"]["lora_B"].equal(2 * state["a.b"]["lora_B"])
    with pytest.raises(UserError, match="alpha is missing"):
        from_layout({k: t for k, t in tensors.items() if not k.endswith("alpha")}, layout, ["a.b"])
    with pytest.raises(UserError, match="x belongs to none"):
        from_layout(tensors | {"x": torch.ones(1)}, layout, ["a.b"])


# --- sides, dtypes, metadata ------------------------------------------------------------------------------------------


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as opened:
        found: dict[str, str] = opened.metadata()
        return found


def test_flip_turns_the_change_the_words_and_the_range_round(slider: Any) -> None:
    path, meant = slider("sd1")
    state, told = read_adapter(export_file(path, "diffusers", flip=True).report.path)
    assert all(state[n]["lora_B"].equal(-meant[n]["lora_B"]) and state[n]["lora_A"].equal(meant[n]["lora_A"]) for n in meant)
    assert (told["slider.positive"], told["slider.negative"]) == ("young", "old")
    assert json.loads(told["slider.strengths"]) == [-1.5, 0.5]
    assert (told["slider.recommended_min"], told["slider.recommended_max"]) == ("-1.5", "0.5")
    assert (
        told["modelspec.usage_hint"] == "strength -1.5 to 0.5; above 0: young; below 0: old"
        and told["slider.flipped"] == "true"
    )
    flipped = path.with_stem("slider_flipped_diffusers")
    again, told = read_adapter(export_file(flipped, "diffusers", flip=True).report.path)
    assert all(again[n]["lora_B"].equal(meant[n]["lora_B"]) for n in meant)
    assert told["slider.positive"] == "old" and "slider.flipped" not in told


def test_a_calibrated_range_is_kept_and_turned_round() -> None:
    told = header("sd1", extra={"slider.recommended_min": "-3", "slider.recommended_max": "2", "slider.calibration": "{}"})
    facts = Plugins.discover().facts("sd1")
    assert for_programs(told, facts, "x")["modelspec.usage_hint"].startswith("strength -3 to 2;")
    turned = flipped(told)
    assert (turned["slider.recommended_min"], turned["slider.recommended_max"]) == ("-2", "3")
    assert "slider.calibration" not in turned


def test_other_programs_find_what_they_look_for(slider: Any) -> None:
    path, _ = slider("sdxl")
    told = metadata(export_file(path, "kohya").report.path)
    wanted = {
        "ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "4", "ss_steps": "100",
        "ss_seed": "42",
        "ss_base_model_version": "sdxl_base_v1-0", "ss_sd_model_name": "model", "ss_output_name": "slider_kohya",
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.title": "young to old", "modelspec.usage_hint": "strength -0.5 to 1.5; above 0: old; below 0: young",
        "slider.layout": "kohya", "slider.positive": "old", "slider.family": "sdxl",
    }  # fmt: skip
    assert {key: told.get(key) for key in wanted} == wanted
    assert all(isinstance(value, str) for value in told.values())


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_the_dtype_is_that_of_the_weights_and_not_of_alpha(dtype: str, kind: torch.dtype, slider: Any) -> None:
    path, meant = slider("sd1")
    report = export_file(path, "kohya", dtype=dtype).report
    tensors = safetensors.torch.load_file(report.path)
    assert {t.dtype for k, t in tensors.items() if k.endswith(".weight")} == {kind}
    assert {t.dtype for k, t in tensors.items() if k.endswith(".alpha")} == {torch.float32}
    assert tensors["lora_unet_conv_in.lora_up.weight"].equal(meant["conv_in"]["lora_B"].to(kind))
    assert report.path.name == f"slider_kohya_{dtype}.safetensors"


# --- LyCORIS, ControlNet ----------------------------------------------------------------------------------------------


@pytest.fixture
def lokr(tmp_path: Path, tiny_folders: Callable[[str], Path]) -> Callable[[str], Path]:
    """A file that LyCORIS trained, with random weights."""

    def write(algo: str) -> Path:
        subject = Subject.load(Plugins.discover().load("sd1"), tiny_folders("sd1"))
        config = LycorisConfig.model_validate(
            {"algo": algo, "linear_dim": 2, "linear_alpha": 1, "apply_preset": {"target_module": ["attn1.to_q", "conv_in"]}}
        )
        adapter = LycorisAdapter(subject.family.facts, subject.components.denoiser, config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        path = tmp_path / "slider.safetensors"
        adapter.export(path, "unet", header("sd1", adapter=adapter.facts()), torch.float32)
        return path

    return write


@pytest.mark.parametrize("algo", ["lokr", "loha", "full", "lora"])
def test_a_lycoris_file_goes_to_lycoris_alone_and_can_be_flipped(
    algo: str, lokr: Callable[[str], Path], tiny_folders: Callable[[str], Path]
) -> None:
    path = lokr(algo)
    with pytest.raises(UserError, match=r"was trained with LyCORIS, and only lycoris-lora.*--to lycoris"):
        export_file(path, "comfyui")
    written = export_file(path, "lycoris", flip=True, model=str(tiny_folders("sd1")))
    assert "lycoris-lora loads all" in written.notes[-1]
    answers = []
    for file, strength in ((path, -1.0), (written.report.path, 1.0), (path, 0.0)):
        subject = Subject.load(Plugins.discover().load("sd1"), tiny_folders("sd1"))
        adapter = attach_file(file, subject.family, subject.components)
        with torch.no_grad(), adapter.scaled(strength):
            answers.append(subject.predict(subject.latents(2), subject.conditioning(PROMPTS)))
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=1e-5)
    assert not torch.allclose(answers[0], answers[2], rtol=0, atol=1e-4)


def test_a_lycoris_file_whose_sign_hangs_on_no_tensor_is_not_flipped(tmp_path: Path) -> None:
    path = tmp_path / "oft.safetensors"
    safetensors.torch.save_file({"lycoris_conv_in.oft_blocks": torch.ones(2, 2)}, path, {"slider.family": "sd1"})
    with pytest.raises(UserError, match=r"--flip: .*lycoris_conv_in has no tensor that its sign hangs on"):
        export_file(path, "lycoris", flip=True)


def test_a_slider_on_a_controlnet_is_for_diffusers(tmp_path: Path) -> None:
    path, state = tmp_path / "slider.safetensors", random_state({"conv_in": torch.Size([8, 4, 3, 3])})
    export_diffusers(state, {"conv_in": 1.0}, "controlnet", header("sd1"), path, torch.float32)
    with pytest.raises(UserError, match="slider on a ControlNet, which diffusers alone reads: use --to diffusers"):
        export_file(path, "kohya")
    with pytest.raises(UserError, match="slider on a ControlNet, and --model"):
        export_file(path, "diffusers", model="x")
    assert keys(export_file(path, "diffusers", flip=True).report.path) == keys(path)


# --- bad input --------------------------------------------------------------------------------------------------------


def wrong(arguments: list[Any], capfd: pytest.CaptureFixture[str]) -> str:
    """What is said of wrong arguments, in one line, with exit code 2; no file appears."""
    assert execute(["export", *map(str, arguments)]) == 2
    text = capfd.readouterr().err
    assert "Traceback" not in text
    return " ".join(text.split())


def test_bad_input_is_named_with_the_way_out(slider: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, _ = slider("sd1")
    (tmp_path / "taken.safetensors").write_bytes(b"mine")
    whole = tmp_path / "whole.safetensors"
    safetensors.torch.save_file({"conv_in.weight": torch.ones(2, 2)}, whole)
    untold = tmp_path / "untold.safetensors"
    safetensors.torch.save_file({f"unet.a.lora_{t}.weight": torch.ones(2, 2) for t in "AB"}, untold)
    cases = [
        ([path, "--to", "gguf"], "--to gguf: there is no such layout; use diffusers, kohya, comfyui, lycoris"),
        ([path], "Missing option '--to'"),
        ([tmp_path / "none.safetensors", "--to", "kohya"], "none.safetensors: there is no such file"),
        ([whole, "--to", "kohya"], "whole.safetensors: no LoRA layers in it"),
        ([untold, "--to", "kohya"], "its metadata does not tell the model family; name it with --family"),
        (
            [untold, "--to", "diffusers", "--family", "flux"],
            "layers belong to `unet`, and the model of flux is `transformer`",
        ),
        ([untold, "--to", "kohya", "--family", "nonsense"], "nonsense"),
        ([path, "--to", "kohya", "--family", "sdxl"], "is a slider of sd1, and --family is sdxl; leave --family out"),
        (
            [path, "--to", "kohya", "--output", tmp_path / "taken.safetensors"],
            "exists already and is not overwritten",
        ),
        ([path, "--to", "kohya", "--output", tmp_path / "a.pt"], "a slider is a .safetensors file"),
        ([path, "--to", "kohya", "--output", whole / "a.safetensors"], "whole.safetensors is a file; choose another folder"),
        ([path, "--to", "kohya", "--dtype", "int8"], "--dtype int8: there is no such type; use fp32, bf16, fp16"),
        ([path, "--to", "kohya", "--model", tmp_path / "nowhere"], "nowhere does not exist"),
    ]
    before = {p.name for p in tmp_path.iterdir()}
    for arguments, message in cases:
        assert message in wrong(arguments, capfd)
    assert {p.name for p in tmp_path.iterdir()} == before and (tmp_path / "taken.safetensors").read_bytes() == b"mine"


def test_layouts_that_nobody_verified_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "slider.safetensors"
    state = random_state({"transformer_blocks.0.attn.to_q": torch.Size([4, 4])})
    for family, to, said in (
        ("flux2", "comfyui", "these key names are not verified for flux2, and for it a slider is a diffusers file only"),
        ("flux", "kohya", "these key names are not verified for flux, and what the web UIs read of it is --to comfyui"),
    ):
        export_diffusers(state, dict.fromkeys(state, 1.0), "transformer", header(family), path, torch.float32)
        assert said in wrong([path, "--to", to], capfd)


def test_a_model_of_other_sizes_or_names_is_refused_and_nothing_is_written(
    slider: Any, tiny_folders: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, _ = slider("sd1")
    assert "is not a Stable Diffusion 1.x model" in wrong([path, "--to", "kohya", "--model", tiny_folders("sdxl")], capfd)
    state = random_state({"conv_in": torch.Size([3, 4, 3, 3]), "nowhere.at_all": torch.Size([4, 4])})
    for names, said in (
        (["conv_in"], "other.safetensors: diffusers cannot load it"),
        (["nowhere.at_all"], "has no module nowhere.at_all"),
    ):
        other, part = tmp_path / "other.safetensors", {name: state[name] for name in names}
        export_diffusers(part, dict.fromkeys(part, 1.0), "unet", header("sd1"), other, torch.float32)
        target = tmp_path / "new" / "other.safetensors"
        assert said in wrong([other, "--to", "diffusers", "--output", target, "--model", tiny_folders("sd1")], capfd)
        assert not list(target.parent.glob("*"))


def test_a_file_that_is_not_what_was_meant_is_never_written(slider: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = slider("sd1")

    def swapped(tensors: Any, *arguments: Any) -> Any:
        found = from_layout(tensors, *arguments)
        return found | {"conv_in": {"lora_A": found["conv_in"]["lora_A"], "lora_B": 2 * found["conv_in"]["lora_B"]}}

    monkeypatch.setattr("slider_plugin.export.verify.from_layout", swapped)
    with pytest.raises(ExportError, match=r"conv_in\.lora_B has other values"):
        export_file(path, "kohya")
    with pytest.raises(ExportError):
        comfyui_file(path, Plugins.discover().facts("sd1"))
    assert [p.name for p in path.parent.glob("*")] == ["slider.safetensors"]


def test_a_loader_that_loses_a_module_is_noticed(
    slider: Any, tiny_folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = slider("sd1")
    monkeypatch.setattr(
        "slider_plugin.export.verify.layers_of", lambda model, name: dict(list(layers_of(model, name).items())[1:])
    )
    with pytest.raises(ExportError, match="is lost"):
        export_file(path, "kohya", model=str(tiny_folders("sd1")))


def test_the_maps_are_pure() -> None:
    layout = layout_of(Plugins.discover().facts("sd1"), "kohya")
    state = random_state({"conv_in": torch.Size([8, 4, 3, 3])})
    before = {twin: tensor.clone() for twin, tensor in state["conv_in"].items()}
    to_layout(state, layout)
    assert all(before[twin].equal(state["conv_in"][twin]) for twin in before)


@pytest.mark.parametrize(
    ("layouts", "said"),
    [
        ({"forge": Layout(prefix="x.")}, "layouts has the name 'forge'"),
        ({"kohya": "lora_unet_"}, r"layouts\['kohya'\] is a str, not a slider_hooks.Layout"),
        ({"kohya": Layout(prefix="x.", names=(("(", "a"),))}, "are no expressions"),
        ({"kohya": Layout(prefix="x.", names=(("a", r"\2"),))}, "are no expressions: invalid group reference"),
        ({"kohya": Layout(prefix="x.", left_out="[")}, "are no expressions"),
        ([], "layouts is a list, not a mapping"),
    ],
)
def test_a_family_s_wrong_layouts_are_named(layouts: Any, said: str) -> None:
    (finding,) = lint_family(replace(Plugins.discover().facts("flux2"), layouts=layouts))
    assert re.search(said, finding)


def test_every_declared_layout_passes_the_lint() -> None:
    plugins = Plugins.discover()
    assert not [finding for name in plugins.families() for finding in lint_family(plugins.facts(name))]

"""The probe on models that nobody described: small ones whose names mislead, pipelines without a family, and bad folders."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from slider_plugin.cli import execute
from slider_plugin.errors import UserError
from slider_plugin.probing import Probe, probe_folder
from slider_plugin.probing.drawing import Observed, Request, draw, observe
from slider_plugin.probing.expressions import Names
from slider_plugin.probing.flow import Graph
from slider_plugin.probing.lengthen import with_more_text
from slider_plugin.probing.opening import open_pipeline
from slider_plugin.probing.probe import judged
from slider_plugin.probing.trace import Argument, Attention, traced
from slider_plugin.probing.trees import Call, table

D = 8  # features


# --- A denoiser whose names mislead -----------------------------------------------------------------------------------


class Attend(nn.Module):
    """Attention whose layers are named after nothing; written out as two products where `by_hand`."""

    def __init__(self, by_hand: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(D, D) for _ in range(4))
        self.by_hand = by_hand

    def forward(self, x_BND: Tensor, y_BND: Tensor) -> Tensor:
        q, k, v = self.a(x_BND), self.b(y_BND), self.c(y_BND)
        if self.by_hand:
            return self.d((q @ k.transpose(1, 2)).softmax(-1) @ v)
        return self.d(scaled_dot_product_attention(q, k, v))


class Block(nn.Module):
    """`text_attn` is self-attention, `self_attn` cross-attention, `time_embedding` modulation."""

    def __init__(self) -> None:
        super().__init__()
        self.text_attn, self.self_attn = Attend(), Attend(by_hand=True)
        self.time_embedding = nn.Linear(D, D)
        self.proj_out = nn.Linear(D, D)  # a feed-forward

    def forward(self, x_BND: Tensor, text_BTD: Tensor, time_B1D: Tensor) -> Tensor:
        x_BND = x_BND + self.text_attn(x_BND * self.time_embedding(time_B1D), x_BND)
        x_BND = x_BND + self.self_attn(x_BND, text_BTD)
        return x_BND + self.proj_out(x_BND)


class Misleading(nn.Module):
    """Images `(B, 4, h, w)`, a time `(B,)`, text `(B, T, D)`, a pooled text `(B, D)`."""

    def __init__(self, longest_text: int = 1000) -> None:
        super().__init__()
        self.text_proj = nn.Conv2d(4, D, 1)  # the image's
        self.conv_in = nn.Linear(D, D)  # the text's
        self.context_refiner = nn.ModuleList([Attend()])
        self.caption = nn.Sequential(nn.Linear(1, D), nn.SiLU(), nn.Linear(D, D))  # the time's
        self.time_embed = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D))  # the pooled text's
        self.blocks = nn.ModuleList([Block(), Block()])
        self.both = nn.ModuleList([Attend()])
        self.never = nn.Linear(D, D)
        self.context = nn.Linear(D, 4)  # the image's
        self.longest_text = longest_text

    def forward(self, image_BChw: Tensor, time_B: Tensor, text_BTD: Tensor, pooled_BD: Tensor) -> Tensor:
        if text_BTD.shape[1] > self.longest_text:
            raise ValueError("too much text")
        B, _, h, w = image_BChw.shape
        x_BND = self.text_proj(image_BChw).flatten(2).transpose(1, 2)
        text_BTD = self.conv_in(text_BTD)
        for refiner in self.context_refiner:
            text_BTD = text_BTD + refiner(text_BTD, text_BTD)
        time_B1D = (self.caption(time_B[:, None]) + self.time_embed(pooled_BD))[:, None]
        for block in self.blocks:
            x_BND = block(x_BND, text_BTD, time_B1D)
        for attend in self.both:
            joined = torch.cat([text_BTD, x_BND], dim=1)
            x_BND = (joined + attend(joined, joined))[:, text_BTD.shape[1] :]
        return self.context(x_BND).transpose(1, 2).reshape(B, 4, h, w)


def observed() -> Observed:
    """Calls of `Misleading` as a pipeline would make them that pads all text to 7 tokens."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    noise, text, pooled, late = normal(1, 4, 4, 4), normal(1, 7, D), normal(1, D), torch.tensor([0.9])

    def call(noise: Tensor = noise, time: Tensor = late, text: Tensor = text, pooled: Tensor = pooled) -> Call:
        return (noise, time), {"text_BTD": text, "pooled_BD": pooled}

    return Observed(
        component="net",
        request=Request(),
        plain=call(),
        reseeded=call(noise=normal(1, 4, 4, 4)),
        later=call(noise=normal(1, 4, 4, 4), time=torch.tensor([0.4])),
        reworded=call(text=normal(1, 7, D), pooled=normal(1, D)),
        wider=call(noise=normal(1, 4, 4, 20)),
        same_text=True,
    )


def probe_of(denoiser: nn.Module) -> Probe:
    with torch.no_grad():
        return judged(denoiser.eval(), observed(), "AnyPipeline", "a folder")


def test_what_is_measured_decides_not_what_it_is_called() -> None:
    probe = probe_of(Misleading())
    attention = [f"blocks.{n}.text_attn.{leaf}" for n in (0, 1) for leaf in "abcd"]
    roles = {role: {name for name, own in probe.roles.items() if own == role} for role in set(probe.roles.values())}
    assert roles["self"] == set(attention)
    assert roles["joint"] == {f"both.0.{leaf}" for leaf in "abcd"}
    assert roles["io"] == {"text_proj", "context"}
    assert roles["time"] == {"caption.0", "caption.2"}
    assert roles["cross"] == {f"blocks.{n}.self_attn.{leaf}" for n in (0, 1) for leaf in "abcd"}
    assert "proj" not in roles and not probe.unsure
    assert probe.streams["never"] == "unused" and probe.streams["conv_in"] == "text"
    assert probe.streams["time_embed.0"] == "fixed" and probe.streams["context_refiner.0.a"] == "text"


def test_the_proposal_matches_these_modules_and_forbids_language() -> None:
    probe = probe_of(Misleading())
    assert probe.proposal.self_attention == r"blocks\.\d+\.text_attn\.(a|b|c|d)"
    assert probe.proposal.joint_attention == r"both\.\d+\.(a|b|c|d)"
    assert probe.proposal.time == r"caption\.(0|2)"
    forbidden = {name for name in probe.streams if re.fullmatch(probe.proposal.forbidden, name)}
    language = {"conv_in", "time_embed.0", "time_embed.2", *(f"context_refiner.0.{leaf}" for leaf in "abcd")}
    assert forbidden == language | {name for name, role in probe.roles.items() if role == "cross"}
    for include_joint in (True, False):
        matched = [name for name in probe.streams if re.fullmatch(probe.proposal.slider(include_joint), name)]
        assert tuple(matched) == probe.targets(include_joint)


def test_where_the_text_cannot_be_lengthened_what_flows_decides_and_it_says_so() -> None:
    sure, probe = probe_of(Misleading()), probe_of(Misleading(longest_text=7))
    assert any("refuses more text tokens (ValueError: too much text)" in note for note in probe.notes)
    differing = {name for name in probe.roles if probe.roles[name] != sure.roles[name]}
    assert differing <= set(probe.unsure)
    assert probe.roles["blocks.0.text_attn.a"] == "self" and probe.roles["blocks.0.self_attn.b"] == "cross"
    assert set(probe.unsure) <= {*(f"both.0.{leaf}" for leaf in "abcd"), "context"}


@pytest.mark.parametrize("family", ["sd1", "flux", "z_image", "ace_step"])
def test_what_flows_is_enough_for_real_models_but_for_what_it_is_unsure_of(
    family: str, tiny_folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sure = probe_folder(tiny_folders(family))
    monkeypatch.setattr("slider_plugin.probing.streams.with_more_text", lambda observed: (None, "it was not asked"))
    probe = probe_folder(tiny_folders(family))
    assert probe.notes[1] == "text: it was not asked"
    for include_joint in (True, False):
        assert set(probe.targets(include_joint)) ^ set(sure.targets(include_joint)) <= set(probe.unsure)


def test_two_products_are_one_attention_and_a_gate_belongs_to_it() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.ModuleDict({name: nn.Linear(D, D) for name in ("q", "k", "v", "gate", "out")})
            self.mlp, self.fused = nn.Linear(D, D), nn.Linear(2 * D, D)

        def forward(self, x_BND: Tensor) -> Tensor:
            part = self.attn
            heads = (part["q"](x_BND) @ part["k"](x_BND).mT).softmax(-1) @ part["v"](x_BND)
            written = torch.zeros_like(x_BND)
            written[:, :2] = part["out"](heads * part["gate"](x_BND))[:, :2]
            return self.fused(torch.cat([heads, self.mlp(x_BND)], dim=-1)) + written

    trace = traced(Gated(), ((torch.randn(1, 5, D),), {}))
    (group,) = Graph(trace).groups
    assert group.numbers == (0, 1) and group.module == "attn"
    assert group.members == {"attn.q", "attn.k", "attn.v", "attn.gate", "attn.out"}
    assert trace.inputs["attn.q"] == {Argument((0,))} and trace.inputs["fused"] == {Attention(1), "mlp"}
    assert trace.answers == [((1, 5, D), frozenset({"fused", "attn.out"}))]


# --- The calls of real pipelines --------------------------------------------------------------------------------------


def test_the_calls_of_a_pipeline(tiny_folders: Callable[[str], Path]) -> None:
    pipeline = open_pipeline(tiny_folders("flux"))
    found = observe(pipeline)
    assert found.component == "transformer" and found.same_text
    assert found.noise() == found.image() == {("hidden_states",)} and found.time() == {("timestep",)}
    assert {("encoder_hidden_states",), ("pooled_projections",)} <= found.text()
    longer, how = with_more_text(found)
    assert longer is not None and how == "a longer prompt"
    assert table(longer)["encoder_hidden_states",].shape[1] == table(longer)["txt_ids",].shape[0] == 192


def test_a_step_of_several_calls_is_told_from_the_next_step(tiny_folders: Callable[[str], Path]) -> None:
    """This pipeline asks its denoiser three times in a step, the first time for a batch of two."""
    found = observe(open_pipeline(tiny_folders("ltx2")))
    assert found.image() == {("hidden_states",)} and ("audio_hidden_states",) in found.noise()
    assert found.time() == {("sigma",), ("timestep",)}
    assert {("encoder_hidden_states",), ("audio_encoder_hidden_states",)} <= found.text()


def test_text_of_one_length_is_lengthened_with_its_mask(tiny_folders: Callable[[str], Path]) -> None:
    found = observe(open_pipeline(tiny_folders("hunyuan_video15")))
    longer, how = with_more_text(found)
    assert longer is not None and how == "64 more tokens in the denoiser's call"
    before, after = table(found.plain), table(longer)
    for name in ("encoder_hidden_states", "encoder_attention_mask", "encoder_hidden_states_2"):
        assert after[name,].shape[1] == before[name,].shape[1] + 64
    for name in ("hidden_states", "image_embeds", "timestep"):
        assert after[name,].shape == before[name,].shape


def test_a_pipeline_is_left_as_it_was(tiny_folders: Callable[[str], Path]) -> None:
    pipeline = open_pipeline(tiny_folders("hidream"))
    before, state = pipeline.default_sample_size, torch.random.get_rng_state()
    run = draw(pipeline, Request())
    assert run.error is None and table(run.calls["transformer"][0])["hidden_states",].shape[-2:] == (8, 8)
    assert pipeline.default_sample_size == before and torch.equal(torch.random.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in pipeline.transformer.modules())


# --- Pipelines that no family describes -------------------------------------------------------------------------------


def save(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder


def latte(folder: Path) -> Path:
    """Videos: attention in space and in time, cross-attention to T5."""
    from diffusers import LattePipeline, LatteTransformer3DModel

    from slider_plugin.testing import tiny as parts

    with parts.seeded(0):
        text_encoder, tokenizer = parts.t5(hidden_size=32)
        transformer = LatteTransformer3DModel(
            sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32,
            in_channels=4, cross_attention_dim=24, out_channels=8, norm_type="ada_norm_single", num_embeds_ada_norm=1000,
            norm_elementwise_affine=False,
        )  # fmt: skip
        pipeline = LattePipeline(tokenizer, text_encoder, parts.autoencoder(4), transformer, parts.ddim())
        return save(pipeline, folder)


def lumina_next(folder: Path) -> Path:
    """One layer takes up both attentions of a block."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LuminaNextDiT2DModel, LuminaPipeline

    from slider_plugin.testing import tiny as parts

    with parts.seeded(0):
        text_encoder, tokenizer = parts.gemma2(hidden_size=32)
        transformer = LuminaNextDiT2DModel(
            sample_size=4, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_attention_heads=3, num_kv_heads=1,
            multiple_of=16, cross_attention_dim=32, learn_sigma=True,
        )  # fmt: skip
        scheduler = FlowMatchEulerDiscreteScheduler()
        pipeline = LuminaPipeline(transformer, scheduler, parts.autoencoder(4), text_encoder, tokenizer)
        return save(pipeline, folder)


def test_videos_with_attention_in_space_and_in_time(tmp_path: Path) -> None:
    probe = probe_folder(latte(tmp_path / "model"))
    leaves = r"\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)"
    assert probe.proposal.self_attention == f"(transformer_blocks|temporal_transformer_blocks){leaves}"
    assert probe.proposal.io == r"pos_embed\.proj|proj_out"
    assert probe.proposal.time == r"adaln_single\.emb\.timestep_embedder\.(linear_1|linear_2)"
    assert probe.proposal.forbidden == r"transformer_blocks\.\d+\.attn2\..+|caption_projection\..+"
    assert len(probe.targets()) == 20 and not probe.unsure


def test_a_layer_of_both_attentions_is_a_question(tmp_path: Path) -> None:
    probe = probe_folder(lumina_next(tmp_path / "model"))
    assert probe.proposal.self_attention == r"layers\.\d+\.attn1\.(to_q|to_k|to_v)"
    assert set(probe.unsure) == {f"layers.{n}.attn2.to_out.0" for n in (0, 1)}
    assert set(probe.unsure.values()) == {"it takes up the results of self-attention and of cross-attention at once"}


# --- Expressions ------------------------------------------------------------------------------------------------------


class Tree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(1, 1), "k": nn.Linear(1, 1)}) for _ in range(3)])
        self.mid = nn.ModuleDict({"q": nn.Linear(1, 1), "k": nn.Linear(1, 1)})
        self.row = nn.Sequential(nn.Linear(1, 1), nn.SiLU(), nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("wanted", "expression"),
    [
        ([], ""),
        (["down.0.q", "down.1.q", "down.2.q"], r"down\.\d+\.q"),
        (["down.0.q", "down.2.q"], r"down\.0\.q|down\.2\.q"),  # not all of them: no number stands for any
        (["down.0.q", "down.1.q", "down.2.q", "mid.q"], r"down\.\d+\.q|mid\.q"),
        (["down.0.q", "down.0.k", "down.1.q", "down.1.k", "down.2.q", "down.2.k"], r"down\.\d+\.(q|k)"),
        (["row.2"], r"row\.2"),  # a place in a row is no block
        (["mid.q", "mid.k", "row.0"], r"mid\.(q|k)|row\.0"),
    ],
)
def test_expressions(wanted: list[str], expression: str) -> None:
    tree = Tree()
    names = [name for name, module in tree.named_modules() if isinstance(module, nn.Linear)]
    found = Names(tree, names).expression(wanted)
    assert {name for name in names if found and re.fullmatch(found, name)} == set(wanted)
    assert found == expression


def test_whole_subtrees_are_covered_where_nothing_else_is_in_them() -> None:
    tree = Tree()
    names = [name for name, module in tree.named_modules() if isinstance(module, nn.Linear)]
    wanted = {"mid.q", "mid.k", "row.0"}
    assert set(Names(tree, names).covering(wanted, wanted.__contains__).split("|")) == {r"mid\..+", r"row\.0"}


# --- The command ------------------------------------------------------------------------------------------------------


def test_the_command_for_programs(capsys: pytest.CaptureFixture[str], tiny_folders: Callable[[str], Path]) -> None:
    assert execute(["targets", "--probe", str(tiny_folders("z_image")), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["denoiser"], answer["denoiser_class"]) == ("transformer", "ZImageTransformer2DModel")
    assert (answer["matched"], answer["joint"]) == (16, 8)
    assert answer["targets"]["joint_attention"] == r"layers\.\d+\.attention\.(to_q|to_k|to_v|to_out\.0)"
    assert answer["modules"]["context_refiner.0.attention.to_q"] == {"sees": "text", "is": "other"}
    matched = [name for name in answer["modules"] if re.fullmatch(answer["slider_without_joint"], name)]
    assert len(matched) == 8 and answer["unsure"] == {}


def test_the_command_for_people(capsys: pytest.CaptureFixture[str], tiny_folders: Callable[[str], Path]) -> None:
    assert execute(["targets", "--probe", str(tiny_folders("chroma"))]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^single_transformer_blocks\.N\.attn\.to_q +joint +joint +1$", text, re.MULTILINE)
    assert '    self_attention=r"transformer_blocks\\.\\d+\\.attn\\.(to_q|to_k|to_v|to_out\\.0)",\n' in text
    assert re.search(r"^slider: 9 modules, .*\nwithout joint: 6 modules, ", text, re.MULTILINE)
    assert "unsure, look at these yourself:\n  distilled_guidance_layer.in_proj: " in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a FAMILY"),
        (["sd1", "--probe", "x"], "leave FAMILY, --model and --flavour out"),
        (["--probe", "x", "--flavour", "1.5"], "leave FAMILY, --model and --flavour out"),
        (["--probe", "missing/x/y"], "missing/x/y does not exist"),
        (["--probe", "."], "not a diffusers pipeline folder: it has no model_index.json"),
        (["--probe", "pyproject.toml"], "is a file"),
    ],
)
def test_wrong_words_are_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    assert execute(["targets", *arguments]) == 2
    text = capsys.readouterr().err.strip()
    assert said in text and "\n" not in text


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "is damaged: it names no pipeline class"),
        ('{"_class_name": "NopePipeline"}', "is of the class NopePipeline, which diffusers does not have here"),
        ('{"_class_name": "DDPMPipeline"}', "draws without a prompt"),
        ('{"_class_name": "WanImageToVideoPipeline"}', "cannot draw from a prompt alone, it needs image"),
        ('{"_class_name": "FluxPipeline"}', "its folder has no vae, text_encoder, "),
    ],
)
def test_a_folder_that_cannot_be_probed_is_one_line(index: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        probe_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_modular_pipeline_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "modular_model_index.json").write_text("{}")
    with pytest.raises(UserError, match="holds a modular pipeline"):
        probe_folder(tmp_path)


def test_a_pipeline_that_only_changes_images_is_one_line(tmp_path: Path, tiny_folders: Callable[[str], Path]) -> None:
    """Its class says nothing of an image that it needs: only drawing shows that."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folders("sd1"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionImg2ImgPipeline"}))
    with pytest.raises(UserError, match="drew none of the small images") as caught:
        probe_folder(folder)
    assert "\n" not in str(caught.value)

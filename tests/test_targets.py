"""Where sliders attach, counted on the real classes at their published sizes, on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from slider_hooks import ResolvedTargets, TargetRequest
from slider_plugin.errors import UserError
from slider_plugin.registry import Plugins
from slider_plugin.targets import DOCUMENTED, adaptable_modules, alternatives, match, resolve_targets, suffix_expression


def published(name: str) -> torch.nn.Module:
    import diffusers

    with torch.device("meta"):
        if name == "sd1":
            return diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        return diffusers.ZImageTransformer2DModel()


SLIDER = TargetRequest(slider=True)


# Counts of architectures.json, measured on diffusers 0.42.1.
@pytest.mark.parametrize(
    ("name", "matched", "kinds"),
    [
        ("sd1", 100, {"self": 64, "proj": 32, "io": 2, "time": 2}),
        ("z_image", 132, {"self": 8, "joint": 120, "io": 2, "time": 2}),
    ],
)
def test_slider_targets_of_the_published_model(name: str, matched: int, kinds: dict[str, int]) -> None:
    plan = resolve_targets(Plugins.discover().load(name), published(name), SLIDER)
    assert len(plan.modules) == matched
    assert plan.by_kind == kinds
    assert plan.source == "slider"
    assert plan.forbidden == plan.dead == plan.warnings == ()


def test_without_joint_modules_z_image_keeps_its_refiner() -> None:
    family = Plugins.discover().load("z_image")
    plan = resolve_targets(family, published("z_image"), TargetRequest(slider=True, include_joint=False))
    assert len(plan.modules) == 12
    assert "joint" not in plan.by_kind


def test_the_documented_list_matches_as_the_specification_was_measured() -> None:
    documented = ResolvedTargets(expression=suffix_expression(DOCUMENTED), source="documented")
    plugins = Plugins.discover()
    sd1 = match(plugins.facts("sd1"), published("sd1"), documented)
    assert len(sd1.modules) == 100
    assert sd1.dead == ("attn1.to_qkv", "to_qkv")
    assert match(plugins.facts("z_image"), published("z_image"), documented).modules == ()


def test_suffixes_match_as_peft_does(load: Callable[[str], tuple[Any, Any]]) -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    family, components = load("sd1")
    answer = ResolvedTargets(expression=suffix_expression(["attn1.to_q", "conv_in", "proj_out"]), source="explicit")
    ours = set(match(family.facts, components.denoiser, answer).modules)
    inject_adapter_in_model(LoraConfig(target_modules=["attn1.to_q", "conv_in", "proj_out"]), components.denoiser)
    theirs = {name for name, module in components.denoiser.named_modules() if isinstance(module, LoraLayer)}
    assert ours == theirs


@pytest.mark.parametrize("name", ["sd1", "z_image"])
def test_no_target_ever_sees_text_alone(name: str, load: Callable[[str], tuple[Any, Any]]) -> None:
    """Shape probe: the text length equals no image token count, so a module that is fed text alone gives itself away."""
    family, components = load(name)
    text_lengths = {24} if name == "sd1" else {32}  # CLIP's padded length; Z-Image pads text to a multiple of 32
    plan = resolve_targets(family, components.denoiser, SLIDER)
    seen: dict[str, set[int]] = {}
    for module_name in plan.modules:
        module = components.denoiser.get_submodule(module_name)
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, key=module_name: (
                    seen.setdefault(key, set()).add(args[0].shape[1]) if args[0].ndim == 3 else None
                )
            )
    latents = torch.randn(1, 4, 16, 16)
    time = torch.tensor([0.5]) if name == "z_image" else torch.tensor([500])
    with torch.no_grad():
        family.predict(components, latents, time, family.encode_prompts(components, ["a red circle"]))
    assert seen
    assert not {module for module, lengths in seen.items() if lengths & text_lengths}


def test_explicit_targets_win_and_a_dead_one_is_named(load: Callable[[str], tuple[Any, Any]]) -> None:
    family, components = load("sd1")
    request = TargetRequest(slider=True, explicit=("attn2.to_k", "nowhere"))
    plan = resolve_targets(family, components.denoiser, request)
    assert plan.source == "explicit"
    assert all(name.endswith("attn2.to_k") for name in plan.modules)
    assert any("nowhere" in line for line in plan.warnings)
    assert any("cross-attention" in line for line in plan.warnings)
    with pytest.raises(UserError, match="nowhere"):
        resolve_targets(family, components.denoiser, request, strict=True)


class _Answering:
    """A family whose answer to a slider request is given."""

    def __init__(self, family: Any, expression: str) -> None:
        self._family, self.facts, self._expression = family, family.facts, expression

    def resolve_lora_targets(self, denoiser: Any, controlnet: Any, request: TargetRequest) -> ResolvedTargets:
        if request.slider:
            return ResolvedTargets(expression=self._expression, source="slider")
        return self._family.resolve_lora_targets(denoiser, controlnet, request)


def test_a_slider_that_reaches_text_is_refused(load: Callable[[str], tuple[Any, Any]]) -> None:
    family, components = load("sd1")
    with pytest.raises(UserError, match=r"cross-attention or text-only.*attn2"):
        resolve_targets(_Answering(family, r".*attn[12]\.to_q"), components.denoiser, SLIDER)


def test_a_slider_without_attention_is_refused(load: Callable[[str], tuple[Any, Any]]) -> None:
    family, components = load("sd1")
    with pytest.raises(UserError, match="no attention module"):
        resolve_targets(_Answering(family, r"conv_in|conv_out"), components.denoiser, SLIDER)


def test_no_match_falls_back_to_standard_targets_with_a_warning(load: Callable[[str], tuple[Any, Any]]) -> None:
    family, components = load("sd1")
    absent = _Answering(family, r"blocks\.\d+\.attn")
    plan = resolve_targets(absent, components.denoiser, SLIDER)
    assert plan.source == "standard"
    assert any("no slider target of sd1 matches" in line for line in plan.warnings)
    with pytest.raises(UserError, match="no slider target of sd1 matches"):
        resolve_targets(absent, components.denoiser, SLIDER, strict=True)


def test_explicit_targets_that_match_nothing_name_what_is_near(load: Callable[[str], tuple[Any, Any]]) -> None:
    family, components = load("sd1")
    with pytest.raises(UserError, match=r"match no module of UNet2DConditionModel.*attn1\.to_q"):
        resolve_targets(family, components.denoiser, TargetRequest(slider=True, explicit=("attn1.to_qq",)))


def test_rank_must_fit_the_groups_of_a_convolution() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=8))
    answer = ResolvedTargets(expression="0", source="explicit")
    facts = Plugins.discover().facts("sd1")
    with pytest.raises(UserError, match="8 groups"):
        match(facts, model, answer, rank=4)
    assert match(facts, model, answer, rank=16).modules == ("0",)


def test_counts_of_trainable_parameters_are_peft_s(load: Callable[[str], tuple[Any, Any]]) -> None:
    from slider_plugin.adapters.peft_lora import LoraAdapter

    family, components = load("sd1")
    plan = resolve_targets(family, components.denoiser, SLIDER, rank=4)
    adapter = LoraAdapter(components.denoiser, plan.modules, rank=4, alpha=4)
    assert sum(p.numel() for p in adapter.parameters()) == 4 * plan.parameters


def test_alternatives_split_at_the_top_level_alone() -> None:
    assert alternatives(r"a|b(c|d)|[x|y]|\|e") == ["a", "b(c|d)", "[x|y]", r"\|e"]


def test_containers_are_never_matched() -> None:
    names = adaptable_modules(published("sd1"))
    assert "down_blocks.0.attentions.0" not in names
    assert "conv_in" in names

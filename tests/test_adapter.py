"""The adapter's promise: 0 is the base model bit for bit, -s mirrors +s, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from slider_hooks import TargetRequest
from slider_plugin.adapters.peft_lora import NAME, LoraAdapter
from slider_plugin.errors import UserError
from slider_plugin.targets import resolve_targets

Load = Callable[[str], tuple[Any, Any]]
FAMILIES = ("sd1", "z_image")


def prepared(
    load: Load, name: str, rank: int = 4, alpha: float = 2.0
) -> tuple[Any, Any, LoraAdapter, Callable[[], Tensor], Tensor]:
    """A tiny model, its output before injection, an adapter with non-zero weights and the call that gave the output."""
    family, components = load(name)
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    time = torch.tensor([0.3, 0.7]) if name == "z_image" else torch.tensor([100, 700])
    with torch.no_grad():
        conditioning = family.encode_prompts(components, ["a red circle", "a square on the left"])

    def call() -> Tensor:
        return family.predict(components, noisy, time, conditioning)

    with torch.no_grad():
        base = call()
    plan = resolve_targets(family, components.denoiser, TargetRequest(slider=True))
    adapter = LoraAdapter(components.denoiser, plan.modules, rank=rank, alpha=alpha, seed=5)
    for parameter in adapter.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
    return family, components, adapter, call, base


@pytest.mark.parametrize("name", FAMILIES)
def test_scale_zero_is_the_base_model_bit_for_bit(load: Load, name: str) -> None:
    _, _, adapter, call, base = prepared(load, name)
    with torch.no_grad():
        with adapter.scaled(0.0):
            assert torch.equal(call(), base)
        assert not torch.equal(call(), base)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_layer_s_delta_is_mirrored(load: Load, name: str) -> None:
    _, components, adapter, call, _ = prepared(load, name)
    inputs: dict[str, Tensor] = {}
    hooks = [
        components.denoiser.get_submodule(n).register_forward_pre_hook(lambda _, a, key=n: inputs.setdefault(key, a[0].clone()))
        for n in adapter.modules
    ]
    with torch.no_grad():
        call()
    for hook in hooks:
        hook.remove()
    assert set(inputs) == set(adapter.modules)
    with torch.no_grad():
        for module_name in adapter.modules:
            layer, x = components.denoiser.get_submodule(module_name), inputs[module_name]
            outputs = []
            for scale in (0.0, 0.7, -0.7):
                with adapter.scaled(scale):
                    outputs.append(layer(x))
            plus, minus = outputs[1] - outputs[0], outputs[2] - outputs[0]
            assert plus.abs().max() > 0
            assert (plus + minus).abs().max() <= 1e-5 * outputs[0].abs().max().clamp(min=plus.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_target_gets_a_gradient_and_nothing_else_does(load: Load, name: str) -> None:
    _, components, adapter, call, _ = prepared(load, name)
    with adapter.scaled(-0.5):
        call().square().mean().backward()
    own = {id(p) for p in adapter.parameters()}
    for parameter_name, parameter in components.denoiser.named_parameters():
        if id(parameter) in own:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name
        else:
            assert not parameter.requires_grad and parameter.grad is None, parameter_name


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_under_checkpointing_equal_those_without(load: Load, name: str) -> None:
    _, components, adapter, call, _ = prepared(load, name)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            components.denoiser.enable_gradient_checkpointing()
        for parameter in adapter.parameters():
            parameter.grad = None
        with adapter.scaled(-0.5):
            call().square().mean().backward()
        gradients.append([p.grad.clone() for p in adapter.parameters()])  # type: ignore[union-attr]
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.allclose(plain, recomputed, rtol=1e-5, atol=1e-9)


def test_a_fresh_adapter_is_the_identity_and_seeded(load: Load) -> None:
    family, components = load("sd1")
    plan = resolve_targets(family, components.denoiser, TargetRequest(slider=True))
    state = torch.get_rng_state()
    first = LoraAdapter(components.denoiser, plan.modules, rank=4, alpha=4, seed=1).state()
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    _, other = load("sd1")
    second = LoraAdapter(other.denoiser, plan.modules, rank=4, alpha=4, seed=1).state()
    assert all(not parts["lora_B"].any() for parts in first.values())
    assert all(torch.equal(first[n]["lora_A"], second[n]["lora_A"]) for n in first)


def test_the_scale_is_restored_after_an_exception(load: Load) -> None:
    _, _, adapter, call, _ = prepared(load, "sd1")
    with torch.no_grad():
        before = call()
        with pytest.raises(RuntimeError), adapter.scaled(-2.0), adapter.scaled(0.0):
            raise RuntimeError
        assert torch.equal(call(), before)
    assert adapter.scale == 1.0


def test_another_adapter_in_the_model_keeps_its_own_scale(load: Load) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    family, components = load("sd1")
    assistant = LoraConfig(r=2, target_modules=["attn1.to_q"], init_lora_weights=False)
    inject_adapter_in_model(assistant, components.denoiser, adapter_name="assistant")
    plan = resolve_targets(family, components.denoiser, TargetRequest(slider=True))
    adapter = LoraAdapter(components.denoiser, [n for n in plan.modules if "attn1" not in n], rank=2, alpha=2)
    layers = [m for m in components.denoiser.modules() if hasattr(m, "scaling") and "assistant" in m.scaling]
    with adapter.scaled(-3.0):
        assert {layer.scaling["assistant"] for layer in layers} == {4.0}  # peft's alpha 8 over r 2
        assert all(NAME not in layer.scaling for layer in layers)


def test_weights_of_another_rank_or_model_are_refused(load: Load) -> None:
    _, _, adapter, _, _ = prepared(load, "sd1")
    state = adapter.state()
    name = adapter.modules[0]
    with pytest.raises(UserError, match=r"file\.x.*lora_rank"):
        adapter.load_state(state | {name: {"lora_A": torch.zeros(8, 3), "lora_B": torch.zeros(3, 8)}}, "file.x")
    with pytest.raises(UserError, match=f"{name} is missing"):
        adapter.load_state({n: parts for n, parts in state.items() if n != name}, "file.x")


def test_bfloat16_base_keeps_a_float32_adapter(load: Load) -> None:
    family, components = load("sd1")
    components.denoiser.to(torch.bfloat16)
    plan = resolve_targets(family, components.denoiser, TargetRequest(slider=True))
    adapter = LoraAdapter(components.denoiser, plan.modules, rank=4, alpha=4)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


def test_a_rank_stabilised_adapter_is_stronger_by_the_root_of_its_rank(load: Load) -> None:
    """arXiv 2312.03732: alpha / sqrt(rank) instead of alpha / rank."""
    family, _, plain, call, _ = prepared(load, "sd1", rank=4, alpha=2.0)
    state = plain.state()
    with torch.no_grad(), plain.scaled(1.0):
        wanted = call()
    _, other = load("sd1")
    stabilised = LoraAdapter(other.denoiser, plain.modules, rank=4, alpha=2.0, rank_stabilised=True)
    stabilised.load_state(state, "here")
    assert set(stabilised.scalings().values()) == {1.0} and set(plain.scalings().values()) == {0.5}
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        text = family.encode_prompts(other, ["a red circle", "a square on the left"])
        with stabilised.scaled(0.5):
            assert torch.allclose(family.predict(other, noisy, torch.tensor([100, 700]), text), wanted, atol=1e-6)


def test_gaussian_first_weights_begin_as_the_base_model(load: Load) -> None:
    family, components = load("sd1")
    noisy, time = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([100])
    with torch.no_grad():
        text = family.encode_prompts(components, ["a"])
        base = family.predict(components, noisy, time, text)
        plan = resolve_targets(family, components.denoiser, TargetRequest(slider=True))
        adapter = LoraAdapter(components.denoiser, plan.modules, rank=4, alpha=4, gaussian=True)
        assert torch.equal(family.predict(components, noisy, time, text), base)
    first = torch.cat([parts["lora_A"].flatten() for parts in adapter.state().values()])
    assert abs(float(first.std()) - 1 / 4) < 0.02 and float(first.abs().max()) > 3 / 4  # normal, deviation 1 / rank

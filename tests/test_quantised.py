"""The frozen base in 8 and 4 bit: what is quantised, that a slider trains beside it, and that strength 0 is that base."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from slider_plugin import run
from slider_plugin.adapters.peft_lora import LoraAdapter
from slider_plugin.configfile import read_config
from slider_plugin.errors import UserError
from slider_plugin.quantise import KINDS as LIBRARIES
from slider_plugin.quantise import bytes_at_rest, check_quantise, quantise, to_quantise
from slider_plugin.registry import Plugins
from slider_plugin.testing.subject import Subject

Project = Callable[..., Path]
KINDS = [
    pytest.param(
        "int8-torchao", marks=pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
    ),
    pytest.param(
        "nf4-bnb", marks=pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="no bitsandbytes")
    ),
]
LAYERS = {"int8-torchao": "Int8Tensor", "nf4-bnb": "Params4bit"}
ERROR = {"int8-torchao": 0.02, "nf4-bnb": 0.3}
"""Of the whole model's answer, relative."""


def stored(weight: Any) -> int:
    """Bytes of a weight, quantised or not; not those of the tables of 4 bit, which are the same for all layers."""
    if state := getattr(weight, "quant_state", None):
        parts = [weight, state.absmax, state.state2.absmax]
        return sum(part.numel() * part.element_size() for part in parts)
    parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]] if hasattr(weight, "qdata") else [weight]
    return sum(part.numel() * part.element_size() for part in parts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["sd1", "z_image"])
def test_strength_0_is_the_quantised_base(tiny_folders: Callable[[str], Path], family: str, kind: str) -> None:
    subject = Subject.load(Plugins.discover().load(family), tiny_folders(family))
    latents, told = subject.latents(2), subject.conditioning(("a red circle",) * 2)
    plain = subject.predict(latents, told).detach()
    before = sum(p.numel() * p.element_size() for p in subject.denoiser.parameters())
    meta = copy.deepcopy(subject.denoiser).to("meta")
    count = quantise(subject.denoiser, subject.family.facts, kind)
    layers = [m for m in subject.denoiser.modules() if isinstance(m, nn.Linear)]
    assert count == sum(type(m.weight).__name__ == LAYERS[kind] for m in layers) > 0.8 * len(layers)
    frozen = list(subject.denoiser.parameters())
    base = subject.predict(latents, told).detach()
    assert 0 < (base - plain).norm() / plain.norm() < ERROR[kind]
    adapter = LoraAdapter(subject.denoiser, subject.targets().modules, rank=4, alpha=4.0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    with adapter.scaled(0.0):
        assert torch.equal(subject.predict(latents, told), base)
    with adapter.scaled(1.0):
        answer = subject.predict(latents, told)
        answer.square().mean().backward()
    assert not torch.equal(answer, base)
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.any() for p in adapter.parameters())
    config = type("Config", (), {"mixed_precision": "no", "base_model_precision": kind})()
    told = bytes_at_rest(meta, subject.family.facts, config)
    assert told == sum(stored(p) for p in frozen) < before


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_a_quantised_base(project: Project, capsys: pytest.CaptureFixture[str], recwarn: Any, kind: str) -> None:
    config = read_config(project("flux", base_model_precision=kind, gradient_checkpointing=True), (), Plugins.discover().facts)[
        0
    ]
    outcome = run.train(config)
    assert f"layers of the frozen model are kept in {LIBRARIES[kind].bits} bit" in capsys.readouterr().err
    assert outcome.adapter is not None
    assert any(tensor.any() for name, tensor in load_file(outcome.adapter).items() if "lora_B" in name)
    assert not [w for w in recwarn if "get_apply_tensor_subclass" in str(w.message)]


def test_weights_that_the_model_reads_and_convolutions_stay() -> None:
    wanted = to_quantise(Plugins.discover().facts("wan"))
    assert wanted(nn.Linear(2, 2), "blocks.0.attn1.to_q")
    assert not wanted(nn.Linear(2, 2), "condition_embedder.time_embedder.linear_1")
    assert not wanted(nn.Conv2d(2, 2, 1), "patch_embedding")


@pytest.mark.parametrize("value", ["fp4-bnb", "int8-quanto", "int4-torchao"])
def test_what_cannot_be_had_is_refused(project: Project, value: str) -> None:
    with pytest.raises(UserError, match=r"base_model_precision.*write.*no_change"):
        read_config(project("sd1", base_model_precision=value), (), Plugins.discover().facts)


def test_what_does_not_go_together_is_refused(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    config = project("sd1", base_model_precision="int8-torchao", torch_compile="eager")
    parsed = read_config(config, (), Plugins.discover().facts)[0]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match="does not go together with torch_compile"):
        check_quantise(parsed)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"torchao is not installed; pip install 'slider-plugin\[int8\]'"):
        check_quantise(parsed)

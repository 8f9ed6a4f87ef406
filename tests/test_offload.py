"""Blocks that are away: the same answers and gradients, one block at a time, and nothing kept for the backward pass.

Where the device is the processor itself, a block would be home either way. So fetched weights are copies here, and what stands
in a block that is away is not a number: any use of it would show.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Module

from slider_plugin import run
from slider_plugin.adapters.peft_lora import LoraAdapter
from slider_plugin.configfile import read_config
from slider_plugin.errors import ConfigError
from slider_plugin.preflight import preflight
from slider_plugin.registry import Plugins
from slider_plugin.stages import model as stages_model
from slider_plugin.testing.subject import Subject
from slider_plugin.training.offload import Offload

Project = Callable[..., Path]
CPU = torch.device("cpu")


class Copying(Offload):
    """Fetches copies, counts those that are alive, and leaves nothing usable behind."""

    def __init__(self, denoiser: Module, device: torch.device) -> None:
        self.copies: list[tuple[StorageWeakRef, int]] = []
        self.values: dict[int, Tensor] = {}
        self.most = 0
        super().__init__(denoiser, device)
        for home in self.homes():
            self.values[home.data_ptr()] = home.detach().clone()
            home.data.fill_(torch.nan)

    def homes(self) -> list[Tensor]:
        return [home for homes in self._homes.values() for home in homes.values()]

    def _to_device(self, home: Tensor) -> Tensor:
        copy = self.values[home.data_ptr()].clone()
        self.copies.append((StorageWeakRef(copy.untyped_storage()), copy.nbytes))
        self.most = max(self.most, self.alive())
        return copy

    def alive(self) -> int:
        """Bytes of fetched weights that something still holds."""
        self.copies = [(storage, size) for storage, size in self.copies if not storage.expired()]
        return sum(size for _, size in self.copies)


def answers(folder: Path, family: str, checkpointing: bool, offloaded: bool) -> tuple[list[Tensor], list[Tensor], Any]:
    """Of a tiny denoiser with an adapter, at three scales: predictions, then the adapter's gradients."""
    subject = Subject.load(Plugins.discover().load(family), folder)
    if checkpointing:
        subject.denoiser.enable_gradient_checkpointing()
    offload = Copying(subject.denoiser, CPU) if offloaded else None
    adapter = LoraAdapter(subject.denoiser, subject.targets().modules, rank=2, alpha=2.0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    predictions = []
    for scale in (1.0, -0.5, [2.0, -2.0]):
        with adapter.scaled(scale):
            answer = subject.predict(subject.latents(2), subject.conditioning(("a red circle",) * 2))
            kept = offload.alive() if offload and not checkpointing else 0
            answer.square().mean().backward()
        assert kept == 0, "weights were kept for the backward pass"
        predictions.append(answer.detach())
    return predictions, [parameter.grad for parameter in adapter.parameters()], offload  # type: ignore[misc]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", ["sd1", "flux", "z_image", "wan"])
def test_answers_and_gradients_are_the_same_bit_for_bit(
    tiny_folders: Callable[[str], Path], family: str, checkpointing: bool
) -> None:
    folder = tiny_folders(family)
    expected, gradients, _ = answers(folder, family, checkpointing, offloaded=False)
    got, own, offload = answers(folder, family, checkpointing, offloaded=True)
    for a, b in zip([*got, *own], [*expected, *gradients], strict=True):
        assert torch.equal(a, b)
    blocks = [sum(home.nbytes for layer in block.modules() for home in of(offload, layer)) for block in offload.blocks]
    assert offload.size == sum(blocks)
    assert offload.most <= max(blocks)
    assert all(home.isnan().all() for home in offload.homes())
    assert all(p.isnan().all() for block in offload.blocks for layer in block.modules() for p in of(offload, layer))


def of(offload: Offload, layer: Module) -> list[Tensor]:
    """The weights in a layer that are away between passes."""
    return [layer._parameters[name] for name in offload._homes.get(layer, {})]  # type: ignore[misc]


def test_moving_the_model_leaves_the_blocks_where_they_are(tiny_folders: Callable[[str], Path]) -> None:
    subject = Subject.load(Plugins.discover().load("flux"), tiny_folders("flux"))
    offload = Offload(subject.denoiser, CPU)
    subject.denoiser.to(torch.float64)
    own = {id(parameter) for block in offload.blocks for parameter in block.parameters()}
    kinds = {(id(parameter) in own, parameter.dtype) for parameter in subject.denoiser.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.float64)}


def test_a_run_is_the_same_and_draws(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    keys = {"validation_prompt": "a red circle", "validation_num_inference_steps": 2, "validation_strengths": [-1, 1]}
    config = project("flux", validation_step_interval=2, **keys)

    def train(folder: str, *flags: str) -> run.Outcome:
        flags = ("--output_dir", str(tmp_path / folder), *flags)
        return run.train(read_config(config, flags, Plugins.discover().facts)[0])

    plain = train("plain")
    monkeypatch.setattr(stages_model, "Offload", Copying)
    away = train("away", "--enable_group_offload", "true")
    assert "2 blocks (" in capsys.readouterr().err
    assert plain.adapter and away.adapter and plain.adapter.read_bytes() == away.adapter.read_bytes()
    drawn = [sorted(p for p in (outcome.images or tmp_path).rglob("*.png")) for outcome in (plain, away)]
    assert drawn[0] and [p.read_bytes() for p in drawn[0]] == [p.read_bytes() for p in drawn[1]]


def test_what_does_not_go_together_is_said_beforehand(project: Project) -> None:
    config = read_config(project("sd1", enable_group_offload=True, torch_compile="eager"), (), Plugins.discover().facts)[0]
    with pytest.raises(ConfigError, match="enable_group_offload does not go together with torch_compile"):
        preflight(config, Plugins.discover().load("sd1"))


def test_a_model_without_blocks_is_refused_before_it_is_loaded(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(project("sd1", enable_group_offload=True), (), Plugins.discover().facts)[0]
    monkeypatch.setattr("slider_plugin.training.offload.ModuleList", torch.nn.Linear)
    with pytest.raises(ConfigError, match="a UNet2DConditionModel has no list of blocks"):
        preflight(config, Plugins.discover().load("sd1"))

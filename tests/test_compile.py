"""torch.compile: what is computed stays the same, and no strength compiles anything anew."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from trainers import trainer_of

from slider_plugin import run
from slider_plugin.configfile import read_config
from slider_plugin.errors import UserError
from slider_plugin.registry import Plugins
from slider_plugin.training.compiling import check_compile, compile_model
from slider_plugin.training.loop import Trainer

Project = Callable[..., Path]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.reset()
    counters.clear()


def randomized(config: Path) -> Trainer:
    """The trainer with random weights in its adapter."""
    trainer = trainer_of(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.adapter.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return trainer


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def losses_and_gradients(trainer: Trainer, scales: list[Any]) -> tuple[list[float], list[torch.Tensor]]:
    """Of one batch at each scale: a number, or one for each sample."""
    batch, losses = trainer.data.batch(next(iter(trainer.sampler))), []
    for scale in scales:
        with trainer.adapter.scaled(scale):
            loss = trainer.loss(batch)
            loss.backward()
        losses.append(float(loss))
    gradients = [parameter.grad for parameter in trainer.adapter.parameters()]
    return losses, [gradient for gradient in gradients if gradient is not None]


SCALES = [0.5, -0.5, 0.0, 2.0, -1.7]
PER_SAMPLE = [(0.5, -0.5), (-1.0, 0.0), (3.0, 0.2)]


@pytest.mark.parametrize(
    ("family", "backend", "checkpointing"),
    [
        ("flux", "eager", True),
        pytest.param("flux", "aot_eager", False, marks=pytest.mark.slow),
        pytest.param("sd1", "eager", False, marks=pytest.mark.slow),
        pytest.param("sd1", "aot_eager", True, marks=pytest.mark.slow),
    ],
)
def test_no_strength_compiles_anything_anew(project: Project, family: str, backend: str, checkpointing: bool) -> None:
    config = project(family, torch_compile=backend, gradient_checkpointing=checkpointing, signs_in_one_forward="no")
    trainer = randomized(config)
    first = losses_and_gradients(trainer, SCALES[:1])
    compiled = graphs()
    assert compiled, "nothing was compiled"
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses, gradients = losses_and_gradients(trainer, SCALES[1:])
    assert graphs() == compiled
    losses_and_gradients(trainer, PER_SAMPLE[:1])  # which is another way through the layers
    assert graphs() > compiled
    compiled = graphs()
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses_and_gradients(trainer, PER_SAMPLE[1:])
    assert graphs() == compiled
    assert len(set(first[0] + losses)) == len(SCALES), "the strength does not reach the compiled blocks"
    assert not counters["graph_break"]
    assert all(gradient.any() for gradient in gradients)


INDUCTOR = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="no g++")]


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        ("flux", "eager"),
        pytest.param("sd1", "eager", marks=pytest.mark.slow),
        pytest.param("sd3", "eager", marks=pytest.mark.slow),  # has no repeated blocks that are named
        pytest.param("flux", "inductor", marks=INDUCTOR),
        pytest.param("z_image", "inductor", marks=INDUCTOR),
    ],
)
def test_compiled_is_what_it_is_without(project: Project, family: str, backend: str) -> None:
    config = project(family, torch_compile=backend, signs_in_one_forward="no")  # which would hook the layers before
    compiled = losses_and_gradients(randomized(config), [*SCALES, *PER_SAMPLE])
    assert graphs()
    config.write_text(config.read_text().replace(f'"torch_compile": "{backend}"', '"torch_compile": "no"'))
    before = graphs()
    plain = losses_and_gradients(randomized(config), [*SCALES, *PER_SAMPLE])
    assert graphs() == before
    assert compiled[0] == pytest.approx(plain[0], rel=1e-5)
    for ours, expected in zip(compiled[1], plain[1], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "said"), [("z_image", r"\d+ blocks of ZImageT"), ("sd3", "the whole SD3Transformer2DModel")]
)
def test_names_and_attributes_stay(load: Callable[[str], tuple[Any, Any]], family: str, said: str) -> None:
    denoiser = load(family)[1].denoiser
    before = list(denoiser.state_dict()), [name for name, _ in denoiser.named_modules()], dict(denoiser.config)
    assert re.match(said, compile_model(denoiser, "eager"))
    assert (list(denoiser.state_dict()), [name for name, _ in denoiser.named_modules()], dict(denoiser.config)) == before


def test_a_run_that_is_resumed_ends_in_the_same_weights(project: Project, tmp_path: Path) -> None:
    config = project("flux", torch_compile="eager")

    def train(*flags: str) -> dict[str, torch.Tensor]:
        outcome = run.train(read_config(config, flags, Plugins.discover().facts)[0])
        assert outcome.adapter is not None
        return load_file(outcome.adapter)

    whole = train("--output_dir", str(tmp_path / "whole"))
    first = str(tmp_path / "cut")
    train("--output_dir", first, "--max_train_steps", "2")
    again = train("--output_dir", first, "--resume_from_checkpoint", "latest")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_what_cannot_be_compiled_is_refused(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(project("sd1", torch_compile=True), (), Plugins.discover().facts)[0]
    assert config.torch_compile == "inductor"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler.*g\+\+"):
        check_compile(config, on_gpu=False)
    lycoris = read_config(config_with_lycoris(project, config.output_dir.parent), (), Plugins.discover().facts)[0]
    with pytest.raises(UserError, match="lycoris-lora keeps the strength as a plain number"):
        check_compile(lycoris)


def config_with_lycoris(project: Project, folder: Path) -> Path:
    shutil.rmtree(folder / "data")
    return project("sd1", torch_compile="eager", lora_type="lycoris", lycoris={"algo": "lokr", "linear_dim": 2})


def test_the_key_of_other_trainers_is_ours(project: Project) -> None:
    assert read_config(project("sd1", dynamo_backend="inductor"), (), Plugins.discover().facts)[0].torch_compile == "inductor"

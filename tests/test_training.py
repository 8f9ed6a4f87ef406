"""The loop on tiny real pipelines: what it computes, what it writes, and that a run which dies loses nothing."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trainers import trainer_of

from slider_plugin import run
from slider_plugin.configfile import read_config
from slider_plugin.errors import UserError
from slider_plugin.preflight import preflight
from slider_plugin.registry import Plugins
from slider_plugin.training.checkpoint import checkpoints
from slider_plugin.training.loop import NotFinite, Trainer
from slider_plugin.training.noise import noise_process
from slider_plugin.training.seeds import generator

Project = Callable[..., Path]


def train(config: Path, *flags: str) -> run.Outcome:
    return run.train(read_config(config, flags, Plugins.discover().facts)[0])


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("family", ["sd1", "z_image"])
def test_a_run_trains_exports_and_validates(project: Project, family: str, tmp_path: Path) -> None:
    config = project(
        family,
        neutral=True,
        validation_prompt="a red circle",
        validation_num_inference_steps=2,
        validation_strengths=[-1, 0, 1],
    )
    outcome = train(config)
    assert outcome.finished and outcome.steps == 4
    rows = metrics(tmp_path / "out")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"loss/positive", "loss/negative", "loss/neutral", "grad_norm", "learning_rate"} <= set(rows[0])
    assert outcome.adapter is not None and outcome.adapter.is_file()
    assert outcome.images is not None and (outcome.images / "contact_sheet.png").is_file()
    assert any(tensor.any() for name, tensor in load_file(outcome.adapter).items() if "lora_B" in name)


def test_only_the_adapter_moves(project: Project) -> None:
    trainer = trainer_of(project("sd1"))
    own = {id(p) for p in trainer.adapter.parameters()}
    everything = dict(trainer.components.denoiser.named_parameters())
    before = {name: p.detach().clone() for name, p in everything.items()}
    trainer.optimizer_step()
    trainer.optimizer_step()
    for name, parameter in everything.items():
        assert torch.equal(parameter, before[name]) == (id(parameter) not in own), name


@pytest.mark.parametrize("family", ["sd1", "z_image"])
def test_the_loss_is_its_formula(project: Project, family: str) -> None:
    """Ten lines written out, against the loop's own, for the first positive and the first negative draw."""
    trainer = trainer_of(project(family))
    for _ in range(2):
        draw = next(trainer.sampler)
        batch = trainer.data.batch(draw)
        x0, process = batch.clean_BCHW, noise_process(trainer.family.facts, trainer.components)
        t = process.draw_time(len(x0), generator(1, "time", 0))  # both draws of the first cycle share time and noise
        e = torch.randn(x0.shape, generator=generator(1, "noise", 0))
        if family == "z_image":
            sigma = t.reshape(-1, 1, 1, 1)
            x_t, target, told, sign = (1 - sigma) * x0 + sigma * e, e - x0, 1 - t, -1
        else:
            a = trainer.components.scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)
            x_t, target, told, sign = a.sqrt() * x0 + (1 - a).sqrt() * e, e, t, 1
        with trainer.adapter.scaled(draw.scale):
            answer = trainer.family.predict(trainer.components, x_t, told, batch.conditioning)
            expected = ((sign * answer - target) ** 2).mean()
            assert torch.allclose(trainer.loss(batch), expected, rtol=1e-6)
        assert draw.scale == (0.5 if draw.position == 0 else -0.5)


@pytest.mark.parametrize(("together", "scales"), [("no", [0.5, -0.5]), ("yes", [[0.5, 0.5, -0.5, -0.5]])])
def test_the_backward_pass_runs_at_the_draw_s_scale(
    project: Project, monkeypatch: pytest.MonkeyPatch, together: str, scales: list[Any]
) -> None:
    trainer = trainer_of(project("sd1", signs_in_one_forward=together))
    seen: list[Any] = []
    backward = trainer.accelerator.backward

    def recording(loss: torch.Tensor) -> None:
        seen.append(trainer.adapter.scale)
        backward(loss)

    monkeypatch.setattr(trainer.accelerator, "backward", recording)
    trainer.optimizer_step()
    assert seen == scales
    assert trainer.adapter.scale == 1.0


def test_neutral_draws_preserve_the_frozen_model(project: Project) -> None:
    trainer = trainer_of(project("sd1", neutral=True))
    neutral = next(d for d in (next(trainer.sampler) for _ in range(3)) if d.neutral)
    batch = trainer.data.batch(neutral)
    with trainer.adapter.scaled(neutral.scale):
        assert float(trainer.loss(batch).detach()) == 0.0  # a fresh adapter is the identity
        for parameter in trainer.adapter.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        loss = trainer.loss(batch)
        loss.backward()
    assert float(loss.detach()) > 0.0
    assert all(p.grad is not None for p in trainer.adapter.parameters())
    assert abs(neutral.scale) == 0.5  # the largest strength of the buckets


def test_a_run_is_its_seed(project: Project, tmp_path: Path) -> None:
    config = project("sd1")
    first = train(config, "--output_dir", str(tmp_path / "a")).adapter
    second = train(config, "--output_dir", str(tmp_path / "b")).adapter
    other = train(config, "--output_dir", str(tmp_path / "c"), "--seed", "2").adapter
    assert first and second and other
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes() != other.read_bytes()


def test_accumulation_is_rounded_up_to_whole_cycles(project: Project) -> None:
    config = project("sd1", neutral=True, gradient_accumulation_steps=4)
    parsed = read_config(config, (), Plugins.discover().facts)[0]
    checked = preflight(parsed, Plugins.discover().load("sd1"))
    assert (checked.cycle, checked.draws_per_step) == (3, 6)
    assert any("gradient_accumulation_steps 4 is rounded up to 6" in line for line in checked.warnings)


def test_a_loss_that_is_not_finite_stops_with_the_batch_named(project: Project) -> None:
    trainer = trainer_of(project("sd1"))
    key = next(k for k in trainer.data.latents if k[0] == "less")
    for other in trainer.data.latents:
        if other[0] == "less":
            trainer.data.latents[other][:] = float("inf")
    before = trainer.adapter.state()
    with pytest.raises(NotFinite, match=rf"bucket 'less' at strength -0.5.*{key[1].parent.name}"):
        trainer.optimizer_step()
    assert all(torch.equal(before[n][p], trainer.adapter.state()[n][p]) for n in before for p in before[n])


@pytest.mark.parametrize("extra", [{}, {"lora_dropout": 0.2, "lr_scheduler": "cosine", "caption_dropout_probability": 0.3}])
def test_resume_is_exact(project: Project, tmp_path: Path, extra: dict[str, Any]) -> None:
    config = project("sd1", neutral=True, max_train_steps=6, checkpoint_step_interval=2, checkpoints_total_limit=9, **extra)
    whole = train(config, "--output_dir", str(tmp_path / "whole")).adapter
    part = tmp_path / "part"
    parsed = read_config(config, ["--output_dir", str(part)], Plugins.discover().facts)[0]
    _stop_after(parsed, 3)
    assert [p.name for p in checkpoints(part)] == ["checkpoint-000002", "checkpoint-000003"]
    resumed = train(config, "--output_dir", str(part), "--resume_from_checkpoint", "latest").adapter
    assert whole and resumed and whole.read_bytes() == resumed.read_bytes()
    assert [row["step"] for row in metrics(part)] == [1, 2, 3, 4, 5, 6]


def _stop_after(config: Any, steps: int) -> None:
    """Run until `steps` are done, then ask for a stop as Ctrl-C does."""
    original = Trainer.run

    def stopping(self: Trainer, total: int, after: Any) -> bool:
        def wrapped(report: Any) -> bool:
            if report.step == steps:
                os.kill(os.getpid(), signal.SIGINT)
            return bool(after(report))

        return original(self, total, wrapped)

    Trainer.run = stopping  # type: ignore[method-assign]
    try:
        assert not run.train(config).finished
    finally:
        Trainer.run = original  # type: ignore[method-assign]


def test_rotation_keeps_the_newest(project: Project, tmp_path: Path) -> None:
    train(project("sd1", max_train_steps=5, checkpoint_step_interval=1, checkpoints_total_limit=2))
    assert [p.name for p in checkpoints(tmp_path / "out")] == ["checkpoint-000004", "checkpoint-000005"]


def test_latest_skips_a_damaged_checkpoint_and_an_explicit_one_is_an_error(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = project("sd1", max_train_steps=4, checkpoint_step_interval=2)
    whole = train(config).adapter
    assert whole
    wanted = whole.read_bytes()
    whole.unlink()
    damaged = tmp_path / "out" / "checkpoint-000004" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    with pytest.raises(UserError, match="checkpoint-000004 is damaged"):
        train(config, "--resume_from_checkpoint", str(damaged.parent))
    resumed = train(config, "--resume_from_checkpoint", "latest").adapter
    assert "skipped" in capsys.readouterr().err
    assert resumed and resumed.read_bytes() == wanted
    for path in checkpoints(tmp_path / "out"):
        (path / "state.json").write_text("{")
    with pytest.raises(UserError, match="no whole checkpoint"):
        train(config, "--resume_from_checkpoint", "latest", "--max_train_steps", "6")


def test_resuming_with_other_buckets_is_refused(project: Project, tmp_path: Path) -> None:
    config = project("sd1", max_train_steps=2)
    train(config)
    entries = json.loads((tmp_path / "buckets.json").read_text())
    entries[0]["id"] = "another"
    (tmp_path / "buckets.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match="cannot be resumed with these buckets"):
        train(config, "--resume_from_checkpoint", "latest", "--max_train_steps", "4")


def test_a_finished_run_is_never_overwritten(project: Project) -> None:
    config = project("sd1", max_train_steps=1)
    train(config)
    with pytest.raises(UserError, match="holds a run already"):
        train(config)


def test_validation_leaves_training_alone(project: Project, tmp_path: Path) -> None:
    config = project("sd1", validation_prompt="a circle", validation_num_inference_steps=2, validation_adapter_strength=0.5)
    with_images = train(config, "--output_dir", str(tmp_path / "a"), "--validation_step_interval", "1").adapter
    without = train(config, "--output_dir", str(tmp_path / "b"), "--validation_disable").adapter
    assert with_images and without and with_images.read_bytes() == without.read_bytes()


def test_tensorboard_gets_the_losses(project: Project, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(project("sd1", report_to="tensorboard"))
    folder = next((tmp_path / "out" / "logs").rglob("events.*")).parent
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [e.step for e in events.Scalars("loss/positive")] == [1, 2, 3, 4]


def test_bf16_trains(project: Project) -> None:
    trainer = trainer_of(project("sd1", mixed_precision="bf16"))
    assert next(trainer.components.denoiser.parameters()).dtype == torch.bfloat16
    before = trainer.adapter.state()
    trainer.optimizer_step()
    trainer.optimizer_step()
    after = trainer.adapter.state()
    assert any(not torch.equal(before[n]["lora_A"], after[n]["lora_A"]) for n in before)
    assert {p.dtype for p in trainer.adapter.parameters()} == {torch.float32}

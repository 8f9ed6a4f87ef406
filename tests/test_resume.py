"""A run that is killed loses nothing: whatever moment it was, it ends in the weights of the run that was left alone."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_processes import HARD, write
from test_training import metrics, train

from slider_plugin.config import RunConfig
from slider_plugin.errors import UserError
from slider_plugin.training import resuming
from slider_plugin.training.checkpoint import ADAPTER, OPTIMIZER, STATE, checkpoints, is_whole

Project = Callable[..., Path]
Tiny = Callable[[str], Path]


# --- Kills ------------------------------------------------------------------------------------------------------------


def start(config: Path, out: Path, count: int) -> subprocess.Popen[bytes]:
    """A run that goes on if there is anything to go on from: one command line for every start."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)] if count > 1 else []
    train = ["-m", "slider_plugin", "train", str(config), "--output_dir", str(out), "--resume_from_checkpoint", "latest"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *launcher, *train], env=environment, start_new_session=True, **quiet)


def kill_somewhere(config: Path, out: Path, count: int, numbers: random.Random, early: bool) -> None:
    """Start or go on, and kill -9 at a random moment: while it reads, encodes or begins, or once it writes checkpoints.

    Of several processes one or all are killed, and with one the launcher ends the others.
    """
    known = {path.name for path in checkpoints(out)}
    process = start(config, out, count)
    deadline = time.monotonic() + (numbers.random() * 12 if early else 300)
    while process.poll() is None and {path.name for path in checkpoints(out)} <= known and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(numbers.random() * 0.3)
    workers = _workers(process)
    for victim in [numbers.choice(workers)] if workers and numbers.random() < 0.5 else [*workers, process]:
        _kill(victim.pid)
    process.wait(timeout=120)


def _workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        return [child for child in children if "slider_plugin" in child.cmdline()]
    except psutil.NoSuchProcess:
        return []


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:  # it was faster
        return


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("kills", "count"),
    [(2, 1), pytest.param(20, 1, marks=pytest.mark.slow), pytest.param(6, 2, marks=pytest.mark.slow)],
)
def test_killed_runs_end_in_the_same_weights(tiny_folders: Tiny, tmp_path: Path, kills: int, count: int) -> None:
    keys = {**HARD, "lora_dropout": 0.1, "lr_scheduler": "cosine", "max_train_steps": 3 * kills, "use_ema": True}
    model = tiny_folders("sd1")
    config = write(tmp_path, "killed", model, **keys, checkpoint_step_interval=1, checkpoints_total_limit=2)
    whole, out, numbers = tmp_path / "whole", tmp_path / "out", random.Random(kills)
    for number in range(kills):
        kill_somewhere(config, out, count, numbers, early=number % 3 == 1)
    if not (out / "slider.safetensors").exists():
        assert start(config, out, count).wait(timeout=600) == 0
    assert start(config, whole, count).wait(timeout=600) == 0  # it finds the caches that killed runs have filled
    assert (whole / "slider.safetensors").read_bytes() == (out / "slider.safetensors").read_bytes()
    for file in (ADAPTER, OPTIMIZER, "ema.safetensors"):
        assert (checkpoints(whole)[-1] / file).read_bytes() == (checkpoints(out)[-1] / file).read_bytes()
    assert [row["step"] for row in metrics(out)] == list(range(1, 3 * kills + 1))
    assert not [path for path in out.glob(".tmp-*") if path.is_dir()]


# --- Rotation ---------------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_does_not_cost_the_last_good_one(project: Project, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = project("sd1", max_train_steps=3, checkpoint_step_interval=1, checkpoints_total_limit=2)
    train(config)
    damaged = checkpoints(out)[-1] / ADAPTER
    damaged.write_bytes(damaged.read_bytes()[:-1])
    shutil.copytree(checkpoints(out)[-1], out / "checkpoint-000099")  # newer, and as damaged
    resume = ["--resume_from_checkpoint", "latest", "--max_train_steps"]
    train(config, *resume, "4")
    assert [(p.name, is_whole(p)) for p in checkpoints(out)] == [
        ("checkpoint-000003", True),  # written anew: the damaged one was in its place
        ("checkpoint-000004", True),
        ("checkpoint-000099", False),
    ]


def test_leftovers_of_killed_runs_are_removed(project: Project, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".tmp-0123").mkdir(parents=True)
    (out / ".tmp-0123" / ADAPTER).write_text("half")
    (out / ".tmp-4567.json").write_text("half")
    train(project("sd1", max_train_steps=1))
    assert not list(out.glob(".tmp-*"))


def test_latest_begins_where_nothing_was_written_yet(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    config = project("sd1", max_train_steps=1)
    assert train(config, "--resume_from_checkpoint", "latest").finished
    assert "holds no checkpoint yet" in capsys.readouterr().err


def test_an_older_checkpoint_is_not_mixed_with_later_ones(project: Project, tmp_path: Path) -> None:
    config = project("sd1", max_train_steps=3, checkpoint_step_interval=1)
    whole = train(config).adapter
    assert whole
    first = str(checkpoints(tmp_path / "out")[0])
    with pytest.raises(UserError, match=r"later checkpoints than .*checkpoint-000002, checkpoint-000003"):
        train(config, "--resume_from_checkpoint", first)
    elsewhere = train(config, "--resume_from_checkpoint", first, "--output_dir", str(tmp_path / "other")).adapter
    assert elsewhere and elsewhere.read_bytes() == whole.read_bytes()


# --- What must be the same --------------------------------------------------------------------------------------------


@pytest.fixture
def done(tiny_folders: Tiny, tmp_path: Path) -> Path:
    """The configuration of a run with a checkpoint at step 1."""
    config = write(tmp_path, "done", tiny_folders("sd1"), max_train_steps=1)
    train(config)
    return config


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seed", "2"], "seed was 1 and is 2"),
        (["--lora_rank", "8"], "lora_rank was 4 and is 8"),
        (["--lora_dropout", "0.1"], r"lora_dropout was 0\.0 and is 0\.1"),
        (["--snr_gamma", "5"], "snr_gamma was .* and is 5"),
        (["--caption_dropout_probability", "0.5"], "caption_dropout_probability"),
        (["--mixed_precision", "bf16"], "mixed_precision"),
        (["--neutral_strength", "2"], "neutral_strength was not given and is 2"),
        (["--slider_lora_target", "false"], "the adapter: its modules, sizes or kind"),
        (["--gradient_accumulation_steps", "6"], "the draws of an optimizer step"),
        (["--resolution", "40"], "the images or their captions, sizes or crops"),
    ],
)
def test_another_run_is_refused(done: Path, flags: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        train(done, "--resume_from_checkpoint", "latest", "--max_train_steps", "2", *flags)


def test_other_images_captions_and_models_are_refused(done: Path, tmp_path: Path) -> None:
    more = ["--resume_from_checkpoint", "latest", "--max_train_steps", "2"]
    again = ["--resume_from_checkpoint", "latest", "--max_train_steps", "3"]
    caption = tmp_path / "more" / "0.txt"
    before = caption.read_text()
    caption.write_text("something else\n")
    with pytest.raises(UserError, match="the images or their captions"):
        train(done, *more)
    caption.write_text(before)
    image = tmp_path / "more" / "0.png"
    shutil.copy(image, tmp_path / "kept.png")
    shutil.copy(tmp_path / "less" / "0.png", image)
    with pytest.raises(UserError, match="the images or their captions"):
        train(done, *more)
    shutil.copy(tmp_path / "kept.png", image)
    from diffusers import UNet2DConditionModel

    model = shutil.copytree(json.loads(done.read_text())["pretrained_model_name_or_path"], tmp_path / "model")
    moved = train(done, *more, "--pretrained_model_name_or_path", str(model))  # the same one in another place
    assert moved.finished
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    unet.conv_out.bias.data += 1
    unet.save_pretrained(model / "unet")
    with pytest.raises(UserError, match="the weights of the model"):
        train(done, *again, "--pretrained_model_name_or_path", str(model))


def test_what_may_change_is_said_and_done(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(done, "--resume_from_checkpoint", "latest", "--max_train_steps", "2", "--learning_rate", "3e-3")
    said = capsys.readouterr().err
    assert "learning_rate is 0.003 from here on; it was 0.001" in said
    assert "max_train_steps is 2 from here on; it was 1" in said
    assert [row["learning_rate"] for row in metrics(tmp_path / "out-done")] == [0.001, 0.003]


def test_every_key_has_one_place() -> None:
    listed = [*resuming.SAID, *resuming.LOOKED_AT, *resuming.WRITTEN]
    assert len(set(listed)) == len(listed)
    assert set(listed) <= set(RunConfig.model_fields)


def test_a_key_that_an_older_version_did_not_have_counts_as_its_default() -> None:
    written = {"model_family": "sd1", "seed": 42, "family_option": 1}
    resuming.check_config(Path("checkpoint"), {"config": written}, RunConfig(model_family="sd1"))
    with pytest.raises(UserError, match='timestep_sampling was "uniform" and is "logit_normal"'):
        resuming.check_config(
            Path("checkpoint"), {"config": written}, RunConfig(model_family="sd1", timestep_sampling="logit_normal")
        )


def test_a_checkpoint_says_what_it_is_of(done: Path, tmp_path: Path) -> None:
    facts = json.loads((checkpoints(tmp_path / "out-done")[-1] / STATE).read_text())["facts"]
    assert set(resuming.FOUND) <= set(facts) and facts["processes"] == 1 and facts["config"]["seed"] == 1

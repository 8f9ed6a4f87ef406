"""Several processes: what two compute is what one computes, one of them writes, and none is left hanging."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import draw_images
from safetensors.torch import load_file
from test_training import metrics, train
from trainers import trainer_of

from slider_plugin.config import RunConfig
from slider_plugin.errors import UserError
from slider_plugin.lycoris_config import LycorisConfig
from slider_plugin.training import processes
from slider_plugin.training.checkpoint import checkpoints
from slider_plugin.training.processes import Share
from slider_plugin.training.sharding import blocks_of, unsharded_type

WORKER = Path(__file__).with_name("processes_worker.py")
STEPS = 20
HARD = {"caption_dropout_probability": 0.3, "max_grad_norm": 0.3}
"""Captions that are dropped, and a gradient that is clipped in every step."""

SCENARIOS: dict[str, dict[str, Any]] = {
    "apart": {**HARD, "max_train_steps": STEPS, "signs_in_one_forward": "no"},
    "together": {**HARD, "max_train_steps": STEPS, "signs_in_one_forward": "yes"},
    "memory": {**HARD, "max_train_steps": 3, "signs_in_one_forward": "auto"},
    "weighed": {
        "max_train_steps": 4,
        "signs_in_one_forward": "no",
        "snr_gamma": 5.0,
        "gradient_accumulation_steps": 6,
        "optimizer_config": {"beta1": 0.5},
    },
}

Tiny = Callable[[str], Path]


def write(root: Path, name: str, model: Path, **keys: Any) -> Path:
    """A project with two draws of 4 and 1 samples for each sign, and one of 3: shares of 2, of 2 and 1, and of 1 and none."""
    if not (root / "more").exists():
        for bucket, count, light in (("more", 5, 220), ("less", 5, 40), ("plain", 3, 120)):
            draw_images(root / bucket, count, light)
    config = {
        "model_family": "sd1",
        "pretrained_model_name_or_path": str(model),
        "buckets": [
            {"id": bucket, "instance_data_dir": str(root / bucket), "slider_strength": strength}
            for bucket, strength in (("more", 0.5), ("less", -0.5), ("plain", 0))
        ],
        "output_dir": str(root / f"out-{name}"),
        "slider_lora_target": True,
        "lora_rank": 4,
        "resolution": 32,
        "train_batch_size": 2,
        "learning_rate": 1e-3,
        "mixed_precision": "no",
        "seed": 1,
    }
    path = root / f"{name}.json"
    path.write_text(json.dumps(config | keys))
    return path


def launch(arguments: list[str], count: int = 2, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, start_new_session=True, **pipes)


def launched(arguments: list[str], count: int = 2, **environment: str) -> tuple[int, str]:
    process = launch(arguments, count, **environment)
    try:
        said, _ = process.communicate(timeout=600)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.fixture(scope="module")
def two(tiny_folders: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have been through all scenarios."""
    root = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIDER_PLUGIN_ALLOW", "slider-plugin")
        for name, keys in SCENARIOS.items():
            write(root, name, tiny_folders("sd1"), **keys)
        code, said = launched([str(WORKER), str(root)])
    assert code == 0, said
    return root


def found(folder: Path, process: int) -> dict[str, Any]:
    return json.loads((folder / f"found-{process}").read_text())  # type: ignore[no-any-return]


def alone(folder: Path, name: str, tmp_path: Path, tiny: Path, **keys: Any) -> dict[str, torch.Tensor]:
    """One process with the batch of two."""
    config = write(folder, f"{name}", tiny, **SCENARIOS[name])
    written = json.loads(config.read_text()) | {"train_batch_size": 4, "output_dir": str(tmp_path / "one")} | keys
    (tmp_path / "one.json").write_text(json.dumps(written))
    trainer = trainer_of(tmp_path / "one.json")
    trainer.run(SCENARIOS[name]["max_train_steps"], lambda report: False)
    return trainer.adapter.tensors()


@pytest.mark.parametrize("name", ["apart", "together", "weighed"])
def test_two_processes_are_one_with_the_same_samples(two: Path, tiny_folders: Tiny, tmp_path: Path, name: str) -> None:
    first, second = (load_file(two / f"{name}-{process}.safetensors") for process in (0, 1))
    assert difference(first, second) == 0.0
    one = alone(two, name, tmp_path, tiny_folders("sd1"))
    assert difference(one, first) < 1e-5
    assert max(float(value.abs().max()) for key, value in one.items() if "lora_B" in key) > 1e-3  # they have moved
    assert found(two, 0)[name] == {"paired": name == "together", "samples": 4}


def test_if_one_process_runs_out_of_memory_all_go_on_in_separate_passes(two: Path, tiny_folders: Tiny, tmp_path: Path) -> None:
    assert not found(two, 0)["memory"]["paired"] and not found(two, 1)["memory"]["paired"]
    one = alone(two, "memory", tmp_path, tiny_folders("sd1"), signs_in_one_forward="no")
    assert difference(one, load_file(two / "memory-0.safetensors")) < 1e-5


def test_all_processes_stop_when_one_has_a_loss_that_is_not_finite(two: Path) -> None:
    for process in (0, 1):
        assert found(two, process)["infinite"].startswith("the loss is not finite in optimizer step 1, bucket 'more'")


def test_what_processes_agree_on(two: Path) -> None:
    for process in (0, 1):
        small = found(two, process)["small"]
        assert small["gradient"] == [1.0, 2.0] and small["unused"] and small["numbers"] == [3.0]
        assert small["any"] == [True, False]
        assert "process 1 has another model than process 0" in small["alike"]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("samples", [1, 2, 3, 4, 8])
def test_shares_are_the_whole_batch(count: int, samples: int) -> None:
    parts = [Share(process, count).of(samples) for process in range(count)]
    places = [place for part in parts if part.weight for place in range(samples)[part.places]]
    assert places == list(range(samples))
    assert sum(part.weight for part in parts) == pytest.approx(1.0)
    assert all(part.count >= 1 and part.first + part.count <= samples for part in parts)
    assert max(part.count for part in parts) - min(part.count for part in parts) <= 1


# --- The command line -------------------------------------------------------------------------------------------------


def test_one_process_writes_and_speaks(tiny_folders: Tiny, tmp_path: Path) -> None:
    """Cold caches, checkpoints, pictures; and then one process goes on where two were."""
    pictures = {"validation_prompt": "a red circle", "validation_num_inference_steps": 1, "validation_strengths": [-1, 1]}
    keys = {"max_train_steps": 3, "checkpoint_step_interval": 1, "validation_step_interval": 2, **pictures}
    config = write(tmp_path, "written", tiny_folders("sd1"), **keys)
    code, said = launched(["-m", "slider_plugin", "train", str(config)])
    assert code == 0, said
    out = tmp_path / "out-written"
    assert said.count("training 3/3") == 1 and said.count(str(out / "slider.safetensors")) == 2  # one line, and the result
    assert "13 images: 0 from the cache, 13 encoded" in said and "2 processes, 4 samples a draw" in said
    assert [row["step"] for row in metrics(out)] == [1, 2, 3]
    assert metrics(out)[0]["samples"] == 8.0  # of all processes: the draws have 4, 1 and 3
    assert [p.name for p in checkpoints(out)] == ["checkpoint-000001", "checkpoint-000002", "checkpoint-000003"]
    assert sorted(p.name for p in (out / "validation_images").iterdir()) == ["step_000002", "step_000003"]
    assert not list(tmp_path.rglob(".tmp-*"))

    more = ["--resume_from_checkpoint", "latest", "--max_train_steps", "4"]
    with pytest.raises(UserError, match=r"the samples of a draw \(train_batch_size times the number of processes\)"):
        train(config, *more)
    assert train(config, *more, "--train_batch_size", "4").finished


def test_fsdp_shards_the_denoiser_and_changes_nothing(tiny_folders: Tiny, tmp_path: Path) -> None:
    pictures = {"validation_prompt": "a red circle", "validation_num_inference_steps": 1, "validation_strengths": [-1, 1]}
    keys = {**HARD, **pictures, "max_train_steps": STEPS, "gradient_checkpointing": True}
    config = write(tmp_path, "sharded", tiny_folders("z_image"), model_family="z_image", **keys)
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    code, said = launched(["-m", "slider_plugin", "train", str(config)], **environment)
    assert code == 0, said
    assert "FSDP: 4 blocks of the denoiser shared out among 2 processes" in said
    out = tmp_path / "out-sharded"
    one = train(config, "--output_dir", str(tmp_path / "one"), "--train_batch_size", "4")
    assert one.adapter and difference(load_file(one.adapter), load_file(out / "slider.safetensors")) < 1e-5
    last = checkpoints(out)[-1]
    adapter = load_file(last / "adapter.safetensors")
    assert difference(adapter, load_file(checkpoints(tmp_path / "one")[-1] / "adapter.safetensors")) < 1e-5
    assert (out / "validation_images" / f"step_{STEPS:06d}" / "contact_sheet.png").is_file()


def test_a_process_that_dies_ends_the_others(tiny_folders: Tiny, tmp_path: Path) -> None:
    config = write(tmp_path, "dying", tiny_folders("sd1"), max_train_steps=10_000, checkpoint_step_interval=1)
    process = launch(["-m", "slider_plugin", "train", str(config)])
    victim = _worker_at_work(process, tmp_path / "out-dying", rank="1")
    os.kill(victim, signal.SIGKILL)
    said, _ = process.communicate(timeout=120)  # far below the patience that processes have with each other
    assert process.returncode != 0
    assert "another process of this run has ended" in said


def test_ctrl_c_stops_all_after_the_same_step(tiny_folders: Tiny, tmp_path: Path) -> None:
    config = write(tmp_path, "stopped", tiny_folders("sd1"), max_train_steps=10_000, checkpoint_step_interval=1)
    out = tmp_path / "out-stopped"
    process = launch(["-m", "slider_plugin", "train", str(config)])
    _worker_at_work(process, out, rank="0")
    os.kill(process.pid, signal.SIGINT)  # the launcher passes it on
    said, _ = process.communicate(timeout=120)
    assert "interrupted after" in said and "another process of this run has ended" not in said, said
    steps = len(metrics(out))
    assert checkpoints(out)[-1].name == f"checkpoint-{steps:06d}" and steps < 10_000


def _worker_at_work(launcher: subprocess.Popen[str], out: Path, rank: str) -> int:
    """The process id of a worker, once the run has a checkpoint."""
    import psutil

    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not checkpoints(out):
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.05)
    return next(p.pid for p in psutil.Process(launcher.pid).children(recursive=True) if p.environ().get("RANK") == rank)


# --- What is refused --------------------------------------------------------------------------------------------------


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("environment", "keys", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "Megatron"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "FSDP 1"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, {}, "offload"),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "gradient_checkpointing"),
        (FSDP, {"lycoris": LycorisConfig(algo="lokr")}, "lora_type"),
        (FSDP, {"controlnet": True}, "controlnet"),
        (FSDP, {"signs_in_one_forward": "yes"}, "signs_in_one_forward"),
        (FSDP, {"base_model_precision": "int8-torchao"}, "base_model_precision"),
        (FSDP, {"torch_compile": "inductor"}, "torch_compile"),
    ],
)
def test_launches_that_are_refused(
    environment: dict[str, str], keys: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig(model_family="sd1", **keys)
    assert processes.check_launch(config) == []
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    lines = processes.check_launch(config)
    assert len(lines) == 1 and said in lines[0]


def test_a_refused_launch_is_a_problem_of_the_configuration(
    project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="DeepSpeed: sliders were never tried with it"):
        train(project("sd1"))


def test_processes_that_accelerate_does_not_see_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.Accelerator", lambda **arguments: type("Machine", (), {"num_processes": 1})())
    with pytest.raises(UserError, match="2 processes were launched and accelerate found 1"):
        processes.open_accelerator()


def test_a_launcher_s_accumulation_does_not_divide_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    machine = processes.open_accelerator()
    weight = torch.nn.Parameter(torch.tensor(1.0))
    machine.backward(weight * 3.0)
    assert weight.grad == 3.0


def test_the_blocks_of_a_denoiser(load: Callable[[str], tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = load("sd1")[1].denoiser
    blocks = blocks_of(denoiser)
    assert {"BasicTransformerBlock", "ResnetBlock2D"} <= {type(block).__name__ for block in blocks}
    inner = [any(later in list(block.modules()) for later in blocks[place + 1 :]) for place, block in enumerate(blocks)]
    assert not any(inner)  # none stands before what it holds
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "BasicTransformerBlock")
    assert {type(block).__name__ for block in blocks_of(denoiser)} == {"BasicTransformerBlock"}
    monkeypatch.delenv("FSDP_TRANSFORMER_CLS_TO_WRAP")
    with pytest.raises(UserError, match="name their class in fsdp_transformer_layer_cls_to_wrap"):
        blocks_of(torch.nn.Linear(2, 2))
    assert unsharded_type(denoiser).__name__ == "UNet2DConditionModel"

"""What each of two processes does in `test_processes.py`: torchrun starts it, and it leaves what it found in a folder.

python -m torch.distributed.run --standalone --nproc_per_node 2 tests/processes_worker.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from trainers import trainer_of

from slider_plugin.errors import UserError
from slider_plugin.training.loop import NotFinite, Trainer


def trained(config: Path, steps: int) -> Trainer:
    trainer = trainer_of(config)
    trainer.run(steps, lambda report: False)
    return trainer


def refusal(work: Any, kind: type[UserError]) -> str:
    try:
        work()
    except kind as error:
        return str(error)
    return ""


def small_things(trainer: Trainer) -> dict[str, Any]:
    """What `Processes` answers."""
    processes, parameter = trainer.processes, torch.nn.Parameter(torch.zeros(2))
    unused = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([1.0, 2.0]) if processes.index else None
    numbers = processes.add_gradients([parameter, unused], torch.tensor([1.0 + processes.index]))
    return {
        "gradient": parameter.grad.tolist(),  # type: ignore[attr-defined]
        "unused": unused.grad is None,
        "numbers": numbers.tolist(),
        "any": [processes.any(processes.index == 1), processes.any(False)],
        "alike": refusal(lambda: processes.assert_alike({"data": 1, "model": processes.index}), UserError),
    }


def infinite_on_one(config: Path) -> str:
    """What a process says when the samples of another one's share are not finite."""
    trainer = trainer_of(config)
    batch = type(trainer.data).batch

    def broken(self: Any, draw: Any) -> Any:
        given = batch(self, draw)
        if self.share.process == 1:
            given.clean_BCHW[:] = float("inf")
        return given

    type(trainer.data).batch = broken  # type: ignore[method-assign]
    try:
        return refusal(trainer.optimizer_step, NotFinite)
    finally:
        type(trainer.data).batch = batch  # type: ignore[method-assign]


def out_of_memory_on_one(config: Path, steps: int) -> Trainer:
    """Train with both signs in one forward, which does not fit into the memory of process 1."""
    trainer = trainer_of(config)
    trainer.pairing.on = True  # as `auto` has it on a GPU
    predict = type(trainer).predict

    def failing(self: Trainer, noisy: Any, *told: Any) -> Any:
        if self.processes.index == 1 and isinstance(self.adapter.scale, list) and self.step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return predict(self, noisy, *told)

    type(trainer).predict = failing  # type: ignore[method-assign]
    try:
        trainer.run(steps, lambda report: False)
    finally:
        type(trainer).predict = predict  # type: ignore[method-assign]
    return trainer


def main(folder: Path) -> None:
    found: dict[str, Any] = {}
    process = 0
    for config in sorted(folder.glob("*.json")):
        steps = json.loads(config.read_text())["max_train_steps"]
        trainer = out_of_memory_on_one(config, steps) if config.stem == "memory" else trained(config, steps)
        process = trainer.processes.index
        save_file(trainer.adapter.tensors(), folder / f"{config.stem}-{process}.safetensors")
        found[config.stem] = {"paired": trainer.pairing.on, "samples": trainer.data.batch_size}
    found["small"] = small_things(trainer)
    found["infinite"] = infinite_on_one(folder / "apart.json")
    (folder / f"found-{process}").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Checkpoints: everything a run needs to go on exactly where it was, without a frozen weight and without pickle.

A checkpoint is a folder `checkpoint-000500` that appears whole or not at all: `adapter.safetensors`, `optimizer.safetensors`
and `state.json`, which holds the position and the hash of the other two.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slider_plugin.adapters.base import Adapter
from slider_plugin.errors import UserError
from slider_plugin.files import folder_replacing

FORMAT = 1
NAME = re.compile(r"checkpoint-(\d{6,})")
ADAPTER, OPTIMIZER, STATE = "adapter.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True, slots=True)
class Position:
    """How far a run has come."""

    step: int
    """Optimizer steps done."""

    sampler: dict[str, Any]
    """What the sampler's `state_dict` gave."""

    schedule: dict[str, Any]
    """What the learning-rate schedule's `state_dict` gave."""


def save_checkpoint(
    folder: Path, adapter: Adapter, optimizer: torch.optim.Optimizer, position: Position, facts: dict[str, Any], keep: int
) -> Path:
    """Write `folder/checkpoint-<step>` and delete the oldest ones beyond `keep`; an existing one of that step stays."""
    path = folder / f"checkpoint-{position.step:06d}"
    if not path.exists():
        with folder_replacing(path) as temporary:
            save_file(adapter.tensors(), temporary / ADAPTER, {"format": "pt"})
            save_file(_optimizer_tensors(adapter, optimizer), temporary / OPTIMIZER, {"format": "pt"})
            state = {
                "format": FORMAT,
                "step": position.step,
                "sampler": position.sampler,
                "schedule": position.schedule,
                "facts": facts,
                "sha256": {name: _sha256(temporary / name) for name in (ADAPTER, OPTIMIZER)},
            }
            (temporary / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def load_checkpoint(path: Path, adapter: Adapter, optimizer: torch.optim.Optimizer) -> Position:
    """Put a checkpoint's weights into adapter and optimizer. Raises UserError if it is damaged or another run's."""
    state = verify(path)
    adapter.load_tensors(load_file(path / ADAPTER), str(path))
    _load_optimizer(adapter, optimizer, load_file(path / OPTIMIZER))
    return Position(state["step"], state["sampler"], state["schedule"])


def verify(path: Path) -> dict[str, Any]:
    """The `state.json` of a whole checkpoint. Raises UserError that says what is damaged."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        recorded = state["sha256"]
        if state["format"] != FORMAT or not isinstance(state["step"], int):
            raise UserError(f"{path} is a checkpoint of another version (format {state['format']})")
        for name in (ADAPTER, OPTIMIZER):
            if _sha256(path / name) != recorded[name]:
                raise UserError(f"{path} is damaged: {name} is not what was written. Resume from another checkpoint")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged or no checkpoint ({_short(error)}). Resume from another checkpoint") from error
    return dict(state)


def find_checkpoint(wanted: str, folder: Path, say: Callable[[str], None]) -> Path:
    """The checkpoint to resume from: `latest` takes the newest whole one of `folder` and names the damaged ones it skips.

    Raises:
        UserError: an explicit path is missing or damaged; `latest`, and there is no whole one.
    """
    if wanted != "latest":
        verify(Path(wanted))
        return Path(wanted)
    for path in reversed(checkpoints(folder)):
        try:
            verify(path)
        except UserError as error:
            say(f"skipped: {error}")
        else:
            return path
    raise UserError(f"resume_from_checkpoint latest: {folder} holds no whole checkpoint; leave the key out to start anew")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    found = [(int(m[1]), p) for p in _children(folder) if (m := NAME.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def _children(folder: Path) -> Iterable[Path]:
    return folder.iterdir() if folder.is_dir() else ()


def _optimizer_tensors(adapter: Adapter, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`<parameter>//<state>` to tensor: safetensors instead of torch.save, which would be a pickle."""
    tensors = {}
    for name, parameter in adapter.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}//{key}"] = torch.as_tensor(value).detach().cpu().clone().contiguous()
    return tensors


def _load_optimizer(adapter: Adapter, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = dict(adapter.named_parameters())
    for name, value in tensors.items():
        parameter_name, key = name.split("//")
        parameter = parameters[parameter_name]
        on_host = key == "step"  # AdamW counts on the CPU
        optimizer.state[parameter][key] = value if on_host else value.to(parameter.device)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]

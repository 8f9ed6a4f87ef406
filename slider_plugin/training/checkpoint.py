"""Checkpoints: everything a run needs to go on exactly where it was, without a frozen weight and without pickle.

A checkpoint is a folder `checkpoint-000500` that appears whole or not at all: `adapter.safetensors` (the weights that train,
not their average), `optimizer.safetensors`, with use_ema `ema.safetensors`, and `state.json`, which holds the position, the
numbers of the optimizer's state and the hashes of the others.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from slider_plugin.adapters.base import Adapter
from slider_plugin.errors import UserError
from slider_plugin.files import TEMPORARY, folder_replacing
from slider_plugin.training.ema import Ema
from slider_plugin.training.optimizers import load_optimizer, optimizer_numbers, optimizer_tensors

FORMAT = 2
NAME = re.compile(r"checkpoint-(\d{6,})")
ADAPTER, OPTIMIZER, EMA, STATE = "adapter.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"


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
    folder: Path,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    position: Position,
    facts: dict[str, Any],
    keep: int,
    spare: str = "",
) -> Path:
    """Write `folder/checkpoint-<step>`, unless it is there and whole, and delete what is older than the newest `keep`.

    Args:
        folder: of the run.
        adapter: whose weights train.
        optimizer: its state is kept, too.
        ema: the moving average, if there is one.
        position: how far the run has come.
        facts: what a run must have in common with this one to go on from here (`resuming`).
        keep: at least 1.
        spare: name of one that is never deleted, and does not count.
    """
    path = folder / f"checkpoint-{position.step:06d}"
    if path.exists() and not is_whole(path):
        _remove(path)
    if not path.exists():
        named = adapter.named_parameters()
        files = {ADAPTER: adapter.tensors(), OPTIMIZER: optimizer_tensors(optimizer, named)}
        files |= {EMA: ema.tensors()} if ema else {}
        with folder_replacing(path) as temporary:
            for name, tensors in files.items():
                save_file(tensors, temporary / name, {"format": "pt"})
            state = {
                "format": FORMAT,
                "step": position.step,
                "sampler": position.sampler,
                "schedule": position.schedule,
                "optimizer": optimizer_numbers(optimizer, named),
                "ema_updates": ema.updates if ema else None,
                "facts": facts,
                "sha256": {name: _sha256(temporary / name) for name in files},
            }
            (temporary / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    _rotate(folder, keep, spare)
    return path


def _rotate(folder: Path, keep: int, spare: str) -> None:
    """A damaged one counts for nothing: however many there are, as many whole ones are kept, if there ever were."""
    found, whole = [path for path in checkpoints(folder) if path.name != spare], 0
    if len(found) <= keep:
        return
    for path in reversed(found):
        if whole == keep:
            _remove(path)
        elif is_whole(path):
            whole += 1


def _remove(path: Path) -> None:
    """Delete a checkpoint; one whose deletion is cut off has lost its name already."""
    going = path.with_name(f"{TEMPORARY}{path.name}")
    if going.exists():
        shutil.rmtree(going)
    path.rename(going)
    shutil.rmtree(going)


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is as it was written."""
    try:
        verify(path)
    except UserError:
        return False
    return True


def load_checkpoint(path: Path, adapter: Adapter, optimizer: torch.optim.Optimizer, ema: Ema | None) -> Position:
    """Put a checkpoint's weights into adapter, optimizer and average. Raises UserError if it is damaged or another run's."""
    state = verify(path)
    assert_fits(path, state, type(optimizer).__name__, ema is not None)
    adapter.load_tensors(load_file(path / ADAPTER), str(path))
    load_optimizer(optimizer, adapter.named_parameters(), load_file(path / OPTIMIZER), state["optimizer"])
    if ema:
        ema.load(load_file(path / EMA), state["ema_updates"], str(path))
    return Position(state["step"], state["sampler"], state["schedule"])


def assert_fits(path: Path, state: Mapping[str, Any], optimizer_class: str, ema: bool) -> None:
    """Raise UserError unless a checkpoint is of a run with this optimizer, and with a moving average or without."""
    written_by = state["optimizer"]["class"]
    if written_by != optimizer_class:
        raise UserError(
            f"optimizer: {path} was written with {written_by}, and this run has {optimizer_class}; resume with the same one, "
            "or begin anew with the finished slider as init_lora"
        )
    if (EMA in state["sha256"]) != ema:
        wrong = "holds no moving average; take use_ema out" if ema else "holds a moving average; set use_ema to true"
        raise UserError(f"use_ema: {path} {wrong} to resume it")


def verify(path: Path) -> dict[str, Any]:
    """The `state.json` of a whole checkpoint. Raises UserError that says what is damaged."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        recorded = state["sha256"]
        if state["format"] != FORMAT or not isinstance(state["step"], int):
            raise UserError(f"{path} is a checkpoint of another version (format {state['format']})")
        for name in (ADAPTER, OPTIMIZER, *(name for name in (EMA,) if name in recorded)):
            if _sha256(path / name) != recorded[name]:
                raise UserError(f"{path} is damaged: {name} is not what was written. Resume from another checkpoint")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged or no checkpoint ({_short(error)}). Resume from another checkpoint") from error
    return dict(state)


def find_checkpoint(wanted: str, folder: Path, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume from: `latest` takes the newest whole one of `folder` and names the damaged ones it skips.

    Returns:
        Its folder; None for `latest` where there is none yet, as when a run was killed before its first one.

    Raises:
        UserError: an explicit path is missing or damaged, or `folder` holds later ones; `latest`, and there is no whole one.
    """
    if wanted != "latest":
        state = verify(Path(wanted))
        later = [p.name for p in checkpoints(folder) if int(p.name.rpartition("-")[2]) > state["step"] and is_whole(p)]
        if later:
            raise UserError(
                f"resume_from_checkpoint: {folder} holds later checkpoints than {wanted} ({', '.join(later)}), which would be "
                "mixed with those of this run; choose another output_dir, or remove them"
            )
        return Path(wanted)
    if not checkpoints(folder):
        return None
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]

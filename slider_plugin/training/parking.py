"""Encoders and decoders leave memory while the denoiser trains, and come back to draw a validation.

A training step needs the denoiser alone, and the other parts of a pipeline may be larger than it: the encoder of a T5-XXL has
4.8 billion parameters. From an accelerator they go to the CPU's memory. Where that is the device itself, their parameters go
to a file on the disk, and empty ones on the meta device stand in for them. What is never drawn with again is dropped.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Module, Parameter

from slider_hooks import Components
from slider_plugin.errors import UserError
from slider_plugin.files import TEMPORARY
from slider_plugin.parts import other_models

CHUNK_BYTES = 2**30
"""Of parameters that are written to one file."""


class Parked:
    """The models of a pipeline besides its denoiser, out of memory.

    Buffers stay: they are small, and many are computed instead of loaded. Parameters that were one are one again when they come
    back, and values and memory layout are what they were.
    """

    def __init__(self, components: Components, device: torch.device, folder: Path | None) -> None:
        """Send them off.

        Args:
            components: the loaded model.
            device: where it runs.
            folder: for the file on the disk, if the device is the CPU; None if no part is ever needed again.

        Raises:
            UserError: the disk is full.
        """
        self._components, self._device = components, device
        self._models = {name: model for name, model in other_models(components).items() if _can_leave(model)}
        self.size = sum(values.nbytes for values in _storages(self._models).values())
        self._on_disk = device.type == "cpu" and folder is not None
        self._dropped = folder is None
        self._stored = _Stored(self._models, folder) if folder is not None and self._on_disk else None
        self._park()

    @property
    def names(self) -> tuple[str, ...]:
        """Which parts these are."""
        return tuple(self._models)

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """All parts in memory inside, and out of it outside."""
        assert not self._dropped, "this run was to draw nothing"
        try:
            self._wake()
            yield
        finally:
            self._park()

    def _park(self) -> None:
        if self._on_disk or self._dropped:
            _replace(self._models, lambda old: _like(old, torch.empty_like(old, device="meta")))
        else:
            for model in self._models.values():
                model.to("cpu")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # others may have it

    def _wake(self) -> None:
        if self._stored is not None:
            self._stored.fetch()
        else:
            move(self._components, self._device)
            for model in self._models.values():
                model.to(self._device)


def move(components: Components, device: torch.device) -> None:
    """Move a whole pipeline, if it can be moved."""
    if hasattr(components.pipeline, "to"):
        components.pipeline.to(device)


def _can_leave(model: Module) -> bool:
    """Whether its parameters are plain ones: quantised ones are more than values, and hooks of accelerate move them about."""
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    return not hooked and all(type(p) in (Parameter, Tensor) and not p.is_meta for p in model.parameters())


# --- Parameters and their places --------------------------------------------------------------------------------------


def _slots(models: Mapping[str, Module]) -> list[tuple[Module, str, Parameter]]:
    """Every place of a parameter: module, name and what is there; a shared one as often as it has places."""
    modules = {id(module): module for model in models.values() for module in model.modules()}
    return [(module, name, p) for module in modules.values() for name, p in module._parameters.items() if p is not None]


def _replace(models: Mapping[str, Module], new: Callable[[Parameter], Parameter]) -> None:
    """Put `new(parameter)` in the place of each parameter; what was one parameter stays one."""
    slots = _slots(models)  # which holds the old ones until the end, so that no number comes up twice
    replaced: dict[int, Parameter] = {}
    for module, name, old in slots:
        if id(old) not in replaced:
            replaced[id(old)] = new(old)
        module._parameters[name] = replaced[id(old)]


def _like(parameter: Parameter, values: Tensor) -> Parameter:
    """A parameter of other values, with what was noted on the one that it replaces."""
    new = Parameter(values, requires_grad=False)
    new.__dict__.update(parameter.__dict__)
    return new


def _key(parameter: Parameter) -> str:
    """What parameters of the same memory, seen the same way, have in common."""
    layout = (parameter.storage_offset(), tuple(parameter.shape), parameter.stride(), parameter.dtype)
    return f"{parameter.untyped_storage().data_ptr()}/{layout}" if parameter.numel() else f"{id(parameter)}"


def _storages(models: Mapping[str, Module]) -> dict[str, Tensor]:
    """The different tensors among the parameters."""
    return {_key(parameter): parameter.detach() for _, _, parameter in _slots(models)}


# --- On the disk ------------------------------------------------------------------------------------------------------


class _Stored:
    """Parameters on the disk, and where they belong."""

    def __init__(self, models: Mapping[str, Module], folder: Path) -> None:
        self._models = models
        self._files: list[_File] = []
        self._where: dict[str, int] = {}
        self._strides = {key: values.stride() for key, values in _storages(models).items()}
        self._keys = [_key(parameter) for _, _, parameter in _slots(models)]
        for chunk in _chunks(_storages(models)):
            self._where.update(dict.fromkeys(chunk, len(self._files)))
            self._files.append(_File(chunk, folder))

    def fetch(self) -> None:
        """Put the parameters back, mapped from the disk: memory is taken as they are read."""
        opened = [file.open() for file in self._files]
        slots = _slots(self._models)
        keys = {id(meta): key for (_, _, meta), key in zip(slots, self._keys, strict=True)}
        values = {key: _laid_out(opened[at].get_tensor(key), self._strides[key]) for key, at in self._where.items()}
        _replace(self._models, lambda meta: _like(meta, values[keys[id(meta)]]))


def _chunks(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Some at a time, since writing them takes as much memory again."""
    chunk: dict[str, Tensor] = {}
    for key, values in tensors.items():
        chunk[key] = values.contiguous()
        if sum(one.nbytes for one in chunk.values()) >= CHUNK_BYTES:
            yield chunk
            chunk = {}
    if chunk:
        yield chunk


def _laid_out(values: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The values in the memory layout that they had, or a kernel might round otherwise (channels last)."""
    if values.stride() == stride:
        return values
    return torch.empty_strided(values.shape, stride, dtype=values.dtype).copy_(values)


class _File:
    """A safetensors file that goes with the process. Where the system can it has no name, so not even `kill -9` leaves it."""

    def __init__(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(prefix=TEMPORARY, suffix=".safetensors", dir=folder)
        os.close(number)
        self._path = Path(name)
        try:
            save_file(dict(tensors), self._path)
        except (OSError, SafetensorError) as error:
            self._path.unlink()
            raise UserError(
                f"output_dir: {folder} has no room for the encoders, which leave memory while the denoiser trains ({error}); "
                "make room, or set validation_disable"
            ) from error
        if os.name == "nt":  # an open file keeps its name there
            weakref.finalize(self, self._path.unlink, missing_ok=True)
            return
        descriptor = os.open(self._path, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        self._path.unlink()
        self._path = Path(f"/dev/fd/{descriptor}")

    def open(self) -> Any:
        """A reader; mapped memory lives as long as it and its tensors."""
        return safe_open(self._path, "pt")

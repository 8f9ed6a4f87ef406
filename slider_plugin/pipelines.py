"""A slider's file in a diffusers pipeline, through diffusers' own loader, and what of it is in there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slider_plugin.adapterfile import read_tensors
from slider_plugin.errors import UserError

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


def models_of(pipeline: Any) -> dict[str, torch.nn.Module]:
    """The models of a pipeline by the names of their parts."""
    parts = getattr(pipeline, "components", {})
    return {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}


def layers_of(model: torch.nn.Module, name: str) -> dict[str, LoraLayer]:
    """The layers of a model that a LoRA of this name is in, by their names."""
    from peft.tuners.lora import LoraLayer

    found: dict[str, Any] = dict(model.named_modules())
    return {module: layer for module, layer in found.items() if isinstance(layer, LoraLayer) and name in layer.lora_A}


def load_file(pipeline: Any, path: Path, name: str, **kwargs: Any) -> str:
    """Load a LoRA into a pipeline: by `load_lora_weights`, or into its denoiser where the pipeline has no such method.

    Args:
        pipeline: of diffusers; changed in place.
        path: the file.
        name: of the adapter in it.
        kwargs: of `load_lora_weights`.

    Returns:
        What loaded it, for people.

    Raises:
        UserError: it cannot be read, it is no LoRA, or some of its layers are not in this pipeline.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    tensors, _ = read_tensors(path)
    if any(key.startswith("lycoris_") for key in tensors):
        raise UserError(f"{path} is a LyCORIS file, which diffusers does not load; lycoris-lora does")
    modules = {key.rpartition(".lora_")[0] for key in tensors if ".lora_" in key}
    if any(key.startswith(("text_encoder", "lora_te")) for key in tensors):
        raise UserError(f"{path} holds layers of a text encoder, which a slider leaves alone; leave these keys out of the file")
    if not modules:
        raise UserError(f"{path}: no LoRA layers in it")
    how = _load(pipeline, path, name, next(iter(sorted(modules))).partition(".")[0], kwargs)
    loaded = sum(len(layers_of(model, name)) for model in models_of(pipeline).values())
    if loaded != len(modules):
        raise UserError(
            f"{path}: {loaded} of its {len(modules)} modules are in this {type(pipeline).__name__}; "
            "use a file of this model, or export it again"
        )
    return how


_ERRORS = (ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError)
"""Whatever diffusers' converters trip over."""


def _load(pipeline: Any, path: Path, name: str, component: str, kwargs: dict[str, Any]) -> str:
    model: Any = models_of(pipeline).get(component)
    place: dict[str, Any] = {"weight_name": path.name, "adapter_name": name}
    try:
        if hasattr(pipeline, "load_lora_weights"):
            pipeline.load_lora_weights(str(path.parent), **place, **kwargs)
            return f"{type(pipeline).__name__}.load_lora_weights"
        if hasattr(model, "load_lora_adapter"):
            model.load_lora_adapter(str(path.parent), prefix=component, **place)
            return f"{type(model).__name__}.load_lora_adapter"
    except _ERRORS as error:
        what = f"diffusers cannot load it into this {type(pipeline).__name__}"
        raise UserError(f"{path}: {what}: {_first_line(error)}") from error
    raise UserError(f"{path}: {type(pipeline).__name__} of diffusers loads no LoRA; `slider validate` does, and so does PEFT")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__

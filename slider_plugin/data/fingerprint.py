"""What shapes an encoding besides the image or the caption itself, as one short text.

Of weights a sample is taken, as hashing all of a text encoder would take longer than loading it: names, shapes, types and 256
evenly spaced values of every parameter and buffer, all of those that have no more. Another model, another precision and a
fine-tune differ in it; a change to a few single weights of a large matrix need not.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import slider_plugin
from slider_hooks import CONTRACT, Components
from slider_plugin.parts import other_parts
from slider_plugin.training.sharding import unsharded_type

if TYPE_CHECKING:
    from slider_plugin.family import LoadedFamily

SAMPLED = 256
"""Values of one tensor that are looked at."""

ADDED = '"added_tokens"'
"""A key in the text of a fast tokenizer."""

HOOKS = ("encode_images", "condition_on_images", "encode_control", "encode_prompts")

LIBRARIES = ("slider-plugin", "diffusers", "transformers", "tokenizers", "pillow", "av", "soundfile", "soxr")
"""Whose versions count. PyTorch's does not: another version rounds otherwise, and means the same."""

OWN_CODE = (
    "loading.py",
    *(f"data/{name}.py" for name in ("wanted", "encoders", "geometry", "images", "media", "video", "audio")),
)
"""Our own code between a file and a family's hooks; with it goes all of `common`."""


class Opaque(Exception):
    """Something takes part whose content cannot be seen. The message names it."""


def fingerprint(family: LoadedFamily, components: Components, device: torch.device) -> str:
    """40 hexadecimal digits that are others whenever model, family, code or libraries make encodings others.

    Args:
        family: whose hooks encode.
        components: the loaded model, with its weights in memory.
        device: where encoding takes place: a GPU rounds otherwise than a processor.

    Raises:
        Opaque: the pipeline holds something that cannot be looked into, so nothing can be told of what it makes.
    """
    denoiser = components.denoiser  # its weights do not encode; its type and its sizes may be asked for
    above = (components.pipeline, denoiser)
    facts = {
        "contract": CONTRACT,
        "family": family.facts.name,
        "makers": family.makers(HOOKS),
        "code": _own_code(),
        "versions": {name: _version(name) for name in LIBRARIES},
        "device": device.type,
        "options": _described(dict(components.options), "options", ()),
        "denoiser": [
            _name_of_type(unsharded_type(denoiser)),
            str(getattr(denoiser, "dtype", "")),
            _described(_config(denoiser), "denoiser", ()),
        ],
        "pipeline": [_name(components.pipeline), _described(_config(components.pipeline), "pipeline", ())],
        "parts": {name: _described(part, name, above) for name, part in other_parts(components).items()},
        "extras": _described(components.extras, "extras", above),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode("utf-8", "backslashreplace")).hexdigest()[:40]


def described_controlnet(components: Components) -> list[Any]:
    """What `encode_control` may ask the ControlNet for, as JSON; an adapter in it changes nothing of that."""
    controlnet = components.controlnet
    weights = [_sample(parameter) for parameter in controlnet.parameters() if not parameter.requires_grad]  # not the adapter's
    return [_name(controlnet), _described(_config(controlnet), "controlnet", ()), weights]


def _own_code() -> str:
    root = Path(slider_plugin.__file__).parent
    files = [*(root / name for name in OWN_CODE), *sorted((root / "common").glob("*.py"))]
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:  # an extra that is not installed
        return None


def _name(value: object) -> str:
    return _name_of_type(type(value))


def _name_of_type(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _config(part: Any) -> Any:
    """The configuration of a part of diffusers or transformers, without notes on where it came from."""
    config: Any = getattr(part, "config", None)
    config = config.to_dict() if hasattr(config, "to_dict") else config
    return _without_notes(config) if isinstance(config, Mapping) else None


def _without_notes(value: Any) -> Any:
    """Keys like `_name_or_path` and `transformers_version` say how something was made, not what it is."""
    if isinstance(value, Mapping):
        kept = {str(k): v for k, v in value.items() if not str(k).startswith("_") and k != "transformers_version"}
        return {name: _without_notes(v) for name, v in kept.items()}
    return value


def _described(value: Any, where: str, above: tuple[Any, ...]) -> Any:
    """A value as JSON, the same in every process. `above` holds what it is part of, so that circles end."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return repr(value)  # JSON has no infinity
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, enum.Enum | torch.dtype | torch.device | Path):
        return str(value)
    if callable(value) and hasattr(value, "__qualname__"):  # a class, a function, a method
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return _sample(torch.as_tensor(value))
    if any(value is one for one in above):
        return "above"
    return _described_whole(value, where, (*above, value))


def _described_whole(value: Any, where: str, above: tuple[Any, ...]) -> Any:
    if isinstance(value, Mapping):
        return [[str(k), _described(v, f"{where}.{k}", above)] for k, v in value.items()]
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(_described(v, where, above), sort_keys=True) for v in value)
    if isinstance(value, list | tuple):
        return [_described(v, where, above) for v in value]
    if isinstance(value, torch.nn.Module):
        return [_name(value), _described(_config(value), where, above), _weights(value)]
    if hasattr(value, "get_vocab"):
        return _tokenizer(value, where, above)
    return _object(value, where, above)


def _weights(model: torch.nn.Module) -> list[Any]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [[name, _sample(tensor)] for name, tensor in tensors]


def _sample(tensor: Tensor) -> list[Any]:
    """Shape, type and evenly spaced values."""
    if tensor.is_meta:
        raise Opaque("a tensor without values")
    values_N = tensor.detach().reshape(-1)
    sample = values_N[:: max(1, len(values_N) // SAMPLED)].cpu().contiguous()
    sample = torch.view_as_real(sample) if sample.is_complex() else sample
    digest = hashlib.sha256(sample.view(torch.uint8).numpy().tobytes()).hexdigest()
    return [list(tensor.shape), str(tensor.dtype), digest]


def _tokenizer(tokenizer: Any, where: str, above: tuple[Any, ...]) -> list[Any]:
    """Everything it does: a fast one writes itself down, of a slow one vocabulary and settings count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # What stands before the tokens is how the latest call padded and cut.
    whole = backend.to_str().partition(ADDED)[2] if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    settings = {k: v for k, v in getattr(tokenizer, "init_kwargs", {}).items() if "file" not in k and "path" not in k}
    settings = {name: v for name, v in settings.items() if isinstance(v, str | int | float | bool | None)}
    limits = [getattr(tokenizer, name, None) for name in ("model_max_length", "chat_template")]
    digest = hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()
    return [_name(tokenizer), digest, _described(settings, where, above), _described(limits, where, above)]


def _object(value: Any, where: str, above: tuple[Any, ...]) -> Any:
    """A processor or a family's own object: its configuration, or what its attributes hold."""
    config = _config(value)
    if config is None and not hasattr(value, "__dict__"):
        raise Opaque(f"{where}, a {_name(value)}")
    held = config if config is not None else _without_notes(vars(value))
    return [_name(value), _described(held, where, above)]

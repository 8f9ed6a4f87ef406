"""LoRAs that stay frozen beside the slider: an assistant, and LoRAs that count as part of the base model.

Each is added behind the layer of the base model that it belongs to, by a forward hook: `y + strength * alpha / rank * B A x`.
PEFT's wrapper still calls that layer as a module, and LyCORIS replaces its `forward`, outside of which hooks stand: so one hook
serves both. It is neither a parameter nor a module of the model: nothing can train, save or target it, and the slider's scale
does not reach it.
"""

from __future__ import annotations

import json
import math
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slider_hooks import Family
from slider_plugin.adapterfile import read_tensors, shape_problem
from slider_plugin.config import RunConfig
from slider_plugin.errors import ConfigError, UserError

NATIVE = "diffusion_model"
"""The prefix that some trainers put in front of diffusers' names instead of the component's."""

BASE, ASSISTANT = "slider.base_loras", "slider.assistant"
"""Metadata keys of an exported file."""

_KEY = re.compile(r"(?P<prefix>[^.]+)\.(?P<module>.+)\.(?:(?P<twin>lora_A|lora_B|lora_down|lora_up)\.weight|(?P<alpha>alpha))")
_DOWN = ("lora_A", "lora_down")
_UNREAD = ("lora_unet_", "lora_te", "lycoris_")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_CONVOLUTIONS: Mapping[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
}


# --- What a configuration asks for ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FrozenFile:
    """A file and the strengths that it runs at."""

    key: str
    """Of the configuration, for messages."""

    path: Path
    training: float
    drawing: float


def frozen_files(config: RunConfig) -> tuple[FrozenFile, ...]:
    """The base LoRAs in their order, then the assistant. Raises UserError if the assistant's keys name no file."""
    base = [FrozenFile("base_loras", lora.path, lora.weight, lora.weight) for lora in config.base_loras]
    assistant = _assistant(config)
    return (*base, *([assistant] if assistant else []))


def _assistant(config: RunConfig) -> FrozenFile | None:
    if config.disable_assistant_lora:
        return None
    strengths = (config.assistant_lora_strength, config.assistant_lora_inference_strength)
    if config.assistant_lora_path is None:
        lost = {
            "assistant_lora_weight_name": config.assistant_lora_weight_name is not None,
            "assistant_lora_strength": strengths[0] != 1.0,
            "assistant_lora_inference_strength": strengths[1] != 0.0,
        }
        if any(lost.values()):
            key = next(key for key, given in lost.items() if given)
            raise UserError(f"{key}: there is no assistant; download its file and name it in assistant_lora_path")
        return None
    return FrozenFile("assistant_lora_path", _assistant_file(config.assistant_lora_path, config), *strengths)


def _assistant_file(place: Path, config: RunConfig) -> Path:
    name = config.assistant_lora_weight_name
    if place.is_dir():
        found = [place / name] if name else sorted(place.glob("*.safetensors"))
        if len(found) == 1 and found[0].is_file():
            return found[0]
        kind = f"no file {name}" if name else f"{len(found) or 'no'} safetensors files"
        raise UserError(f"assistant_lora_path: {place} holds {kind}; name one of its files in assistant_lora_weight_name")
    if not place.is_file():
        raise UserError(f"assistant_lora_path: there is no file or folder {place}; nothing is downloaded, so download it first")
    if name not in (None, place.name):
        raise UserError(
            f"assistant_lora_weight_name: assistant_lora_path names the file {place.name} already; keep one of them"
        )
    return place


def check_frozen(config: RunConfig, family: Family, denoiser: nn.Module | None) -> None:
    """Read every file and compare it with the denoiser, which may be on the meta device, or None if it is not known yet.

    Raises:
        ConfigError: everything that is wrong.
    """
    problems: list[str] = []
    for file in frozen_files(config):
        try:
            factors = read_frozen(file, family.denoiser)
            if denoiser is not None:
                check_fits(factors, denoiser, f"{file.key}: {file.path}")
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(problems)


def frozen_metadata(config: RunConfig) -> dict[str, str]:
    """What an exported file says of them: names and strengths, no tensors. The files need not be there any more."""
    base = [{"name": _name(lora.path), "weight": lora.weight} for lora in config.base_loras]
    told: dict[str, str] = {BASE: json.dumps(base)} if base else {}
    if config.assistant_lora_path is not None and not config.disable_assistant_lora:
        name = _name(Path(config.assistant_lora_weight_name or config.assistant_lora_path))
        told[ASSISTANT] = json.dumps({"name": name, "strength": config.assistant_lora_strength})
    return told


def _name(path: Path) -> str:
    """Of a file or folder, without the path to it, which tells about somebody's machine."""
    return path.name.removesuffix(".safetensors")


def other_base(config: RunConfig, metadata: Mapping[str, str]) -> str:
    """How the base LoRAs of a configuration differ from those that a file was trained with; "" if they do not."""
    trained, here = metadata.get(BASE, "[]"), frozen_metadata(config).get(BASE, "[]")
    if trained == here:
        return ""
    return f"was trained with the base LoRAs {_listed(trained)}, and is drawn with {_listed(here)}; see base_loras"


def _listed(written: str) -> str:
    try:
        return ", ".join(f"{lora['name']} at {lora['weight']:g}" for lora in json.loads(written)) or "none"
    except (ValueError, TypeError, KeyError):  # a stranger's metadata
        return "that its metadata does not tell"


# --- Files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Factors:
    """What is added behind one layer: `factor * up @ down`."""

    down: Tensor
    """(rank, in), or (rank, in, *kernel)."""

    up: Tensor
    """(out, rank), or (out, rank, 1, ...)."""

    factor: float
    """alpha / rank."""


def read_frozen(file: FrozenFile, component: str) -> dict[str, Factors]:
    """Read a LoRA by module name: `transformer.X.lora_A.weight` and `lora_B`, or `diffusion_model.X.` with diffusers' names.

    `lora_down` and `lora_up` are other names of the two; `X.alpha` may stand beside them. Not read: keys of kohya and LyCORIS,
    DoRA, layers of a text encoder, and names that are not those of diffusers.

    Args:
        file: the file.
        component: the denoiser's name in a pipeline.

    Raises:
        UserError: the file cannot be read or is no such file; the message names key and file.
    """
    where = f"{file.key}: {file.path}"
    if not file.path.is_file():
        raise UserError(f"{file.key}: there is no file {file.path}")
    try:
        tensors, metadata = read_tensors(file.path)
    except UserError as error:
        raise UserError(f"{file.key}: {error}") from error
    except NotImplementedError as error:  # of 8 bits, for which torch cannot even say whether they are finite
        raise UserError(f"{where}: its tensors have a type that is not read; convert it to bfloat16") from error
    parts = _by_module(tensors, component, where)
    default = _stated_alpha(metadata, component, where)
    if default is not None and any("alpha" in found for found in parts.values()):
        raise UserError(f"{where}: it states alpha in its tensors and in its metadata; keep one")
    return {module: _factors(found, default, f"{where}: {module}") for module, found in parts.items()}


def _by_module(tensors: Mapping[str, Tensor], component: str, where: str) -> dict[str, dict[str, Tensor]]:
    """The tensors `down`, `up` and `alpha` of each module."""
    if not tensors:
        raise UserError(f"{where}: it is empty")
    parts: dict[str, dict[str, Tensor]] = {}
    prefixes = set()
    for key, tensor in sorted(tensors.items()):
        match = _KEY.fullmatch(key)
        if match is None or match["prefix"] not in (component, NATIVE):
            raise UserError(f"{where}: `{key}` {_why_not(key, component)}")
        prefixes.add(match["prefix"])
        if tensor.dtype not in _DTYPES and match["twin"]:
            raise UserError(f"{where}: `{key}` has dtype {str(tensor.dtype).removeprefix('torch.')}; convert it to bfloat16")
        part = "alpha" if match["alpha"] else "down" if match["twin"] in _DOWN else "up"
        if part in parts.setdefault(match["module"], {}):
            raise UserError(f"{where}: `{match['module']}` has two {part} weights")
        parts[match["module"]][part] = tensor
    if len(prefixes) > 1:
        raise UserError(f"{where}: it holds layers of {' and of '.join(sorted(prefixes))}; keep one")
    return parts


def _why_not(key: str, component: str) -> str:
    if key.startswith(_UNREAD):
        return "is a key of the kohya or LyCORIS format, which is not read; convert the file to diffusers' keys"
    if "dora_scale" in key or "lora_magnitude_vector" in key:
        return "belongs to DoRA, which is not read"
    if key.startswith("text_encoder"):
        return "belongs to a text encoder, and only layers of the denoiser are read; leave these keys out of the file"
    return f"is no key that is read: {component}.NAME.lora_A.weight, lora_B, lora_down, lora_up, or NAME.alpha"


def _factors(found: Mapping[str, Tensor], default_alpha: float | None, where: str) -> Factors:
    missing = [part for part in ("down", "up") if part not in found]
    if missing:
        raise UserError(f"{where} has no {'lora_A' if missing[0] == 'down' else 'lora_B'}; the file is incomplete")
    down, up = found["down"], found["up"]
    if problem := shape_problem(down.shape, up.shape):
        raise UserError(f"{where}: {problem}")
    rank = int(down.shape[0])
    alpha = float(rank) if default_alpha is None else default_alpha
    if "alpha" in found:
        if found["alpha"].numel() != 1:
            raise UserError(f"{where}.alpha holds {found['alpha'].numel()} numbers instead of one")
        alpha = float(found["alpha"])
    return Factors(down, up, alpha / rank)


def _stated_alpha(metadata: Mapping[str, str], component: str, where: str) -> float | None:
    """The alpha of all layers that diffusers may have left in the metadata; None if it did not."""
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: its lora_adapter_metadata is not JSON") from error
    stated = values if isinstance(values, dict) else {}
    special = [key for key in ("alpha_pattern", "use_rslora", "use_dora") if stated.get(f"{component}.{key}")]
    if special:
        raise UserError(f"{where}: its metadata has {special[0]}, which is not read; export it with alpha folded in")
    alpha = stated.get(f"{component}.lora_alpha")
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise UserError(f"{where}: its metadata gives lora_alpha as {alpha!r}, which is not a number")
    return float(alpha)


def check_fits(factors: Mapping[str, Factors], denoiser: nn.Module, where: str) -> None:
    """Raise UserError unless the denoiser has a layer of the right kind and shape for each module of a file."""
    known = dict(denoiser.named_modules())
    foreign = [name for name in factors if name not in known]
    if foreign:
        count = f"{len(foreign)} of its {len(factors)} modules"
        raise UserError(
            f"{where} does not fit {type(denoiser).__name__}: {count} are not in it, such as {foreign[0]}; "
            "use a file of this model family, with the names of diffusers"
        )
    for name, found in factors.items():
        if problem := _layer_problem(known[name], found):
            raise UserError(f"{where} does not fit this model: {name}: {problem}")


def _layer_problem(layer: nn.Module, found: Factors) -> str:
    """Why nothing can be added behind a layer; "" if it can."""
    shape = getattr(getattr(layer, "weight", None), "shape", None)
    if shape is None or not isinstance(layer, (nn.Linear, *_CONVOLUTIONS)):
        return f"it is a {type(layer).__name__}, and a LoRA belongs to a Linear or a convolution"
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "it belongs to an nn.MultiheadAttention, which never calls it: nothing can be added behind it"
    if not isinstance(layer, nn.Linear):
        plain = layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"  # type: ignore[arg-type]
        if not plain:
            return "the layer is a grouped, dilated or wrapping convolution, for which files disagree about a LoRA's meaning"
    rank = found.down.shape[0]
    wanted_down, wanted_up = (rank, *shape[1:]), (shape[0], rank, *(1 for _ in shape[2:]))
    if tuple(found.down.shape) == wanted_down and tuple(found.up.shape) == wanted_up:
        return ""
    return f"it holds {tuple(found.down.shape)} and {tuple(found.up.shape)}, and the layer takes {wanted_down} and {wanted_up}"


# --- In the model -----------------------------------------------------------------------------------------------------


class FrozenLora:
    """One LoRA behind the layers of a denoiser, at one strength."""

    def __init__(self, denoiser: nn.Module, factors: Mapping[str, Factors], strength: float, drawing: float) -> None:
        """Add it behind the denoiser's layers, in the dtype of each and on its device; before any adapter wraps them.

        Args:
            denoiser: gets hooks; its parameters, modules and names stay what they are.
            factors: by full name of a layer; see `check_fits`.
            strength: that it runs at.
            drawing: strength inside `drawing_strengths`.
        """
        self.strength, self.drawing = strength, drawing
        self.modules = tuple(factors)
        for name, found in factors.items():
            layer: Any = denoiser.get_submodule(name)
            down, up = (tensor.to(layer.weight.device, layer.weight.dtype) for tensor in (found.down, found.up))
            layer.register_forward_hook(self._adding(down, up, found.factor), with_kwargs=True)
        _BESIDE.setdefault(denoiser, []).append(self)

    def _adding(self, down: Tensor, up: Tensor, factor: float) -> Callable[..., Tensor | None]:
        def add(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor | None:
            if self.strength == 0.0:
                return None  # which leaves the output alone
            given = arguments[0] if arguments else next(iter(named.values()))
            added = _change(layer, given.to(down.dtype), down, up)
            return (output + added * (self.strength * factor)).to(output.dtype)

        return add


def _change(layer: Any, given: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """`up @ down @ given`; a convolution's kernel is in `down`."""
    if isinstance(layer, nn.Linear):
        return functional.linear(functional.linear(given, down), up)
    convolve = next(function for kind, function in _CONVOLUTIONS.items() if isinstance(layer, kind))
    return convolve(convolve(given, down, None, layer.stride, layer.padding), up)


_BESIDE: weakref.WeakKeyDictionary[nn.Module, list[FrozenLora]] = weakref.WeakKeyDictionary()
"""The frozen LoRAs of each denoiser: whoever draws finds them there, whichever way it came by the model."""


def attach_frozen(config: RunConfig, family: Family, denoiser: nn.Module) -> tuple[str, ...]:
    """Add the files of a configuration to a loaded denoiser, in the order of `frozen_files`.

    Returns:
        A line about each.

    Raises:
        UserError: a file cannot be read, or does not fit.
    """
    lines = []
    for file in frozen_files(config):
        factors = read_frozen(file, family.denoiser)
        check_fits(factors, denoiser, f"{file.key}: {file.path}")
        FrozenLora(denoiser, factors, file.training, file.drawing)
        kind = "base LoRA" if file.key == "base_loras" else "assistant"
        validating = "" if file.training == file.drawing else f", {file.drawing:g} in validation"
        lines.append(f"{kind}: {file.path.name}, frozen on {len(factors)} modules at strength {file.training:g}{validating}")
    return tuple(lines)


@contextmanager
def drawing_strengths(denoiser: nn.Module) -> Iterator[None]:
    """Run a denoiser's frozen LoRAs at their strengths for validation inside, and at what they were before outside."""
    beside = tuple(_BESIDE.get(denoiser, ()))
    before = [lora.strength for lora in beside]
    for lora in beside:
        lora.strength = lora.drawing
    try:
        yield
    finally:
        for lora, strength in zip(beside, before, strict=True):
            lora.strength = strength

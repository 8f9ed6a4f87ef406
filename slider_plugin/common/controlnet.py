"""Load a ControlNet, make a fresh one from the denoiser, call it: what the hooks of many families share."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slider_hooks import Components, Family
from slider_plugin.errors import UserError
from slider_plugin.loading import CLASS, class_of

if TYPE_CHECKING:
    from torch import Tensor

KEY = "controlnet_model_name_or_path"


def check_controlnet(family: Family, model: str | None) -> None:
    """Raise UserError if the family has no ControlNet, or the folder holds another class. Reads JSON only."""
    if not family.controlnet_class:
        raise UserError(f"controlnet: {family.name} has no ControlNet that this version can use; take controlnet and {KEY} out")
    if model is None:
        return
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if folder.exists() or folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
            raise UserError(f"{KEY}: {model} is no folder; give the folder of a ControlNet, or a hub id")
        return
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"{KEY}: {folder} has no config.json; give the folder that `save_pretrained` of a ControlNet wrote")
    try:
        found = json.loads(config.read_text(encoding="utf-8")).get(CLASS)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{KEY}: {config} is damaged: {error}. Copy the ControlNet again") from error
    wanted = family.controlnet_class.rpartition(":")[2]
    if found != wanted:
        held = f"a {found}" if found else "no ControlNet"
        raise UserError(f"{KEY}: {folder} holds {held}, and the ControlNet of {family.name} is a {wanted}")


SAME = (
    *("cross_attention_dim", "block_out_channels", "addition_embed_type", "joint_attention_dim"),
    *("in_channels", "num_attention_heads", "caption_channels", "dim"),
)
"""Keys of the configuration in which a ControlNet and its denoiser agree, where both state them."""


def load_trained(family: Family, components: Components, model: str) -> Any:
    """A ControlNet from a folder or the hub, in the denoiser's dtype, safetensors only. Raises UserError if it cannot be."""
    check_controlnet(family, model)
    controlnet_class: Any = class_of(family.controlnet_class)
    try:
        controlnet = controlnet_class.from_pretrained(model, torch_dtype=components.denoiser.dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{KEY}: {model} could not be loaded as a {family.controlnet_class}: {first}") from error
    _assert_fits(controlnet.config, components.denoiser.config, model)
    return controlnet


def _assert_fits(controlnet: Mapping[str, Any], denoiser: Mapping[str, Any], model: str) -> None:
    stated = {key: (_plain(controlnet.get(key)), _plain(denoiser.get(key))) for key in SAME}
    for key, (own, wanted) in stated.items():
        if own is not None and wanted is not None and own != wanted:
            raise UserError(f"{KEY}: {model} was made for another model: its {key} is {own}, and the denoiser's is {wanted}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def fresh_from_transformer(family: Family, components: Components, **sizes: Any) -> Any:
    """A ControlNet that copies the first blocks of a transformer; its residuals are zero.

    Args:
        family: whose `controlnet_class` has a `from_transformer`.
        components: with the transformer.
        sizes: further arguments of `from_transformer`, such as the number of blocks.

    Raises:
        UserError: the class cannot be made from a transformer.
    """
    controlnet_class: Any = class_of(family.controlnet_class)
    if not hasattr(controlnet_class, "from_transformer"):
        raise UserError(
            f"controlnet: a fresh {family.controlnet_class} cannot be made from the denoiser of {family.name}; "
            f"give a trained one in {KEY}"
        )
    return in_dtype(controlnet_class.from_transformer(components.denoiser, **sizes), components.denoiser.dtype)


def in_dtype(controlnet: Any, dtype: Any) -> Any:
    """The ControlNet in a dtype; left alone if it is in that, since diffusers warns of every cast."""
    return controlnet if controlnet.dtype == dtype else controlnet.to(dtype)


def refuse_config(controlnet: Any, wrong: Mapping[str, str]) -> None:
    """Raise UserError for the first of the reasons, by configuration key, whose key is set to anything in a ControlNet."""
    for key, reason in wrong.items():
        if controlnet.config.get(key):
            raise UserError(f"{KEY}: this {type(controlnet).__name__} has {key} {controlnet.config[key]}: {reason}")


def call_controlnet(
    components: Components, shown: Tensor, strength: float, call: Mapping[str, Any], **instead: Any
) -> Sequence[Any]:
    """Call the ControlNet with those arguments of the denoiser's call that it takes by the same names.

    Args:
        components: with the ControlNet.
        shown: what `encode_control` gave, `(B, ...)`.
        strength: what the residuals are multiplied by.
        call: the arguments of the denoiser's call, by name.
        instead: arguments that differ from the denoiser's.
    """
    taken = inspect.signature(components.controlnet.forward).parameters
    shared = {name: value for name, value in call.items() if name in taken}
    shown = shown.to(components.controlnet.dtype)
    arguments = shared | {"controlnet_cond": shown, "conditioning_scale": strength, "return_dict": False} | instead
    residuals: Sequence[Any] = components.controlnet(**arguments)
    return residuals

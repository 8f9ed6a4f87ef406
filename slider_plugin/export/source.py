"""A slider's file on its way into another layout: what kind it is, whose, and its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from slider_hooks import Family
from slider_plugin.adapterfile import read_adapter, read_tensors
from slider_plugin.errors import UserError
from slider_plugin.export.layouts import DIFFUSERS, LYCORIS
from slider_plugin.export.write import AdapterState

FAMILY = "slider.family"

CONTROLNET = "controlnet"
"""The component of a slider on a ControlNet."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file that was read. One of `state` and `lycoris` holds its numbers, the other is empty."""

    path: Path
    component: str
    """What a LoRA belongs to: the denoiser, or `controlnet`; "" for LyCORIS, whose keys do not say."""

    state: AdapterState
    lycoris: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def read_source(path: Path) -> Source:
    """Read a LoRA in diffusers' keys, or a file of lycoris-lora. Raises UserError for anything else; see `read_adapter`."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    tensors, metadata = read_tensors(path)
    if tensors and all(key.startswith("lycoris_") for key in tensors):
        return Source(path, "", {}, tensors, metadata)
    state, metadata = read_adapter(path)
    (component,) = {key.partition(".")[0] for key in tensors}
    return Source(path, component, state, {}, metadata)


def family_name(source: Source, given: str | None) -> str:
    """The family of a file, as its metadata says or `--family`. Raises UserError if nobody says it, or both do differently."""
    told = source.metadata.get(FAMILY)
    if told is None and given is None:
        raise UserError(f"{source.path}: its metadata does not tell the model family; name it with --family")
    if told is not None and given not in (None, told):
        raise UserError(f"{source.path} is a slider of {told}, and --family is {given}; leave --family out")
    return told or given or ""


def check_kind(source: Source, family: Family, to: str) -> None:
    """Raise UserError if a file cannot be in a layout at all."""
    if source.lycoris:
        if to != LYCORIS:
            raise UserError(
                f"{source.path} was trained with LyCORIS, and only lycoris-lora and programs that know its keys read it: "
                "use --to lycoris, or train a plain LoRA"
            )
        return
    if source.component == CONTROLNET:
        if to != DIFFUSERS:
            raise UserError(f"{source.path} is a slider on a ControlNet, which diffusers alone reads: use --to diffusers")
    elif source.component != family.denoiser:
        raise UserError(
            f"{source.path}: its layers belong to `{source.component}`, and the model of {family.name} is `{family.denoiser}`; "
            "name the family that it was made for with --family"
        )

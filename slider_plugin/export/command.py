"""`slider export`: a finished slider in the key names of another program, with its two sides swapped, or in another dtype."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from slider_hooks import Family
from slider_plugin.errors import UserError
from slider_plugin.export.layouts import layout_of, to_layout
from slider_plugin.export.metadata import flipped, for_programs
from slider_plugin.export.source import CONTROLNET, FAMILY, Source, check_kind, family_name, read_source
from slider_plugin.export.verify import compare_names_turned_back, verify_on_model
from slider_plugin.export.write import ExportReport, cast, write_verified
from slider_plugin.files import check_writable
from slider_plugin.registry import Plugins

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

NEGATED = ("lora_up.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a", "diff", "diff_b", "a2.weight", "b2.weight")
"""Of each layer of a LyCORIS file, the one tensor whose sign is that of the layer's change."""

COMFYUI_SUFFIX = "_comfyui"


@dataclass(frozen=True, slots=True)
class Exported:
    """What `slider export` wrote."""

    report: ExportReport
    notes: tuple[str, ...]
    """Lines for people: what was left out, what was compared."""


def export_file(
    adapter: Path,
    to: str,
    *,
    output: Path | None = None,
    family: str | None = None,
    dtype: str | None = None,
    flip: bool = False,
    verify: bool = False,
    model: str | None = None,
) -> Exported:
    """Write a slider's file in another layout, and compare what is read back.

    Args:
        adapter: LoRA in diffusers' keys, or a file of lycoris-lora.
        to: `diffusers`, `kohya`, `comfyui` or `lycoris`.
        output: the file; beside `adapter` and named after the layout by default. Nothing is overwritten.
        family: of a file whose metadata does not tell.
        dtype: `fp32`, `bf16` or `fp16`; that of the file by default.
        flip: swap the two sides, for programs without negative strengths.
        verify: say what was compared; with `model`, load the new file into it as well.
        model: folder or hub id of a pipeline of the family.

    Raises:
        UserError: anything wrong with the file, the layout, the place or the model.
        ExportError: what was written is not what was meant.
    """
    source = read_source(adapter)
    loaded = Plugins.discover().load(family_name(source, family))
    layout = layout_of(loaded.facts, to)
    check_kind(source, loaded.facts, to)
    target = output or default_output(adapter, to, dtype, flip)
    _check_request(source, target, dtype, model)
    if source.component == CONTROLNET:
        layout = replace(layout, prefix=f"{CONTROLNET}.")
    meant = mirrored(source) if flip else source
    found, left_out = to_layout(meant.state, layout) if meant.state else (dict(meant.lycoris), ())
    tensors = _cast(found, None if dtype is None else DTYPES[dtype])
    notes = [*_about(left_out)]

    def check(written: Path) -> None:
        held = compare_names_turned_back(written, layout, meant.state) if meant.state else {}
        if model is not None:
            try:
                notes.append(verify_on_model(loaded, model, written, to, held))
            except UserError as error:  # the file has its name only when it is verified
                raise UserError(str(error).replace(str(written), str(target))) from error
        elif verify:
            notes.append("verified: read back, and its names turned back; with --model it is loaded into a pipeline, too")

    header = _header(meant, loaded.facts, to, target.stem)
    report = write_verified(target, tensors, header, _modules(source) - len(left_out), _ranks(source), check)
    return Exported(report, tuple(notes))


def comfyui_file(path: Path, family: Family) -> Exported:
    """Write the second file of a training run beside its diffusers file: the same slider in the keys that web UIs read.

    A file of that name is replaced. Raises UserError if a module has no name there.
    """
    source, layout = read_source(path), family.layouts["comfyui"]
    tensors, left_out = to_layout(source.state, layout)
    target = path.with_stem(path.stem + COMFYUI_SUFFIX)
    header = _header(source, family, "comfyui", target.stem)

    def check(written: Path) -> None:
        compare_names_turned_back(written, layout, source.state)

    report = write_verified(target, tensors, header, len(source.state) - len(left_out), _ranks(source), check)
    return Exported(report, tuple(_about(left_out)))


def default_output(adapter: Path, to: str, dtype: str | None, flip: bool) -> Path:
    """`NAME_kohya.safetensors` and the like, beside the file."""
    parts = [adapter.stem, "flipped" if flip else "", to, dtype or ""]
    return adapter.with_name("_".join(filter(None, parts)) + ".safetensors")


# --- What is written --------------------------------------------------------------------------------------------------


def mirrored(source: Source) -> Source:
    """The slider with its two sides swapped: -B A is the mirror of B A, exactly."""
    state = {module: {"lora_A": f["lora_A"], "lora_B": -f["lora_B"]} for module, f in source.state.items()}
    return replace(source, state=state, lycoris=_mirrored_lycoris(source), metadata=flipped(source.metadata))


def _mirrored_lycoris(source: Source) -> dict[str, Tensor]:
    """Each layer's change is linear in one of its tensors, which is negated."""
    found: dict[str, Tensor] = {}
    turned, layers = set(), set()
    for key, tensor in source.lycoris.items():
        layer, _, part = key.partition(".")
        layers.add(layer)
        if part in NEGATED:
            turned.add(layer)
        found[key] = -tensor if part in NEGATED else tensor
    if rest := sorted(layers - turned):
        raise UserError(f"--flip: {source.path}: {rest[0]} has no tensor that its sign hangs on; leave --flip out")
    return found


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """All tensors but alphas in one dtype, by default that of the file, or float32 where it has several."""
    have = {tensor.dtype for key, tensor in tensors.items() if not key.endswith(".alpha")}
    wanted = dtype or (have.pop() if len(have) == 1 else torch.float32)
    return {key: t if key.endswith(".alpha") else cast(t, key, wanted) for key, t in tensors.items()}


def _header(source: Source, family: Family, to: str, name: str) -> dict[str, str]:
    told = {key: value for key, value in source.metadata.items() if key not in ("format", "lora_adapter_metadata")}
    ranks = _ranks(source)
    if ranks:
        told.setdefault("slider.rank", str(ranks[0]) if len(ranks) == 1 else "Dynamic")
    return for_programs(told | {FAMILY: family.name, "slider.layout": to}, family, name)


def _modules(source: Source) -> int:
    return len(source.state) or len({key.partition(".")[0] for key in source.lycoris})


def _ranks(source: Source) -> list[int]:
    return sorted({int(factors["lora_A"].shape[0]) for factors in source.state.values()})


def _about(left_out: tuple[str, ...]) -> list[str]:
    if not left_out:
        return []
    names = ", ".join(left_out)
    return [f"left out, since readers of this layout cannot take it: {names}; the diffusers file holds all modules"]


def _check_request(source: Source, target: Path, dtype: str | None, model: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: there is no such type; use {', '.join(DTYPES)}")
    if model is not None and source.component == CONTROLNET:
        raise UserError(f"{source.path} is a slider on a ControlNet, and --model loads a pipeline without one; leave it out")
    if target.suffix != ".safetensors":
        raise UserError(f"--output {target}: a slider is a .safetensors file; name it so")
    if os.path.lexists(target):
        raise UserError(f"{target} exists already and is not overwritten: remove it, or name another file with --output")
    check_writable(target.parent)

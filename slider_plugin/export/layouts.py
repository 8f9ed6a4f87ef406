"""Key names of other programs: pure maps from a LoRA's modules to the tensors of a file, and back.

All files hold the same numbers, with alpha folded into the second factor. Kohya's format must state an alpha: it is the rank,
so that `alpha / rank` is 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from slider_hooks import Family, Layout
from slider_plugin.adapterfile import TWINS
from slider_plugin.errors import UserError
from slider_plugin.export.write import AdapterState

DIFFUSERS, LYCORIS = "diffusers", "lycoris"
TARGETS = (DIFFUSERS, "kohya", "comfyui", LYCORIS)
"""What `slider export --to` takes."""

LYCORIS_LAYOUT = Layout(prefix="lycoris_", flat=True, programs="lycoris-lora")
"""lycoris-lora flattens the names of whatever model it is given, so this needs no family to declare it."""

_KOHYA_TWINS = {"lora_A": "lora_down", "lora_B": "lora_up"}


def layout_of(family: Family, to: str) -> Layout:
    """The layout that `--to` means for a family. Raises UserError for a name that is none, or one that nobody has verified."""
    if to not in TARGETS:
        raise UserError(f"--to {to}: there is no such layout; use {', '.join(TARGETS)}")
    if to == DIFFUSERS:
        return Layout(prefix=f"{family.denoiser}.", programs="diffusers")
    if to == LYCORIS:
        return LYCORIS_LAYOUT
    declared = dict(family.layouts)
    if to in declared:
        return declared[to]
    others = ", ".join((DIFFUSERS, *sorted(declared), LYCORIS))
    only = "for it a slider is a diffusers file only" if not declared else "what the web UIs read of it is --to comfyui"
    raise UserError(f"--to {to}: these key names are not verified for {family.name}, and {only}; use one of {others}")


def needs_own_file(family: Family) -> bool:
    """Whether the web UIs need other keys than diffusers': `slider train` then writes a second file."""
    return "comfyui" in family.layouts and not family.layouts["comfyui"].reads_diffusers


def stems(layout: Layout, modules: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """What the keys of each module begin with, and the modules that the program's readers cannot take.

    Raises:
        UserError: a module has no name there, two modules share one, or none is left.
    """
    found: dict[str, str] = {}
    left_out = []
    for module in sorted(modules):
        if layout.left_out and re.fullmatch(layout.left_out, module):
            left_out.append(module)
            continue
        name = _name(layout, module)
        found[module] = layout.prefix + (name.replace(".", "_") if layout.flat else name)
    owners: dict[str, str] = {}
    for module, stem in found.items():
        if stem in owners:
            raise UserError(f"{owners[stem]} and {module} would both be {stem} in this layout; use --to diffusers")
        owners[stem] = module
    if not found:
        raise UserError(f"none of the modules can be in this layout (left out: {', '.join(left_out)}); use --to diffusers")
    return found, tuple(left_out)


def _name(layout: Layout, module: str) -> str:
    for expression, replacement in layout.names:
        match = re.fullmatch(expression, module)
        if match:
            return match.expand(replacement)
    raise UserError(f"{module} has no name in this layout, and the file would be read by half; use --to diffusers")


def to_layout(state: AdapterState, layout: Layout) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of a file, and the modules that are left out.

    Args:
        state: factors by module, alpha folded in.
        layout: the key names.

    Raises:
        UserError: see `stems`.
    """
    names, left_out = stems(layout, state)
    tensors: dict[str, Tensor] = {}
    for module, stem in names.items():
        for twin, key in zip(TWINS, _keys(layout, stem), strict=True):
            tensors[key] = state[module][twin].contiguous()
        if layout.flat:
            tensors[f"{stem}.alpha"] = torch.tensor(float(state[module]["lora_A"].shape[0]))
    return tensors, left_out


def from_layout(tensors: Mapping[str, Tensor], layout: Layout, modules: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """The inverse: factors by module, of those modules that the layout has; float32 where an alpha is not the rank.

    Flattened names do not tell where their dots were, so the modules must be known.

    Raises:
        UserError: a key is missing, or belongs to no module.
    """
    names, _ = stems(layout, modules)
    rest = dict(tensors)
    state = {}
    for module, stem in names.items():
        wanted = [*_keys(layout, stem), *([f"{stem}.alpha"] if layout.flat else [])]
        if missing := [key for key in wanted if key not in rest]:
            raise UserError(f"{missing[0]} is missing")
        down, up, *alpha = (rest.pop(key) for key in wanted)
        factor = float(alpha[0]) / down.shape[0] if alpha else 1.0
        state[module] = {"lora_A": down, "lora_B": up if factor == 1.0 else up.float() * factor}
    if rest:
        raise UserError(f"{min(rest)} belongs to none of the modules")
    return state


def _keys(layout: Layout, stem: str) -> tuple[str, str]:
    down, up = (f"{stem}.{_KOHYA_TWINS[twin] if layout.flat else twin}.weight" for twin in TWINS)
    return down, up

"""Which modules a LyCORIS preset wraps: lycoris-lora's own rules, and the specification's lists, which these do not understand.

lycoris-lora compares `target_module` with the names of Python classes alone (wrapper.py:446-493). The specification writes
endings of module names there, `attn1.to_q`, which wrap nothing. Here an entry that is no class of the model is such an ending.
If none of the entries names attention and the list is one that the specification documents, the family's verified slider
targets are meant. Everything else that names nothing is an error.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slider_hooks import Family
from slider_plugin.errors import UserError
from slider_plugin.lycoris_config import DOCUMENTED, LycorisConfig, LycorisPreset
from slider_plugin.targets import adaptable_modules, listed, suffix_expression

if TYPE_CHECKING:
    from torch.nn import Module

EVERYTHING = ("Linear", "Conv1d", "Conv2d", "Conv3d", "GroupNorm", "LayerNorm")
"""What lycoris-lora wraps where a preset has no `target_module` (wrapper.py:205-212)."""


@dataclass(frozen=True, slots=True)
class Translated:
    """A preset in words that lycoris-lora understands: real classes and exact names."""

    preset: dict[str, Any]
    """For `LycorisNetwork.apply_preset`; every key is set, since its state is kept by the class."""

    notes: tuple[str, ...] = ()
    """Lines to say: what was taken for what, and what names nothing."""


def translate(family: Family, denoiser: Module, config: LycorisConfig) -> Translated:
    """Translate a preset for one model; on the meta device, too.

    Raises:
        UserError: nothing is named, or cross-attention or text is reached.
    """
    preset = config.apply_preset
    classes = {type(module).__name__ for module in denoiser.modules()}
    entries = EVERYTHING if preset.target_module is None else preset.target_module
    endings = [entry for entry in entries if entry not in classes and entry not in EVERYTHING]
    named = {ending: _ending_with(denoiser, ending) for ending in endings}
    names, notes = sorted({name for found in named.values() for name in found}), []
    if _documented(preset) and not any(_is_attention(family, name) for name in names):
        names = [name for name in adaptable_modules(denoiser) if re.fullmatch(family.targets.slider(), name)]
        notes.append(_meant(family, names, config))
    elif dead := [ending for ending, found in named.items() if not found]:
        notes.append(f"apply_preset: target_module: {listed(dead)} name no module of {type(denoiser).__name__}")
    left_out = [] if preset.enable_conv else _convolutions(denoiser)
    if read := _taken_away(family, denoiser, config):
        left_out += read
        notes.append(f"algo full leaves out {listed(read)}: the model reads their weights, which full takes away")
    translated = {
        "enable_conv": True,
        "target_module": [entry for entry in entries if entry not in endings],
        "target_name": [*preset.target_name, *(_exactly(name, preset) for name in names)],
        "exclude_name": [*preset.exclude_name, *(_exactly(name, preset) for name in left_out)],
        "use_fnmatch": preset.use_fnmatch,
        "module_algo_map": dict(preset.module_algo_map),
        "name_algo_map": dict(preset.name_algo_map),
        "lora_prefix": preset.lora_prefix,
    }
    return Translated(translated, tuple(notes))


def _exactly(name: str, preset: LycorisPreset) -> str:
    """A pattern that matches this name alone: an expression of lycoris-lora also matches every longer name (wrapper.py:565)."""
    return glob.escape(name) if preset.use_fnmatch else f"{re.escape(name)}$"


def _is_attention(family: Family, name: str) -> bool:
    kinds = family.targets.by_kind()
    return any(re.fullmatch(kinds[kind], name) for kind in ("self", "joint") if kind in kinds)


def _ending_with(denoiser: Module, ending: str) -> list[str]:
    expression = re.compile(suffix_expression([ending]))
    return [name for name in adaptable_modules(denoiser) if expression.fullmatch(name)]


def _documented(preset: LycorisPreset) -> bool:
    written = set(preset.target_module or ())
    return any(written == set(known) for known in DOCUMENTED.values()) and not preset.target_name


def _meant(family: Family, names: Sequence[str], config: LycorisConfig) -> str:
    """What a documented list means for a family whose modules have other names, with the preset to write instead."""
    pasted = json.dumps(preset_for(family))
    return (
        f"this documented preset names no attention of {family.name}; its {len(names)} verified slider targets are taken. "
        f'To say so yourself, write "apply_preset": {pasted}'
    )


def preset_for(family: Family, include_joint: bool = True) -> dict[str, Any]:
    """A preset that wraps the family's slider targets, in lycoris-lora's own words."""
    return {"target_module": [], "target_name": [f"(?:{family.targets.slider(include_joint)})$"]}


def _taken_away(family: Family, denoiser: Module, config: LycorisConfig) -> list[str]:
    """Modules that algorithm `full` must leave alone."""
    maps = (*config.apply_preset.module_algo_map.values(), *config.apply_preset.name_algo_map.values())
    if "full" not in (config.algo, *(settings.get("algo") for settings in maps)) or not family.targets.weight_read:
        return []
    return [name for name in adaptable_modules(denoiser) if re.fullmatch(family.targets.weight_read, name)]


def _convolutions(denoiser: Module) -> list[str]:
    """Those with a kernel; a pointwise convolution counts as a Linear in lycoris-lora."""
    modules = adaptable_modules(denoiser).items()
    return [name for name, module in modules if max(getattr(module, "kernel_size", (1,))) > 1]


def check_names(family: Family, denoiser: Module, names: Sequence[str], config: LycorisConfig) -> list[str]:
    """Warnings about the modules that a preset wraps. Raises UserError where it wraps none, or reaches language."""
    if not names:
        raise UserError(_nothing(family, denoiser, config))
    forbidden = [n for n in names if family.targets.forbidden and re.fullmatch(family.targets.forbidden, n)]
    if forbidden:
        everything = ""
        if config.apply_preset.target_module is None:
            everything = '; without target_module lycoris-lora wraps every layer, so write "target_module": []'
        raise UserError(
            f"apply_preset reaches cross-attention or text: {listed(forbidden)}. A slider must leave language alone: name its "
            f"modules, or put these into exclude_name{everything}"
        )
    if family.targets.by_kind() and not any(_is_attention(family, name) for name in names):
        return [f"apply_preset wraps no attention, only {listed(names)}: such a slider has next to no effect"]
    return []


def _nothing(family: Family, denoiser: Module, config: LycorisConfig) -> str:
    import difflib

    preset = config.apply_preset
    wanted = [*(preset.target_module or ()), *preset.target_name, *preset.module_algo_map, *preset.name_algo_map]
    leaves = sorted({re.sub(r"\d+", "N", name) for name in adaptable_modules(denoiser)})
    near = difflib.get_close_matches(wanted[0] if wanted else "attn", leaves, n=3, cutoff=0.3) or leaves[:3]
    return (
        f"apply_preset names no module of {type(denoiser).__name__}: {listed(wanted) or 'it is empty'}. Nearest names: "
        f"{', '.join(near)}. The preset for {family.name}: {json.dumps(preset_for(family))}"
    )

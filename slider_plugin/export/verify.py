"""Is a file what was meant? Its names are turned back; with a model at hand, the program's own loader puts it in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from slider_hooks import Layout, LoadRequest
from slider_plugin.errors import UserError
from slider_plugin.export.layouts import LYCORIS, from_layout, stems
from slider_plugin.export.write import AdapterState, ExportError
from slider_plugin.pipelines import layers_of, load_file

if TYPE_CHECKING:
    from slider_plugin.family import LoadedFamily

NAME = "verified"

CLOSE = 1e-6
"""How far `up @ down` may be from another order of the same arithmetic in float32, as a share of the largest value."""


def compare_names_turned_back(path: Path, layout: Layout, meant: AdapterState) -> AdapterState:
    """The factors that a file holds, read back by module. Raises ExportError unless they are those that were meant."""
    try:
        found = from_layout(safetensors.torch.load(path.read_bytes()), layout, meant)
    except UserError as error:
        raise ExportError(f"the file does not hold what was meant: {error}") from error
    for module in stems(layout, meant)[0]:
        for twin, tensor in found[module].items():
            if not torch.equal(tensor, meant[module][twin].to(tensor.dtype)):
                raise ExportError(f"the file does not hold what was meant: {module}.{twin} has other values")
    return found


def verify_on_model(family: LoadedFamily, model: str, path: Path, to: str, state: AdapterState) -> str:
    """Load a file into a pipeline through the loader of its program, and compare what is in the model then.

    Args:
        family: of the file.
        model: folder or hub id of the pipeline.
        path: the file.
        to: its layout: lycoris-lora loads `lycoris`, diffusers all others.
        state: what it holds; empty for what LyCORIS trained, of which only the number of modules is known.

    Returns:
        A line on what was compared.

    Raises:
        UserError: the model cannot be loaded, or the file does not fit it.
        ExportError: modules are lost on the way, or their weights are others.
    """
    options = {option.name: option.default for option in family.facts.options}
    components = family.load_components(LoadRequest(model=model, dtype=torch.float32, options=options))
    if to == LYCORIS:
        return _verify_lycoris(family, components, path, state)
    known = dict(components.denoiser.named_modules())
    if foreign := sorted(set(state) - set(known)):
        raise UserError(f"--model {model} has no module {foreign[0]} (and {len(foreign) - 1} more): it is another model")
    how = load_file(components.pipeline, path, NAME)
    layers = layers_of(components.denoiser, NAME)
    if layers.keys() != state.keys():
        lost = sorted(layers.keys() ^ state.keys())
        raise ExportError(f"{how} loads {len(layers)} modules of {len(state)}; {lost[0]} is lost")
    for module, layer in layers.items():
        down, up = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight * layer.scaling[NAME]
        if not torch.equal(down, state[module]["lora_A"].to(down)) or not torch.equal(up, state[module]["lora_B"].to(up)):
            raise ExportError(f"{how} loads other weights than those that were meant in {module}")
    return f"verified: {how} loads all {len(layers)} modules, with equal weights"


def _verify_lycoris(family: LoadedFamily, components: Any, path: Path, state: AdapterState) -> str:
    from slider_plugin.adapters.attach import attach_file
    from slider_plugin.adapters.lycoris_network import LycorisFile

    attached = attach_file(path, family, components)
    assert isinstance(attached, LycorisFile)
    for module, change in attached.changes().items() if state else ():
        factors = state[module]
        meant = (factors["lora_B"].float().flatten(1) @ factors["lora_A"].float().flatten(1)).reshape(change.shape)
        if float((change.cpu() - meant).abs().max()) > CLOSE * float(meant.abs().max()):
            raise ExportError(f"lycoris-lora loads another change than was meant in {module}")
    compared = ", which change their weights as was meant" if state else ""
    return f"verified: lycoris-lora loads all {len(attached.modules)} modules{compared}"

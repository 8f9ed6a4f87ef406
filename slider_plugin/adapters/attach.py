"""Put an adapter into the denoiser: a new one to be trained, or a finished one from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slider_hooks import Components
from slider_plugin.adapterfile import read_adapter, read_tensors
from slider_plugin.adapters.base import Adapter
from slider_plugin.adapters.peft_lora import LoraAdapter
from slider_plugin.config import RunConfig
from slider_plugin.control import zero_layers
from slider_plugin.errors import UserError
from slider_plugin.export import AdapterState
from slider_plugin.lycoris_config import LycorisConfig
from slider_plugin.targets import TargetPlan, listed, resolve_on_controlnet, resolve_targets, with_layers
from slider_plugin.training.seeds import derived_seed

if TYPE_CHECKING:
    from torch.nn import Module

    from slider_plugin.adapters.lycoris_network import LycorisFile
    from slider_plugin.family import LoadedFamily

CONTROLNET = "controlnet"
"""The component that a slider on a ControlNet belongs to; diffusers reads it with `load_lora_adapter(file, prefix=...)`."""


def plan_targets(config: RunConfig, family: LoadedFamily, denoiser: Module) -> TargetPlan:
    """Which modules the configured adapter would wrap; the denoiser may be on the meta device.

    Raises:
        UserError: none, or modules that a slider must leave alone; under `strict` any warning, too.
    """
    if config.lycoris is None:
        return resolve_targets(family, denoiser, config.target_request(), config.lora_rank, config.strict)
    from slider_plugin.adapters.lycoris_build import plan_of

    plan = plan_of(family.facts, denoiser, config.lycoris)
    if config.strict and plan.warnings:
        raise UserError("targets, under --strict: " + "; ".join(plan.warnings))
    return plan


def plan_on_controlnet(config: RunConfig, family: LoadedFamily, components: Components) -> TargetPlan:
    """Which modules of the ControlNet are wrapped; of a fresh one its zero layers, too, since no gradient passes them.

    Raises:
        UserError: none, or modules that a slider must leave alone; zero layers, where a trained ControlNet is demanded.
    """
    controlnet = components.controlnet
    request = config.target_request()
    plan = resolve_on_controlnet(family, components.denoiser, controlnet, request, config.lora_rank, config.strict)
    zeros = zero_layers(controlnet, components.denoiser)
    if not zeros:
        return plan
    if config.controlnet_zero_layers == "refuse":
        raise UserError(
            f"controlnet: {len(zeros)} layers of the ControlNet are zero ({listed(zeros)}), so it is not trained and passes "
            "no gradient; name a trained one in controlnet_model_name_or_path, or set controlnet_zero_layers to train"
        )
    return with_layers(plan, controlnet, zeros, "zero")


def trained_model(config: RunConfig, components: Components) -> Any:
    """What the slider goes into: the denoiser, or the ControlNet."""
    return components.controlnet if config.controlnet else components.denoiser


def component_of(config: RunConfig, family: LoadedFamily) -> str:
    """Its name, with which the keys of the slider's file begin."""
    return CONTROLNET if config.controlnet else family.facts.denoiser


def new_adapter(config: RunConfig, family: LoadedFamily, components: Components, targets: TargetPlan) -> Adapter:
    """Inject the adapter that is trained. Raises UserError if its algorithm does not mirror on one of the layers."""
    seed = derived_seed(config.seed, "adapter")
    if config.lycoris is None:
        alpha = config.lora_alpha or float(config.lora_rank)
        return LoraAdapter(
            trained_model(config, components),
            targets.modules,
            rank=config.lora_rank,
            alpha=alpha,
            dropout=config.lora_dropout,
            seed=seed,
            rank_stabilised=config.lora_use_rslora,
            gaussian=config.lora_init_type == "gaussian",
        )
    from slider_plugin.adapters.lycoris_network import LycorisAdapter

    return LycorisAdapter(family.facts, components.denoiser, config.lycoris, seed)


def check_start(config: RunConfig, family: LoadedFamily, targets: TargetPlan | None) -> None:
    """Raise UserError unless the file of `init_lora`, if there is one, holds exactly the modules of this run, at its rank."""
    if config.init_lora is None or (config.resume_from_checkpoint and config.lycoris is None):
        return
    state = _read_start(config.init_lora, config, family)
    if targets is None:
        return
    missing, extra = sorted(set(targets.modules) - set(state)), sorted(set(state) - set(targets.modules))
    if missing or extra:
        first = f"{missing[0]} is missing" if missing else f"{extra[0]} has no place here"
        raise UserError(
            f"init_lora: {config.init_lora} holds {len(state)} modules and this run has {len(targets.modules)} ({first}); "
            "use the model and the targets that it was made with"
        )


def start_from_file(config: RunConfig, family: LoadedFamily, adapter: Adapter) -> None:
    """Give a new adapter the weights of `init_lora`: at the same strength it answers as that file does.

    Raises:
        UserError: modules, shapes or rank are not exactly this run's.
    """
    if config.init_lora is None or config.resume_from_checkpoint:  # a checkpoint's weights are later ones
        return
    state = _read_start(config.init_lora, config, family)
    assert isinstance(adapter, LoraAdapter)
    adapter.load_folded(state, f"init_lora: {config.init_lora}")


def _read_start(file: Path, config: RunConfig, family: LoadedFamily) -> AdapterState:
    if config.lycoris is not None:
        raise UserError("init_lora: only a plain LoRA starts from a file; take it out, or write lora_type standard")
    if not file.is_file():
        raise UserError(f"init_lora: there is no file {file}")
    try:
        state, metadata = read_adapter(file, component_of(config, family))
    except UserError as error:
        raise UserError(f"init_lora: {error}") from error
    made_by = metadata.get("slider.family", family.facts.name)
    if made_by != family.facts.name:
        raise UserError(f"init_lora: {file} is a slider of {made_by}, and model_family is {family.facts.name}")
    ranks = sorted({int(parts["lora_A"].shape[0]) for parts in state.values()})
    if ranks != [config.lora_rank]:
        has = f"rank {ranks[0]}; set lora_rank to it" if len(ranks) == 1 else f"ranks {ranks}, which one run cannot have"
        raise UserError(f"init_lora: lora_rank is {config.lora_rank}, and {file} has {has}")
    return state


def attach_file(adapter_file: Path, family: LoadedFamily, components: Components) -> LoraAdapter | LycorisFile:
    """Inject an adapter with the weights of a file that `export` wrote. Raises UserError if it does not fit the model."""
    tensors, metadata = read_tensors(adapter_file)
    if any(name.startswith("lycoris_") for name in tensors):
        from slider_plugin.adapters.lycoris_network import CONFIG, LycorisFile

        config = LycorisConfig.model_validate(json.loads(metadata[CONFIG])) if CONFIG in metadata else None
        return LycorisFile(components.denoiser, tensors, str(adapter_file), config)
    on_controlnet = any(name.startswith(f"{CONTROLNET}.") for name in tensors)
    if on_controlnet and components.controlnet is None:
        raise UserError(f"{adapter_file} is a slider on a ControlNet; name that in controlnet_model_name_or_path")
    model = components.controlnet if on_controlnet else components.denoiser
    state, _ = read_adapter(adapter_file, CONTROLNET if on_controlnet else family.facts.denoiser)
    known = dict(model.named_modules())
    foreign = [name for name in state if name not in known]
    if foreign:
        raise UserError(f"{adapter_file} does not fit this model: it has no module {foreign[0]} (and {len(foreign) - 1} more)")
    ranks = {int(parts["lora_A"].shape[0]) for parts in state.values()}
    if len(ranks) > 1:
        raise UserError(f"{adapter_file} has modules of different ranks ({sorted(ranks)}); this version reads one rank")
    rank = ranks.pop()
    adapter = LoraAdapter(model, list(state), rank=rank, alpha=float(rank))
    adapter.load_folded(state, str(adapter_file))
    return adapter

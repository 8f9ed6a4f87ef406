"""The model: loaded, frozen, and with an adapter in it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from accelerate.utils import ProjectConfiguration

from slider_hooks import Components, LoadRequest
from slider_plugin import console
from slider_plugin.adapters.attach import (
    CONTROLNET,
    new_adapter,
    plan_on_controlnet,
    plan_targets,
    start_from_file,
    trained_model,
)
from slider_plugin.adapters.base import Adapter
from slider_plugin.adapters.frozen import attach_frozen
from slider_plugin.config import RunConfig
from slider_plugin.configfile import to_json
from slider_plugin.control import Control, zero_layers
from slider_plugin.errors import UserError
from slider_plugin.files import folder_replacing, remove_leftovers
from slider_plugin.parts import other_models
from slider_plugin.preflight import Preflight, draws_any, image_file
from slider_plugin.quantise import KINDS, quantise
from slider_plugin.targets import TargetPlan
from slider_plugin.training.compiling import compile_model
from slider_plugin.training.offload import Offload
from slider_plugin.training.parking import move
from slider_plugin.training.processes import Processes, open_accelerator, sharded
from slider_plugin.training.seeds import derived_seed
from slider_plugin.training.sharding import shard
from slider_plugin.validation.render import check_image

if TYPE_CHECKING:
    from accelerate import Accelerator

    from slider_plugin.family import LoadedFamily


def open_machine(config: RunConfig) -> Accelerator:
    """Processes and device that accelerate finds, and their arithmetic."""
    trackers = "tensorboard" if config.report_to == "tensorboard" else None
    machine = open_accelerator(
        mixed_precision="no",  # the trainer's own: accelerate would fix it for the life of the process
        log_with=trackers,
        project_config=ProjectConfiguration(project_dir=str(config.output_dir), logging_dir=str(config.output_dir / "logs")),
    )
    processes = Processes(machine)
    processes.assert_alike({"configuration": json.dumps(to_json(config)), "output_dir": str(config.output_dir.absolute())})
    if processes.count > 1:
        console.say(f"{processes.count} processes, {config.train_batch_size * processes.count} samples a draw")
    return machine


def load(config: RunConfig, family: LoadedFamily, checked: Preflight, machine: Accelerator) -> Components:
    """Load the model, frozen, and say what was found."""
    if console.IS_MAIN:
        remove_leftovers(config.output_dir)
    for line in checked.warnings:
        console.warn(line)
    components = load_model(config, family, checked.model, machine, whole=False)
    if draws_any(config):  # for a model from the hub, whose pipeline preflight could not see
        check_image(type(family.build_pipeline(components)), image_file(config))
    if config.gradient_checkpointing:
        _enable_checkpointing(components, family)
    if console.IS_MAIN:
        family.observe("loaded", config=to_json(config), hooks=family.describe()["hooks"])
    return components


def load_model(config: RunConfig, family: LoadedFamily, model: str, machine: Accelerator, whole: bool = True) -> Components:
    """Load a model onto the device, with the LoRAs that stay frozen beside the slider.

    Without `whole` the denoiser alone, which is all that training needs: other parts follow when there is something to encode
    or to draw.
    """
    request = LoadRequest(
        model=model,
        dtype=torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32,
        revision=config.revision,
        variant=config.variant,
        options=config.family_options,
    )
    components = family.load_components(request)
    components.denoiser.requires_grad_(False).eval()
    if config.base_model_precision != "no_change":
        count = quantise(components.denoiser, family.facts, config.base_model_precision)
        console.say(f"{count} layers of the frozen model are kept in {KINDS[config.base_model_precision].bits} bit")
    if config.enable_group_offload and not whole:
        offload = Offload(components.denoiser, machine.device)
        console.say(
            f"{len(offload.blocks)} blocks ({offload.size / 1e6:,.1f} MB) of the frozen model wait in the computer's memory"
        )
    elif not sharded():  # then it need not fit the device, and goes there block by block
        components.denoiser.to(machine.device)
    if whole or not other_models(components):  # of a pipeline that does not tell its parts, all moves or nothing
        move(components, machine.device)
    if config.has_controlnet:  # before any adapter is in the denoiser, as a fresh one copies its weights
        with Processes(machine).main_first():  # who writes a fresh one; the others read it
            add_controlnet(config, family, components)
    for line in attach_frozen(config, family.facts, components.denoiser):
        console.say(line)
    return components


def add_controlnet(config: RunConfig, family: LoadedFamily, components: Components) -> None:
    """Hang the configured ControlNet on the denoiser, frozen.

    A fresh one is kept in the output folder: its first layers are drawn at random, and a slider on it needs the very same.
    """
    kept = config.output_dir / CONTROLNET
    trained = config.controlnet_model_name_or_path or (str(kept) if kept.is_dir() else None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(config.seed, CONTROLNET))
        components.controlnet = family.load_controlnet(components, trained)
    if trained is None:
        with folder_replacing(kept) as temporary:
            components.controlnet.save_pretrained(temporary)
        console.say(f"fresh ControlNet: {kept}")
    if not config.controlnet and zero_layers(components.controlnet, components.denoiser):
        raise UserError(
            f"controlnet_model_name_or_path: {config.controlnet_model_name_or_path} is not trained: it has layers that are all "
            "zero, and holds nothing; name a trained one, or set controlnet to train on it"
        )
    components.controlnet.requires_grad_(False).eval().to(components.denoiser.device)
    components.control = Control(family, components, config.controlnet_conditioning_scale)
    console.say("ControlNet: the slider is trained on it" if config.controlnet else "ControlNet: frozen, holds the structure")


def _enable_checkpointing(components: Components, family: LoadedFamily) -> None:
    for model in (components.denoiser, components.controlnet):
        enable = getattr(model, "enable_gradient_checkpointing", None)
        if model is not None and enable is None:
            raise UserError(f"gradient_checkpointing: the model of {family.facts.name} cannot do it; set the key to false")
        if enable is not None:
            enable()


def find_targets(config: RunConfig, family: LoadedFamily, checked: Preflight, components: Components) -> TargetPlan:
    """Where the adapter attaches, found beforehand or on the loaded model."""
    plan = checked.targets
    if plan is None:
        on_controlnet = config.controlnet
        plan = (plan_on_controlnet if on_controlnet else _plan_on_denoiser)(config, family, components)
        for line in plan.warnings:
            console.warn(line)
    kinds = ", ".join(f"{count} {kind}" for kind, count in plan.by_kind.items())
    console.say(f"{len(plan.modules)} {plan.source} target modules" + (f": {kinds}" if kinds else ""))
    return plan


def _plan_on_denoiser(config: RunConfig, family: LoadedFamily, components: Components) -> TargetPlan:
    return plan_targets(config, family, components.denoiser)


def attach(
    config: RunConfig, family: LoadedFamily, components: Components, targets: TargetPlan, machine: Accelerator
) -> Adapter:
    """Inject the trainable adapter."""
    adapter = new_adapter(config, family, components, targets)
    start_from_file(config, family, adapter)
    if sharded():
        blocks = shard(components.denoiser, adapter, machine)
        console.say(f"FSDP: {blocks} blocks of the denoiser shared out among {machine.num_processes} processes")
    else:
        trained_model(config, components).to(machine.device)
    if config.enable_group_offload:
        for parameter in adapter.parameters():  # those in blocks, which stay where they are
            parameter.data = parameter.data.to(machine.device)
    if config.torch_compile != "no":
        adapter.prepare_for_compile()
        for model in (components.denoiser, components.controlnet):
            if model is not None:
                console.say(f"torch.compile ({config.torch_compile}): {compile_model(model, config.torch_compile)}")
    return adapter

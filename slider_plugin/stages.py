"""The stages of `run.py`: each takes what the stages before it made and makes one thing."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import ProjectConfiguration

from slider_hooks import BucketInfo, Components, LoadRequest, PromptEntry, Sampler
from slider_plugin import console
from slider_plugin.adapterfile import read_tensors
from slider_plugin.adapters.attach import (
    CONTROLNET,
    component_of,
    new_adapter,
    plan_on_controlnet,
    plan_targets,
    start_from_file,
    trained_model,
)
from slider_plugin.adapters.base import Adapter
from slider_plugin.adapters.frozen import attach_frozen, check_frozen, frozen_metadata, other_base
from slider_plugin.config import RunConfig
from slider_plugin.configfile import to_json
from slider_plugin.control import Control, zero_layers
from slider_plugin.data.cache import Cache, Memory, Store, cache_folder
from slider_plugin.data.digests import Digests
from slider_plugin.data.encode import Encoded, encode_once
from slider_plugin.data.fingerprint import Opaque, fingerprint
from slider_plugin.data.pairs import PairSampler
from slider_plugin.errors import ConfigError, UserError
from slider_plugin.export import slider_metadata
from slider_plugin.files import folder_replacing, remove_leftovers, write_json
from slider_plugin.parts import other_models
from slider_plugin.preflight import (
    EXPORTED,
    Preflight,
    control_image,
    controlnet_problems,
    draws,
    image_file,
    model_of,
    num_frames,
)
from slider_plugin.quantise import check_quantise, quantise
from slider_plugin.targets import TargetPlan
from slider_plugin.training.checkpoint import Position, find_checkpoint, load_checkpoint, save_checkpoint, verify
from slider_plugin.training.compiling import compile_model
from slider_plugin.training.ema import Ema, finished_weights
from slider_plugin.training.loop import StepReport, Trainer
from slider_plugin.training.noise import noise_process
from slider_plugin.training.optimizers import make_optimizer, make_schedule
from slider_plugin.training.pairing import Pairing
from slider_plugin.training.parking import Parked, move
from slider_plugin.training.processes import Processes, open_accelerator, sharded
from slider_plugin.training.resuming import changes, check_found, facts_of, resume_schedule
from slider_plugin.training.seeds import derived_seed
from slider_plugin.training.sharding import shard
from slider_plugin.training.times import Times
from slider_plugin.training.watch import Metrics, interruptible, log_images
from slider_plugin.validation.render import DrawSettings, Rendered, ScalableAdapter, check_image, render

if TYPE_CHECKING:
    from accelerate import Accelerator

    from slider_plugin.family import LoadedFamily

PAIRED = "signs_in_one_forward"
"""Among the facts of a checkpoint: whether draws shared forwards."""

PIXELS_AT_ONCE = 8 * 512 * 512
"""Of the images of a validation that are drawn in one batch."""


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


# --- Model ------------------------------------------------------------------------------------------------------------


def load(config: RunConfig, family: LoadedFamily, checked: Preflight, machine: Accelerator) -> Components:
    """Load the model, frozen, and say what was found."""
    if console.IS_MAIN:
        remove_leftovers(config.output_dir)
    for line in checked.warnings:
        console.warn(line)
    components = load_model(config, family, checked.model, machine, whole=False)
    if draws(config):  # for a model from the hub, whose pipeline preflight could not see
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
        console.say(f"{quantise(components.denoiser, family.facts)} layers of the frozen model are kept in 8 bit")
    if not sharded():  # then it need not fit the device, and goes there block by block
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
    if config.torch_compile != "no":
        adapter.prepare_for_compile()
        for model in (components.denoiser, components.controlnet):
            if model is not None:
                console.say(f"torch.compile ({config.torch_compile}): {compile_model(model, config.torch_compile)}")
    return adapter


# --- Data -------------------------------------------------------------------------------------------------------------


def encode(
    config: RunConfig, family: LoadedFamily, components: Components, checked: Preflight, machine: Accelerator
) -> Encoded:
    """Encode the images and captions that are not in the cache."""
    started = time.perf_counter()
    store, where = _open_store(config, family, components, checked.model, machine)
    prepare = partial(move, components, machine.device)
    data = encode_once(family, components, checked.buckets, config, machine.device, store, prepare, Processes(machine))
    images = _counted("images", len(data.latents), data.fresh_images)
    captions = _counted("captions", len(data.prompts), data.fresh_prompts)
    console.say(f"{images}; {captions}, in {time.perf_counter() - started:.1f} s ({where})")
    return data


def _counted(what: str, total: int, fresh: int) -> str:
    return f"{total} {what}: {total - fresh} from the cache, {fresh} encoded"


def _open_store(
    config: RunConfig, family: LoadedFamily, components: Components, model: str, machine: Accelerator
) -> tuple[Store, str]:
    """Where encodings are kept, and how that is written."""
    folder = cache_folder(config)
    try:
        made_by = fingerprint(family, components, machine.device)
    except Opaque as error:
        console.say(f"nothing is kept in {folder}, since nothing can be told of what encodes: {error}")
        return Memory(), "in memory"
    about = {"family": family.facts.name, "model": model, "plugin": f"{family.distribution} {family.version}"}
    return Cache(folder, made_by, Digests(folder / "digests.json"), about), str(folder)


def park(config: RunConfig, components: Components, machine: Accelerator) -> Parked:
    """Send everything but the denoiser out of memory, until it draws."""
    back = draws(config) and _draws_here(Processes(machine))
    parked = Parked(components, machine.device, config.output_dir if back else None)
    if parked.names:
        until = "until it draws" if back else "for good"
        console.say(f"{', '.join(parked.names)} ({parked.size / 1e6:,.1f} MB) left memory {until}")
    return parked


# --- Training ---------------------------------------------------------------------------------------------------------


def build_sampler(config: RunConfig, family: LoadedFamily, data: Encoded, checked: Preflight) -> Sampler:
    """The order in which buckets are drawn."""

    def build(buckets: Sequence[BucketInfo]) -> Sampler:
        return family.build_sampler(buckets, config.seed, config.data_backend_sampling, checked.neutral_scale)

    if not checked.twins:
        return build(data.infos())
    strengths = {info.name: info.strength or 0.0 for info in data.infos()}
    neutral = [info for info in data.infos() if not info.strength]
    positive = build([info for info in data.infos() if info.name in checked.twins])
    return PairSampler(positive, build(neutral) if neutral else None, checked.twins, strengths)


def build_trainer(
    config: RunConfig,
    family: LoadedFamily,
    components: Components,
    adapter: Adapter,
    data: Encoded,
    sampler: Sampler,
    checked: Preflight,
    machine: Accelerator,
) -> Trainer:
    """Bring optimizer, schedule and noise together, and go back to a checkpoint if one is asked for."""
    optimizer = make_optimizer(config, adapter.parameters())
    trainer = Trainer(
        family=family,
        components=components,
        adapter=adapter,
        data=data,
        sampler=sampler,
        noise=noise_process(family.facts, components, Times.of(config)),
        accelerator=machine,
        optimizer=optimizer,
        schedule=make_schedule(config, optimizer),
        ema=Ema(adapter.named_parameters(), config.ema_decay) if config.use_ema else None,
        seed=config.seed,
        cycle=checked.cycle,
        draws_per_step=checked.draws_per_step,
        max_grad_norm=config.max_grad_norm,
        bf16=config.mixed_precision == "bf16",
        processes=Processes(machine),
        facts=facts_of(config, components, adapter, data, checked.draws_per_step, machine.device),
    )
    recorded = _resume(config, trainer)
    trainer.processes.assert_alike({"step": trainer.step, "data": data.digest, "model": trainer.facts["model"]})
    _pair(config, trainer, recorded)
    return trainer


def _pair(config: RunConfig, trainer: Trainer, recorded: bool | None) -> None:
    """Decide whether the draws of a cycle share a forward. A run that goes on does what it did: its rounding depends on it."""
    wanted = config.signs_in_one_forward
    on = trainer.accelerator.device.type != "cpu" if recorded is None else recorded
    on = on and not sharded()  # then all must make the same number of forwards, and each process judges by its own samples
    trainer.pairing = Pairing(on if wanted == "auto" else wanted == "yes", wanted == "yes", trainer.family.facts.name)
    if trainer.pairing.on:
        trainer.check_pairing()
    if trainer.pairing.on:
        console.say("the draws of a cycle share a forward")


def _resume(config: RunConfig, trainer: Trainer) -> bool | None:
    """Go back to a checkpoint, if one is asked for and there; returns whether draws shared forwards there, None if unknown."""
    if not config.resume_from_checkpoint:
        return None
    path = find_checkpoint(config.resume_from_checkpoint, config.output_dir, console.say)
    if path is None:
        console.say(f"{config.output_dir} holds no checkpoint yet: the run begins at its first step")
        return None
    facts = verify(path)["facts"]
    check_found(path, facts, trainer.facts)
    position = load_checkpoint(path, trainer.adapter, trainer.optimizer, trainer.ema)
    try:
        trainer.sampler.load_state_dict(position.sampler)
    except ValueError as error:
        raise UserError(f"{path} cannot be resumed with these buckets: {error}") from error
    resume_schedule(trainer.schedule, trainer.optimizer, position.schedule)
    trainer.step = position.step
    console.say(f"resumed from {path}, {position.step} steps done")
    for line in changes(facts, config, trainer.facts):
        console.warn(line)
    recorded: bool | None = facts.get(PAIRED)
    return recorded


def run(config: RunConfig, trainer: Trainer, checked: Preflight, parked: Parked | None = None) -> tuple[bool, float]:
    """Train, with checkpoints, validations and logs at their intervals; what is parked comes back to draw.

    Returns:
        Whether all steps were done (an interrupt stops after the step, with a checkpoint), and the seconds it took.
    """
    started, processes = time.perf_counter(), trainer.processes
    if processes.is_main:
        write_json(config.output_dir / "config.json", to_json(config))
    metrics = Metrics(config, trainer.step, trainer.accelerator) if processes.is_main else None
    with (
        interruptible(console.say) as interrupt,
        console.ticking("training", config.max_train_steps, trainer.step) as ticker,
        metrics or nullcontext(),
    ):

        def after(report: StepReport) -> bool:
            if metrics:  # in the main process alone
                metrics.write(report)
                if trainer.family.is_observed:
                    trainer.family.observe("step", step=report.step, **report.metrics())
                ticker.tick(report.step, metrics.note(report))
            if _due(report.step, config.checkpoint_step_interval):
                _checkpoint(config, trainer)
            if _due(report.step, config.validation_step_interval) and report.step < config.max_train_steps:
                validate(config, trainer, checked, parked)
            return processes.any(interrupt.asked)

        finished = trainer.run(config.max_train_steps, after)
    _checkpoint(config, trainer)
    return finished, time.perf_counter() - started


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _checkpoint(config: RunConfig, trainer: Trainer) -> None:
    if not trainer.processes.is_main:
        return
    position = Position(trainer.step, trainer.sampler.state_dict(), trainer.schedule.state_dict())
    facts = {"plugin": trainer.family.describe(), PAIRED: trainer.pairing.on, **trainer.facts}
    path = save_checkpoint(
        config.output_dir, trainer.adapter, trainer.optimizer, trainer.ema, position, facts, config.checkpoints_total_limit
    )
    trainer.family.observe("checkpoint", step=trainer.step, path=path)


# --- Results ----------------------------------------------------------------------------------------------------------


def validate(config: RunConfig, trainer: Trainer, checked: Preflight, parked: Parked | None = None) -> Path | None:
    """Draw the validation of a run with its finished weights; None where there is nothing to draw, or another process does it.

    With FSDP all processes draw, since each holds a part of the denoiser, and one of them keeps the pictures.
    """
    if not draws(config) or not _draws_here(trainer.processes):
        return None
    if not trainer.processes.is_main:
        with tempfile.TemporaryDirectory() as folder:
            _validate(config, trainer, checked, parked, Path(folder))
        return None
    drawn = _validate(config, trainer, checked, parked, config.output_dir / "validation_images")
    log_images(trainer.accelerator, drawn, trainer.step)
    return drawn.folder


def _draws_here(processes: Processes) -> bool:
    return processes.is_main or sharded()


def _validate(config: RunConfig, trainer: Trainer, checked: Preflight, parked: Parked | None, folder: Path) -> Rendered:
    size = validation_size(config) or checked.size
    with finished_weights(trainer.optimizer, trainer.ema), parked.awake() if parked else nullcontext():
        return draw(config, trainer.family, trainer.components, trainer.adapter, size, folder, trainer.step)


def draw(
    config: RunConfig,
    family: LoadedFamily,
    components: Components,
    adapter: ScalableAdapter,
    size: tuple[int, int],
    folder: Path,
    step: int,
) -> Rendered:
    """Draw prompts, strips and the contact sheet into `folder/step_...`."""
    first_seed = config.seed if config.validation_seed is None else config.validation_seed
    guidance = family.facts.guidance_scale if config.validation_guidance is None else config.validation_guidance
    rendered = render(
        family,
        components,
        adapter,
        [PromptEntry(name=p.name, prompt=p.prompt, adapter_strength=p.adapter_strength) for p in config.prompts],
        folder=folder,
        step=step,
        seeds=range(first_seed, first_seed + config.num_validation_images),
        strengths=config.validation_strengths,
        global_strength=config.validation_adapter_strength,
        settings=DrawSettings(
            width=size[0],
            height=size[1],
            steps=config.validation_num_inference_steps,
            guidance_scale=guidance,
            negative_prompt=config.validation_negative_prompt,
            num_frames=num_frames(config),
            image=image_file(config),
            control=None if components.control is None else str(control_image(config)),
            extra=family.facts.call_kwargs,
            batch_size=max(1, PIXELS_AT_ONCE // (size[0] * size[1])),
        ),
    )
    console.say(f"validation: {rendered.contact_sheet or rendered.folder}")
    if console.IS_MAIN:
        family.observe("validation", step=step, path=rendered.folder)
    return rendered


def validation_size(config: RunConfig) -> tuple[int, int] | None:
    """(width, height) of `validation_resolution`."""
    if config.validation_resolution is None:
        return None
    width, _, height = config.validation_resolution.partition("x")
    return int(width), int(height or width)


def export(config: RunConfig, trainer: Trainer, targets: TargetPlan, checked: Preflight) -> Path | None:
    """Write the slider, with its finished weights, as a diffusers file; done only after it was read back and compared.

    None in all processes but the main one.
    """
    if not trainer.processes.is_main:
        return None
    family, adapter = trainer.family, trainer.adapter
    metadata = slider_metadata(
        family=family.facts.name,
        flavour=config.model_flavour,
        plugin=family.distribution,
        plugin_version=family.version,
        targets=targets.expression,
        targets_source=targets.source,
        strengths=sorted({b.strength or 0.0 for b in checked.buckets}),
        adapter=adapter.facts(),
        steps=trainer.step,
        seed=config.seed,
        base_model=checked.model,
        objective=config.slider_objective,
        extra=_extra(config, family),
    )
    path = config.output_dir / EXPORTED
    with finished_weights(trainer.optimizer, trainer.ema):
        report = adapter.export(path, component_of(config, family), metadata, torch.float32)
    console.say(f"slider: {report.path} ({report.modules} modules, {report.size / 1e6:.1f} MB)")
    family.observe("exported", step=trainer.step, path=path)
    return path


def _extra(config: RunConfig, family: LoadedFamily) -> dict[str, str]:
    """Metadata beyond the numbers of a run: the family's own options, who answered each hook, what stood frozen beside it."""
    extra = {"slider.hooks": json.dumps(family.describe()["hooks"], sort_keys=True), **frozen_metadata(config)}
    if config.has_controlnet:
        extra["slider.controlnet"] = json.dumps(
            {
                "model": config.controlnet_model_name_or_path,
                "trained": config.controlnet,
                "scale": config.controlnet_conditioning_scale,
            }
        )
    if config.use_ema:
        extra["slider.ema"] = f"{config.ema_decay:g}"
    if config.family_options:
        extra["slider.options"] = json.dumps(config.family_options, sort_keys=True)
    return extra


# --- A finished slider ------------------------------------------------------------------------------------------------


def check_validation(config: RunConfig, family: LoadedFamily, adapter_file: Path) -> tuple[str, tuple[int, int]]:
    """Model and image size of a validation. Raises UserError for a file of another family, or nothing to draw."""
    _, metadata = read_tensors(adapter_file)
    made_by = metadata.get("slider.family", family.facts.name)
    if made_by != family.facts.name:
        raise UserError(f"{adapter_file} is a slider of {made_by}, and model_family is {family.facts.name}")
    if not config.prompts:
        raise UserError("there is no prompt to draw: give validation_prompt or user_prompt_library")
    problems = controlnet_problems(config, family.facts)
    if config.controlnet and not config.controlnet_model_name_or_path and not (config.output_dir / CONTROLNET).is_dir():
        problems.append("controlnet_model_name_or_path: name the ControlNet that the slider was trained on")
    if problems:
        raise ConfigError(problems)
    if difference := other_base(config, metadata):
        console.warn(f"{adapter_file.name} {difference}")
    check_quantise(config)
    check_frozen(config, family.facts, None)  # once the model is loaded, it is compared with that, too
    size = validation_size(config) or (int(config.resolution), int(config.resolution))
    return model_of(config, family), size

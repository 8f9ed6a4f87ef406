"""The results: strips of images, and the slider's file."""

from __future__ import annotations

import json
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from slider_hooks import Components, PromptEntry
from slider_plugin import console
from slider_plugin.adapterfile import read_tensors
from slider_plugin.adapters.attach import CONTROLNET, component_of
from slider_plugin.adapters.frozen import check_frozen, frozen_metadata, other_base
from slider_plugin.config import RunConfig
from slider_plugin.data.drawn import TEXT
from slider_plugin.errors import ConfigError, UserError
from slider_plugin.export import slider_metadata
from slider_plugin.export.command import comfyui_file
from slider_plugin.export.layouts import needs_own_file
from slider_plugin.export.metadata import for_programs
from slider_plugin.preflight import (
    EXPORTED,
    Preflight,
    controlnet_problems,
    draws,
    model_of,
)
from slider_plugin.quantise import check_quantise
from slider_plugin.targets import TargetPlan
from slider_plugin.training.ema import finished_weights
from slider_plugin.training.loop import Trainer
from slider_plugin.training.parking import Parked
from slider_plugin.training.processes import draws_here
from slider_plugin.training.watch import log_images
from slider_plugin.validation.render import Rendered, ScalableAdapter, render
from slider_plugin.validation.settings import draw_settings, validation_seeds, validation_size

if TYPE_CHECKING:
    from slider_plugin.family import LoadedFamily


def validate(config: RunConfig, trainer: Trainer, checked: Preflight, parked: Parked | None = None) -> Path | None:
    """Draw the validation of a run with its finished weights; None where there is nothing to draw, or another process does it.

    With FSDP all processes draw, since each holds a part of the denoiser, and one of them keeps the pictures.
    """
    if not draws(config) or not draws_here(trainer.processes):
        return None
    if not trainer.processes.is_main:
        with tempfile.TemporaryDirectory() as folder:
            _validate(config, trainer, checked, parked, Path(folder))
        return None
    drawn = _validate(config, trainer, checked, parked, config.output_dir / "validation_images")
    log_images(trainer.accelerator, drawn, trainer.step)
    return drawn.folder


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
    rendered = render(
        family,
        components,
        adapter,
        [PromptEntry(name=p.name, prompt=p.prompt, adapter_strength=p.adapter_strength) for p in config.prompts],
        folder=folder,
        step=step,
        seeds=validation_seeds(config, config.num_validation_images),
        strengths=config.validation_strengths,
        global_strength=config.validation_adapter_strength,
        settings=draw_settings(config, family, components, size),
    )
    console.say(f"validation: {rendered.contact_sheet or rendered.folder}")
    if console.IS_MAIN:
        family.observe("validation", step=step, path=rendered.folder)
    return rendered


def export(config: RunConfig, trainer: Trainer, targets: TargetPlan, checked: Preflight) -> Path | None:
    """Write the slider, with its finished weights, as a diffusers file; done only after it was read back and compared.

    None in all processes but the main one.
    """
    if not trainer.processes.is_main:
        return None
    path = config.output_dir / EXPORTED
    with finished_weights(trainer.optimizer, trainer.ema):
        write_slider(config, trainer, targets, checked, path, trainer.step)
    _export_for_web_uis(config, trainer.family, path)
    trainer.family.observe("exported", step=trainer.step, path=path)
    return path


def export_best(config: RunConfig, trainer: Trainer, targets: TargetPlan, checked: Preflight) -> Path | None:
    """Write the best slider by the run's reports, if it is not the last one; None if it is, or nothing was reported."""
    from slider_plugin.report import watching

    best = watching.best_of(config.output_dir) if config.validation_report else None
    if best is None or not trainer.processes.is_main:
        return None
    console.say(f"best report: step {best['step']}, score {best['score']:.2f} ({best['checkpoint']})")
    path, present = config.output_dir / watching.EXPORTED, trainer.adapter.tensors()
    if best["step"] == trainer.step:
        path.unlink(missing_ok=True)
        return None
    trainer.adapter.load_tensors(watching.best_weights(config.output_dir), str(path))
    write_slider(config, trainer, targets, checked, path, best["step"])
    trainer.adapter.load_tensors(present, str(path))
    return path


def write_slider(config: RunConfig, trainer: Trainer, targets: TargetPlan, checked: Preflight, path: Path, step: int) -> None:
    """Write the adapter's present weights as the slider of a step, read back and compared."""
    family, adapter = trainer.family, trainer.adapter
    metadata = slider_metadata(
        family=family.facts.name,
        flavour=config.model_flavour,
        plugin=family.distribution,
        plugin_version=family.version,
        targets=targets.expression,
        targets_source=targets.source,
        strengths=sorted({b.strength or 0.0 for b in checked.buckets} | (set(TEXT) if checked.drawn else set())),
        adapter=adapter.facts(),
        steps=step,
        seed=config.seed,
        base_model=checked.model,
        objective=config.slider_objective,
        positive=config.slider_positive,
        negative=config.slider_negative,
        extra=_extra(config, family, checked),
    )
    header = for_programs(metadata, family.facts, path.stem)
    report = adapter.export(path, component_of(config, family), header, torch.float32)
    console.say(f"slider: {report.path} ({report.modules} modules, {report.size / 1e6:.1f} MB)")


def _export_for_web_uis(config: RunConfig, family: LoadedFamily, path: Path) -> None:
    """Write the second file of a plain LoRA, where the web UIs need other keys than diffusers."""
    if config.controlnet or config.lycoris is not None or not needs_own_file(family.facts):
        return
    try:
        second = comfyui_file(path, family.facts)
    except UserError as error:  # a user's own targets may reach what has no name there; the slider itself is written
        console.warn(f"no second file for ComfyUI: {error}")
        return
    report, programs = second.report, family.facts.layouts["comfyui"].programs
    console.say("; ".join([f"for {programs}: {report.path} ({report.modules} modules)", *second.notes]))


def _extra(config: RunConfig, family: LoadedFamily, checked: Preflight) -> dict[str, str]:
    """Metadata beyond the numbers of a run: the family's own options, who answered each hook, what stood frozen beside it."""
    extra = {"slider.hooks": json.dumps(family.describe()["hooks"], sort_keys=True), **frozen_metadata(config)}
    extra |= {"slider.learning_rate": f"{config.learning_rate:g}", "slider.resolution": "{}x{}".format(*checked.size)}
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

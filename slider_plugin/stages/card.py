"""The model card, from what the run knows at its end."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slider_plugin import console
from slider_plugin.adapterfile import read_tensors
from slider_plugin.card import MARK, NAME, CardFacts, card
from slider_plugin.config import RunConfig
from slider_plugin.errors import UserError
from slider_plugin.export.command import COMFYUI_SUFFIX
from slider_plugin.files import write_atomic
from slider_plugin.loading import model_folder
from slider_plugin.preflight import Preflight, num_frames
from slider_plugin.training.loop import Trainer
from slider_plugin.validation.render import call_arguments
from slider_plugin.validation.samples import sampling_rate
from slider_plugin.validation.settings import validation_size

if TYPE_CHECKING:
    from slider_plugin.family import LoadedFamily

PICTURES = 3
"""Strips that a card shows."""


def write_card(config: RunConfig, trainer: Trainer, checked: Preflight, exported: Path | None, images: Path | None) -> None:
    """Write README.md beside the finished slider. One that somebody else wrote stays, which is said."""
    if exported is None:
        return
    place = exported.parent / NAME
    if place.exists() and not place.read_text(encoding="utf-8", errors="replace").rstrip().endswith(MARK):
        console.warn(f"{place} is not of an earlier run and stays as it is; no model card is written")
        return
    write_atomic(place, card(_facts(config, trainer, checked, exported, images)))
    console.say(f"model card: {place}")


def _facts(config: RunConfig, trainer: Trainer, checked: Preflight, exported: Path, images: Path | None) -> CardFacts:
    family, components = trainer.family, trainer.components
    _, header = read_tensors(exported)
    pipeline, denoiser = components.pipeline, components.denoiser
    second = exported.with_stem(exported.stem + COMFYUI_SUFFIX)
    makes = _makes(family)
    is_hub_id = _is_hub_id(family, checked.model)
    return CardFacts(
        header=header,
        family=family.facts,
        model=checked.model if is_hub_id else header["slider.base_model"],
        is_hub_id=is_hub_id,
        file=exported.name,
        comfyui_file=second.name if second.is_file() else None,
        pipeline=_diffusers_class(pipeline),
        loader=_loader(pipeline, denoiser),
        adapter="controlnet" if config.controlnet else "lora" if config.lycoris is None else "lycoris",
        makes=makes,
        prompt=config.prompts[0].prompt if config.prompts else "a photo",
        call=_call(config, family, pipeline, checked),
        wants_image=config.validation_image is not None,
        sampling_rate=sampling_rate(pipeline) if makes == "audio" else 0,
        load={"load_into_transformer_2": True} if denoiser is getattr(pipeline, "transformer_2", None) else {},
        pictures=_pictures(exported.parent, images),
        training=_training(config, checked, header),
    )


def _is_hub_id(family: LoadedFamily, model: str) -> bool:
    try:
        return model_folder(family.facts, model) is None
    except UserError:  # a family with a loader of its own may name its models otherwise
        return False


def _diffusers_class(pipeline: Any) -> str | None:
    name = type(pipeline).__name__
    return name if getattr(importlib.import_module("diffusers"), name, None) is type(pipeline) else None


def _loader(pipeline: Any, denoiser: Any) -> str:
    if hasattr(pipeline, "load_lora_weights"):
        return "pipeline"
    return "denoiser" if hasattr(denoiser, "load_lora_adapter") else "none"


def _makes(family: LoadedFamily) -> str:
    """Pipelines of videos give frames, also of a single image."""
    return next((kind for kind in ("audio", "video") if kind in family.facts.modalities), "image")


def _call(config: RunConfig, family: LoadedFamily, pipeline: Any, checked: Preflight) -> dict[str, Any]:
    """With what validation draws, as far as the pipeline takes it."""
    width, height = validation_size(config) or checked.size
    guidance = family.facts.guidance_scale if config.validation_guidance is None else config.validation_guidance
    wanted = {
        "height": height,
        "width": width,
        **({"num_frames": num_frames(config)} if "video" in family.facts.modalities else {}),
        "num_inference_steps": config.validation_num_inference_steps,
        "guidance_scale": guidance,
    }
    return call_arguments(pipeline, wanted | dict(family.facts.call_kwargs)) if callable(pipeline) else {}


def _pictures(folder: Path, images: Path | None) -> list[str]:
    if images is None:
        return []
    found = sorted(images.glob("*_strip.png"))[:PICTURES]
    return [path.relative_to(folder).as_posix() for path in found if path.is_relative_to(folder)]


def _training(config: RunConfig, checked: Preflight, header: dict[str, str]) -> list[tuple[str, str]]:
    rows = [(f"bucket {b.name}", f"{len(b.items)} files at strength {b.strength or 0.0:+g}") for b in checked.buckets]
    rows += [("base LoRA, to be loaded as well", f"{lora.path.stem} at {lora.weight:g}") for lora in config.base_loras]
    told = {
        "objective": "slider.objective",
        "steps": "slider.steps",
        "learning rate": "slider.learning_rate",
        "rank": "slider.rank",
        "alpha (folded into the file)": "slider.alpha",
        "resolution": "slider.resolution",
        "seed": "slider.seed",
        "targets": "slider.targets_source",
        "plugin": "slider.plugin",
        "version": "slider.plugin_version",
    }
    return [
        *rows,
        *((name, header[key]) for name, key in told.items() if key in header),
        ("optimizer", config.optimizer),
        ("samples of a draw", str(config.train_batch_size)),
        ("precision", config.mixed_precision),
    ]

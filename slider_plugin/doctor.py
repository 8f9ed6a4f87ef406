"""`slider doctor`: what a run would do, from JSON, image headers and a model on the meta device. Trains and writes nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table

from slider_plugin.adapters.frozen import frozen_files
from slider_plugin.config import RunConfig
from slider_plugin.data.drawn import TEXT
from slider_plugin.preflight import Preflight, preflight
from slider_plugin.quantise import bytes_at_rest
from slider_plugin.registry import Plugins
from slider_plugin.targets import TargetPlan, listed
from slider_plugin.training.memory import Unpredictable, bytes_per_trained, predict_footprint

if TYPE_CHECKING:
    from torch.nn import Module

    from slider_plugin.family import LoadedFamily

GIB = 2**30


def examine(config: RunConfig) -> RenderableType:
    """The resolved plan of a run. Raises UserError with everything that is wrong."""
    family = Plugins.discover().load(config.model_family)
    checked = preflight(config, family)
    warnings = [f"warning: {line}" for line in checked.warnings]
    return Group(*_model(config, family, checked), _buckets(config, checked), *_steps(config, checked), *warnings)


def _model(config: RunConfig, family: LoadedFamily, checked: Preflight) -> list[RenderableType]:
    facts = _facts_table()
    facts.add_row("model", f"{family.facts.title} ({family.facts.name}, {family.distribution} {family.version})")
    facts.add_row("", checked.model)
    for file in frozen_files(config):
        strengths = f"{file.training:g} in training, {file.drawing:g} in pictures"
        facts.add_row("frozen", f"{file.path.name} ({file.key}): {strengths}")
    if config.has_controlnet:
        facts.add_row("ControlNet", _control(config))
    if config.controlnet:
        facts.add_row("targets", "those of the ControlNet, which are known once it is loaded")
        return [facts]
    if checked.targets is None or checked.denoiser is None:
        facts.add_row("targets", "known only once the model is loaded: it is no local diffusers folder")
        return [facts]
    _target_rows(facts, checked.targets)
    base = sum(p.numel() for p in checked.denoiser.parameters())
    trainable, what = _trainable(config, checked.targets)
    if trainable is None:
        facts.add_row("trainable", f"{what}: parameters are counted once the model is loaded")
        return [facts]
    facts.add_row("trainable", f"{trainable:,} parameters, {what}, of {base:,}")
    _memory_rows(facts, config, family, checked, _at_rest(config, family, checked.denoiser, trainable))
    return [facts]


def _control(config: RunConfig) -> str:
    """What the ControlNet of a run is, and does."""
    model = config.controlnet_model_name_or_path or "a fresh one, whose zero layers get the adapter, too"
    return f"{model}: {'the slider is trained on it' if config.controlnet else 'frozen, holds the structure'}"


def _trainable(config: RunConfig, plan: TargetPlan) -> tuple[int | None, str]:
    """How many parameters are trained, and of what adapter."""
    if config.lycoris is None:
        return plan.parameters * config.lora_rank, f"LoRA of rank {config.lora_rank}"
    sized = "" if config.lycoris.algo == "full" else f" of rank {config.lycoris.linear_dim}"
    return plan.trainable, f"{config.lycoris.algo}{sized}"


def _target_rows(facts: Table, plan: TargetPlan) -> None:
    kinds = ", ".join(f"{count} {kind}" for kind, count in plan.by_kind.items()) or "kinds unknown"
    facts.add_row("targets", f"{len(plan.modules)} modules ({plan.source}): {kinds}")
    if plan.dead:
        facts.add_row("dead entries", listed(plan.dead))
    if plan.forbidden:
        facts.add_row("reach text", listed(plan.forbidden))


def _at_rest(config: RunConfig, family: LoadedFamily, denoiser: Module, trainable: int) -> int:
    """Bytes of weights, adapter and optimizer."""
    return bytes_at_rest(denoiser, family.facts, config) + trainable * bytes_per_trained(config)


def _memory_rows(facts: Table, config: RunConfig, family: LoadedFamily, checked: Preflight, at_rest: int) -> None:
    """The peak of a training step and what it is made of; where that cannot be told, what is there between steps."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        footprint = predict_footprint(config, family, checked, device)
    except Unpredictable as error:
        facts.add_row("memory", f"{_gib(at_rest)} for denoiser, adapter and optimizer; activations are not told: {error}")
        return
    facts.add_row("weights", f"{_gib(footprint.weights)} of the denoiser")
    facts.add_row("adapter", f"{_gib(footprint.adapter)} with gradients and optimizer")
    batch = f"{config.train_batch_size} of {checked.size[0]}x{checked.size[1]}"
    kept = "with" if config.gradient_checkpointing else "without"
    facts.add_row("activations", f"{_gib(footprint.activations)} at batches of {batch}, {kept} gradient checkpointing")
    facts.add_row("peak", f"{_gib(footprint.total)} while training; encoders and decoders are not in memory then")
    if device.type == "cuda" and (there := torch.cuda.get_device_properties(device).total_memory) < footprint.total:
        facts.add_row("", f"warning: this GPU has {_gib(there)}; {_smaller(config)}")


def _smaller(config: RunConfig) -> str:
    """What takes less memory, of what is not taken already."""
    ways = {
        "set gradient_checkpointing": not config.gradient_checkpointing,
        "lower train_batch_size": config.train_batch_size > 1,
        "write signs_in_one_forward: no": config.signs_in_one_forward != "no",
    }
    return ", ".join([*(way for way, is_open in ways.items() if is_open), "lower resolution"])


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _buckets(config: RunConfig, checked: Preflight) -> Table:
    table = Table("bucket", "strength", "images", "draws per epoch", "probability", "sizes", box=None, title="", pad_edge=False)
    for bucket in checked.buckets:
        info = bucket.info(config.train_batch_size)
        strength = "neutral" if not bucket.strength else f"{bucket.strength:+g}"
        sizes = ", ".join(f"{w}x{h} ({len(places)})" for (w, h), places in list(bucket.shapes().items())[:4])
        table.add_row(bucket.name, strength, str(len(bucket.items)), str(info.batches), f"{bucket.probability:g}", sizes)
    if checked.drawn:
        width, height, frames = checked.drawn
        size = f"{width}x{height}" + (f", {frames} frames" if frames > 1 else "")
        for at, name in TEXT.items():
            table.add_row(name, f"{at:+g}", "drawn by the model", "", "", size)
    return table


def _factor(config: RunConfig) -> tuple[float, str]:
    """What an adapter's output is multiplied by at strength 1, and how that is written."""
    if config.lycoris is not None:
        return config.lycoris.multiplier, "multiplier"
    alpha = config.lora_alpha or float(config.lora_rank)
    if config.lora_use_rslora:
        return alpha / math.sqrt(config.lora_rank), "alpha/sqrt(rank)"
    return alpha / config.lora_rank, "alpha/rank"


def _steps(config: RunConfig, checked: Preflight) -> list[RenderableType]:
    facts = _facts_table()
    strengths = sorted({abs(b.strength) for b in checked.buckets if b.strength}) or [checked.neutral_scale]
    factor, formula = _factor(config)
    effective = ", ".join(f"{config.learning_rate * factor * s:.2g} at |strength| {s:g}" for s in strengths)
    facts.add_row("one step", f"{checked.draws_per_step} draws of {config.train_batch_size} images, cycle of {checked.cycle}")
    rate = f"{config.lr_scheduler} from {config.learning_rate:g}"
    facts.add_row("steps", f"{config.max_train_steps} of {config.optimizer}, {rate}")
    facts.add_row("step size", f"learning rate x {formula} ({factor:g}) x |strength|: {effective}")
    if anchors := checked.objective.anchors:
        prompts = "; ".join(anchor or "the empty prompt" for anchor in anchors)
        facts.add_row("anchors", f"kept at +{checked.neutral_scale:g} and -{checked.neutral_scale:g}: {prompts}")
    if any(not b.strength for b in checked.buckets):
        facts.add_row("neutral", f"the frozen model is preserved at +{checked.neutral_scale:g} and -{checked.neutral_scale:g}")
    facts.add_row("output", str(config.output_dir))
    return [facts]


def _facts_table() -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table

"""The training: sampler, trainer, and the run with its checkpoints."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from slider_hooks import BucketInfo, Components, Sampler
from slider_plugin import console
from slider_plugin.adapters.base import Adapter
from slider_plugin.config import RunConfig
from slider_plugin.configfile import to_json
from slider_plugin.data.drawn import AnchorSampler
from slider_plugin.data.encode import Encoded
from slider_plugin.data.pairs import PairSampler
from slider_plugin.errors import UserError
from slider_plugin.files import write_json
from slider_plugin.preflight import Preflight
from slider_plugin.report.watching import Reports, best_checkpoint
from slider_plugin.stages.results import validate
from slider_plugin.training.checkpoint import Position, find_checkpoint, load_checkpoint, save_checkpoint, verify
from slider_plugin.training.ema import Ema
from slider_plugin.training.loop import Trainer
from slider_plugin.training.noise import noise_process
from slider_plugin.training.optimizers import make_optimizer, make_schedule
from slider_plugin.training.pairing import Pairing
from slider_plugin.training.parking import Parked
from slider_plugin.training.processes import Processes, sharded
from slider_plugin.training.reports import StepReport
from slider_plugin.training.resuming import changes, check_found, facts_of, resume_schedule
from slider_plugin.training.times import WHOLE, Times
from slider_plugin.training.watch import Metrics, interruptible

if TYPE_CHECKING:
    from accelerate import Accelerator

    from slider_plugin.family import LoadedFamily

PAIRED = "signs_in_one_forward"
"""Among the facts of a checkpoint: whether draws shared forwards."""


def build_sampler(config: RunConfig, family: LoadedFamily, data: Encoded, checked: Preflight) -> Sampler:
    """The order in which buckets are drawn."""

    def build(buckets: Sequence[BucketInfo]) -> Sampler:
        return family.build_sampler(buckets, config.seed, config.data_backend_sampling, checked.neutral_scale)

    if not checked.twins:
        return _with_anchors(build(data.infos()), checked)
    strengths = {info.name: info.strength or 0.0 for info in data.infos()}
    neutral = [info for info in data.infos() if not info.strength]
    positive = build([info for info in data.infos() if info.name in checked.twins])
    return _with_anchors(PairSampler(positive, build(neutral) if neutral else None, checked.twins, strengths), checked)


def _with_anchors(sampler: Sampler, checked: Preflight) -> Sampler:
    anchors = len(checked.objective.anchors)
    return AnchorSampler(sampler, checked.cycle - 1, anchors, checked.neutral_scale) if anchors else sampler


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
    if checked.drawn and components.time_range != WHOLE:
        raise UserError(
            f"slider_objective {config.slider_objective}: this denoiser answers for a part of the noise alone and cannot draw "
            "from pure noise; give buckets of both signs"
        )
    optimizer = make_optimizer(config, adapter.parameters())
    trainer = Trainer(
        family=family,
        components=components,
        adapter=adapter,
        data=data,
        sampler=sampler,
        noise=noise_process(family.facts, components, Times.of(config)),
        objective=checked.objective,
        random_strength=config.random_strength,
        rollout_steps=config.text_rollout_steps,
        rollout_guidance=config.text_rollout_guidance,
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
    # under FSDP all must make the same number of forwards, and each process judges by its own samples
    on = recorded is not False and not sharded()
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
    reports = Reports(config, trainer, checked, parked)
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
            if reports.due(report.step) and reports.make():
                _checkpoint(config, trainer)
            return processes.any(interrupt.asked or reports.stopped)

        finished = trainer.run(config.max_train_steps, after) or processes.any(reports.stopped)
    _checkpoint(config, trainer)
    return finished, time.perf_counter() - started


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _checkpoint(config: RunConfig, trainer: Trainer) -> None:
    if not trainer.processes.is_main:
        return
    position = Position(trainer.step, trainer.sampler.state_dict(), trainer.schedule.state_dict())
    facts = {"plugin": trainer.family.describe(), PAIRED: trainer.pairing.on, **trainer.facts}
    spare = best_checkpoint(config.output_dir)
    keep = config.checkpoints_total_limit
    path = save_checkpoint(config.output_dir, trainer.adapter, trainer.optimizer, trainer.ema, position, facts, keep, spare)
    trainer.family.observe("checkpoint", step=trainer.step, path=path)

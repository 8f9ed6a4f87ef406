"""The table of contents: what `slider train` does, one line per stage, in order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slider_plugin import stages
from slider_plugin.adapters.attach import attach_file
from slider_plugin.config import RunConfig
from slider_plugin.preflight import preflight
from slider_plugin.registry import Plugins
from slider_plugin.training.processes import check_one_process
from slider_plugin.training.watch import reporting


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run left behind."""

    finished: bool
    """False if it was interrupted, with a checkpoint written."""

    adapter: Path | None
    """The exported slider."""

    images: Path | None
    """Folder of the last validation."""

    steps: int
    seconds: float


def train(config: RunConfig) -> Outcome:
    """Train a slider, validate it and export it. Raises UserError, before anything is written, for anything wrong."""
    plugins = Plugins.discover()
    family = plugins.load(config.model_family)
    checked = preflight(config, family)
    machine = stages.open_machine(config)
    components = stages.load(config, family, checked, machine)
    targets = stages.find_targets(config, family, checked, components)
    adapter = stages.attach(config, family, components, targets, machine)
    data = stages.encode(config, family, components, checked, machine)
    parked = stages.park(config, components, machine)
    sampler = stages.build_sampler(config, family, data, checked)
    trainer = stages.build_trainer(config, family, components, adapter, data, sampler, checked, machine)
    with reporting(config, machine):
        finished, seconds = stages.run(config, trainer, checked, parked)
        exported = stages.export(config, trainer, targets, checked) if finished else None
        if finished:
            stages.export_best(config, trainer, targets, checked)
        images = stages.validate(config, trainer, checked, parked) if finished else None
        stages.write_card(config, trainer, checked, exported, images)
    return Outcome(finished, exported, images, trainer.step, seconds)


def validate(config: RunConfig, adapter_file: Path, folder: Path) -> Path:
    """Draw the strips of a finished slider. Raises UserError for anything wrong with the file or the configuration."""
    check_one_process("validate")
    family = Plugins.discover().load(config.model_family)
    model, size = stages.check_validation(config, family, adapter_file)
    machine = stages.open_machine(config)
    components = stages.load_model(config, family, model, machine)
    adapter = attach_file(adapter_file, family, components)
    return stages.draw(config, family, components, adapter, size, folder, 0).folder

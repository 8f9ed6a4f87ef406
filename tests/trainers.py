"""A trainer as a run builds it, for tests that look into one."""

from __future__ import annotations

from pathlib import Path

from slider_plugin import stages
from slider_plugin.configfile import read_config
from slider_plugin.preflight import preflight
from slider_plugin.registry import Plugins
from slider_plugin.training.loop import Trainer


def trainer_of(config_file: Path, *flags: str) -> Trainer:
    """The trainer as `run.train` builds it, before its first step."""
    config = read_config(config_file, flags, Plugins.discover().facts)[0]
    family = Plugins.discover().load(config.model_family)
    checked = preflight(config, family)
    machine = stages.open_machine(config)
    components = stages.load(config, family, checked, machine)
    adapter = stages.attach(config, family, components, stages.find_targets(config, family, checked, components), machine)
    data = stages.encode(config, family, components, checked, machine)
    sampler = stages.build_sampler(config, family, data, checked)
    return stages.build_trainer(config, family, components, adapter, data, sampler, checked, machine)

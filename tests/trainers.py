"""A trainer as a run builds it, for tests that look into one, and a run that stops and goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from slider_plugin import run, stages
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


def assert_goes_on_to_the_same_weights(config_file: Path, out: Path) -> None:
    """Train the five steps of a configuration into `out`, take the last checkpoint and the file away, resume, and compare."""
    config = read_config(config_file)[0]
    run.train(config)
    whole = load_file(out / "slider.safetensors")
    shutil.rmtree(out / "checkpoint-000005")
    (out / "slider.safetensors").unlink()
    run.train(config.model_copy(update={"resume_from_checkpoint": "latest"}))
    again = load_file(out / "slider.safetensors")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)

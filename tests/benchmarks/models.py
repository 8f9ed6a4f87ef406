"""Models and runs for the benchmarks: tiny and middle-sized pipelines, and the trainer that `slider train` builds on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from slider_plugin import stages
from slider_plugin.configfile import read_config
from slider_plugin.family import LoadedFamily
from slider_plugin.preflight import Preflight, preflight
from slider_plugin.registry import Plugins
from slider_plugin.testing.subject import write_tiny
from slider_plugin.training.loop import Trainer

TINY = ("sd1", "z_image", "flux", "wan")
MIDDLE = {"block_out_channels": (64, 128, 256, 256)}
"""A Stable Diffusion with a fifth of the channels, 38 million parameters."""


def noise_images(folder: Path, count: int, side: int) -> Path:
    """Images of noise, with eight different captions."""
    folder.mkdir(parents=True)
    numbers = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(numbers.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a photo of noise number {i % 8}\n")
    return folder


def tiny_pipeline(family: str, root: Path) -> Path:
    """A family's tiny pipeline below a folder."""
    return write_tiny(Plugins.discover().facts(family), root / family)


def middle_pipeline(root: Path) -> Path:
    """The tiny sd1 with a middle-sized UNet of random weights."""
    from diffusers import UNet2DConditionModel

    from slider_plugin.testing.tiny import seeded

    folder = root / "middle"
    if not folder.exists():
        Plugins.discover().facts("sd1").tiny(folder)  # type: ignore[misc]
        tiny = UNet2DConditionModel.load_config(folder / "unet")
        with seeded(0):
            UNet2DConditionModel(sample_size=16, cross_attention_dim=tiny["cross_attention_dim"], **MIDDLE).save_pretrained(
                folder / "unet"
            )
    return folder


def write_run(family: str, pipeline: Path, folder: Path, side: int, **keys: Any) -> Path:
    """A configuration with four images of each sign; its config.json."""
    entries = [
        {"id": name, "instance_data_dir": str(noise_images(folder / name, 4, side)), "slider_strength": strength}
        for name, strength in (("more", 1.0), ("less", -1.0))
    ]
    (folder / "buckets.json").write_text(json.dumps(entries))
    config = {
        "model_family": family,
        "pretrained_model_name_or_path": str(pipeline),
        "data_backend_config": "buckets.json",
        "output_dir": str(folder / "out"),
        "slider_lora_target": True,
        "lora_rank": 16,
        "resolution": side,
        "max_train_steps": 1000,
        "mixed_precision": "no",
        "signs_in_one_forward": "no",  # as a loop written by hand does
    }
    (folder / "config.json").write_text(json.dumps(config | keys))
    return folder / "config.json"


def trainer_of(config_file: Path) -> tuple[Trainer, LoadedFamily, Preflight]:
    """The trainer as `slider_plugin.run.train` builds it, before its first step."""
    plugins = Plugins.discover()
    config = read_config(config_file, (), plugins.facts)[0]
    family = plugins.load(config.model_family)
    checked = preflight(config, family)
    machine = stages.open_machine(config)
    components = stages.load(config, family, checked, machine)
    adapter = stages.attach(config, family, components, stages.find_targets(config, family, checked, components), machine)
    data = stages.encode(config, family, components, checked, machine)
    stages.park(config, components, machine)
    sampler = family.build_sampler(data.infos(), config.seed, config.data_backend_sampling, checked.neutral_scale)
    return stages.build_trainer(config, family, components, adapter, data, sampler, checked, machine), family, checked

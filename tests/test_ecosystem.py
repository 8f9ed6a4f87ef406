"""The exported file in plain diffusers, in a process that knows nothing of this project: the same images as ours."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slider_plugin import run
from slider_plugin.adapterfile import read_adapter
from slider_plugin.configfile import read_config
from slider_plugin.registry import Plugins

PLAIN_DIFFUSERS = """
import json, sys
import torch
from diffusers import DiffusionPipeline

assert not any(name.startswith("slider") for name in sys.modules)
folder, adapter, out, guidance = sys.argv[1:5]
extra = {"safety_checker": None} if "sd1" in folder else {}
pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, **extra)

def draw(name):
    generator = [torch.Generator().manual_seed(1)]
    pipeline(prompt=["a red circle"], negative_prompt=["blurry"], height=32, width=32, num_inference_steps=2,
             guidance_scale=float(guidance), generator=generator).images[0].save(f"{out}/{name}.png")

draw("base")
pipeline.load_lora_weights(adapter, adapter_name="slider")
# Tensors of a memory-mapped file are not aligned, and another code path may round differently; copies are.
for parameter in getattr(pipeline, "unet", None or getattr(pipeline, "transformer", None)).parameters():
    parameter.data = parameter.data.clone()
for scale in (1.0, -1.0, 0.0):
    pipeline.set_adapters("slider", scale)
    draw(f"{scale:+g}")
denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
print(json.dumps(sum("slider" in getattr(m, "lora_A", {}) for m in denoiser.modules())))
"""


@pytest.mark.parametrize("family", ["sd1", "z_image"])
def test_plain_diffusers_draws_the_same(project: Callable[..., Path], tmp_path: Path, family: str) -> None:
    config_path = project(
        family, lora_alpha=2.0, learning_rate=0.05, validation_prompt="a red circle", validation_negative_prompt="blurry",
        validation_num_inference_steps=2, validation_strengths=[-1, 0, 1], validation_seed=1,
    )  # fmt: skip
    config = read_config(config_path, (), Plugins.discover().facts)[0]
    outcome = run.train(config)
    assert outcome.adapter and outcome.images
    guidance = Plugins.discover().facts(family).guidance_scale
    arguments = [str(config.pretrained_model_name_or_path), str(outcome.adapter), str(tmp_path), str(guidance)]
    result = subprocess.run([sys.executable, "-c", PLAIN_DIFFUSERS, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[-1]) == len(read_adapter(outcome.adapter)[0])

    theirs = {name: pixels(tmp_path / f"{name}.png") for name in ("base", "+1", "-1", "+0")}
    ours = {
        shot["scale"]: pixels(outcome.images / shot["file"])
        for shot in json.loads((outcome.images / "prompts.json").read_text())["images"]
    }
    assert np.array_equal(theirs["base"], theirs["+0"])
    assert np.array_equal(theirs["base"], ours[0])
    for name, scale in (("+1", 1), ("-1", -1)):
        assert np.abs(theirs[name].astype(int) - ours[scale].astype(int)).max() <= 1, name
        assert not np.array_equal(theirs[name], theirs["base"])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)

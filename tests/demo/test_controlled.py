"""ControlNets on the tiny world: one is trained to follow outlines, and then sliders beside it and on it.

The outline of an image is where its colour changes, whatever its light. The measures were fixed before the first run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image

from slider_hooks import LoadRequest
from slider_plugin import run, stages
from slider_plugin.adapters.attach import attach_file
from slider_plugin.adapters.base import Adapter
from slider_plugin.configfile import read_config
from slider_plugin.control import Control, encode_for_controlnet
from slider_plugin.data.media import pixels
from slider_plugin.demo import measure, world
from slider_plugin.demo.bundle import fixtures
from slider_plugin.registry import Plugins
from slider_plugin.training.noise import noise_process

pytestmark = pytest.mark.slow

STEPS, BATCH, RATE = 900, 16, 5e-4  # of the ControlNet
SLIDER = {"learning_rate": 2e-3, "max_train_steps": 120, "lr_scheduler": "cosine", "lr_warmup_steps": 10, "lora_rank": 8}
SEEDS = (1000, 1001, 1002, 1003)
BASE = fixtures() / "tiny" / "sd1"


def outline(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """White where the chromaticity changes, `(H, W, 3)` in 0..255."""
    chroma = image / np.maximum(image.sum(axis=2, keepdims=True), 1e-3)
    steps = np.abs(np.diff(chroma, axis=0, prepend=chroma[:1])).sum(2) + np.abs(
        np.diff(chroma, axis=1, prepend=chroma[:, :1])
    ).sum(2)
    return np.repeat((steps > 0.1).astype(np.uint8)[..., None] * 255, 3, axis=2)


def scenes(count: int, seed: int) -> list[world.Scene]:
    rng = np.random.default_rng(seed)
    return [world.random_scene(rng) for _ in range(count)]


@pytest.fixture(scope="module")
def controlnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet that follows outlines, trained on the spot: every weight of it, on scenes of the world."""
    folder = tmp_path_factory.mktemp("controlnet") / "outlines"
    family = Plugins.discover().load("sd1")
    components = family.load_components(LoadRequest(model=str(BASE), dtype=torch.float32))
    torch.manual_seed(0)
    model: ControlNetModel = family.load_controlnet(components, None)  # type: ignore[assignment]
    model.train().requires_grad_(True)
    components.controlnet, components.control = model, Control(family, components, 1.0)
    process = noise_process(family.facts, components)
    drawn = scenes(800, seed=3)
    with torch.no_grad():
        images = [world.render(scene) for scene in drawn]
        clean = torch.cat([family.encode_images(components, tensor(image)) for image in images])
        shown = torch.cat([encode_for_controlnet(family, components, tensor(outline(image) / 255.0)) for image in images])
        text = family.encode_prompts(components, [world.caption(scene) for scene in drawn])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        chosen = torch.randint(len(drawn), (BATCH,), generator=generator).tolist()
        time_B, noise = process.draw_time(BATCH, generator), torch.randn(BATCH, *clean.shape[1:], generator=generator)
        told = [{**text[i], "control": shown[i]} for i in chosen]
        answer = family.predict(components, process.add_noise(clean[chosen], noise, time_B), process.told(time_B), told)
        (process.output(answer) - process.target(clean[chosen], noise, time_B)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def tensor(image: np.ndarray[Any, Any]) -> torch.Tensor:
    return pixels(np.round(image * 255)).unsqueeze(0)


def train(concept: str, folder: Path, **keys: Any) -> tuple[Any, Path]:
    """Train a slider of the demo's buckets with outlines beside them; the run's configuration and the slider's file."""
    folder.mkdir()
    entries: list[dict[str, Any]] = []
    for name, strength in (("more", 1.0), ("less", -1.0)):
        images = fixtures() / "buckets" / concept / name
        entry = {"id": name, "instance_data_dir": str(images), "slider_strength": strength}
        if "controlnet_model_name_or_path" in keys:
            (folder / name).mkdir()
            for path in images.glob("*.png"):
                with Image.open(path) as image:
                    lines = outline(np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0)
                Image.fromarray(lines).save(folder / name / path.name)
            entry["conditioning_data_dir"] = str(folder / name)
        entries.append(entry)
    (folder / "buckets.json").write_text(json.dumps(entries))
    config = SLIDER | keys | {
        "model_family": "sd1", "pretrained_model_name_or_path": str(BASE), "data_backend_config": "buckets.json",
        "output_dir": str(folder / "out"), "slider_lora_target": True, "train_batch_size": 6, "mixed_precision": "no",
        "resolution": 64, "validation_disable": True, "seed": 7, "gradient_accumulation_steps": 4,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    read = read_config(folder / "config.json")[0]
    outcome = run.train(read)
    assert outcome.adapter
    return read, outcome.adapter


def drawn(
    config: Any, slider: Path, strengths: Sequence[float], steered: Path | None
) -> dict[float, list[np.ndarray[Any, Any]]]:
    """Held-out prompts and seeds at each strength; steered by the outline of a scene of the world, or by none."""
    family = Plugins.discover().load("sd1")
    quiet = config.model_copy(update={"controlnet_model_name_or_path": str(steered) if steered else None})
    components = stages.load_model(quiet, family, str(BASE), stages.open_machine(config))
    adapter: Any = attach_file(slider, family, components)
    pipeline = components.pipeline
    pipeline.set_progress_bar_config(disable=True)
    images: dict[float, list[np.ndarray[Any, Any]]] = {}
    guidance = json.loads((BASE / "training.json").read_text())["guidance"]
    for strength in strengths:
        images[strength] = []
        for number in range(len(measure.PROMPTS)):
            images[strength] += _one_prompt(pipeline, components, family, adapter, number, strength, guidance)
    return images


def _one_prompt(
    pipeline: Any, components: Any, family: Any, adapter: Adapter, number: int, strength: float, guidance: float
) -> list[np.ndarray[Any, Any]]:
    from contextlib import nullcontext

    words = measure.PROMPTS[number]
    arguments = {"num_inference_steps": 16, "guidance_scale": guidance, "height": 64, "width": 64, "output_type": "np"}
    steering: Any = nullcontext()
    if components.control is not None:
        lines = tensor(outline(world.render(held_out(number))) / 255.0)
        with torch.no_grad():
            steering = components.control.showing(encode_for_controlnet(family, components, lines))
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    with adapter.scaled(strength), steering:
        return list(pipeline(prompt=[measure.prompt(*words)] * len(SEEDS), generator=generators, **arguments).images)


def held_out(number: int) -> world.Scene:
    colour, shape, background = measure.PROMPTS[number]
    size = 0.2 + 0.02 * number
    return world.Scene(colour=colour, shape=shape, background=background, radius=size, light=0.8, x=0.42, y=0.55)


def mask(image: np.ndarray[Any, Any], number: int) -> np.ndarray[Any, Any]:
    """Where the shape is: nearer to its colour than to the background's, under the image's own light."""
    colour, _, background = measure.PROMPTS[number]
    light = float(image.max(axis=2).mean()) / world.PALETTE_VALUE
    start, end = world.palette(background) * light, world.palette(colour) * light
    axis = end - start
    inside: np.ndarray[Any, Any] = (image - start) @ axis / max(float(axis @ axis), 1e-6) > 0.5
    return inside


def overlap(images: dict[float, list[np.ndarray[Any, Any]]], strength: float) -> float:
    """Mean intersection over union of the shape at a strength and at 0."""
    values = []
    for place, (image, base) in enumerate(zip(images[strength], images[0.0], strict=True)):
        one, other = mask(image, place // len(SEEDS)), mask(base, place // len(SEEDS))
        values.append(float((one & other).sum()) / max(1, int((one | other).sum())))
    return float(np.mean(values))


def brightness(images: dict[float, list[np.ndarray[Any, Any]]], strength: float) -> float:
    return float(np.mean([image.max(axis=2).mean() for image in images[strength]]))


def test_a_frozen_controlnet_keeps_the_outline_while_the_slider_learns(controlnet: Path, tmp_path: Path) -> None:
    rows = {}
    for name, keys in {"without": {}, "beside": {"controlnet_model_name_or_path": str(controlnet)}}.items():
        config, slider = train("brightness", tmp_path / name, **keys)
        for steered in (None, controlnet):
            images = drawn(config, slider, (-1.0, 0.0, 1.0), steered)
            rows[name, steered is not None] = (
                min(overlap(images, -1.0), overlap(images, 1.0)),
                brightness(images, 1.0) / brightness(images, -1.0),
            )
    # 2026-11-21: overlap 0.814 without, 0.873 beside; both drawn with the ControlNet, which holds them itself, 0.930 and 0.921.
    print({key: tuple(round(v, 3) for v in value) for key, value in rows.items()})
    for steered in (False, True):  # the slider moves what it is to move in any case
        assert rows["beside", steered][1] > 0.95 * rows["without", steered][1] > 1.5
    assert rows["beside", False][0] > rows["without", False][0] + 0.03
    assert rows["beside", True][0] > rows["without", False][0] + 0.03


def test_a_slider_on_the_controlnet_moves_the_concept(controlnet: Path, tmp_path: Path) -> None:
    """2026-11-21: brightness 0.557, 0.661, 0.747, 0.791, 0.815 from -1 to 1."""
    config, slider = train("brightness", tmp_path / "on", controlnet=True, controlnet_model_name_or_path=str(controlnet))
    images = drawn(config, slider, (-1.0, -0.5, 0.0, 0.5, 1.0), controlnet)
    response = [brightness(images, s) for s in sorted(images)]
    print([round(value, 3) for value in response])
    assert response == sorted(response) and response[-1] > 1.2 * response[0]

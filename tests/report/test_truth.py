"""The report against the truth of the tiny world: trained sliders, good and deliberately broken ones.

Prompts, seeds, strengths and measures are the demo's held-out ones (`slider_plugin.demo.measure`). Everything here trains, a
minute a slider on one core; sliders are trained once per session.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from slider_plugin import run
from slider_plugin.adapters.attach import attach_file
from slider_plugin.config import RunConfig
from slider_plugin.configfile import read_config
from slider_plugin.demo import measure
from slider_plugin.demo.bundle import fixtures
from slider_plugin.demo.run import write_config
from slider_plugin.registry import Plugins
from slider_plugin.report.calibrate import FRACTION, calibrate
from slider_plugin.report.card import Card, card_of
from slider_plugin.report.command import Desk, Options, check_report, with_prompts
from slider_plugin.report.flags import ONE_SIDED
from slider_plugin.report.probe import curves_of, draw
from slider_plugin.report.scores import response, spearman

pytestmark = pytest.mark.slow

PROMPTS = measure.PROMPTS
SEEDS = 2
"""Of `measure.SEEDS`, the first ones."""

STRENGTHS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)

KINDS: dict[str, dict[str, Any]] = {
    "good": {},
    "gentle": {"learning_rate": 5e-4},
    "strong": {"learning_rate": 5e-3},
    "wrong labels": {"swap": True},
    "too high a rate": {"learning_rate": 3e-2, "lr_scheduler": "constant"},
    "too few steps": {"max_train_steps": 2, "lr_warmup_steps": 1},
    "one-sided": {"ordinary_positives": True, "learning_rate": 5e-3, "lr_scheduler": "constant", "max_train_steps": 160},
}
"""How each slider is trained, besides the demo's recipe. The positive side of the one-sided one is shown ordinary images."""

CHECKPOINTS = {"good": 30}
DRAWING = ("validation_guidance", "validation_num_inference_steps", "validation_resolution", "validation_seed")


@dataclass(frozen=True)
class Measured:
    """A slider or a checkpoint of it."""

    card: Card
    truth: np.ndarray
    """Mean change of the true attribute against strength 0, by strength."""


class Sliders:
    """Trains and measures, each once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._trained: dict[tuple[str, str, str], tuple[RunConfig, Path]] = {}
        self._measured: dict[tuple[Path, int], Measured] = {}

    def trained(self, family: str, concept: str, kind: str) -> tuple[RunConfig, Path]:
        key = (family, concept, kind)
        if key not in self._trained:
            folder = self._root / "-".join(key).replace(" ", "_")
            folder.mkdir()
            outcome = run.train(config := read_config(_config(family, concept, kind, folder))[0])
            assert outcome.adapter
            self._trained[key] = config, outcome.adapter
        return self._trained[key]

    def measured(self, family: str, concept: str, kind: str, step: int = 0) -> Measured:
        """The finished slider, or its checkpoint of a step."""
        config, adapter = self.trained(family, concept, kind)
        key = (adapter, step)
        if key not in self._measured:
            self._measured[key] = measured(config, adapter, concept, step)
        return self._measured[key]


@pytest.fixture(scope="session")
def sliders(tmp_path_factory: pytest.TempPathFactory) -> Sliders:
    return Sliders(tmp_path_factory.mktemp("sliders"))


def _config(family: str, concept: str, kind: str, folder: Path) -> Path:
    path = write_config(family, concept, "lora", None, folder)
    values, keys = json.loads(path.read_text()), dict(KINDS[kind])
    buckets = json.loads((folder / "buckets.json").read_text())
    if keys.pop("swap", False):
        buckets[0]["slider_strength"], buckets[1]["slider_strength"] = -1.0, 1.0
    if keys.pop("ordinary_positives", False):
        buckets = buckets[:2]
        buckets[0]["instance_data_dir"] = str(fixtures() / "buckets" / "neutral")
    (folder / "buckets.json").write_text(json.dumps(buckets))
    guidance = json.loads((fixtures() / "tiny" / family / "training.json").read_text())["guidance"]
    drawing = {"validation_guidance": guidance, "validation_num_inference_steps": 16, "validation_resolution": "64"}
    drawing["validation_seed"] = measure.SEEDS[0]
    checkpoints = {"checkpoint_step_interval": CHECKPOINTS.get(kind, 0), "checkpoints_total_limit": 99}
    path.write_text(json.dumps(values | keys | drawing | checkpoints))
    return path


def measured(
    config: RunConfig, adapter_file: Path, concept: str, step: int = 0, strengths: Sequence[float] = STRENGTHS
) -> Measured:
    """Report with the right images, whatever the slider was trained on, and measure the same pictures."""
    family = Plugins.discover().load(config.model_family)
    right = write_config(config.model_family, concept, "lora", None, adapter_file.parent / "right")
    own = {key: getattr(config, key) for key in DRAWING}
    judged = with_prompts(read_config(right)[0].model_copy(update=own), [measure.prompt(*words) for words in PROMPTS])
    options = Options(strengths=tuple(strengths), seeds=SEEDS)
    desk = Desk.open(judged, family, check_report(judged, family, adapter_file, adapter_file.parent / "r", options), options)
    adapter: Any = attach_file(adapter_file, family, desk.components)
    if step:
        adapter.load_tensors(load_file(adapter_file.parent / f"checkpoint-{step:06d}" / "adapter.safetensors"), "a checkpoint")
    seen: list[Image.Image] = []

    def look(images: Sequence[Image.Image]) -> np.ndarray:
        seen.extend(image.copy() for image in images)
        return np.zeros(len(images))

    ends = desk.ends(adapter)
    drawn = draw(family, desk.components, adapter, desk.request, desk.settings, ends.grid, look)
    axis = ends.axis()
    curves = curves_of(replace(drawn, scores_PQS=None), axis, 1.0, 1.0)
    return Measured(card_of(curves, 0, axis.separation), _truth(seen, concept, desk.request.strengths))


def _truth(images: Sequence[Image.Image], concept: str, strengths: Sequence[float]) -> np.ndarray:
    """Pictures come strength by strength, then by prompt and seed."""
    values = []
    for number, image in enumerate(images):
        colour, _, background = PROMPTS[number // SEEDS % len(PROMPTS)]
        pixels = np.asarray(image, dtype=np.float32) / 255.0
        values.append(float(getattr(measure.measure(pixels, colour, background), concept)))
    mean_S: np.ndarray = np.array(values).reshape(len(strengths), -1).mean(1)
    return mean_S - mean_S[strengths.index(0.0)]


# --- The response is the truth ------------------------------------------------------------------------------------------


def test_the_response_orders_sliders_checkpoints_and_strengths_as_the_truth_does(sliders: Sliders) -> None:
    """2026-11-21, over all strengths of all: sd1 size 0.99, sd1 brightness 0.96, z_image size 1.00.

    By their range alone, sd1's sliders and checkpoints are in order with 0.90. What misses is the one of too high a rate.
    """
    found: dict[tuple[str, str], list[Measured]] = {
        ("sd1", "size"): [
            *(sliders.measured("sd1", "size", "good", step) for step in (30, 60, 120)),
            *(sliders.measured("sd1", "size", kind) for kind in KINDS if kind != "good"),
        ],
        ("sd1", "brightness"): [sliders.measured("sd1", "brightness", "good", step) for step in (30, 120)],
        ("z_image", "size"): [sliders.measured("z_image", "size", "good", step) for step in (30, 150)],
    }
    for key, all_of_it in found.items():
        responses = np.concatenate([response(one.card.curves) for one in all_of_it])
        truths = np.concatenate([one.truth for one in all_of_it])
        print(key, "strengths", round(float(spearman(responses, truths)), 3))
        assert spearman(responses, truths) >= 0.9, key
    ranges = [(one.card.scores.range, one.truth[5] - one.truth[1]) for one in found["sd1", "size"]]
    print("sliders", round(float(spearman(*map(np.array, zip(*ranges, strict=True)))), 3), np.round(ranges, 2).tolist())
    assert spearman(*map(np.array, zip(*ranges, strict=True))) >= 0.9 - 1e-6


# --- What is broken is flagged ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "flag"),
    [
        ("wrong labels", "wrong_direction"),
        ("too high a rate", "broken"),
        ("too few steps", "no_effect"),
        ("one-sided", "one_sided"),
    ],
)
def test_a_broken_slider_is_flagged(sliders: Sliders, kind: str, flag: str) -> None:
    card = sliders.measured("sd1", "size", kind).card
    print(kind, card.verdict)
    assert flag in card.codes


@pytest.mark.parametrize("family", ["sd1", "z_image"])
def test_a_good_slider_has_no_flag(sliders: Sliders, family: str) -> None:
    card = sliders.measured(family, "size", "good").card
    print(family, card.verdict)
    assert not card.flags


@pytest.mark.parametrize("family", ["sd1", "z_image"])
def test_a_slider_without_room_on_one_side_is_called_one_sided_as_it_is(sliders: Sliders, family: str) -> None:
    """These prompts and seeds are drawn almost as bright as the world has it: plus can add little, and does.

    2026-11-21: the true brightness changes by -0.27 and 0.05 for sd1, by -0.30 and 0.08 for z_image.
    """
    one = sliders.measured(family, "brightness", "good")
    low, high = one.truth[1], one.truth[5]
    print(family, round(low, 3), round(high, 3), one.card.verdict)
    assert high / -low < ONE_SIDED and one.card.codes == {"one_sided"}


# --- Calibration --------------------------------------------------------------------------------------------------------


def test_calibrated_sliders_of_three_rates_answer_alike_at_one(sliders: Sliders) -> None:
    """2026-11-21: 0.245, 0.252 and 0.254 at +1."""
    at_one: dict[str, list[float]] = {"+1": [], "half span": []}
    for kind in ("gentle", "good", "strong"):
        config, adapter = sliders.trained("sd1", "size", kind)
        path = calibrate(adapter, sliders.measured("sd1", "size", kind).card, Plugins.discover().facts("sd1"))
        mean_S = response(measured(config, path, "size", strengths=(-1.0, 1.0)).card.curves)
        at_one["+1"].append(float(mean_S[2]))
        at_one["half span"].append(float(mean_S[2] - mean_S[0]) / 2)
    print({name: np.round(values, 3).tolist() for name, values in at_one.items()})
    for values in at_one.values():
        assert max(values) / min(values) <= 1.2
    assert np.mean(at_one["half span"]) == pytest.approx(FRACTION, rel=0.1)

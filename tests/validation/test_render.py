"""Drawing writes the right files, and leaves model, pipeline and random numbers as they were."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from slider_hooks import Components, PromptEntry
from slider_plugin.errors import PluginError
from slider_plugin.validation.plan import Shot
from slider_plugin.validation.render import DrawSettings, Rendered, render

CAT = PromptEntry(name="cat", prompt="a cat")
ODD = PromptEntry(name="../Ünïcode 猫", prompt="猫", adapter_strength=-0.5)


class Denoiser(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.dropout = torch.nn.Dropout(0.5)
        self.frozen = torch.nn.Dropout(0.5).eval()
        self.gradient_checkpointing = True


class Adapter:
    def __init__(self) -> None:
        self.scale = 0.75
        self.entered: list[float] = []

    @contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        before, self.scale = self.scale, scale
        self.entered.append(scale)
        try:
            yield
        finally:
            self.scale = before


class Pipeline:
    """Paints noise of the generator, in the colour of prompt and scale, and writes down how it was called."""

    def __init__(self, denoiser: Denoiser, adapter: Adapter) -> None:
        self.denoiser, self.adapter = denoiser, adapter
        self.scheduler = SimpleNamespace(timesteps=[1000])
        self.calls: list[dict[str, Any]] = []
        self.fail_at: int | None = None

    def set_progress_bar_config(self, **config: Any) -> None:
        self._progress_bar_config = config

    def __call__(self, **call: Any) -> Any:
        state = {
            "scale": self.adapter.scale,
            "training": [module.training for module in self.denoiser.modules()],
            "grad": torch.is_grad_enabled(),
            "inference": torch.is_inference_mode_enabled(),
            "bar": dict(self._progress_bar_config),
        }
        self.calls.append({**call, "state": state})
        self.scheduler.timesteps = [1]
        self.table = torch.ones(1)  # a model may keep what it computes
        torch.rand(3)  # a pipeline that does not stick to its generators
        if self.fail_at == len(self.calls):
            raise RuntimeError("out of memory")
        return SimpleNamespace(images=[self._paint(p, g, call) for p, g in zip(call["prompt"], call["generator"], strict=True)])

    def _paint(self, prompt: str, generator: torch.Generator, call: dict[str, Any]) -> Image.Image:
        noise = torch.randint(0, 256, (4,), generator=generator).tolist()
        image = Image.new("RGB", (call["width"], call["height"]), (noise[0], noise[1], len(prompt) * 8))
        image.putpixel((0, 0), (int(10 * self.adapter.scale) + 100, 0, 0))
        return image


class Family:
    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    def build_pipeline(self, components: Components) -> Pipeline:
        return self.pipeline

    def validation_prompt_scale(self, entry: PromptEntry, global_strength: float) -> float:
        return global_strength if entry.adapter_strength is None else entry.adapter_strength


class Studio:
    """Everything that a rendering needs."""

    def __init__(self) -> None:
        self.denoiser = Denoiser()
        self.adapter = Adapter()
        self.pipeline = Pipeline(self.denoiser, self.adapter)
        self.components = Components(denoiser=self.denoiser, pipeline=self.pipeline, scheduler=None, prediction="epsilon")

    def draw(
        self, folder: Path, prompts: Any = (CAT, ODD), seeds: Any = (42, 43), strengths: Any = (-1, 0, 1), **settings: Any
    ) -> Rendered:
        defaults = {"width": 24, "height": 16, "steps": 3, "guidance_scale": 4.0, "negative_prompt": None, "batch_size": 3}
        return render(
            Family(self.pipeline), self.components, self.adapter, prompts,
            folder=folder, step=500, seeds=seeds, strengths=strengths, global_strength=1.0,
            settings=DrawSettings(**{**defaults, **settings}),
        )  # fmt: skip


@pytest.fixture
def studio() -> Studio:
    return Studio()


def test_every_picture_is_written_and_recorded(studio: Studio, tmp_path: Path) -> None:
    made = studio.draw(tmp_path)
    assert made.folder == tmp_path / "step_000500"
    cat = {p.name for p in made.folder.iterdir() if p.name.startswith("01_cat_seed42")}
    assert cat == {f"01_cat_seed42_{kind}.png" for kind in ("scale-1", "base", "scale+1", "pair", "strip")}
    assert len(made.images) == 2 * 3 + 2 * 4 and len(made.pairs) == len(made.strips) == 4
    everything = {*made.images.values(), *made.pairs, *made.strips, made.contact_sheet, made.prompts}
    assert {*made.folder.iterdir()} == everything
    assert all(path.name.isascii() for path in made.folder.iterdir())
    sidecar = json.loads((made.folder / "prompts.json").read_text(encoding="utf-8"))
    assert sidecar["step"] == 500 and sidecar["settings"]["guidance_scale"] == 4.0
    records = {(r["name"], r["prompt"], r["seed"], r["scale"]): r["file"] for r in sidecar["images"]}
    assert records == {(s.entry.name, s.entry.prompt, s.seed, s.scale): p.name for s, p in made.images.items()}


def test_images_are_those_of_their_prompt_seed_and_scale(studio: Studio, tmp_path: Path) -> None:
    made = studio.draw(tmp_path)
    for shot, path in made.images.items():
        with Image.open(path) as image:
            assert image.size == (24, 16)
            assert image.getpixel((0, 0)) == (int(10 * shot.scale) + 100, 0, 0)
            noise = torch.randint(0, 256, (4,), generator=torch.Generator().manual_seed(shot.seed)).tolist()
            assert image.getpixel((5, 5)) == (noise[0], noise[1], len(shot.entry.prompt) * 8)


def test_numbers_follow_the_library(studio: Studio, tmp_path: Path) -> None:
    low = PromptEntry(name="low", prompt="low", adapter_strength=-9.0)  # drawn first
    made = studio.draw(tmp_path, prompts=[CAT, low])
    assert {path.name[:6] for path in made.images.values()} == {"01_cat", "02_low"}


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_the_batch_does_not_matter(studio: Studio, tmp_path: Path, batch_size: int) -> None:
    reference = studio.draw(tmp_path / "a", batch_size=3)
    other = studio.draw(tmp_path / "b", prompts=(ODD, CAT), batch_size=batch_size)
    for shot, path in reference.images.items():
        assert path.read_bytes() == other.images[shot].read_bytes()


def test_calls_hold_one_scale_and_no_more_than_a_batch(studio: Studio, tmp_path: Path) -> None:
    studio.draw(tmp_path)
    assert studio.adapter.entered == [-1.0, -0.5, 0.0, 1.0]
    assert [(call["state"]["scale"], len(call["prompt"])) for call in studio.pipeline.calls] == [
        (-1.0, 3), (-1.0, 1), (-0.5, 2), (0.0, 3), (0.0, 1), (1.0, 3), (1.0, 1),
    ]  # fmt: skip
    call = studio.pipeline.calls[0]
    assert (call["width"], call["height"], call["num_inference_steps"], call["guidance_scale"]) == (24, 16, 3, 4.0)
    assert all(g.device.type == "cpu" for g in call["generator"])


def test_the_negative_prompt_is_passed_only_if_given(studio: Studio, tmp_path: Path) -> None:
    studio.draw(tmp_path, seeds=[1])
    assert all("negative_prompt" not in call for call in studio.pipeline.calls)
    studio.pipeline.calls.clear()
    studio.draw(tmp_path, seeds=[1], negative_prompt="")
    assert all(call["negative_prompt"] == [""] * len(call["prompt"]) for call in studio.pipeline.calls)


def snapshot(studio: Studio) -> dict[str, Any]:
    return {
        "scale": studio.adapter.scale,
        "modes": [module.training for module in studio.denoiser.modules()],
        "checkpointing": studio.denoiser.gradient_checkpointing,
        "scheduler": (id(studio.pipeline.scheduler), list(studio.pipeline.scheduler.timesteps)),
        "bar": getattr(studio.pipeline, "_progress_bar_config", {}),
        "random": torch.get_rng_state().tolist(),
        "grad": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("fail_at", [None, 2])
def test_nothing_stays_behind(studio: Studio, tmp_path: Path, fail_at: int | None) -> None:
    studio.denoiser.train()
    studio.denoiser.frozen.eval()
    studio.pipeline.set_progress_bar_config(desc="mine")
    studio.pipeline.fail_at = fail_at
    before = snapshot(studio)
    if fail_at is None:
        studio.draw(tmp_path)
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            studio.draw(tmp_path)
    assert snapshot(studio) == before
    for call in studio.pipeline.calls:
        state = call["state"]
        assert not any(state["training"]) and not state["grad"] and not state["inference"]
        assert state["bar"] == {"desc": "mine", "disable": True}


def test_training_can_use_what_the_model_kept(studio: Studio, tmp_path: Path) -> None:
    studio.draw(tmp_path)
    (studio.denoiser.weight * studio.pipeline.table).sum().backward()  # an inference tensor would raise here
    assert studio.denoiser.weight.grad is not None


def test_a_pipeline_without_scheduler_and_progress_bar_is_fine(studio: Studio, tmp_path: Path) -> None:
    class Plain:
        def __call__(self, **call: Any) -> Any:
            return SimpleNamespace(images=[Image.new("RGB", (8, 8))] * len(call["prompt"]))

    studio.pipeline = Plain()  # type: ignore[assignment]
    assert studio.draw(tmp_path).contact_sheet is not None


@pytest.mark.parametrize("images", [[], [Image.new("RGB", (8, 8))], torch.zeros(2, 3, 8, 8), ["a", "b"]])
def test_a_pipeline_that_answers_something_else_is_an_error(studio: Studio, tmp_path: Path, images: Any) -> None:
    studio.pipeline.__class__ = type("Odd", (Pipeline,), {"__call__": lambda self, **call: SimpleNamespace(images=images)})
    with pytest.raises(PluginError, match="build_pipeline"):
        studio.draw(tmp_path, prompts=[CAT])


def test_without_strengths_there_are_pairs_and_a_sheet(studio: Studio, tmp_path: Path) -> None:
    made = studio.draw(tmp_path, strengths=())
    assert made.strips == () and len(made.pairs) == 4 and made.contact_sheet is not None
    assert Shot(CAT, 42, 1.0) in made.images


def test_nothing_to_draw_touches_nothing(studio: Studio, tmp_path: Path) -> None:
    made = studio.draw(tmp_path, prompts=())
    assert made.images == {} and made.contact_sheet is None and not any(tmp_path.iterdir())
    assert studio.pipeline.calls == []


def test_drawing_again_replaces_the_files(studio: Studio, tmp_path: Path) -> None:
    first = studio.draw(tmp_path)
    names = sorted(first.folder.iterdir())
    first.pairs[0].write_bytes(b"old")
    second = studio.draw(tmp_path)
    assert sorted(second.folder.iterdir()) == names and second.pairs[0].read_bytes() != b"old"

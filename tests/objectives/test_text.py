"""Text sliders in the loop: what is asked, what is aimed at, with images and without, and what is wrong about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from trainers import assert_goes_on_to_the_same_weights, trainer_of

from slider_plugin import run
from slider_plugin.configfile import read_config
from slider_plugin.data.drawn import ANCHOR, AnchorSampler
from slider_plugin.data.sampler import CycleSampler
from slider_plugin.errors import ConfigError
from slider_plugin.objectives.losses import ANCHOR_CAP
from slider_plugin.preflight import preflight
from slider_plugin.registry import Plugins
from slider_plugin.training.loop import Trainer
from slider_plugin.training.seeds import generator

Project = Callable[..., Path]
WORDS = {"target": "a circle", "positive": "a large circle", "negative": "a small circle"}


@pytest.fixture
def text_project(project: Project) -> Project:
    """A project without images; keyword arguments as those of `project`."""

    def write(family: str = "sd1", **keys: Any) -> Path:
        keys = {"slider_objective": "text", "slider_text": WORDS, "text_rollout_steps": 3} | keys
        path = project(family, **keys)
        written = json.loads(path.read_text())
        del written["data_backend_config"]
        path.write_text(json.dumps(written))
        return path

    return write


def shaken(trainer: Trainer, size: float = 0.05) -> Trainer:
    """The same with something in its adapter."""
    with torch.no_grad():
        for name, parameter in trainer.adapter.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=size, generator=torch.Generator().manual_seed(3))
    return trainer


def embedded(trainer: Trainer, prompt: str, count: int) -> Tensor:
    return torch.stack([trainer.data.prompts[prompt]["prompt_embeds"]] * count)


def unet(trainer: Trainer, noisy: Tensor, time: Tensor, prompt: str, scale: float) -> Tensor:
    with torch.no_grad(), trainer.adapter.scaled(scale):
        answer: Tensor = trainer.components.denoiser(noisy, time, embedded(trainer, prompt, len(noisy))).sample
        return answer


# --- The formula --------------------------------------------------------------------------------------------------------


def test_the_loss_is_its_formula_on_noised_images(project: Project) -> None:
    """Written out for a positive and a negative draw, at the strengths of their buckets."""
    trainer = shaken(trainer_of(project("sd1", slider_objective="text", slider_text=WORDS, text_guidance=0.8)))
    for _ in range(2):
        draw = next(trainer.sampler)
        batch = trainer.data.batch(draw)
        t = trainer.noise.draw_time(2, generator(1, "time", 0))
        e = torch.randn(batch.clean_BCHW.shape, generator=generator(1, "noise", 0))
        a = trainer.components.scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        x_t = a.sqrt() * batch.clean_BCHW + (1 - a).sqrt() * e
        base, more, less = (unet(trainer, x_t, t, WORDS[name], 0.0) for name in ("target", "positive", "negative"))
        wanted = base + draw.scale * 0.8 * (more - less)
        expected = ((unet(trainer, x_t, t, WORDS["target"], draw.scale) - wanted) ** 2).mean()
        with torch.no_grad(), trainer.adapter.scaled(draw.scale):
            assert float(trainer.loss(batch)) == pytest.approx(float(expected), rel=1e-4)
        assert draw.scale == (0.5 if draw.position == 0 else -0.5)


def test_without_images_the_model_draws_them_with_the_adapter_at_the_drawn_sign(text_project: Project) -> None:
    """DDIM's three lines, against the noisy latents that a draw asks about."""
    trainer = shaken(trainer_of(text_project()))
    alphas = trainer.components.scheduler.alphas_cumprod
    seen = []
    for sign in (1.0, -1.0):
        draw = next(trainer.sampler)
        assert draw.scale == sign
        batch = trainer.data.batch(draw)
        assert batch.clean_BCHW.shape == (2, 4, 8, 8) and not batch.clean_BCHW.any() and batch.files == ()
        (asked,) = trainer._questions([batch])
        ends, last = trainer.noise.draw_time(2, generator(1, "time", 0)), len(alphas) - 1
        count = -(-3 * (last - int(ends.min())) // last)
        now, x = torch.full((2,), last), torch.randn((2, 4, 8, 8), generator=generator(1, "noise", 0))
        for step in range(1, count + 1):
            e = unet(trainer, x, now, WORDS["target"], sign)
            a = alphas[now].reshape(-1, 1, 1, 1)
            x0 = (x - (1 - a).sqrt() * e) / a.sqrt()
            now = ends if step == count else (last - (last - ends) * step / count).round().long()
            b = alphas[now].reshape(-1, 1, 1, 1)
            x = b.sqrt() * x0 + (1 - b).sqrt() * e
        assert torch.equal(asked.ask.time, ends) and torch.allclose(asked.ask.noisy, x, atol=1e-4)
        seen.append(asked.ask.noisy)
    assert not torch.allclose(*seen, atol=1e-4), "the adapter has its part in what is drawn"


def test_what_the_model_draws_may_be_guided(text_project: Project) -> None:
    """One step of DDIM with `f("") + 3 (f(prompt) - f(""))`."""
    trainer = shaken(trainer_of(text_project(text_rollout_steps=1, text_rollout_guidance=3)))
    (asked,) = trainer._questions([trainer.data.batch(next(trainer.sampler))])
    first, e = torch.full((2,), len(trainer.components.scheduler.alphas_cumprod) - 1), asked.noise
    without, told = (unet(trainer, e, first, prompt, 1.0) for prompt in ("", WORDS["target"]))
    clean, found = trainer.noise.apart(e, without + 3 * (told - without), first)
    assert torch.allclose(asked.ask.noisy, trainer.noise.add_noise(clean, found, asked.ask.time), atol=1e-4)
    assert not torch.allclose(without, told, atol=1e-4)


def test_guidance_where_nothing_is_drawn_is_warned_of(project: Project) -> None:
    path = project("sd1", slider_objective="text", slider_text=WORDS, text_rollout_guidance=3)
    config = read_config(path, (), Plugins.discover().facts)[0]
    warnings = preflight(config, Plugins.discover().load("sd1")).warnings
    assert any("text_rollout_guidance changes nothing" in warning for warning in warnings)


def test_all_frozen_prompts_are_answered_in_one_forward(text_project: Project) -> None:
    words = WORDS | {"attributes": ["red", "blue"]}
    trainer = trainer_of(text_project(slider_text=words, text_rollout_steps=1, timestep_range=[0.9, 1.0]))
    asked: list[tuple[int, bool]] = []
    trainer.components.denoiser.register_forward_pre_hook(
        lambda module, arguments: asked.append((len(arguments[0]), torch.is_grad_enabled()))
    )
    trainer.losses([trainer.data.batch(next(trainer.sampler))])
    assert asked == [(2, False), (2 * (1 + 4), False), (2, True)], "the rollout, the frozen prompts, the adapter"


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_both_signs_in_one_forward_are_the_same_losses(text_project: Project, family: str) -> None:
    trainer = shaken(trainer_of(text_project(family, slider_text=WORDS | {"anchors": ["a dog"]})))
    batches = [trainer.data.batch(next(trainer.sampler)) for _ in range(3)]
    with torch.no_grad(), trainer.adapter.scaled(trainer.scale(batches)):
        together = [float(loss) for loss in trainer.losses(batches)]
    for batch, loss in zip(batches, together, strict=True):
        with torch.no_grad(), trainer.adapter.scaled(batch.draw.scale):
            assert float(trainer.loss(batch)) == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("family", ["kandinsky5_image", "z_image", "ernie", "omnigen", "cosmos3"])
def test_prompts_of_different_length_are_answered_as_each_alone(text_project: Project, family: str) -> None:
    """Also by models that share no forward at two strengths."""
    words = WORDS | {"positive": "a very large circle in the middle of a page", "negative": "small"}
    trainer = trainer_of(text_project(family, slider_text=words, text_rollout_steps=1))
    (asked,) = trainer._questions([trainer.data.batch(next(trainer.sampler))])
    asks = trainer.objective.asks(asked)
    for ask, answer in zip(asks, trainer._frozen(asks), strict=True):
        assert torch.allclose(answer, trainer._frozen([ask])[0], atol=1e-4)


def test_it_learns_the_direction_between_the_prompts(text_project: Project) -> None:
    trainer = trainer_of(text_project(learning_rate=5e-3, text_guidance=1.0, max_train_steps=30))
    losses = [sum(trainer.optimizer_step().losses().values()) for _ in range(30)]
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])


# --- Runs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "z_image", "flux", "wan"])
def test_a_run_without_images(text_project: Project, tmp_path: Path, family: str) -> None:
    words = [WORDS | {"anchors": ["a dog", ""]}, WORDS | {"target": "a square", "attributes": ["red", "blue"]}]
    path = text_project(family, slider_text=words, max_train_steps=2)
    outcome = run.train(read_config(path, (), Plugins.discover().facts)[0])
    assert outcome.finished and outcome.adapter
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {key for row in rows for key in row if key.startswith("loss/")} == {"loss/positive", "loss/negative", "loss/anchor"}
    with safe_open(outcome.adapter, "pt") as opened:
        facts = opened.metadata()
    assert facts["slider.objective"] == "text" and "-1" in facts["slider.strengths"] and "1" in facts["slider.strengths"]
    again = read_config(tmp_path / "out" / "config.json", (), Plugins.discover().facts)[0]
    assert [words.target for words in again.slider_text] == ["a circle", "a square"]


def test_neutral_images_are_preserved_beside_prompts(project: Project, tmp_path: Path) -> None:
    path = project("sd1", neutral=True, slider_objective="text", slider_text=WORDS, text_rollout_steps=2)
    entries = json.loads((tmp_path / "buckets.json").read_text())
    (tmp_path / "buckets.json").write_text(json.dumps(entries[-1:]))
    trainer = trainer_of(path)
    draws = [next(trainer.sampler) for _ in range(6)]
    assert [(d.bucket, d.scale) for d in draws[:3]] == [("(text +)", 1.0), ("(text -)", -1.0), ("plain", 1.0)]
    assert [d.scale for d in draws if d.neutral] == [1.0, -1.0]
    batch = trainer.data.batch(draws[2])
    assert batch.clean_BCHW.any() and batch.files
    with trainer.adapter.scaled(1.0):
        assert float(trainer.loss(batch).detach()) == 0.0


def test_a_run_that_stopped_goes_on_to_the_same_weights(text_project: Project, tmp_path: Path) -> None:
    words = WORDS | {"anchors": ["a dog", "a cat"]}
    path = text_project(slider_text=words, random_strength="on", max_train_steps=5, checkpoint_step_interval=2)
    assert_goes_on_to_the_same_weights(path, tmp_path / "out")


# --- Anchors ------------------------------------------------------------------------------------------------------------


def test_anchors_take_turns_at_both_signs_after_each_cycle(project: Project) -> None:
    words = WORDS | {"anchors": ["a dog", "a cat"]}
    trainer = trainer_of(project("sd1", slider_objective="text", slider_text=words))
    draws = [next(trainer.sampler) for _ in range(15)]
    assert [draw.position for draw in draws] == list(range(15)) and trainer.cycle == 3
    anchors = [draw for draw in draws if draw.bucket == ANCHOR]
    assert anchors == draws[2::3] and [draw.scale for draw in anchors] == [0.5, 0.5, -0.5, -0.5, 0.5]
    for draw, prompt in zip(anchors, ["a dog", "a cat"] * 2, strict=False):
        batch = trainer.data.batch(draw)
        assert torch.equal(batch.conditioning[0]["prompt_embeds"], trainer.data.prompts[prompt]["prompt_embeds"])
        assert batch.clean_BCHW.any(), "noised images, where there are any"
    folders = {file.parent.name for draw in anchors for file in trainer.data.batch(draw).files}
    assert folders == {"more", "less"}


def test_an_anchor_is_kept_at_the_frozen_answer_and_its_loss_is_capped(text_project: Project) -> None:
    trainer = trainer_of(text_project(slider_text=WORDS | {"anchors": ["a dog"]}))
    batch = next(trainer.data.batch(draw) for draw in (next(trainer.sampler) for _ in range(3)) if draw.bucket == ANCHOR)
    with trainer.adapter.scaled(batch.draw.scale):
        assert float(trainer.loss(batch).detach()) == 0.0
    shaken(trainer, 1.0)
    with torch.no_grad(), trainer.adapter.scaled(batch.draw.scale):
        (asked,) = trainer._questions([batch])
        (frozen,), (answer,) = trainer._frozen([asked.ask]), trainer._answers([asked.ask])
        cap = ANCHOR_CAP * float(frozen.square().mean())
        assert float((answer - frozen).square().mean()) > 2 * cap
        assert float(trainer.loss(batch)) == pytest.approx(cap, rel=1e-4)


def test_the_place_among_anchors_is_kept() -> None:
    from slider_plugin.data.drawn import text_infos

    def sampler() -> AnchorSampler:
        return AnchorSampler(CycleSampler(text_infos(3, 2), 1), 2, 2, 1.0)

    whole, part = sampler(), sampler()
    draws = [next(whole) for _ in range(30)]
    assert [next(part) for _ in range(12)] == draws[:12]
    again = sampler()
    again.load_state_dict(part.state_dict())
    assert [next(again) for _ in range(18)] == draws[12:]
    with pytest.raises(ValueError, match="without anchors"):
        again.load_state_dict(CycleSampler(text_infos(3, 2), 1).state_dict())


# --- What is wrong ------------------------------------------------------------------------------------------------------


def told(path: Path, check: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:
        config = read_config(path, (), Plugins.discover().facts)[0]
        preflight(config, Plugins.discover().load(config.model_family))
    return str(caught.value)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"slider_text": None}, "slider_text: slider_objective text needs it"),
        ({"slider_text": WORDS | {"negative": "a large circle "}}, "is the positive prompt, too: nothing says what changes"),
        ({"slider_text": WORDS | {"attributes": ["red", "red"]}}, "attributes: ['red', 'red'] has one entry twice"),
        ({"slider_text": [WORDS, {"target": "x"}]}, "slider_text, entry 2: positive: it is missing"),
        ({"slider_text": WORDS | {"postive": "x"}}, "postive"),
        ({"slider_text": "a circle"}, "slider_text: it must be an object of prompts, or a list, not a text"),
        ({"slider_objective": "bucket"}, "there are no images"),
        ({"slider_objective": "txt"}, "slider_objective: 'txt' is not among bucket, pair, text"),
        ({"pair_mask": 0.1}, "pair_mask: it is for slider_objective pair, and this one is text"),
        ({"objective_config": {"a": 1}}, "objective_config: slider_objective text has keys of its own"),
        ({"random_strength": "1,0.5"}, "random_strength: '1,0.5' is neither on, off nor two rising numbers"),
        ({"controlnet_model_name_or_path": "x"}, "slider_objective text without images has nothing to show it"),
    ],
)
def test_contradictions_are_told_before_anything_is_loaded(text_project: Project, keys: dict[str, Any], said: str) -> None:
    assert said in told(text_project(**keys))


def test_images_of_one_sign_are_an_error(project: Project, tmp_path: Path) -> None:
    path = project("sd1", slider_objective="text", slider_text=WORDS)
    entries = json.loads((tmp_path / "buckets.json").read_text())
    (tmp_path / "buckets.json").write_text(json.dumps(entries[:1]))
    assert "there are positive images and no negative ones" in told(path)


def test_prompts_given_to_another_objective_are_an_error(project: Project) -> None:
    assert "slider_text: it is for slider_objective text, and this one is bucket" in told(project("sd1", slider_text=WORDS))


def test_a_model_of_sounds_needs_sounds(text_project: Project) -> None:
    assert "ace_step makes no images to be drawn" in told(text_project("ace_step"))


def test_the_size_is_that_of_the_configuration(text_project: Project) -> None:
    config = read_config(text_project(resolution=70, gradient_accumulation_steps=2), (), Plugins.discover().facts)[0]
    checked = preflight(config, Plugins.discover().load("sd1"))
    assert checked.drawn == (64, 64, 1) and checked.size == (64, 64) and checked.cycle == 2 and not checked.warnings

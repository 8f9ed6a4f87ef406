"""Masks, ADDifT and random strengths in the loop, on pairs of images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from trainers import trainer_of

from slider_plugin.configfile import read_config
from slider_plugin.errors import ConfigError
from slider_plugin.registry import Plugins
from slider_plugin.training.loop import Trainer
from slider_plugin.training.seeds import generator

Project = Callable[..., Path]


def shaken(trainer: Trainer) -> Trainer:
    """The same with something in its adapter."""
    with torch.no_grad():
        for name, parameter in trainer.adapter.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(3))
    return trainer


def velocity(trainer: Trainer, noisy: Tensor, sigma: Tensor, told: object, scale: float) -> Tensor:
    with torch.no_grad(), trainer.adapter.scaled(scale):
        return -trainer.family.predict(trainer.components, noisy, 1 - sigma, told)  # z_image: negated, and told 1 - sigma


def test_the_loss_of_addift_is_its_formula_for_a_flow(project: Project) -> None:
    trainer = shaken(trainer_of(project("z_image", slider_objective="pair", pair_target="addift")))
    one, other = (trainer.data.batch(next(trainer.sampler)) for _ in range(2))
    sigma = trainer.noise.draw_time(2, generator(1, "time", 0))
    s, e = sigma.reshape(-1, 1, 1, 1), torch.randn(one.clean_BCHW.shape, generator=generator(1, "noise", 0))
    for batch, twin in ((one, other), (other, one)):
        x0, y0 = batch.clean_BCHW, twin.clean_BCHW
        assert batch.twin_BCHW is not None and torch.equal(batch.twin_BCHW, y0)
        wanted = velocity(trainer, (1 - s) * y0 + s * e, sigma, batch.conditioning, 0.0) + y0 - x0
        answer = velocity(trainer, (1 - s) * x0 + s * e, sigma, batch.conditioning, batch.draw.scale)
        with torch.no_grad(), trainer.adapter.scaled(batch.draw.scale):
            assert float(trainer.loss(batch)) == pytest.approx(float(((answer - wanted) ** 2).mean()), rel=1e-4)


def test_addift_trains_on_all_of_the_noise(project: Project) -> None:
    """On tenths of it alike: the published trainer visits five times in all."""
    trainer = trainer_of(project("sd1", slider_objective="pair", pair_target="addift"))
    batches = [trainer.data.batch(next(trainer.sampler)) for _ in range(2)]
    seen = []
    for cycle in range(200):
        for batch in batches:
            object.__setattr__(batch.draw, "position", 2 * cycle + batches.index(batch))
        both = [trainer._questions([batch])[0].ask.time for batch in batches]
        assert torch.equal(*both), "one time for both images"
        seen += both[0].tolist()
    tenths = torch.bincount(torch.tensor(seen) // 100, minlength=10)
    assert tenths.min() >= 20 and tenths.max() <= 60, "400 times, 40 expected in each"


def test_the_mask_is_that_of_the_two_images(project: Project) -> None:
    path = project("sd1", slider_objective="pair")
    trainer, plain = shaken(trainer_of(path, "--pair_mask", "0.1")), shaken(trainer_of(path))
    draw = next(trainer.sampler)
    batch = trainer.data.batch(draw)
    (asked,) = trainer._questions([batch])
    twins = trainer.data._latents([("less", file.parents[1] / "less" / file.name) for file in batch.files])
    d = (batch.clean_BCHW - twins).abs().mean(1, keepdim=True)
    w = torch.where(d >= 0.1 * d.amax((1, 2, 3), keepdim=True), 1.0, 0.1)
    assert 0 < (w == 0.1).sum() < w.numel(), "or this test says nothing"
    with torch.no_grad(), trainer.adapter.scaled(draw.scale):
        (answer,) = trainer._answers([asked.ask])
        error = (w * (answer - asked.noise) ** 2).mean((1, 2, 3)) / w.mean((1, 2, 3))
        assert float(trainer.loss(batch)) == pytest.approx(float(error.mean()), rel=1e-4)
    with torch.no_grad(), plain.adapter.scaled(draw.scale):
        assert float(plain.loss(batch)) != pytest.approx(float(error.mean()), rel=1e-3)


@pytest.mark.parametrize("objective", ["bucket", "pair"])
def test_a_random_strength_is_one_for_a_cycle_and_aims_at_that_share_of_the_way(project: Project, objective: str) -> None:
    pairs = objective == "pair"
    trainer = shaken(trainer_of(project("sd1", slider_objective=objective, random_strength="0.25,1", neutral=pairs)))
    shares = set()
    for cycle in range(4):
        draws = [next(trainer.sampler) for _ in range(trainer.cycle)]
        shares |= {trainer._share(draw) for draw in draws}
        assert len(shares) == cycle + 1 and all(0.25 <= share <= 1.0 for share in shares)
        share = trainer._share(draws[0])
        scales = [trainer.scale([trainer.data.batch(draw)]) for draw in draws]
        assert scales == [share * draw.scale for draw in draws] and {abs(draw.scale) for draw in draws} == {0.5}
        for draw in draws[:2]:
            batch = trainer.data.batch(draw)
            (asked,) = trainer._questions([batch])
            with torch.no_grad(), trainer.adapter.scaled(0.0):
                (frozen,) = trainer._answers([asked.ask])
            with torch.no_grad(), trainer.adapter.scaled(share * draw.scale):
                (answer,) = trainer._answers([asked.ask])
                wanted = frozen + share * (asked.noise - frozen)
                assert float(trainer.loss(batch)) == pytest.approx(float(((answer - wanted) ** 2).mean()), rel=1e-4)


def test_the_strength_of_a_pass_is_the_drawn_one(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    path = project("sd1", random_strength="on", signs_in_one_forward="no")
    trainer = trainer_of(path)
    seen: list[float] = []
    backward = trainer.accelerator.backward
    monkeypatch.setattr(trainer.accelerator, "backward", lambda loss: (seen.append(trainer.adapter.scale), backward(loss)))
    trainer.optimizer_step()
    assert seen[0] == -seen[1] and 0.125 <= seen[0] < 0.5
    again = trainer_of(path)
    assert again._share(next(again.sampler)) * 0.5 == seen[0], "by seed and position alone"


def test_keys_of_pairs_are_for_pairs(project: Project) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(project("sd1", pair_target="addift", pair_mask=0.5), (), Plugins.discover().facts)
    for key in ("pair_target", "pair_mask"):
        assert f"{key}: it is for slider_objective pair, and this one is bucket; take it out" in str(caught.value)

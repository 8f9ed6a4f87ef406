"""What a model draws itself: with an answer that is never wrong, exactly the noisy latents of the image that it knows."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from slider_hooks import Flow
from slider_plugin.training.noise import ContinuousDiffusionProcess, DiffusionProcess, FlowProcess, NoiseProcess
from slider_plugin.training.rollout import rollout, steps_to

ALPHAS = torch.cumprod(1.0 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)


def cosine(time_B: Tensor) -> Tensor:
    return torch.cos(0.5 * torch.pi * 0.99 * time_B.double()).square()


PROCESSES: dict[str, NoiseProcess] = {
    "flow": FlowProcess(Flow(), 1.0),
    "epsilon": DiffusionProcess(ALPHAS, "epsilon"),
    "v_prediction": DiffusionProcess(ALPHAS, "v_prediction"),
    "continuous": ContinuousDiffusionProcess(torch.empty(0), "epsilon", alpha_bar_at=cosine),
}


@pytest.fixture(params=list(PROCESSES))
def process(request: pytest.FixtureRequest) -> NoiseProcess:
    return PROCESSES[request.param]


def random(seed: int) -> Tensor:
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def mixed(process: NoiseProcess, noisy: Tensor, clean: Tensor, time_B: Tensor) -> Tensor:
    """The noise that is in `noisy` beside the clean latents."""
    amount = process.add_noise(torch.zeros_like(noisy), torch.ones_like(noisy), time_B)
    return (noisy - process.add_noise(clean, torch.zeros_like(noisy), time_B)) / amount


def test_an_answer_is_taken_apart_into_what_it_was_made_of(process: NoiseProcess) -> None:
    clean, noise, time_B = random(0), random(1), process.times(torch.tensor([0.1, 0.5, 0.9]))
    found = process.apart(process.add_noise(clean, noise, time_B), process.target(clean, noise, time_B), time_B)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, (clean, noise), strict=True))


def test_shares_are_times_turned_round(process: NoiseProcess) -> None:
    share_B = torch.tensor([0.0, 0.25, 1.0])
    assert torch.allclose(process.share(process.times(share_B)), share_B, atol=1e-3)
    assert torch.equal(process.times(torch.tensor([0.5, 0.5])), process.at(0.5, 2))


@pytest.mark.parametrize("steps", [1, 7])
def test_a_denoiser_that_is_never_wrong_leads_to_its_image(process: NoiseProcess, steps: int) -> None:
    """To each sample's own time; the noise is that of the beginning, where a little of the image may be mixed in already."""
    clean, begins, asked = random(0), random(1), []

    def never_wrong(noisy: Tensor, time_B: Tensor) -> Tensor:
        asked.append(process.share(time_B))
        return process.target(clean, mixed(process, noisy, clean, time_B), time_B)

    time_B = process.times(torch.tensor([0.02, 0.4, 0.8]))
    landed = rollout(process, never_wrong, begins, time_B, steps)
    noise = mixed(process, begins, clean, process.times(torch.ones(3)))
    assert torch.allclose(landed, process.add_noise(clean, noise, time_B), atol=2e-3)
    assert len(asked) == steps
    assert all(torch.equal(a > b, torch.ones(3, dtype=torch.bool)) for a, b in itertools.pairwise(asked))


def test_a_denoiser_with_the_wrong_sign_leads_elsewhere(process: NoiseProcess) -> None:
    clean, time_B = random(0), process.times(torch.full((3,), 0.3))

    def wrong(noisy: Tensor, time_B: Tensor) -> Tensor:
        return -process.target(clean, mixed(process, noisy, clean, time_B), time_B)

    assert (rollout(process, wrong, random(1), time_B, 8) - clean).abs().max() > 2.0


def test_a_rollout_takes_the_share_of_the_steps_that_lies_before_its_end(process: NoiseProcess) -> None:
    assert steps_to(process, process.times(torch.tensor([0.81, 0.9, 1.0])), 20) == 4
    assert steps_to(process, process.times(torch.ones(2)), 20) == 1
    assert steps_to(process, process.times(torch.zeros(2)), 20) == 20

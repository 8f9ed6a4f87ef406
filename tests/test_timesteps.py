"""Times of the noise and the weights of their losses, against distributions and formulas written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from slider_hooks import Components, Flow
from slider_plugin.configfile import read_config
from slider_plugin.errors import ConfigError, UserError
from slider_plugin.objectives.losses import learning_loss, preservation_loss
from slider_plugin.preflight import preflight
from slider_plugin.registry import Plugins
from slider_plugin.training.noise import DiffusionProcess, FlowProcess, noise_process
from slider_plugin.training.times import Times, intersection, logit_normal

Project = Callable[..., Path]
MANY = 20_000
KOLMOGOROV = 1.95 / math.sqrt(MANY)
"""What the largest distance of MANY draws from their distribution stays below, all but once in a thousand times."""


def furthest(drawn: Tensor, distribution: Callable[[Tensor], Tensor]) -> float:
    """The Kolmogorov-Smirnov distance of values from a cumulative distribution."""
    ordered = drawn.double().sort().values
    expected = distribution(ordered)
    ranks = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return float(torch.maximum(ranks[1:] - expected, expected - ranks[:-1]).max())


def normal(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def drawn(process: Any, seed: int = 1, size: tuple[int, ...] = ()) -> Tensor:
    times: Tensor = process.draw_time(MANY, torch.Generator().manual_seed(seed), size)
    return times


def part_of(distribution: Callable[[Tensor], Tensor], low: float, high: float) -> Callable[[Tensor], Tensor]:
    """The distribution of those values that lie inside a window."""
    below, above = distribution(torch.tensor([low, high], dtype=torch.float64))
    return lambda x: (distribution(x) - below) / (above - below)


@pytest.mark.parametrize(("mean", "scale", "shift"), [(0.0, 1.0, 1.0), (-0.5, 0.6, 1.0), (0.3, 1.5, 3.0)])
@pytest.mark.parametrize("window", [(0.0, 1.0), (0.25, 0.6), (0.9, 1.0)])
def test_logit_normal_times(mean: float, scale: float, shift: float, window: tuple[float, float]) -> None:
    """The logit of a time before the shift is normal; shifting by s adds ln s to it (arXiv 2403.03206)."""
    times = drawn(FlowProcess(Flow(), shift, window, (mean, scale)))
    distribution = part_of(lambda x: normal((torch.logit(x) - math.log(shift) - mean) / scale), *window)
    assert furthest(times, distribution) < KOLMOGOROV
    assert window[0] - 1e-6 <= float(times.min()) and float(times.max()) <= window[1] + 1e-6
    other = part_of(lambda x: normal((torch.logit(x) - math.log(shift) - mean - 0.3) / scale), *window)
    assert furthest(times, other) > KOLMOGOROV or window == (0.9, 1.0)  # the test would see another mean


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("window", [(0.0, 1.0), (0.25, 0.6)])
def test_uniform_times(shift: float, window: tuple[float, float]) -> None:
    times = drawn(FlowProcess(Flow(), shift, window))
    assert furthest(times, part_of(lambda x: x / (shift - (shift - 1) * x), *window)) < KOLMOGOROV
    assert window[0] - 1e-6 <= float(times.min()) and float(times.max()) <= window[1] + 1e-6


def test_a_window_at_the_very_end_of_a_distribution() -> None:
    """Where next to no share of the distribution lies, values stay inside, and are finite."""
    times = logit_normal(torch.tensor([0.0, 0.5, 1.0 - 2**-24]), 0.0, 0.1, 0.9, 1.0)
    assert torch.isfinite(times).all() and float(times.min()) >= 0.9 and float(times.max()) <= 1.0
    assert torch.equal(logit_normal(torch.zeros(1), 0.0, 1.0), torch.zeros(1))


def test_times_are_what_they_were_by_default() -> None:
    """Without a word about times, a run draws the numbers that it always drew."""
    generator = torch.Generator().manual_seed(3)
    u = torch.rand(4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(FlowProcess(Flow(), 3.0).draw_time(4, generator), 3.0 * u / (1.0 + 2.0 * u))
    steps = DiffusionProcess(torch.linspace(1, 0, 1000), "epsilon").draw_time(4, torch.Generator().manual_seed(3))
    assert torch.equal(steps, torch.randint(0, 1000, (4,), generator=torch.Generator().manual_seed(3)))


# --- Windows ----------------------------------------------------------------------------------------------------------


def components(time_range: tuple[float, float] = (0.0, 1.0), **config: Any) -> Components:
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000), 0)
    scheduler = SimpleNamespace(config=config, alphas_cumprod=alphas)
    return Components(denoiser=None, pipeline=None, scheduler=scheduler, prediction="epsilon", time_range=time_range)


def test_a_window_of_steps() -> None:
    facts = Plugins.discover().facts("sd1")
    steps = drawn(noise_process(facts, components(), Times(window=(0.2, 0.5))))
    assert (int(steps.min()), int(steps.max())) == (200, 499)
    assert abs(float((steps < 350).float().mean()) - 0.5) < 0.02
    with pytest.raises(UserError, match="none of the model's 1000 time steps lies in it"):
        noise_process(facts, components(), Times(window=(0.50001, 0.50002)))


def test_the_window_meets_the_expert_s_own_part() -> None:
    facts = Plugins.discover().facts("wan")
    times = drawn(noise_process(facts, components((0.875, 1.0), shift=3.0), Times(window=(0.5, 0.95))))
    assert float(times.min()) >= 0.875 - 1e-6 and float(times.max()) <= 0.95 + 1e-6
    with pytest.raises(UserError, match=r"\[0, 0.5\] holds nothing of \[0.875, 1\]"):
        noise_process(facts, components((0.875, 1.0)), Times(window=(0.0, 0.5)))
    assert intersection((0.0, 1.0), (0.0, 0.875)) == (0.0, 0.875)


# --- Shift ------------------------------------------------------------------------------------------------------------


def test_a_shift_of_one_s_own_wins() -> None:
    facts = Plugins.discover().facts("z_image")
    given = noise_process(facts, components(shift=6.0), Times(shift=2.0))
    assert furthest(drawn(given), lambda x: x / (2 - x)) < KOLMOGOROV
    assert furthest(drawn(noise_process(facts, components(shift=6.0))), lambda x: x / (6 - 5 * x)) < KOLMOGOROV


@pytest.mark.parametrize("size", [(32, 32), (128, 128), (96, 160)])
def test_a_shift_by_size_is_the_pipeline_s_and_the_scheduler_s(size: tuple[int, int]) -> None:
    """Drawn times, against the sigmas that diffusers' scheduler makes of even ones at this size."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.4, max_shift=1.3)
    loaded = Components(denoiser=None, pipeline=object.__new__(FluxPipeline), scheduler=scheduler, prediction="flow")
    process = noise_process(Plugins.discover().facts("flux"), loaded, Times(shift="auto"))
    found = process.draw_time(9, torch.Generator().manual_seed(4), size)
    even = torch.rand(9, generator=torch.Generator().manual_seed(4))
    mu = calculate_shift(size[0] * size[1] // 4, base_shift=0.4, max_shift=1.3)
    scheduler.set_timesteps(sigmas=even.tolist(), mu=mu)
    assert torch.allclose(found, scheduler.sigmas[:-1].float(), atol=1e-6)


@pytest.mark.parametrize(
    ("family", "keys", "said"),
    [
        ("z_image", {"snr_gamma": 5}, "snr_gamma: min-SNR weighs epsilon and v models, and z_image is a flow model"),
        ("sd1", {"timestep_sampling": "logit_normal"}, "timestep_sampling: it is for flow models, and sd1 predicts epsilon"),
        ("sd1", {"timestep_shift": 3}, "timestep_shift: it is for flow models"),
        ("sd1", {"flow_schedule_auto_shift": True}, "timestep_shift: it is for flow models"),
        ("wan", {"timestep_shift": "auto"}, "timestep_shift: auto is for pipelines that shift by the size of images, and wan"),
        ("auraflow", {"timestep_shift": "auto"}, "timestep_shift: auto is for pipelines that shift by the size of images"),
    ],
)
def test_what_means_nothing_to_a_family_is_found_beforehand(
    project: Project, family: str, keys: dict[str, Any], said: str
) -> None:
    config = read_config(project(family, **keys), (), Plugins.discover().facts)[0]
    with pytest.raises(ConfigError) as caught:
        preflight(config, Plugins.discover().load(family))
    assert said in str(caught.value) and len(caught.value.problems) == 1


# --- min-SNR ----------------------------------------------------------------------------------------------------------


def test_min_snr_weights_are_their_formulas() -> None:
    """min(snr, g) / snr for epsilon, min(snr, g) / (snr + 1) for v (arXiv 2303.09556), at pure noise and pure image, too."""
    from diffusers.training_utils import compute_snr

    loaded = components()
    time = torch.tensor([0, 10, 200, 600, 999])
    snr = compute_snr(loaded.scheduler, time)
    assert float(snr[0]) > 5 > float(snr[-1])
    alphas = loaded.scheduler.alphas_cumprod
    epsilon = DiffusionProcess(alphas, "epsilon", snr_gamma=5.0).weight(time)
    v = DiffusionProcess(alphas, "v_prediction", snr_gamma=5.0).weight(time)
    assert epsilon is not None and v is not None
    assert torch.allclose(epsilon, snr.clamp(max=5) / snr, rtol=1e-4)
    assert torch.allclose(v, snr.clamp(max=5) / (snr + 1), rtol=1e-4)
    ends = torch.tensor([0, 1])
    for prediction, wanted in (("epsilon", [0.0, 1.0]), ("v_prediction", [0.0, 0.0])):
        extreme = DiffusionProcess(torch.tensor([1.0, 0.0]), prediction, snr_gamma=5.0).weight(ends)
        assert extreme is not None
        assert torch.nan_to_num(extreme, nan=-1.0).tolist() == wanted
    assert DiffusionProcess(alphas, "epsilon").weight(time) is None


def test_a_run_s_gamma_reaches_its_noise() -> None:
    facts = Plugins.discover().facts("sd1")
    time = torch.tensor([0])
    weights = [noise_process(facts, components(), Times(snr_gamma=gamma)).weight(time) for gamma in (None, 1.0, 5.0)]
    assert weights[0] is None and weights[1] is not None and weights[2] is not None
    assert torch.allclose(weights[2], 5 * weights[1])


def test_weights_enter_both_losses_sample_by_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    answer, target = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    weights = torch.tensor([0.1, 1.0, 3.0])
    expected = sum(w * float(((n - t) ** 2).mean()) for w, n, t in zip(weights.tolist(), answer, target, strict=True)) / 3
    learnt, kept = learning_loss(answer, target, weights), preservation_loss(answer, target, weights)
    assert float(learnt) == pytest.approx(expected, rel=1e-5) and float(kept) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(learning_loss(answer, target), (answer - target).square().mean())


@pytest.mark.parametrize(("family", "keys"), [("sd1", {"snr_gamma": 0.1}), ("z_image", {"timestep_sampling": "logit_normal"})])
def test_the_loss_of_a_run_is_weighted_and_timed_as_asked(project: Project, family: str, keys: dict[str, Any]) -> None:
    from test_training import trainer_of

    from slider_plugin.training.seeds import generator

    trainer = trainer_of(project(family, timestep_range=[0.1, 0.7], neutral=True, **keys))
    draws = {draw.neutral: draw for draw in (next(trainer.sampler) for _ in range(3))}
    for neutral, draw in draws.items():
        batch = trainer.data.batch(draw)
        x0, process = batch.clean_BCHW, trainer.noise
        t = process.draw_time(len(x0), generator(1, "time", 0))
        if family == "sd1":
            assert int(t.min()) >= 100 and int(t.max()) < 700
            a = trainer.components.scheduler.alphas_cumprod[t]
            weight = (0.1 * (1 - a) / a).clamp(max=1.0)
            assert float(weight.min()) < 0.5
        else:
            assert float(t.min()) >= 0.1 and float(t.max()) <= 0.7
            weight = torch.ones(len(x0))
        e = torch.randn(x0.shape, generator=generator(1, "noise", 0))
        x_t, told = process.add_noise(x0, e, t), process.told(t)
        with torch.no_grad():
            for parameter in trainer.adapter.parameters():
                parameter += 0.02
            with trainer.adapter.scaled(0.0):
                frozen = process.output(trainer.family.predict(trainer.components, x_t, told, batch.conditioning))
            with trainer.adapter.scaled(draw.scale):
                answer = process.output(trainer.family.predict(trainer.components, x_t, told, batch.conditioning))
                error = (answer - (frozen if neutral else process.target(x0, e, t))).square().flatten(1).mean(1)
                assert float(trainer.loss(batch)) == pytest.approx(float((weight * error).mean()), rel=1e-5)

"""The noise processes against their formulas, and against the family's own scheduler and pipeline."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from slider_hooks import Components, Flow, one_minus_sigma
from slider_plugin.registry import Plugins
from slider_plugin.training.noise import DiffusionProcess, FlowProcess, noise_process

Load = Callable[[str], tuple[Any, Any]]


def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 4, 8, 8, generator=generator)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_diffusion_noising_and_target_are_the_scheduler_s(prediction: str) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction)
    process = DiffusionProcess(scheduler.alphas_cumprod, prediction)
    clean, noise = pair()
    steps = torch.tensor([0, 500, 999])
    assert torch.allclose(process.add_noise(clean, noise, steps), scheduler.add_noise(clean, noise, steps), atol=1e-6)
    wanted = noise if prediction == "epsilon" else scheduler.get_velocity(clean, noise, steps)
    assert torch.allclose(process.target(clean, noise, steps), wanted, atol=1e-6)


def test_cosmos_1_is_preconditioned_as_its_scheduler_says() -> None:
    """What the denoiser sees, what it is told, and that the right answer leads to the clean latents in one step."""
    from diffusers import EDMEulerScheduler

    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    family = Plugins.discover().facts("cosmos1")
    process = noise_process(family, Components(denoiser=None, pipeline=None, scheduler=scheduler, prediction="v_prediction"))
    clean, noise = pair()
    times = torch.tensor([0.01, 0.5, 0.99])
    sigmas = torch.distributions.Normal(0.0, 1.0).icdf(times).exp()  # ln(sigma) is normal, where r is drawn evenly
    for time, sigma, z, e in zip(times, sigmas, clean, noise, strict=True):
        x = 0.5 * z + sigma * e
        noisy = process.add_noise(z[None], e[None], time[None])
        assert torch.allclose(noisy[0], scheduler.precondition_inputs(x, sigma), atol=1e-5)
        assert torch.allclose(process.told(time[None]), scheduler.precondition_noise(sigma), atol=1e-5)
        answer = process.output(process.target(z[None], e[None], time[None]))
        assert torch.allclose(scheduler.precondition_outputs(x, answer[0], sigma), 0.5 * z, atol=1e-5)
    drawn = process.told(process.draw_time(20000, torch.Generator().manual_seed(1))) * 4
    assert abs(float(drawn.mean())) < 0.02 and abs(float(drawn.std()) - 1.0) < 0.02


def test_flow_formula() -> None:
    process = FlowProcess(Flow(sign=-1, time=one_minus_sigma), shift=1.0)
    clean, noise = pair()
    sigma = torch.tensor([0.0, 0.25, 1.0])
    noisy = process.add_noise(clean, noise, sigma)
    assert torch.equal(noisy[0], clean[0])
    assert torch.allclose(noisy[1], 0.75 * clean[1] + 0.25 * noise[1])
    assert torch.equal(noisy[2], noise[2])
    assert torch.equal(process.target(clean, noise, sigma), noise - clean)
    assert torch.equal(process.told(sigma), torch.tensor([1.0, 0.75, 0.0]))
    assert torch.equal(process.output(clean), -clean)


def test_shift_moves_time_towards_noise() -> None:
    flow = Flow()
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    plain = FlowProcess(flow, 1.0).draw_time(1000, generators[0])
    shifted = FlowProcess(flow, 3.0).draw_time(1000, generators[1])
    assert torch.allclose(shifted, 3 * plain / (1 + 2 * plain))
    assert float(plain.min()) >= 0.0 and float(shifted.max()) <= 1.0


class Oracle(torch.nn.Module):
    """Answers as a perfectly trained denoiser of one image would, through the conventions that the family declares."""

    def __init__(self, process: Any, clean: Tensor, config: Any, flip: str = "") -> None:
        super().__init__()
        self.process, self.clean, self.config, self.flip = process, clean, config, flip
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.in_channels = clean.shape[1]
        self.add_embedding = None

    def answer(self, noisy: Tensor, told: Tensor) -> Tensor:
        if isinstance(self.process, FlowProcess):
            sigma = told if self.flip == "time" else 1.0 - told
            sigma = sigma.clamp(min=1e-4).reshape(-1, 1, 1, 1)
            noise = (noisy - (1 - sigma) * self.clean) / sigma
            velocity = noise - self.clean
            return velocity if self.flip == "sign" else -velocity
        step = told.long().reshape(-1)
        alpha = self.process.alphas_cumprod_N[step].reshape(-1, 1, 1, 1)
        noise = (noisy - alpha.sqrt() * self.clean) / (1 - alpha).sqrt()
        true = self.process.target(self.clean.expand_as(noisy), noise, step)
        return -true if self.flip == "sign" else true

    def forward(self, sample: Any, time: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(sample, list):
            noisy = torch.stack(sample).squeeze(2)
            return (list(self.answer(noisy, time).unsqueeze(2)),)
        return (self.answer(sample, time.expand(len(sample))),)


# An integer timestep has no second direction to be flipped to.
@pytest.mark.parametrize(
    ("name", "flip"), [("sd1", ""), ("sd1", "sign"), ("z_image", ""), ("z_image", "sign"), ("z_image", "time")]
)
def test_the_family_s_own_pipeline_lands_on_the_clean_latent(load: Load, name: str, flip: str) -> None:
    """Sign and time conventions: with the denoiser replaced by the true answer, the real pipeline finds the image."""
    family, components = load(name)
    process = noise_process(family.facts, components)
    clean = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    pipeline = components.pipeline
    oracle = Oracle(process, clean, components.denoiser.config, flip)
    setattr(pipeline, family.facts.denoiser, oracle)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        latents = pipeline(
            prompt=["a circle"], height=32, width=32, num_inference_steps=20, guidance_scale=0.0 if name == "z_image" else 1.0,
            generator=[torch.Generator().manual_seed(1)], output_type="latent",
        ).images  # fmt: skip
    error = (latents - clean).abs().mean()
    assert (error < 0.02) if not flip else (error > 0.1), float(error)


@pytest.mark.parametrize("name", ["sd1", "z_image"])
def test_the_oracle_has_zero_loss_in_our_own_convention(load: Load, name: str) -> None:
    """The same oracle through `predict` and the declared conventions gives exactly the training target."""
    family, components = load(name)
    process = noise_process(family.facts, components)
    clean = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)).expand(3, -1, -1, -1)
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    time = process.draw_time(3, torch.Generator().manual_seed(2))
    components.denoiser = Oracle(process, clean[:1], components.denoiser.config)
    conditioning = [{"prompt_embeds": torch.zeros(4, 4)}] * 3
    noisy = process.add_noise(clean, noise, time)
    output = process.output(family.predict(components, noisy, process.told(time), conditioning))
    assert (output - process.target(clean, noise, time)).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["sd1", "z_image"])
def test_encoded_images_decode_to_themselves_in_the_pipeline_s_scaling(load: Load, name: str) -> None:
    """What the pipeline does before decoding undoes what `encode_images` does after encoding."""
    family, components = load(name)
    vae = components.pipeline.vae
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        latents = family.encode_images(components, images)
        raw = vae.encode(images).latent_dist.mode()
    undone = latents / vae.config.scaling_factor + ((vae.config.shift_factor or 0.0) if name == "z_image" else 0.0)
    assert torch.allclose(undone, raw, atol=1e-5)


@pytest.mark.parametrize(("config", "shift"), [({"shift": 3.0}, 3.0), ({"flow_shift": 5.0}, 5.0), ({}, 1.0)])
def test_the_published_shift_has_two_names(config: dict[str, float], shift: float) -> None:
    family = Plugins.discover().facts("wan")
    scheduler = SimpleNamespace(config=config)
    process = noise_process(family, Components(denoiser=None, pipeline=None, scheduler=scheduler, prediction="flow"))
    assert process.shift == shift  # type: ignore[attr-defined]

"""A known answer for noising, time, target and latents: the family's real pipeline around a denoiser that is never wrong.

The denoiser is replaced by one that knows the clean latents and the noise (that of its first call, or of each call where the
sampler mixes in new noise on its way): for the time that it is given, it answers what `Flow` or `Diffusion` of the family
says the right answer is, in the model's own layout. If sign, time and noise schedule are those of the published sampler, the
pipeline's scheduler then walks to the clean latents exactly; with a wrong sign or a reversed time it ends elsewhere. What
the pipeline finally hands to its autoencoder, brought back by `encode_images` from an autoencoder that returns just that, must
be the clean latents again: so the scaling of latents is checked as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from slider_hooks import Diffusion, Flow
from slider_plugin.errors import UserError
from slider_plugin.testing.subject import PROMPTS, Subject, answered_by
from slider_plugin.training.noise import ContinuousDiffusionProcess, DiffusionProcess, NoiseProcess, noise_process
from slider_plugin.validation.render import call_arguments, check_image, undisturbed

STEPS = 4  # of the sampler

NOISY = ("hidden_states", "sample", "x", "vision_tokens")
"""What denoisers call the noisy latents."""

TIME = ("timestep", "timesteps", "timestep_ratio", "t", "vision_timesteps")
"""What they call the time."""

OTHER_STREAMS = ("audio_hidden_states", "sound_tokens", "action_tokens")
"""What is denoised beside the noisy latents and answered behind them, by denoisers of sound and sight: it stands still."""


class _Captured(Exception):
    """The latents as the denoiser is given them."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents


def miss(subject: Subject, noise: Flow | Diffusion | None = None) -> float:
    """How far from the clean latents the pipeline lands: the largest difference, in units of their standard deviation.

    Args:
        subject: the family on its tiny model.
        noise: another noise process than the family's own, to see that a wrong one is noticed.
    """
    components = subject.components
    clean = _clean(subject)
    process = _process(subject, noise or subject.family.facts.noise)
    pipeline = subject.family.build_pipeline(components)
    answer = _truth(subject, clean, process)
    arguments = drawing_arguments(subject, pipeline, subject.family.facts.guidance_scale)
    with ExitStack() as stack:
        stack.enter_context(undisturbed(components, pipeline))
        for denoiser in (subject.denoiser, *_twins(subject)):
            stack.enter_context(answered_by(denoiser, answer))
        decoded = stack.enter_context(_watched_autoencoder(pipeline))
        drawn = pipeline(prompt=[PROMPTS[0]], generator=[torch.Generator().manual_seed(3)], **arguments)
    landed = _encoded_again(subject, decoded[0]) if decoded else _pixels(drawn.images[0])
    return float((landed - clean).abs().max() / clean.std())


def _twins(subject: Subject) -> list[Any]:
    """Denoisers of the same kind and sizes in the pipeline: one that answers without text, for guidance (Ideogram 4)."""

    def sizes(part: Any) -> list[torch.Size]:
        return [parameter.shape for parameter in part.parameters()]

    own, parts = subject.denoiser, getattr(subject.components.pipeline, "components", {}).values()
    return [part for part in parts if part is not own and type(part) is type(own) and sizes(part) == sizes(own)]


def left_over(scheduler: Any) -> float:
    """Standard deviation of the noise with which a sampler ends though nothing is wrong.

    EDM's stops at `sigma_min`, not at zero (Cosmos). UniPC tells the denoiser whole timesteps, which are not quite its sigmas.
    """
    config: Mapping[str, Any] = getattr(scheduler, "config", {})
    stops = float(config.get("sigma_min") or 0.0) if config.get("final_sigmas_type") == "sigma_min" else 0.0
    return stops + (1.0 / config["num_train_timesteps"] if config.get("use_flow_sigmas") else 0.0)


def drawing_arguments(subject: Subject, pipeline: Any, guidance_scale: float) -> dict[str, Any]:
    """Arguments of the pipeline's call for the test media's size."""
    wanted: dict[str, Any] = {
        "height": subject.size,
        "width": subject.size,
        "num_frames": subject.media().shape[2],
        "num_inference_steps": STEPS,
        "guidance_scale": guidance_scale,
    }
    if begins_with_an_image(pipeline):
        wanted["image"] = subject.first_image()
    return call_arguments(pipeline, wanted | dict(subject.family.facts.call_kwargs))


def begins_with_an_image(pipeline: Any) -> bool:
    """Whether a pipeline cannot draw without an image."""
    try:
        check_image(type(pipeline), None)
    except UserError:
        return True
    return False


def _clean(subject: Subject) -> Tensor:
    """Random clean latents; pixels stay inside the range of an image."""
    latents = subject.latents()
    return latents.clamp(-2.0, 2.0) * 0.45 if in_pixels(subject) else latents


def in_pixels(subject: Subject) -> bool:
    """Whether the denoiser works on the image itself; one whose latents `tiny_latents` states does not."""
    return not hasattr(subject.components.pipeline, "vae") and subject.family.facts.tiny_latents is None


def _process(subject: Subject, noise: Flow | Diffusion) -> NoiseProcess:
    from dataclasses import replace

    components = subject.components
    if isinstance(noise, Diffusion) and noise.prediction is not None:
        components = replace(components, prediction=noise.prediction)
    return noise_process(replace(subject.family.facts, noise=noise), components)


# --- The denoiser that is never wrong ---------------------------------------------------------------------------------


def _truth(subject: Subject, clean: Tensor, process: NoiseProcess) -> Callable[..., Any]:
    clean_model, like, plain = _in_the_model_s_layout(subject, clean)
    stochastic = "DDPM" in type(subject.components.scheduler).__name__
    noise: list[Tensor] = []

    room = _room_for_text(clean_model)
    clean_model, like = clean_model[:, room:], like[:, room:]

    def forward(*arguments: Any, **named: Any) -> Any:
        noisy, told = _noisy(arguments, named), _time(arguments, named)
        stacked = torch.stack(list(noisy)) if isinstance(noisy, list | tuple) else noisy
        room = _room_for_text(stacked)
        stacked = stacked[:, room:]
        shape = (*stacked.shape[:1], *like.shape[1:])
        found = stacked[tuple(slice(0, n) for n in shape)]
        known = clean_model[tuple(slice(0, n) for n in found.shape)]
        time_B = time_from(process, told.float().reshape(-1)[:1]).expand(len(found))
        if stochastic or not noise:
            noise[:] = [_noise_in(process, found, known.expand_as(found), time_B)[:1]]
        answer = torch.zeros(shape)
        truth = process.target(known.expand_as(found), noise[0].expand_as(found), time_B)
        answer[tuple(slice(0, n) for n in found.shape)] = process.output(truth)  # output() is its own inverse: a sign
        answer = torch.nn.functional.pad(answer, (0, 0, room, 0)) if room else answer
        if plain:
            return answer
        sample: Any = list(answer) if isinstance(noisy, list | tuple) else answer
        others = [_nothing(named[name]) for name in OTHER_STREAMS if name in named]
        return (sample, *others) if named.get("return_dict") is False else SimpleNamespace(sample=sample)

    return forward


def _nothing(stream: Tensor | None) -> Tensor | None:
    """The answer for a stream that stands still, or that this model could have and does not."""
    return None if stream is None else torch.zeros_like(stream)


def _room_for_text(latents: Tensor) -> int:
    """Tokens of zeros in front of those of the image in a sequence `(B, N, D)` that takes its text elsewhere (Ideogram 4)."""
    return int(latents[0].any(dim=-1).int().argmax()) if latents.ndim == 3 else 0


def _noise_in(process: NoiseProcess, noisy: Tensor, clean: Tensor, time_B: Tensor) -> Tensor:
    """The noise that `add_noise` mixed in."""
    nothing = torch.zeros_like(noisy)
    amount = process.add_noise(nothing, torch.ones_like(noisy), time_B)
    return (noisy - process.add_noise(clean, nothing, time_B)) / amount.clamp_min(1e-3)


def time_from(process: NoiseProcess, told_1: Tensor) -> Tensor:
    """Our time from what the denoiser was told.

    It is the time itself for most diffusion models, a linear function of it for flow models, and else something that rises.
    """
    if isinstance(process, ContinuousDiffusionProcess):
        return told_1 if process.time is None else _where(process.time, told_1.double())
    if isinstance(process, DiffusionProcess):
        return told_1.round().long()
    first, last = (process.told(torch.tensor([end])) for end in (0.0, 1.0))
    return ((told_1 - first) / (last - first)).clamp(0.0, 1.0)


def _where(rising: Callable[[Tensor], Tensor], value_1: Tensor) -> Tensor:
    """The r in 0..1 at which a rising function has a value, by bisection."""
    low_1, high_1 = torch.zeros_like(value_1), torch.ones_like(value_1)
    for _ in range(60):
        middle_1 = (low_1 + high_1) / 2
        below_1 = rising(middle_1) < value_1
        low_1, high_1 = torch.where(below_1, middle_1, low_1), torch.where(below_1, high_1, middle_1)
    return (low_1 + high_1) / 2


def first_answer(answer: Any) -> Tensor:
    """What a denoiser answered for the noisy latents, `(B, ...)`; one that is no class of diffusers may answer it plainly."""
    if isinstance(answer, Tensor):
        return answer
    first = answer[0] if isinstance(answer, tuple) else answer.sample
    return torch.stack(list(first)) if isinstance(first, list | tuple) else first


def _noisy(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    return arguments[0] if arguments else named[known_name(named, NOISY)]


def _time(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    return torch.as_tensor(arguments[1] if len(arguments) > 1 else named[known_name(named, TIME)])


def known_name(named: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """Which of the names an argument of the denoiser goes by. Raises AssertionError for a call that uses none of them."""
    found = next((name for name in names if name in named), None)
    assert found, (
        f"the denoiser is called with {', '.join(named)}, and the kit looks for one of {', '.join(names)}; "
        "give it the noisy latents and the time by position, in this order, or under one of these names"
    )
    return found


@torch.no_grad()
def _in_the_model_s_layout(subject: Subject, clean: Tensor) -> tuple[Tensor, Tensor, bool]:
    """The clean latents as `predict` hands them to the denoiser, something of the shape that the denoiser answers, and whether
    it answers a tensor and nothing around it."""
    real = type(subject.denoiser).forward
    outputs: list[tuple[Tensor, bool]] = []

    def capture(*arguments: Any, **named: Any) -> Any:
        answer = real(subject.denoiser, *arguments, **named)
        outputs.append((first_answer(answer), isinstance(answer, Tensor)))
        noisy = _noisy(arguments, named)
        raise _Captured(torch.stack(list(noisy)) if isinstance(noisy, list | tuple) else noisy)

    with answered_by(subject.denoiser, capture):
        try:
            subject.predict(clean, subject.conditioning())
        except _Captured as captured:
            return captured.latents.clone(), *outputs[0]
    raise AssertionError(f"predict of {subject.family.facts.name} never called its denoiser")


# --- What the pipeline hands on ---------------------------------------------------------------------------------------


@contextmanager
def _watched_autoencoder(pipeline: Any) -> Iterator[list[Tensor]]:
    """Note what is decoded, by `vae` or by a `decode` of the pipeline's own; empty for one that works in pixels."""
    decoded: list[Tensor] = []
    vae = getattr(pipeline, "vae", pipeline if hasattr(pipeline, "decode") else None)
    if vae is None:
        yield decoded
        return
    real = vae.decode

    def decode(latents: Tensor, *arguments: Any, **named: Any) -> Any:
        decoded.append(latents.detach().clone())
        return real(latents, *arguments, **named)

    vae.decode = decode
    try:
        yield decoded
    finally:
        del vae.decode


@torch.no_grad()
def _encoded_again(subject: Subject, decoded: Tensor) -> Tensor:
    """`encode_images` with an autoencoder that finds exactly what was decoded; without one there is nothing to undo."""
    vae = getattr(subject.components.pipeline, "vae", None)
    if vae is None:
        return decoded
    posterior = SimpleNamespace(mode=lambda: decoded, sample=lambda *_: decoded, mean=decoded)
    vae.encode = lambda *_, **__: SimpleNamespace(latent_dist=posterior, latents=decoded, latent=decoded)
    try:
        return subject.family.encode_images(subject.components, subject.media())
    finally:
        del vae.encode


def _pixels(image: Any) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1.0

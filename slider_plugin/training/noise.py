"""The noise processes: how images are noised, what the denoiser is told, what it should answer.

Shapes: B batch, C channels, H and W latent rows and columns. Video latents have one more dimension; all works on any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from slider_hooks import Components, Diffusion, Family, Flow
from slider_plugin.errors import UserError
from slider_plugin.training.times import WHOLE, Size, Times, even, intersection, logit_normal, shifted, size_shift, unshifted

LEAST_SIGNAL = 1e-3
"""Of pure noise, of which a model that predicts noise says nothing: a rollout begins as if so much of an image were in it."""


class NoiseProcess(Protocol):
    """What a training step needs to know about a noise process."""

    def draw_time(self, count: int, generator: torch.Generator, size: Size = ()) -> Tensor:
        """Random times `(count,)` in this process's own unit, for latents of a size."""
        ...

    def weight(self, time_B: Tensor) -> Tensor | None:
        """What the loss of each sample is multiplied by, `(B,)` in float32; None where all weigh 1."""
        ...

    def at(self, share: float, count: int) -> Tensor:
        """The time `(count,)` at a share 0 (image) to 1 (noise) of the way."""
        ...

    def times(self, share_B: Tensor) -> Tensor:
        """The same for shares `(B,)`."""
        ...

    def share(self, time_B: Tensor) -> Tensor:
        """The share of the way `(B,)` at which a time is."""
        ...

    def add_noise(self, clean_BCHW: Tensor, noise_BCHW: Tensor, time_B: Tensor) -> Tensor:
        """The noisy latents."""
        ...

    def target(self, clean_BCHW: Tensor, noise_BCHW: Tensor, time_B: Tensor) -> Tensor:
        """What `output` of the denoiser's answer should be."""
        ...

    def apart(self, noisy_BCHW: Tensor, answer_BCHW: Tensor, time_B: Tensor) -> tuple[Tensor, Tensor]:
        """The clean latents and the noise that an answer (`output`) stands for: `add_noise` and `target` turned round."""
        ...

    def told(self, time_B: Tensor) -> Tensor:
        """What the denoiser is told about the time."""
        ...

    def output(self, answer_BCHW: Tensor) -> Tensor:
        """The denoiser's answer in the common convention."""
        ...


def _like(values_B: Tensor, like_BCHW: Tensor) -> Tensor:
    return values_B.to(like_BCHW.device, torch.float32).reshape(-1, *(1,) * (like_BCHW.ndim - 1))


@dataclass(frozen=True)
class FlowProcess:
    """`x = (1 - sigma) x0 + sigma e`, `v = e - x0`. Times are sigma, 0 (image) to 1 (noise)."""

    flow: Flow
    shift: float
    time_range: tuple[float, float] = WHOLE
    logit: tuple[float, float] | None = None
    shift_by_size: Callable[[Size], float] | None = None

    def draw_time(self, count: int, generator: torch.Generator, size: Size = ()) -> Tensor:
        """Uniform or logit-normal, then shifted towards noise (arXiv 2403.03206, section 3.1 and eq. 23), in `time_range`."""
        shift = self.shift_by_size(size) if self.shift_by_size else self.shift
        low, high = (unshifted(sigma, shift) for sigma in self.time_range)
        u_B = torch.rand(count, generator=generator)
        time_B: Tensor = shifted(logit_normal(u_B, *self.logit, low, high) if self.logit else even(u_B, low, high), shift)
        return time_B

    def weight(self, time_B: Tensor) -> Tensor | None:
        return None

    def at(self, share: float, count: int) -> Tensor:
        return torch.full((count,), share)

    def times(self, share_B: Tensor) -> Tensor:
        return share_B

    def share(self, time_B: Tensor) -> Tensor:
        return time_B

    def add_noise(self, clean_BCHW: Tensor, noise_BCHW: Tensor, time_B: Tensor) -> Tensor:
        sigma_B111 = _like(time_B, clean_BCHW)
        return (1.0 - sigma_B111) * clean_BCHW + sigma_B111 * noise_BCHW

    def target(self, clean_BCHW: Tensor, noise_BCHW: Tensor, time_B: Tensor) -> Tensor:
        return noise_BCHW - clean_BCHW

    def apart(self, noisy_BCHW: Tensor, answer_BCHW: Tensor, time_B: Tensor) -> tuple[Tensor, Tensor]:
        """`x0 = x - sigma v`, `e = x + (1 - sigma) v`."""
        sigma_B111 = _like(time_B, noisy_BCHW)
        return noisy_BCHW - sigma_B111 * answer_BCHW, noisy_BCHW + (1.0 - sigma_B111) * answer_BCHW

    def told(self, time_B: Tensor) -> Tensor:
        return self.flow.time(time_B)

    def output(self, answer_BCHW: Tensor) -> Tensor:
        return answer_BCHW if self.flow.sign == 1 else -answer_BCHW


@dataclass(frozen=True)
class DiffusionProcess:
    """`x_t = sqrt(a_t) x0 + sqrt(1 - a_t) e` with `a_t` the scheduler's `alphas_cumprod`. Times are its integer steps.

    The target is `e`, or `v = sqrt(a_t) e - sqrt(1 - a_t) x0` (arXiv 2202.00512).
    """

    alphas_cumprod_N: Tensor
    prediction: str
    time_range: tuple[float, float] = WHOLE
    sign: int = 1
    snr_gamma: float | None = None

    def draw_time(self, count: int, generator: torch.Generator, size: Size = ()) -> Tensor:
        first, after_last = (round(share * len(self.alphas_cumprod_N)) for share in self.time_range)
        return torch.randint(first, after_last, (count,), generator=generator)

    def weight(self, time_B: Tensor) -> Tensor | None:
        """min-SNR: `min(snr, gamma) / snr` for epsilon, `min(snr, gamma) / (snr + 1)` for v; `snr = a / (1 - a)` (2303.09556).

        Both weigh the error of the clean image by `min(snr, gamma)`; at snr 0, pure noise, the first is 1.
        """
        if self.snr_gamma is None:
            return None
        alpha_B = self.alpha_bar(time_B).float()
        snr_B = alpha_B / (1.0 - alpha_B)
        if self.prediction == "epsilon":
            return (self.snr_gamma / snr_B).clamp(max=1.0)
        return snr_B.clamp(max=self.snr_gamma) / (snr_B + 1.0)

    def at(self, share: float, count: int) -> Tensor:
        return self.times(torch.full((count,), share, dtype=torch.float64))

    def times(self, share_B: Tensor) -> Tensor:
        return (share_B * (len(self.alphas_cumprod_N) - 1)).round().long()

    def share(self, time_B: Tensor) -> Tensor:
        return time_B.float() / (len(self.alphas_cumprod_N) - 1)

    def alpha_bar(self, time_B: Tensor) -> Tensor:
        """The cumulative alpha `(B,)` at a time."""
        return self.alphas_cumprod_N[time_B.cpu()]

    def _roots(self, time_B: Tensor, like_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        alpha_B = self.alpha_bar(time_B)
        return _like(alpha_B.sqrt(), like_BCHW), _like((1.0 - alpha_B).sqrt(), like_BCHW)

    def add_noise(self, clean_BCHW: Tensor, noise_BCHW: Tensor, time_B: Tensor) -> Tensor:
        signal_B111, sigma_B111 = self._roots(time_B, clean_BCHW)
        return signal_B111 * clean_BCHW + sigma_B111 * noise_BCHW

    def target(self, clean_BCHW: Tensor, noise_BCHW: Tensor, time_B: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return noise_BCHW
        signal_B111, sigma_B111 = self._roots(time_B, clean_BCHW)
        return signal_B111 * noise_BCHW - sigma_B111 * clean_BCHW

    def apart(self, noisy_BCHW: Tensor, answer_BCHW: Tensor, time_B: Tensor) -> tuple[Tensor, Tensor]:
        """`x0 = (x - sqrt(1 - a) e) / sqrt(a)`; of v, `x0 = sqrt(a) x - sqrt(1 - a) v` and `e = sqrt(1 - a) x + sqrt(a) v`."""
        signal_B111, sigma_B111 = self._roots(time_B, noisy_BCHW)
        if self.prediction == "epsilon":
            return (noisy_BCHW - sigma_B111 * answer_BCHW) / signal_B111.clamp_min(LEAST_SIGNAL), answer_BCHW
        clean_BCHW = signal_B111 * noisy_BCHW - sigma_B111 * answer_BCHW
        return clean_BCHW, sigma_B111 * noisy_BCHW + signal_B111 * answer_BCHW

    def told(self, time_B: Tensor) -> Tensor:
        return time_B

    def output(self, answer_BCHW: Tensor) -> Tensor:
        return answer_BCHW if self.sign == 1 else -answer_BCHW


@dataclass(frozen=True)
class ContinuousDiffusionProcess(DiffusionProcess):
    """The same over continuous time r, 0 (image) to 1 (noise), with the cumulative alpha a function that the family states."""

    alpha_bar_at: Callable[[Tensor], Tensor] = torch.ones_like
    time: Callable[[Tensor], Tensor] | None = None

    def draw_time(self, count: int, generator: torch.Generator, size: Size = ()) -> Tensor:
        return even(torch.rand(count, generator=generator), *self.time_range)

    def at(self, share: float, count: int) -> Tensor:
        return torch.full((count,), share)

    def times(self, share_B: Tensor) -> Tensor:
        return share_B

    def share(self, time_B: Tensor) -> Tensor:
        return time_B

    def alpha_bar(self, time_B: Tensor) -> Tensor:
        return self.alpha_bar_at(time_B)

    def told(self, time_B: Tensor) -> Tensor:
        return time_B if self.time is None else self.time(time_B)


def noise_process(family: Family, components: Components, times: Times | None = None) -> NoiseProcess:
    """The noise process that a family declares, with what its loaded scheduler adds and what a run asks for.

    Raises:
        UserError: the scheduler is of another kind, or the run's window and the denoiser's part of the noise do not meet.
    """
    config: Any = getattr(components.scheduler, "config", {})
    times = times or Times()
    window = intersection(times.window, components.time_range)
    if isinstance(family.noise, Flow):
        published = config.get("shift") or config.get("flow_shift") or 1.0  # two names: Euler's, and that of the multistep ones
        own = family.noise.shift if family.noise.shift is not None else float(published)
        if times.shift == "auto":
            return FlowProcess(family.noise, own, window, times.logit, size_shift(family, components.pipeline, config))
        return FlowProcess(family.noise, float(own if times.shift is None else times.shift), window, times.logit)
    assert isinstance(family.noise, Diffusion)
    stated, common = family.noise, (components.prediction, window, family.noise.sign, times.snr_gamma)
    if stated.alpha_bar is not None:
        return ContinuousDiffusionProcess(torch.empty(0), *common, stated.alpha_bar, stated.time)
    alphas: Tensor | None = getattr(components.scheduler, "alphas_cumprod", None)
    if alphas is None:
        raise UserError(
            f"the model's {type(components.scheduler).__name__} has no alphas_cumprod, so it is no discrete diffusion, "
            f"and {family.name} trains nothing else; use another version of the model"
        )
    process = DiffusionProcess(alphas.detach().float().cpu(), *common)
    first, after_last = (round(share * len(alphas)) for share in window)
    if first == after_last:
        raise UserError(f"timestep_range: none of the model's {len(alphas)} time steps lies in it; choose a wider one")
    return process

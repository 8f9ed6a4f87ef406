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


class NoiseProcess(Protocol):
    """What a training step needs to know about a noise process."""

    def draw_time(self, count: int, generator: torch.Generator) -> Tensor:
        """Random times `(count,)` in this process's own unit."""
        ...

    def at(self, share: float, count: int) -> Tensor:
        """The time `(count,)` at a share 0 (image) to 1 (noise) of the way."""
        ...

    def add_noise(self, clean_BCHW: Tensor, noise_BCHW: Tensor, time_B: Tensor) -> Tensor:
        """The noisy latents."""
        ...

    def target(self, clean_BCHW: Tensor, noise_BCHW: Tensor, time_B: Tensor) -> Tensor:
        """What `output` of the denoiser's answer should be."""
        ...

    def told(self, time_B: Tensor) -> Tensor:
        """What the denoiser is told about the time."""
        ...

    def output(self, answer_BCHW: Tensor) -> Tensor:
        """The denoiser's answer in the common convention."""
        ...


def _like(values_B: Tensor, like_BCHW: Tensor) -> Tensor:
    return values_B.to(like_BCHW.device, torch.float32).reshape(-1, *(1,) * (like_BCHW.ndim - 1))


WHOLE = (0.0, 1.0)
"""All of the noise."""


def _within(u_B: Tensor, low: float, high: float) -> Tensor:
    """Uniform values brought from 0..1 into a part of it."""
    return u_B if (low, high) == WHOLE else low + (high - low) * u_B


@dataclass(frozen=True)
class FlowProcess:
    """`x = (1 - sigma) x0 + sigma e`, `v = e - x0`. Times are sigma, 0 (image) to 1 (noise)."""

    flow: Flow
    shift: float
    time_range: tuple[float, float] = WHOLE

    def draw_time(self, count: int, generator: torch.Generator) -> Tensor:
        """Uniform, then shifted towards noise: `s u / (1 + (s - 1) u)` (arXiv 2403.03206, eq. 23); inside `time_range`."""
        low, high = (sigma / (self.shift - (self.shift - 1.0) * sigma) for sigma in self.time_range)
        u_B = _within(torch.rand(count, generator=generator), low, high)
        return self.shift * u_B / (1.0 + (self.shift - 1.0) * u_B)

    def at(self, share: float, count: int) -> Tensor:
        return torch.full((count,), share)

    def add_noise(self, clean_BCHW: Tensor, noise_BCHW: Tensor, time_B: Tensor) -> Tensor:
        sigma_B111 = _like(time_B, clean_BCHW)
        return (1.0 - sigma_B111) * clean_BCHW + sigma_B111 * noise_BCHW

    def target(self, clean_BCHW: Tensor, noise_BCHW: Tensor, time_B: Tensor) -> Tensor:
        return noise_BCHW - clean_BCHW

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

    def draw_time(self, count: int, generator: torch.Generator) -> Tensor:
        first, after_last = (round(share * len(self.alphas_cumprod_N)) for share in self.time_range)
        return torch.randint(first, after_last, (count,), generator=generator)

    def at(self, share: float, count: int) -> Tensor:
        return torch.full((count,), round(share * (len(self.alphas_cumprod_N) - 1)), dtype=torch.long)

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

    def told(self, time_B: Tensor) -> Tensor:
        return time_B

    def output(self, answer_BCHW: Tensor) -> Tensor:
        return answer_BCHW if self.sign == 1 else -answer_BCHW


@dataclass(frozen=True)
class ContinuousDiffusionProcess(DiffusionProcess):
    """The same over continuous time r, 0 (image) to 1 (noise), with the cumulative alpha a function that the family states."""

    alpha_bar_at: Callable[[Tensor], Tensor] = torch.ones_like
    time: Callable[[Tensor], Tensor] | None = None

    def draw_time(self, count: int, generator: torch.Generator) -> Tensor:
        return _within(torch.rand(count, generator=generator), *self.time_range)

    def at(self, share: float, count: int) -> Tensor:
        return torch.full((count,), share)

    def alpha_bar(self, time_B: Tensor) -> Tensor:
        return self.alpha_bar_at(time_B)

    def told(self, time_B: Tensor) -> Tensor:
        return time_B if self.time is None else self.time(time_B)


def noise_process(family: Family, components: Components) -> NoiseProcess:
    """The noise process that a family declares, with what its loaded scheduler adds."""
    config: Any = getattr(components.scheduler, "config", {})
    if isinstance(family.noise, Flow):
        published = config.get("shift") or config.get("flow_shift") or 1.0  # two names: Euler's, and that of the multistep ones
        shift = family.noise.shift if family.noise.shift is not None else published
        return FlowProcess(family.noise, float(shift), components.time_range)
    assert isinstance(family.noise, Diffusion)
    stated, common = family.noise, (components.prediction, components.time_range, family.noise.sign)
    if stated.alpha_bar is not None:
        return ContinuousDiffusionProcess(torch.empty(0), *common, stated.alpha_bar, stated.time)
    alphas: Tensor | None = getattr(components.scheduler, "alphas_cumprod", None)
    if alphas is None:
        raise UserError(
            f"the model's {type(components.scheduler).__name__} has no alphas_cumprod, so it is no discrete diffusion, "
            f"and {family.name} trains nothing else; use another version of the model"
        )
    alphas_N = alphas.detach().float().cpu()
    return DiffusionProcess(alphas_N, *common)

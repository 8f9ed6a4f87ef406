"""Which times of the noise are trained on: their distribution, its shift, and the part of the noise that it is kept to.

Times of a flow are sigma, 0 (image) to 1 (noise). A distribution is drawn through its quantiles, so that a window takes the
values that lie inside it, in the proportions that they have anyway; nothing is drawn twice.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from slider_hooks import Diffusion, Family, Flow
from slider_plugin.config import RunConfig
from slider_plugin.errors import UserError

Window = tuple[float, float]
Size = tuple[int, ...]
"""Of latents, without batch and channels."""

WHOLE: Window = (0.0, 1.0)
"""All of the noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """What a configuration says about times. The defaults are those of the model itself."""

    logit: tuple[float, float] | None = None
    """Mean and scale of the logit-normal distribution; None draws evenly."""

    shift: float | Literal["auto"] | None = None
    """None takes the family's, or that of the loaded scheduler."""

    window: Window = WHOLE
    """The part of the noise, 0 (image) to 1 (noise)."""

    snr_gamma: float | None = None
    """Of min-SNR loss weights; None for none."""

    @classmethod
    def of(cls, config: RunConfig) -> Times:
        """What a run asks for."""
        normal = (config.timestep_logit_mean, config.timestep_logit_scale)
        logit = normal if config.timestep_sampling == "logit_normal" else None
        return cls(logit=logit, shift=config.timestep_shift, window=config.timestep_range, snr_gamma=config.snr_gamma or None)


def time_problems(config: RunConfig, family: Family, pipeline_class: type | None) -> list[str]:
    """What these keys cannot mean for this family; one line each.

    Args:
        config: the run.
        family: its facts.
        pipeline_class: of the model, where it is known beforehand.
    """
    problems = []
    if isinstance(family.noise, Flow) and config.snr_gamma:
        problems.append(
            f"snr_gamma: min-SNR weighs epsilon and v models, and {family.name} is a flow model; take it out, or prefer the "
            "middle of the noise with timestep_sampling: logit_normal"
        )
    if isinstance(family.noise, Diffusion):
        given = {"timestep_sampling": config.timestep_sampling == "logit_normal", "timestep_shift": config.timestep_shift}
        problems += [
            f"{key}: it is for flow models, and {family.name} predicts epsilon or v, with its times drawn evenly; take it out"
            for key, value in given.items()
            if value
        ]
    elif config.timestep_shift == "auto" and pipeline_class is not None and not _size_shift(family, pipeline_class):
        problems.append(_no_size_shift(family))
    return problems


def intersection(window: Window, time_range: Window) -> Window:
    """The part of the noise that the user wants and the denoiser answers for. Raises UserError if there is none."""
    low, high = max(window[0], time_range[0]), min(window[1], time_range[1])
    if low < high:
        return low, high
    raise UserError(
        f"timestep_range: {_written(window)} holds nothing of {_written(time_range)}, the part of the noise that this denoiser "
        "answers for; choose a range that reaches into it, or the model's other denoiser"
    )


def _written(window: Window) -> str:
    return f"[{window[0]:g}, {window[1]:g}]"


# --- Distributions ----------------------------------------------------------------------------------------------------


def shifted(sigma: Any, shift: float) -> Any:
    """`s t / (1 + (s - 1) t)`: towards noise above 1 (arXiv 2403.03206, eq. 23)."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def unshifted(sigma: float, shift: float) -> float:
    """What `shifted` makes this of."""
    return sigma / (shift - (shift - 1.0) * sigma)


def even(u_B: Tensor, low: float, high: float) -> Tensor:
    """Uniform values `(B,)` brought from 0..1 into a part of it."""
    return u_B if (low, high) == WHOLE else low + (high - low) * u_B


def logit_normal(u_B: Tensor, mean: float, scale: float, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Values `(B,)` whose logit is normal (arXiv 2403.03206, section 3.1), from uniform ones, none outside low..high.

    Args:
        u_B: float32 in 0..1.
        mean: of the logit; above 0 prefers noise.
        scale: standard deviation of the logit.
        low: the least value.
        high: the largest value.
    """
    ends = (torch.logit(torch.tensor((low, high), dtype=torch.float64)) - mean) / scale
    below, above = torch.special.ndtr(ends).tolist()
    share_B = below + (above - below) * u_B.double()
    return torch.sigmoid(mean + scale * torch.special.ndtri(share_B)).clamp(low, high).to(u_B.dtype)


# --- Shift by size ----------------------------------------------------------------------------------------------------


def size_shift(family: Family, pipeline: Any, scheduler_config: Mapping[str, Any]) -> Callable[[Size], float]:
    """The shift by the size of latents, as the model's own pipeline has it: diffusers' `calculate_shift`, from Flux.

    More tokens need more noise (arXiv 2403.03206, section 5.3.2). `calculate_shift` gives its logarithm, a straight line
    through two lengths of the token sequence; tokens are 2x2 latents, as in every pipeline that has it.

    Raises:
        UserError: the model's pipeline has no such rule.
    """
    calculate = _size_shift(family, type(pipeline))
    if calculate is None:
        raise UserError(_no_size_shift(family))
    said = {
        "base_seq_len": scheduler_config.get("base_image_seq_len"),
        "max_seq_len": scheduler_config.get("max_image_seq_len"),
        "base_shift": scheduler_config.get("base_shift"),
        "max_shift": scheduler_config.get("max_shift"),
    }
    numbers = {name: value for name, value in said.items() if value is not None}
    grows = scheduler_config.get("time_shift_type", "exponential") == "exponential"

    def shift(size: Size) -> float:
        height, width = size
        mu = float(calculate((height // 2) * (width // 2), **numbers))
        return math.exp(mu) if grows else mu

    return shift


def _size_shift(family: Family, pipeline_class: type) -> Callable[..., float] | None:
    """`calculate_shift` of the module that the pipeline is in; none for videos, whose tokens it does not count."""
    found: Callable[..., float] | None = getattr(sys.modules.get(pipeline_class.__module__), "calculate_shift", None)
    return found if family.modalities == ("image",) else None


def _no_size_shift(family: Family) -> str:
    return f"timestep_shift: auto is for pipelines that shift by the size of images, and {family.name} does not; give a number"

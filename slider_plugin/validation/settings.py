"""How the configuration of a run wants its images drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slider_hooks import Components
from slider_plugin.config import RunConfig
from slider_plugin.preflight import control_image, image_file, num_frames
from slider_plugin.validation.render import DrawSettings

if TYPE_CHECKING:
    from slider_plugin.family import LoadedFamily

PIXELS_AT_ONCE = 8 * 512 * 512
"""Of the images of a validation that are drawn in one batch."""


def validation_seeds(config: RunConfig, count: int) -> range:
    """The seeds of that many images of a prompt."""
    first_seed = config.seed if config.validation_seed is None else config.validation_seed
    return range(first_seed, first_seed + count)


def draw_settings(config: RunConfig, family: LoadedFamily, components: Components, size: tuple[int, int]) -> DrawSettings:
    """How the configuration wants images of `size` (width, height) drawn."""
    guidance = family.facts.guidance_scale if config.validation_guidance is None else config.validation_guidance
    return DrawSettings(
        width=size[0],
        height=size[1],
        steps=config.validation_num_inference_steps,
        guidance_scale=guidance,
        negative_prompt=config.validation_negative_prompt,
        num_frames=num_frames(config),
        image=image_file(config),
        control=None if components.control is None else str(control_image(config)),
        extra=family.facts.call_kwargs,
        batch_size=max(1, PIXELS_AT_ONCE // (size[0] * size[1])),
    )


def validation_size(config: RunConfig) -> tuple[int, int] | None:
    """(width, height) of `validation_resolution`."""
    if config.validation_resolution is None:
        return None
    width, _, height = config.validation_resolution.partition("x")
    return int(width), int(height or width)

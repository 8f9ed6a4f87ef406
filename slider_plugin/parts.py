"""The parts of a loaded model besides its denoiser: what encodes prompts and images, and what decodes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.nn import Module

    from slider_hooks import Components


def other_parts(components: Components) -> dict[str, Any]:
    """By name, everything that the pipeline holds besides denoiser, ControlNet and scheduler: models, tokenizers, processors.

    A diffusers pipeline lists its parts in `components`; of any other object the attributes count. Empty where neither tells.
    """
    held = getattr(components.pipeline, "components", None)
    if not isinstance(held, Mapping):
        held = getattr(components.pipeline, "__dict__", {})
    out = (components.denoiser, components.controlnet, components.scheduler)
    return {name: part for name, part in held.items() if part is not None and not any(part is one for one in out)}


def other_models(components: Components) -> dict[str, Module]:
    """Those of `other_parts` that are models and that no training step needs.

    A training step needs the denoiser, a ControlNet and what a family keeps in `Components.extras`; a part that holds a
    parameter of theirs, or one that is trained, is left out.
    """
    from torch.nn import Module

    needed = {id(parameter) for model in _needed(components) for parameter in model.parameters()}
    return {
        name: part
        for name, part in other_parts(components).items()
        if isinstance(part, Module) and not any(p.requires_grad or id(p) in needed for p in part.parameters())
    }


def _needed(components: Components) -> Iterator[Module]:
    """Models among the fields of `Components` and in `extras`."""
    from torch.nn import Module

    own = [getattr(components, field.name) for field in fields(components) if field.name != "pipeline"]
    yield from (value for value in (*own, *components.extras.values()) if isinstance(value, Module))

"""The published denoiser of a family, built from its configuration on the meta device: every module, no memory, no download."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slider_hooks import Family, TargetRequest
from slider_plugin.errors import UserError
from slider_plugin.loading import denoiser_class_of, on_meta
from slider_plugin.targets import TargetPlan, resolve_targets

if TYPE_CHECKING:
    from torch.nn import Module

    from slider_plugin.family import LoadedFamily


def reference_denoiser(family: Family, flavour: str | None = None) -> Module:
    """The denoiser of a published version on the meta device.

    Raises:
        UserError: the family has no such flavour, states no published configuration, or its class is not installed.
    """
    if flavour is not None and flavour not in family.flavours:
        raise UserError(
            f"model_flavour: {family.name} has no flavour {flavour!r}; it has {', '.join(family.flavours) or 'none'}"
        )
    denoiser_class = denoiser_class_of(family)
    if denoiser_class is None:
        raise UserError(f"{family.name}: diffusers has no class {family.denoiser_class}; give a model folder with --model")
    chosen = flavour or family.default_flavour
    changes = family.flavours[chosen].reference if chosen else {}
    denoiser: Module = on_meta(denoiser_class, {**family.reference, **changes})
    return denoiser


def reference_targets(family: LoadedFamily, flavour: str | None = None, include_joint: bool = True) -> TargetPlan:
    """The slider targets of a published version."""
    request = TargetRequest(slider=True, include_joint=include_joint)
    return resolve_targets(family, reference_denoiser(family.facts, flavour), request)

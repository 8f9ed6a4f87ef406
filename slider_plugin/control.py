"""A ControlNet beside the denoiser: whoever calls the denoiser, the ControlNet is called first, with what it is shown.

Every diffusers ControlNet takes the arguments of its denoiser and gives residuals that the denoiser takes as further arguments
(diffusers pipelines/*/pipeline_*controlnet*.py). So it hangs on the denoiser's call: the training step and the family's own
pipeline, classifier-free guidance and all, need not know of it.

Shapes: B batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from slider_hooks import Components, Conditioning
from slider_plugin.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from slider_plugin.family import LoadedFamily

SHOWN = "control"
"""In the conditioning of a sample: what `encode_control` made of its conditioning image, without a batch dimension."""

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Control:
    """The ControlNet of a run and what it is shown at present; without that, the denoiser is called as if there were none."""

    def __init__(self, family: LoadedFamily, components: Components, strength: float) -> None:
        """Hang `components.controlnet` on `components.denoiser`.

        Args:
            family: whose hook `control` calls the ControlNet.
            components: with a ControlNet, on the denoiser's device.
            strength: what its residuals are multiplied by.
        """
        self._family, self._components, self._strength = family, components, strength
        self._shown_B: Tensor | None = None
        self._signature = inspect.signature(components.denoiser.forward)
        components.denoiser.register_forward_pre_hook(self._before, with_kwargs=True)

    @contextmanager
    def showing(self, images_B: Tensor) -> Iterator[None]:
        """Inside, calls of the denoiser are steered by these images, one for each sample or one for all."""
        before, self._shown_B = self._shown_B, images_B
        try:
            yield
        finally:
            self._shown_B = before

    def _before(self, denoiser: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        if self._shown_B is None:
            return args, kwargs
        call = self._signature.bind(*args, **kwargs).arguments
        shown_B = _for_each(self._shown_B, len(next(iter(call.values()))))
        residuals = self._family.control(self._components, shown_B, self._strength, call)
        return args, kwargs | dict(residuals)


def _for_each(images_B: Tensor, samples: int) -> Tensor:
    """One image for each sample of a call: under classifier-free guidance the call holds every sample twice."""
    if samples % len(images_B):
        raise UserError(
            f"the denoiser was called with {samples} samples and {len(images_B)} conditioning images; "
            "train_batch_size 1 keeps them together"
        )
    return images_B.repeat(samples // len(images_B), *(1,) * (images_B.ndim - 1))


def encode_for_controlnet(family: LoadedFamily, components: Components, images_BCHW: Tensor) -> Tensor:
    """What the ControlNet is shown of conditioning images in -1..1, `(B, ...)` float32."""
    latents_BChw = family.encode_images(components, images_BCHW)
    return family.encode_control(components, images_BCHW, latents_BChw).float()


@contextmanager
def steered(components: Components, conditioning: Sequence[Conditioning]) -> Iterator[Sequence[Conditioning]]:
    """Show the ControlNet, if there is one, what stands in the conditioning of a batch; gives the rest of the conditioning."""
    import torch

    if components.control is None:
        yield conditioning
        return
    images_B = torch.stack([sample[SHOWN] for sample in conditioning])
    rest = [{name: value for name, value in sample.items() if name != SHOWN} for sample in conditioning]
    with components.control.showing(images_B):
        yield rest


def zero_layers(controlnet: Module, denoiser: Module) -> list[str]:
    """The layers of a ControlNet's own whose weights are all zero: all of its outputs, as long as nobody has trained it.

    As long as they are zero no gradient passes them (measured: 34 of 34 LoRA tensors get none).
    """
    from slider_plugin.targets import adaptable_modules

    shared = {id(module) for module in denoiser.modules()}
    own = {name: module for name, module in adaptable_modules(controlnet).items() if id(module) not in shared}
    return [name for name, module in own.items() if not module.weight.any()]  # type: ignore[operator]

"""Blocks of a frozen denoiser wait in the computer's memory; a layer's weights come to the device when it computes.

diffusers' own group offloading is for inference: in a training step its hooks leave a block away while its gradient is
computed (measured with diffusers 0.42.1 on `flux`, weights on the disk: gradients are not finite, unless checkpointing happens
to cut the second forward short before the hook that sends the block away). Here nothing of a block's weights is kept for the
backward pass: what autograd saves of them is fetched again when it is used. A weight crosses the bus once in the forward and
once in the backward pass, with gradient checkpointing once more. Layers fetch one by one, since a checkpoint may begin inside a
block (those of a UNet do), and computes a second time what is in it alone.

The trained adapter, and what is in no list of blocks, stays on the device.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Module, ModuleList, Parameter

from slider_plugin.alone import assert_alone
from slider_plugin.config import RunConfig
from slider_plugin.errors import UserError


def check_offload(config: RunConfig, denoiser: Module | None) -> None:
    """Raise UserError if `enable_group_offload` does not go together with the rest, or with a denoiser, if that is known."""
    if config.enable_group_offload:
        quantised = config.base_model_precision != "no_change"
        assert_alone(config, "enable_group_offload", "set it to false", base_model_precision=quantised)
        if denoiser is not None:
            blocks_of(denoiser)


class _Away(NamedTuple):
    """What autograd saved of a weight that is not on the device: which part of it."""

    home: Tensor
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Offload:
    """Keeps the blocks of a denoiser in the computer's memory, from now on and in every forward and backward pass."""

    def __init__(self, denoiser: Module, device: torch.device) -> None:
        """Hook a frozen denoiser, whose weights are on the CPU and without an adapter, and move the rest of it.

        Args:
            denoiser: changed in place. `.to()` and its like move everything but the blocks from now on.
            device: where it runs.

        Raises:
            UserError: it has no list of blocks.
        """
        self.device = device
        self.blocks = blocks_of(denoiser)
        self._homes: dict[Module, dict[str, Parameter]] = {}
        self._fetched: dict[int, Tensor] = {}  # by where a fetched weight lies: where it comes from
        self._saving: list[saved_tensors_hooks] = []
        for block in self.blocks:
            for layer in block.modules():
                self._hook(layer)
            block._apply = partial(_stay, block)  # type: ignore[method-assign]
        denoiser.register_forward_pre_hook(self._begin)
        denoiser.register_forward_hook(self._end, always_call=True)
        denoiser.to(device)

    @property
    def size(self) -> int:
        """Bytes that are kept off the device."""
        return sum(home.nbytes for homes in self._homes.values() for home in homes.values())

    def _hook(self, layer: Module) -> None:
        for name, buffer in layer._buffers.items():
            layer._buffers[name] = None if buffer is None else buffer.to(self.device)
        homes = {name: home for name, home in layer._parameters.items() if home is not None}
        if homes:
            for home in homes.values():
                home.data = home.data.pin_memory() if self.device.type == "cuda" else home.data
            self._homes[layer] = homes
            layer.register_forward_pre_hook(self._fetch)
            layer.register_forward_hook(self._send_back, always_call=True)

    def _to_device(self, home: Tensor) -> Tensor:
        return home.detach().to(self.device, non_blocking=True)  # in order with what the device computes

    # --- one layer --------------------------------------------------------------------------------------------------

    def _fetch(self, layer: Module, _: Any) -> None:
        """Put copies into the place of a layer's weights: of their own, since a checkpoint saves frozen ones as they are."""
        for name, home in self._homes[layer].items():
            layer._parameters[name] = fetched = Parameter(self._to_device(home), requires_grad=False)
            self._fetched[fetched.untyped_storage().data_ptr()] = home.detach()

    def _send_back(self, layer: Module, *_: Any) -> None:
        for name, home in self._homes[layer].items():
            fetched = layer._parameters[name]
            if fetched is not None:
                self._fetched.pop(fetched.untyped_storage().data_ptr(), None)
            layer._parameters[name] = home

    # --- the whole forward ------------------------------------------------------------------------------------------

    def _begin(self, *_: Any) -> None:
        """Gradient checkpointing has hooks of its own inside these, and computes layers a second time, which fetches them."""
        self._saving.append(saved_tensors_hooks(self._pack, self._unpack))
        self._saving[-1].__enter__()

    def _end(self, *_: Any) -> None:
        self._saving.pop().__exit__()

    def _pack(self, saved: Tensor) -> Tensor | _Away:
        home = self._fetched.get(saved.untyped_storage().data_ptr())
        return saved if home is None else _Away(home, saved.size(), saved.stride(), int(saved.storage_offset()))

    def _unpack(self, packed: Tensor | _Away) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        return self._to_device(packed.home).as_strided(packed.size, packed.stride, packed.offset)


def blocks_of(denoiser: Module) -> list[Module]:
    """The modules in the denoiser's own lists, as diffusers groups them (hooks/group_offloading.py, block level)."""
    blocks = [block for child in denoiser.children() if isinstance(child, ModuleList) for block in child]
    if not blocks:
        raise UserError(
            f"enable_group_offload: a {type(denoiser).__name__} has no list of blocks that could wait elsewhere; "
            "set it to false"
        )
    return blocks


def _stay(block: Module, *_: Any, **__: Any) -> Module:
    """Instead of a block's own way of moving, which would bring all of it to the device."""
    return block

"""FSDP2 for a denoiser that does not fit one GPU: its frozen weights are shared out among the processes.

Each process keeps a part of every weight and gathers the whole of a block when that is computed (`fully_shard` of PyTorch). The
adapter is left out: it is small, every process has all of it, and its gradients are added up as without sharding
(`processes.py`). So checkpoints and the exported file are whole without being gathered, and a run can go on with FSDP or
without. The launcher's settings that count are those for wrapping and `fsdp_reshard_after_forward`.
"""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any

import torch

from slider_plugin.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from slider_plugin.adapters.base import Adapter


def shard(denoiser: Any, adapter: Adapter, machine: Accelerator) -> int:
    """Shard a denoiser in place, with its adapter in it; the denoiser may still be on the CPU.

    Args:
        denoiser: frozen, but for the adapter.
        adapter: moves to the device whole.
        machine: accelerate, with its processes.

    Returns:
        How many blocks are gathered one by one.

    Raises:
        UserError: this PyTorch cannot leave the adapter out, or nothing says what the blocks of this denoiser are.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise UserError(f"FSDP needs PyTorch 2.7 or newer, and this is {torch.__version__}; update it, or launch without FSDP")
    blocks = blocks_of(denoiser)
    for parameter in adapter.parameters():
        parameter.data = parameter.data.to(machine.device)
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(machine.device.type, (machine.num_processes,)),
        "reshard_after_forward": os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true",
        "ignored_params": set(adapter.parameters()),
    }
    for module in blocks:
        fully_shard(module, **settings)
    fully_shard(denoiser, **settings)
    return len(blocks)


def blocks_of(denoiser: Any) -> list[torch.nn.Module]:
    """The modules that are gathered one by one, inner ones first: the launcher's classes, or those the model names itself."""
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    own = getattr(denoiser, "_no_split_modules", None) or getattr(denoiser, "_repeated_blocks", None) or ()
    classes = {name.strip() for name in named.split(",") if name.strip()} or set(own)
    modules = [module for module in denoiser.modules() if type(module).__name__ in classes and module is not denoiser]
    if not modules:
        raise UserError(
            f"FSDP: nothing says what the blocks of a {type(denoiser).__name__} are; name their class in "
            "fsdp_transformer_layer_cls_to_wrap"
        )
    return modules[::-1]


def unsharded_type(model: torch.nn.Module) -> type:
    """The class of a model as it was before `fully_shard`, which gives a model a class of its own, derived from both."""
    kinds = type(model).__mro__
    return kinds[2] if len(kinds) > 2 and kinds[1].__name__ == "FSDPModule" else kinds[0]

"""torch.compile of the frozen model around the adapter: each repeated block once where diffusers names them, else the whole.

Modules are compiled in place (`torch.nn.Module.compile`), so that names, attributes and adapters stay as they are. The strength
reaches a LoRA as a tensor, which a compiled block takes as it takes its input: another sign or size compiles nothing anew.
"""

from __future__ import annotations

import importlib.util
import shutil
from typing import Any

import torch
from torch import nn

from slider_plugin.config import RunConfig
from slider_plugin.errors import UserError

VARIANTS = 64
"""Of one block that may be compiled: sizes of its layers and of images, with and without gradient, a strength for all or for
each sample. PyTorch gives up at 8 (torch/_dynamo/config.py), and goes on without compiling."""

COMPILERS = ("c++", "g++", "clang++", "cl")


def check_compile(config: RunConfig, on_gpu: bool | None = None) -> None:
    """Raise UserError if what `torch_compile` asks for cannot be had."""
    if config.torch_compile == "no":
        return
    if config.lycoris is not None:
        raise UserError(
            "torch_compile: lycoris-lora keeps the strength as a plain number, for each value of which its layers would be "
            "compiled anew; write no, or lora_type standard"
        )
    if config.torch_compile != "inductor":
        return
    gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
    if gpu and importlib.util.find_spec("triton") is None:
        raise UserError("torch_compile: inductor needs triton on a GPU, which is not installed; install it, or write no")
    if not gpu and not any(map(shutil.which, COMPILERS)):
        raise UserError("torch_compile: inductor needs a C++ compiler, and there is none; install one (g++), or write no")


def compile_model(model: nn.Module, backend: str) -> str:
    """Compile a model in place, when its adapter is in it. Nothing is compiled before its first forward.

    Args:
        model: the denoiser or a ControlNet.
        backend: of `torch.compile`.

    Returns:
        What is compiled, in words.
    """
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, VARIANTS)
    repeated = getattr(model, "_repeated_blocks", None) or ()
    blocks = [module for module in model.modules() if type(module).__name__ in repeated]
    if not blocks:
        model.compile(backend=backend)
        return f"the whole {type(model).__name__}"
    for block in blocks:  # as diffusers' compile_repeated_blocks (models/modeling_utils.py), which also needs one to be there
        block.compile(backend=backend)
    return f"{len(blocks)} blocks of {type(model).__name__}"

"""The frozen base in 8 bit: the weights of its Linear layers as integers with a scale for each row, by torchao.

The adapter beside a quantised layer stays float32, and its strength 0 is the quantised base. Layers are quantised when a model
is loaded, before it goes to the device. Convolutions, and modules whose weight the model reads itself, stay as they are.
4 bit is not offered: PEFT takes no 4-bit layer of torchao, and diffusers quantises by bitsandbytes on a GPU alone.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable

from torch import nn

from slider_hooks import Family
from slider_plugin.config import RunConfig
from slider_plugin.errors import UserError


def check_quantise(config: RunConfig) -> None:
    """Raise UserError if what `base_model_precision` asks for cannot be had."""
    if config.base_model_precision == "no_change":
        return
    if importlib.util.find_spec("torchao") is None:
        raise UserError("base_model_precision: torchao is not installed; pip install 'slider-plugin[int8]', or write no_change")
    beside = {
        "lora_type lycoris": config.lycoris is not None,
        "a ControlNet": config.has_controlnet,
        "base_loras": bool(config.base_loras),
        "assistant_lora_path": config.assistant_lora_path is not None and not config.disable_assistant_lora,
        "torch_compile": config.torch_compile != "no",
    }
    if found := [name for name, given in beside.items() if given]:
        raise UserError(
            f"base_model_precision: {config.base_model_precision} does not go together with {', '.join(found)} in this "
            "version; write no_change, or take that out"
        )


def to_quantise(family: Family) -> Callable[[nn.Module, str], bool]:
    """Whether a module, with its full name, is one that is quantised."""
    read = re.compile(family.targets.weight_read) if family.targets.weight_read else None

    def wanted(module: nn.Module, name: str) -> bool:
        return type(module) is nn.Linear and not (read and read.fullmatch(name))

    return wanted


def quantise(denoiser: nn.Module, family: Family) -> int:
    """Quantise a frozen denoiser in place; returns how many of its layers are. Before any adapter is in it."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    wanted = to_quantise(family)
    count = sum(wanted(module, name) for name, module in denoiser.named_modules())
    quantize_(denoiser, Int8WeightOnlyConfig(), filter_fn=wanted)
    return count


def bytes_at_rest(denoiser: nn.Module, family: Family, config: RunConfig) -> int:
    """Bytes of the frozen weights as they are kept, from a denoiser on the meta device."""
    plain = 2 if config.mixed_precision == "bf16" else 4
    total: int = plain * sum(parameter.numel() for parameter in denoiser.parameters())
    if config.base_model_precision == "no_change":
        return total
    wanted = to_quantise(family)
    linear = [module for name, module in denoiser.named_modules() if wanted(module, name)]
    saved = sum((plain - 1) * module.weight.numel() - (plain + 1) * module.weight.shape[0] for module in linear)
    return int(total - saved)  # a row has a scale and a zero point of one byte

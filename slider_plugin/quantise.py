"""The frozen base in fewer bits, for a plain LoRA: the weights of its Linear layers, and nothing else.

    int8-torchao   8 bit integers with a scale for each row, by torchao
    nf4-bnb        4 bit NormalFloat (QLoRA, arXiv 2305.14314) in blocks of 64, whose scales are quantised too, by bitsandbytes

The adapter beside a quantised layer stays float32, and its strength 0 is the quantised base. Layers are quantised when a model
is loaded, before it goes to the device. Convolutions, and modules whose weight the model reads itself, stay as they are.
diffusers' own loader quantises by bitsandbytes on a GPU alone; the layers themselves also work on a processor. PEFT takes no
4 bit layer of torchao, so there is one library for each.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from slider_hooks import Family
from slider_plugin.alone import assert_alone
from slider_plugin.config import RunConfig
from slider_plugin.errors import UserError


@dataclass(frozen=True, slots=True)
class Kind:
    """A library that quantises."""

    package: str
    extra: str
    """Of this distribution, which installs it."""

    bits: int


KINDS: Mapping[str, Kind] = {"int8-torchao": Kind("torchao", "int8", 8), "nf4-bnb": Kind("bitsandbytes", "quant", 4)}

BLOCK = 64
"""Weights that share a scale in nf4."""

BLOCKS = 256
"""Scales that share a scale of their own, which is float32 (bitsandbytes/functional.py, `quantize_4bit`)."""


def check_quantise(config: RunConfig) -> None:
    """Raise UserError if what `base_model_precision` asks for cannot be had."""
    if config.base_model_precision == "no_change":
        return
    kind = KINDS[config.base_model_precision]
    if importlib.util.find_spec(kind.package) is None:
        raise UserError(
            f"base_model_precision: {kind.package} is not installed; pip install 'slider-plugin[{kind.extra}]', "
            "or write no_change"
        )
    assert_alone(config, f"base_model_precision: {config.base_model_precision}", "write no_change")


def to_quantise(family: Family) -> Callable[[nn.Module, str], bool]:
    """Whether a module, with its full name, is one that is quantised."""
    read = re.compile(family.targets.weight_read) if family.targets.weight_read else None

    def wanted(module: nn.Module, name: str) -> bool:
        return type(module) is nn.Linear and not (read and read.fullmatch(name))

    return wanted


def quantise(denoiser: nn.Module, family: Family, precision: str) -> int:
    """Quantise a frozen denoiser in place; returns how many of its layers are. Before any adapter is in it."""
    wanted = to_quantise(family)
    names = [name for name, module in denoiser.named_modules() if wanted(module, name)]
    if precision == "nf4-bnb":
        _in_4_bit(denoiser, names)
    else:
        _in_8_bit(denoiser, wanted)
    return len(names)


def _in_8_bit(denoiser: nn.Module, wanted: Callable[[nn.Module, str], bool]) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(denoiser, Int8WeightOnlyConfig(), filter_fn=wanted)


def _in_4_bit(denoiser: nn.Module, names: list[str]) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name in names:
        plain = denoiser.get_submodule(name)
        weight, bias = plain.get_parameter("weight"), plain.bias
        layer = Linear4bit(
            plain.in_features, plain.out_features, bias is not None, weight.dtype, quant_type="nf4", device="meta"
        )
        layer.weight = Params4bit(weight.data, requires_grad=False, quant_type="nf4", blocksize=BLOCK, module=layer)
        layer.bias = bias
        denoiser.set_submodule(name, layer.to(weight.device))  # moving it quantises it
    # PEFT looks for this when it chooses its layers (peft/tuners/lora/model.py)
    setattr(denoiser, "is_loaded_in_4bit", True)  # noqa: B010  (a module takes only tensors by plain assignment, to a type checker)


def bytes_at_rest(denoiser: nn.Module, family: Family, config: RunConfig) -> int:
    """Bytes of the frozen weights as they are kept, from a denoiser on the meta device."""
    plain = 2 if config.mixed_precision == "bf16" else 4
    total: int = plain * sum(parameter.numel() for parameter in denoiser.parameters())
    if config.base_model_precision == "no_change":
        return total
    wanted = to_quantise(family)
    kept = _bytes_in_4_bit if config.base_model_precision == "nf4-bnb" else _bytes_in_8_bit
    linear = [module for name, module in denoiser.named_modules() if wanted(module, name)]
    return int(total + sum(kept(module.weight, plain) - plain * module.weight.numel() for module in linear))


def _bytes_in_8_bit(weight: nn.Parameter, plain: int) -> int:
    return weight.numel() + (plain + 1) * weight.shape[0]  # a row has a scale and a zero point of one byte


def _bytes_in_4_bit(weight: nn.Parameter, plain: int) -> int:
    blocks = -(-weight.numel() // BLOCK)
    return -(-weight.numel() // 2) + blocks + 4 * -(-blocks // BLOCKS)

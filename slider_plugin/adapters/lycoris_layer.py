"""One layer that lycoris-lora wraps: what it changes at strength 1, and how far it is from a mirror."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

STRENGTHS = (0.0, 1.0, -1.0, 2.0)


def beside_each_other(lora: Any, x: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """What a layer answers without its network, and what the network adds at strength 1."""
    weight, bias = change_of(lora)
    change = lora.op(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), **lora.kw_dict)
    if not hasattr(lora.org_module[0], "weight"):  # `full` has taken it
        base_bias = None if lora.org_bias is None else lora.org_bias[0].to(x.device)
        return lora.op(x, lora.org_weight.to(x.device), base_bias, **lora.kw_dict), change
    return lora.org_forward(x, *arguments, **named), change


def change_of(lora: Any) -> tuple[Tensor, Tensor | None]:
    """The change of weight and bias at strength 1, as the algorithm's own forward has it.

    `get_diff_weight` is that for all but LoHa and LoKr, where it scales by alpha / rank twice and leaves out the trained factor
    (lycoris-lora 4.1.3, loha.py:230, lokr.py:381, against their `forward`).
    """
    if type(lora).__name__ in ("LohaModule", "LokrModule"):
        return lora.get_weight(lora.shape) * lora.scalar, None
    weight, bias = lora.get_diff_weight(1.0, lora.shape, lora.device)
    return weight, bias


@contextmanager
def random_weights(lora: Any) -> Iterator[torch.Generator]:
    """Weights that change something inside; what they were, bit for bit, outside. Gives the generator for more numbers."""
    parameters = list(lora.parameters())
    kept = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    try:
        yield generator
    finally:
        for parameter, old in zip(parameters, kept, strict=True):
            parameter.copy_(old)


def dtype_of(lora: Any) -> torch.dtype:
    """Of the layer that is wrapped."""
    parameters = (*lora.org_module[0].parameters(), *lora.parameters())
    dtype: torch.dtype = parameters[0].dtype
    return dtype


def rounding_of(dtype: torch.dtype, answer: float, change: float) -> float:
    """What a difference of answers may miss by rounding, as a share of the change."""
    return float(torch.finfo(dtype).eps / torch.finfo(torch.float32).eps) * 1e-5 * answer / max(change, 1e-12)


def unmirrored(lora: Any) -> float:
    """How far a wrapped layer misses the mirror, as a share of its largest change; its weights are put back."""
    layer, answers, dtype, before = lora.org_module[0], {}, dtype_of(lora), lora.multiplier
    with random_weights(lora) as generator:
        value = torch.randn(input_shape(lora), generator=generator).to(next(lora.parameters()).device)
        for strength in STRENGTHS:
            lora.multiplier = strength
            answers[strength] = layer(value.to(dtype)).double()
        lora.multiplier = before
    base = answers[0.0]
    plus, minus, double = (answers[strength] - base for strength in (1.0, -1.0, 2.0))
    size = max(float(plus.abs().max()), 1e-6 * float(base.abs().max()), 1e-12)
    rounding = rounding_of(dtype, float(base.abs().max()), size)
    miss = max(float((plus + minus).abs().max()), float((double - 2 * plus).abs().max())) / size
    return max(0.0, miss - rounding)


def input_shape(lora: Any) -> tuple[int, ...]:
    """A small input of a Linear or a convolution."""
    layer = lora.org_module[0]
    if lora.module_type == "linear":
        return (2, layer.in_features)
    return (1, layer.in_channels, *(2 * size + 1 for size in layer.kernel_size))

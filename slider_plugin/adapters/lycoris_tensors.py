"""The tensors of a LyCORIS file: which ones carry a change, and how a layer's are written for lycoris-lora's own reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

CARRYING = ("lora_up.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a", "diff", "diff_b", "a2.weight", "b2.weight", "weight")
"""The tensors of a file, by the ends of their names, in which each layer's change is linear while the others stay."""


def factor_of(name: str, multiplier: float) -> float:
    """What one tensor of a file is multiplied by so that its layer's change is multiplied by `multiplier`."""
    return multiplier if name.split(".", 1)[1] in CARRYING else 1.0


def readable(lora: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoKr layer as its own loader can read it: factors whole, where the loader would guess their shapes wrong.

    It counts a kernel's positions as input channels (lokr.py:270-320), and takes two low-rank factors for granted or none.
    """
    named = {name.split(".", 1)[1]: value for name, value in state.items()}
    is_kernel, both = len(lora.shape) > 2, "lokr_w1_a" in named and "lokr_w2" in named
    if ("lokr_w1" not in named and "lokr_w1_a" not in named) or not (is_kernel or both):
        return dict(state)
    first = named["lokr_w1"] if "lokr_w1" in named else named["lokr_w1_a"] @ named["lokr_w1_b"]
    low_rank = "lokr_w2" not in named
    second = _second_factor(lora, named, first) if low_rank else named["lokr_w2"]
    scale = lora.scale if low_rank or "lokr_w1_a" in named else 1.0  # two whole factors have none
    return {
        f"{lora.lora_name}.lokr_w1": first,
        f"{lora.lora_name}.lokr_w2": second * scale,
        f"{lora.lora_name}.alpha": torch.tensor(1.0),
    }


def _second_factor(lora: Any, named: Mapping[str, Tensor], first: Tensor) -> Tensor:
    """The second Kronecker factor `(out / a, in / b, *kernel)` from its low-rank parts."""
    if "lokr_t2" in named:
        return torch.einsum("ij...,ip,jr->pr...", named["lokr_t2"], named["lokr_w2_a"], named["lokr_w2_b"])
    shape = (lora.shape[0] // first.shape[0], lora.shape[1] // first.shape[1], *lora.shape[2:])
    return (named["lokr_w2_a"] @ named["lokr_w2_b"]).reshape(shape)

"""Bringing together what `encode_prompts` gave for each sample. Sequences have their tokens first: `(T, ...)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def per_prompt(**batched: Tensor) -> list[dict[str, Tensor]]:
    """From tensors `(B, ...)` to one mapping for each prompt: what `encode_prompts` returns."""
    count = len(next(iter(batched.values())))
    return [{name: values[i] for name, values in batched.items()} for i in range(count)]


def stacked(conditioning: Sequence[Mapping[str, Tensor]], name: str) -> Tensor:
    """One tensor `(B, ...)` of those of equal shape."""
    import torch

    return torch.stack([c[name] for c in conditioning])


def padded(conditioning: Sequence[Mapping[str, Tensor]], name: str) -> tuple[Tensor, Tensor]:
    """One tensor `(B, T, ...)` of sequences `(T_i, ...)`, zeros behind shorter ones, and its mask `(B, T)`, 1 where text."""
    import torch

    sequences = [c[name] for c in conditioning]
    mask_BT = torch.nn.utils.rnn.pad_sequence([s.new_ones(len(s), dtype=torch.long) for s in sequences], batch_first=True)
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True), mask_BT


def without_padding(embeds_BTD: Tensor, mask_BT: Tensor) -> list[Tensor]:
    """The sequences `(T_i, D)` that a mask keeps."""
    return [embeds_TD[mask_T.bool()] for embeds_TD, mask_T in zip(embeds_BTD, mask_BT, strict=True)]


def prompts_or_negative(prompts: Sequence[str], encoded: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """`prompt_embeds` `(T_i, D)` of each prompt, where a pipeline puts an instruction before prompts but not before "".

    Args:
        prompts: texts; "" takes what the pipeline gives its empty negative prompt.
        encoded: what `encode_prompt` gave under guidance: embeddings `(B, T, D)`, their mask `(B, T)`, the negative's two.
    """
    embeds_BTD, mask_BT, negative_BTD, negative_mask_BT = encoded
    pairs = zip(without_padding(embeds_BTD, mask_BT), without_padding(negative_BTD, negative_mask_BT), strict=True)
    return [{"prompt_embeds": own if text else empty} for text, (own, empty) in zip(prompts, pairs, strict=True)]

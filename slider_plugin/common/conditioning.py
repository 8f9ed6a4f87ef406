"""Bringing together what `encode_prompts` gave for each sample. Sequences have their tokens first: `(T, ...)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

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


def by_length(conditioning: Sequence[Mapping[str, Tensor]], name: str, call: Callable[[list[int]], Tensor]) -> Tensor:
    """The denoiser's answer `(B, ...)` in one call for each length of text, where it has no mask that would hide padding.

    Args:
        conditioning: of each sample.
        name: the sequence whose length counts.
        call: from the places of samples of equal length in the batch to the answers for these.
    """
    import torch

    lengths = [len(c[name]) for c in conditioning]
    groups = [[i for i, own in enumerate(lengths) if own == length] for length in dict.fromkeys(lengths)]
    answers = {i: answer for group in groups for i, answer in zip(group, call(group), strict=True)}
    return torch.stack([answers[i] for i in range(len(lengths))])


def after_instruction(pipeline: Any, prompts: Sequence[str], device: Any) -> list[dict[str, Tensor]]:
    """`prompt_embeds` `(T_i, D)` of each prompt behind the instruction that the pipeline's own call puts there (Sana)."""
    import inspect

    instruction = inspect.signature(pipeline).parameters["complex_human_instruction"].default
    encoded = pipeline.encode_prompt(list(prompts), device=device, complex_human_instruction=instruction)
    return prompts_or_negative(prompts, encoded)

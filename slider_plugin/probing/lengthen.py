"""More text tokens in a call of a denoiser whose pipeline pads all prompts to one length."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from slider_plugin.probing.drawing import Observed, reshaped
from slider_plugin.probing.trees import Call, Path, changed_call, table

MORE = 64  # tokens; some denoisers pad their text to multiples of 32


def with_more_text(observed: Observed) -> tuple[Call | None, str]:
    """The call with more text tokens and how they came about; None if nothing in the call is a sequence of text tokens."""
    if reshaped(observed.plain, observed.reworded) - observed.noise():
        return observed.reworded, "a longer prompt"
    fixed = set(table(observed.plain)) - reshaped(observed.plain, observed.wider)
    lengths = text_lengths(observed)
    if not lengths:
        return None, "the call holds no sequence of text tokens"

    def longer(path: Path, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return _longer(leaf, lengths) if path in fixed and path not in observed.time() else leaf
        return leaf + MORE if type(leaf) is int and leaf in lengths and path in fixed else leaf

    return changed_call(longer, observed.plain), f"{MORE} more tokens in the denoiser's call"


def text_lengths(observed: Observed) -> set[int]:
    """Numbers of text tokens: the axis before the features, of what the prompt is in and the image's size is not."""
    fixed = set(table(observed.plain)) - reshaped(observed.plain, observed.wider)
    text = [leaf for path, leaf in table(observed.plain).items() if path in observed.text() & fixed]
    return {leaf.shape[-2] for leaf in text if isinstance(leaf, Tensor) and leaf.ndim >= 2 and leaf.shape[-2] > 1}


def _longer(tensor: Tensor, lengths: set[int]) -> Tensor:
    """Repeated along its axis of tokens, if it has one: the last but one of embeddings, the last of a mask."""
    import torch

    axes = [axis for axis in (tensor.ndim - 2, tensor.ndim - 1, 0) if 0 <= axis < tensor.ndim]
    axis = next((axis for axis in axes if tensor.shape[axis] in lengths), None)
    if axis is None:
        return tensor
    places = torch.arange(tensor.shape[axis] + MORE) % tensor.shape[axis]
    return tensor.index_select(axis, places)

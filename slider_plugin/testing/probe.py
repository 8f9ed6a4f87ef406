"""Which stream of tokens does each module see? Found by measuring, not by reading names.

The denoiser runs three times: as it is, with more text tokens, with a wider image. A module whose input changes its shape
with the text alone sees text; with the image alone, the image; with both, the two joined in one sequence; with neither,
something of fixed size such as the time. Conditioning tensors of two or more dimensions begin with the token axis; one of a
single dimension is a mask if it is as long as one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from slider_hooks import Conditioning
from slider_plugin.targets import adaptable_modules
from slider_plugin.testing.subject import Subject

Stream = Literal["text", "image", "joint", "fixed", "unused"]

MORE_TOKENS = 32  # some denoisers pad their text to multiples of 32


@torch.no_grad()
def streams(subject: Subject) -> dict[str, Stream]:
    """The stream of every module that an adapter could wrap, by full name."""
    text, image = subject.conditioning(), subject.latents()
    plain = _shapes(subject, image, text)
    with_text = _shapes(subject, image, [_lengthened(c) for c in text])
    with_image = _shapes(subject, subject.latents(wider=2), text)
    return {
        name: _stream(plain.get(name), with_text.get(name), with_image.get(name))
        for name in adaptable_modules(subject.denoiser)
    }


Shapes = list[tuple[int, ...]] | None


def _stream(plain: Shapes, with_text: Shapes, with_image: Shapes) -> Stream:
    if plain is None:
        return "unused"
    text, image = plain != with_text, plain != with_image
    return "joint" if text and image else "text" if text else "image" if image else "fixed"


def _shapes(subject: Subject, latents: Tensor, conditioning: list[Conditioning]) -> dict[str, list[tuple[int, ...]]]:
    """The shapes of the inputs of each module in one call."""
    seen: dict[str, list[tuple[int, ...]]] = {}
    with _watching(subject.denoiser, seen):
        subject.predict(latents, conditioning)
    return seen


@contextmanager
def _watching(denoiser: torch.nn.Module, seen: dict[str, list[tuple[int, ...]]]) -> Iterator[None]:
    def hook(name: str) -> Callable[..., None]:
        def note(_: torch.nn.Module, arguments: tuple[object, ...], named: dict[str, object]) -> None:
            tensors = [a for a in (*arguments, *named.values()) if isinstance(a, Tensor)]
            seen.setdefault(name, []).append(tuple(tensors[0].shape) if tensors else ())

        return note

    handles = [
        module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in adaptable_modules(denoiser).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _lengthened(conditioning: Conditioning) -> Conditioning:
    """The same with more tokens: the first ones again."""
    lengths = {tensor.shape[0] for tensor in conditioning.values() if tensor.ndim >= 2}
    has_tokens = {name for name, tensor in conditioning.items() if tensor.ndim and tensor.shape[0] in lengths}
    return {name: _repeated(tensor) if name in has_tokens else tensor for name, tensor in conditioning.items()}


def _repeated(tensor: Tensor) -> Tensor:
    times = -(-MORE_TOKENS // tensor.shape[0])
    return torch.cat([tensor, torch.cat([tensor] * times)[:MORE_TOKENS]])

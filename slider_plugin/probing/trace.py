"""What flows into what: the layers of a denoiser as a graph, found by following every tensor of one call.

Each tensor remembers where it comes from: the arguments of the call and the layers that made it, back to the nearest layer. A
product of two such tensors that contracts both is attention, whatever the module is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from slider_plugin.probing.trees import Call, Path, leaves, table


@dataclass(frozen=True, slots=True)
class Attention:
    """Number of a contraction of two tensors that layers made."""

    number: int


@dataclass(frozen=True, slots=True)
class Argument:
    """A tensor of the denoiser's call."""

    path: Path


Source = str | Attention | Argument
"""A layer by its name, a contraction, or an argument."""

Sources = frozenset[Source]
NOTHING: Sources = frozenset()

CONTRACTIONS = {"scaled_dot_product_attention", "matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum"}
LIKENESSES = {"type_as", "expand_as", "view_as", "reshape_as", "to"}  # the second tensor lends a shape, not its values
FORGETFUL = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"}
FORGETFUL |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}


@dataclass(slots=True)
class Trace:
    """One call of a denoiser."""

    shapes: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    """Shapes of what each layer was given, call by call; in the order of the first calls."""

    inputs: dict[str, Sources] = field(default_factory=dict)
    """What each layer was given comes from."""

    attentions: list[list[Sources]] = field(default_factory=list)
    """The operands of each contraction."""

    answers: list[tuple[tuple[int, ...], Sources]] = field(default_factory=list)
    """Shapes and sources of the tensors of the denoiser's answer."""


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules without parts that have a weight of two or more axes: Linear, convolutions, also transposed, embeddings."""
    return {
        name: module
        for name, module in model.named_modules()
        if not list(module.children()) and isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim >= 2
    }


@torch.no_grad()
def traced(denoiser: nn.Module, call: Call) -> Trace:
    """Call a denoiser and follow every tensor."""
    trace, follower = Trace(), _Follower()
    for path, leaf in table(call).items():
        if isinstance(leaf, Tensor):
            follower.sources[leaf] = frozenset({Argument(path)})
    with ExitStack() as stack:
        for name, module in layers(denoiser).items():
            stack.enter_context(_watched(name, module, trace, follower))
        stack.enter_context(follower)
        arguments, named = call
        answer = denoiser(*arguments, **named)
    found = dict(leaves(dict(answer) if isinstance(answer, Mapping) else answer))
    trace.answers = [(tuple(leaf.shape), follower.of(leaf)) for leaf in found.values() if isinstance(leaf, Tensor)]
    trace.attentions = follower.attentions
    return trace


@contextmanager
def _watched(name: str, module: nn.Module, trace: Trace, follower: _Follower) -> Iterator[None]:
    def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        tensors = [leaf for _, leaf in leaves([arguments, named]) if isinstance(leaf, Tensor)]
        trace.shapes.setdefault(name, []).append(tuple(tensors[0].shape) if tensors else ())
        trace.inputs[name] = trace.inputs.get(name, NOTHING).union(*map(follower.of, tensors))

    def after(_: nn.Module, __: Any, output: Any) -> None:
        for _path, leaf in leaves(output):
            if isinstance(leaf, Tensor):
                follower.sources[leaf] = frozenset({name})

    handles = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Follower(TorchFunctionMode):
    """Gives the result of every function of torch the sources of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: Any = WeakTensorKeyDictionary()
        self.attentions: list[list[Sources]] = []

    def of(self, tensor: Tensor) -> Sources:
        found: Sources = self.sources.get(tensor, NOTHING)
        return found

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in FORGETFUL:
            return result
        tensors = [leaf for _, leaf in leaves([args, kwargs or {}]) if isinstance(leaf, Tensor)]
        known = [self.of(tensor) for tensor in (tensors[:1] if name in LIKENESSES else tensors)]
        sources = self._contracted(known) if name in CONTRACTIONS else NOTHING.union(*known)
        if not sources:
            return result
        for _, leaf in leaves(result):
            if isinstance(leaf, Tensor):
                self.sources[leaf] = sources
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            self._written(tensors[0], sources)
        return result

    def _written(self, tensor: Tensor, sources: Sources) -> None:
        """A write into a view is one into what it is a view of."""
        for written in (tensor, tensor._base):
            if isinstance(written, Tensor):
                self.sources[written] = self.of(written) | sources

    def _contracted(self, known: list[Sources]) -> Sources:
        operands = [made for sources in known if (made := _made(sources))]
        if len(operands) < 2:  # with a parameter or a table of positions
            return NOTHING.union(*known)
        self.attentions.append(operands)
        return frozenset({Attention(len(self.attentions) - 1)})


def _made(sources: Sources) -> Sources:
    """Without the arguments of the call."""
    return frozenset(source for source in sources if not isinstance(source, Argument))

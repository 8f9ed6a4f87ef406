"""Questions to the graph of a trace: what a layer comes from, what it reaches, which layers make up one attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from slider_plugin.probing.trace import Argument, Attention, Sources, Trace
from slider_plugin.probing.trees import Path


@dataclass(frozen=True, slots=True)
class Group:
    """One attention: the layers of its operands, those that take up its result, and the module around the former."""

    numbers: tuple[int, ...]
    """Of its contractions, in the order of the call."""

    operands: tuple[frozenset[str], ...]
    """Layers that each operand comes from: of queries, keys, values."""

    module: str
    """The module that holds these layers."""

    outs: frozenset[str]
    """Layers that take up the result, in it or nothing else, and those in it whose result meets that, such as a gate.

    A layer outside that takes up the result together with a feed-forward's is as much a feed-forward, and none of these.
    """

    @property
    def first(self) -> int:
        return self.numbers[0]

    @property
    def members(self) -> frozenset[str]:
        return frozenset().union(*self.operands) | self.outs


class Graph:
    """A trace, asked."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def arguments(self, name: str) -> frozenset[Path]:
        """The arguments of the call that a layer's input comes from, other than through attention."""
        return self._arguments[name]

    @cached_property
    def _arguments(self) -> dict[str, frozenset[Path]]:
        found: dict[str, frozenset[Path]] = {}
        for name, sources in self.trace.inputs.items():  # in the order of the call: what comes before is known
            own = {source.path for source in sources if isinstance(source, Argument)}
            found[name] = frozenset(own).union(*(found.get(layer, frozenset()) for layer in _layers(sources)))
        return found

    def askers(self, name: str) -> frozenset[str]:
        """Layers that made the queries of the attention whose result a layer is given: its rows are theirs."""
        waiting = [source for source in self.trace.inputs.get(name, ()) if isinstance(source, Attention)]
        found: frozenset[str] = frozenset()
        while waiting:
            queries = self.trace.attentions[waiting.pop().number][0]
            found |= _layers(queries)
            waiting += [source for source in queries if isinstance(source, Attention)]
        return found

    def reached(self, name: str) -> set[str | Attention]:
        """Layers and contractions that a layer's result reaches, other than through attention."""
        reached: set[str | Attention] = set()
        waiting: list[str | Attention] = [name]
        while waiting:
            place = waiting.pop()
            new = self._consumers.get(place, set()) - reached if isinstance(place, str) else set()
            reached |= new
            waiting.extend(new)
        return reached

    @cached_property
    def _consumers(self) -> dict[str | Attention, set[str | Attention]]:
        found: dict[str | Attention, set[str | Attention]] = {}
        for name, sources in self.trace.inputs.items():
            for source in sources:
                if not isinstance(source, Argument):
                    found.setdefault(source, set()).add(name)
        for number, operands in enumerate(self.trace.attentions):
            for source in (source for sources in operands for source in sources):
                if not isinstance(source, Argument):
                    found.setdefault(source, set()).add(Attention(number))
        return found

    @cached_property
    def groups(self) -> list[Group]:
        """All attentions; one that is written out as two products is one."""
        leaders: list[int] = []
        for operands in self.trace.attentions:
            parts = [source.number for sources in operands for source in sources if isinstance(source, Attention)]
            leaders.append(min((leaders[part] for part in parts), default=len(leaders)))
        return [self._group([n for n, own in enumerate(leaders) if own == leader]) for leader in sorted(set(leaders))]

    def _group(self, numbers: list[int]) -> Group:
        operands = [_layers(sources) for number in numbers for sources in self.trace.attentions[number]]
        operands = [layers for layers in operands if layers]
        module = common_module(frozenset().union(*operands))
        results = {Attention(number) for number in numbers}
        takers = {name: sources for name, sources in self.trace.inputs.items() if sources & results}
        outs = {name for name, sources in takers.items() if is_in(name, module) or sources <= results}
        gates = {layer for out in outs for layer in _layers(self.trace.inputs[out]) if is_in(layer, module)}
        return Group(tuple(numbers), tuple(operands), module, frozenset(outs | gates))


def _layers(sources: Sources) -> frozenset[str]:
    return frozenset(source for source in sources if isinstance(source, str))


def is_in(name: str, module: str) -> bool:
    """Whether a full name lies in a module; everything lies in the root, ""."""
    return not module or name.startswith(f"{module}.")


def common_module(names: Iterable[str]) -> str:
    """The innermost module that holds all of these."""
    paths = [name.split(".")[:-1] for name in names]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)

"""What each layer is to a slider: part of which attention, the first or last one, a projection, the time embedding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from slider_plugin.probing.drawing import Observed
from slider_plugin.probing.expressions import in_blocks
from slider_plugin.probing.flow import Graph, Group
from slider_plugin.probing.result import Role
from slider_plugin.probing.streams import Seen
from slider_plugin.probing.trace import Argument, Attention
from slider_plugin.probing.trees import Path
from slider_plugin.targets import adaptable_modules

VISUAL = ("image", "joint")


@dataclass(slots=True)
class Roles:
    """The roles of the layers that have one; all others are `other`."""

    by_name: dict[str, Role]
    language: set[str]
    """Layers that see nothing but text, pooled text included, or another stream beside image and text, such as sound."""

    unsure: dict[str, str] = field(default_factory=dict)


def roles(seen: Seen, observed: Observed, denoiser: nn.Module) -> Roles:
    """The roles of the adaptable layers.

    Args:
        seen: what each layer sees.
        observed: the denoiser's calls.
        denoiser: the model itself.
    """
    adaptable = adaptable_modules(denoiser)
    graph = Graph(seen.plain)
    sliding = [group for group in graph.groups if is_visual(group, seen)]
    found: dict[str, Role] = {}
    for group in graph.groups:
        if group not in sliding and any(seen.streams[name] in VISUAL for name in group.members):
            found |= dict.fromkeys(group.members, "cross")
    for group in sliding:
        found |= {name: _kind(seen.streams[name]) for name in group.members if seen.streams[name] in VISUAL}
    found |= dict.fromkeys(_projections(sliding, seen, found), "proj")
    found |= dict.fromkeys(first_layers(seen, observed), "io")
    found |= dict.fromkeys(last_layers(seen), "io")
    told = _told_the_time(graph, observed, sliding, seen)
    embeddings, unsure = _embeddings(graph, {name for name in told if not in_blocks(denoiser, name)})  # else: modulation
    found |= dict.fromkeys(embeddings, "time")
    return Roles(
        {name: role for name, role in found.items() if name in adaptable},
        {name for name in seen.streams if _is_language(name, seen, graph, observed)} - set(embeddings),
        {
            name: why
            for name, why in (unsure | _hidden(graph, seen, observed) | _shared(graph, sliding, found)).items()
            if name in adaptable
        },
    )


def _kind(stream: str) -> Role:
    return "joint" if stream == "joint" else "self"


def is_visual(group: Group, seen: Seen) -> bool:
    """Whether image tokens attend to image tokens: queries, keys and values all come from layers that see them."""
    return all(any(seen.streams[name] in VISUAL for name in operand) for operand in group.operands)


def _is_language(name: str, seen: Seen, graph: Graph, observed: Observed) -> bool:
    if seen.streams[name] == "text":
        return True
    arguments = graph.arguments(name) if name in seen.plain.inputs else frozenset[Path]()
    pooled = bool(arguments) and arguments <= observed.text()
    other_stream = bool(arguments & (observed.noise() - observed.image())) and not arguments & observed.image()
    return seen.streams[name] not in VISUAL and (pooled or other_stream)


def _hidden(graph: Graph, seen: Seen, observed: Observed) -> dict[str, str]:
    """Layers of attention that noise flows into and that saw nothing of a wider image: it may have been padded away."""
    reason = "noise flows into this layer of an attention, yet its input did not grow with the image"
    members = frozenset[str]().union(*(group.members for group in graph.groups))
    fixed = [name for name in graph.trace.inputs if name in members and seen.streams[name] == "fixed"]
    return {name: reason for name in fixed if graph.arguments(name) & observed.image()}


def _shared(graph: Graph, sliding: list[Group], found: dict[str, Role]) -> dict[str, str]:
    """Layers of a cross-attention that take up the result of a self-attention as well."""
    reason = "it takes up the results of self-attention and of cross-attention at once"
    results = {Attention(number) for group in sliding for number in group.numbers}
    return {name: reason for name, role in found.items() if role == "cross" and graph.trace.inputs[name] & results}


# --- Projections, first and last layer --------------------------------------------------------------------------------


def _projections(sliding: list[Group], seen: Seen, taken: dict[str, Role]) -> Iterator[str]:
    """Layers of a module that holds a list of attention blocks and lies in the denoiser: they lead into and out of it."""
    for holder in {_holder(group.module) for group in sliding} - {""}:
        for name, stream in seen.streams.items():
            if name.rpartition(".")[0] == holder and stream in VISUAL and name not in taken:
                yield name


def _holder(attention: str) -> str:
    """What holds the innermost list of blocks around an attention: before the last number in its name."""
    parts = attention.split(".")
    places = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: places[-1] - 1]) if places else ""


def first_layers(seen: Seen, observed: Observed) -> set[str]:
    """Layers that are given the noisy latents themselves."""
    noisy = {Argument(path) for path in observed.image()}
    takers = {name: sources for name, sources in seen.plain.inputs.items() if sources & noisy}
    pure = {name for name, sources in takers.items() if all(isinstance(source, Argument) for source in sources)}
    return pure or set(takers)


def last_layers(seen: Seen) -> set[str]:
    """Layers that make the answer for the image: the one that grows with it."""
    pairs = zip(seen.plain.answers, seen.wider.answers, strict=False)
    sources = [sources for (shape, sources), (wide, _) in pairs if shape != wide]
    return {name for found in sources for name in found if isinstance(name, str) and seen.streams[name] in VISUAL}


# --- Time -------------------------------------------------------------------------------------------------------------


def _told_the_time(graph: Graph, observed: Observed, sliding: list[Group], seen: Seen) -> Iterator[str]:
    """The layers that are given the time and nothing else, no layer before them, where it goes to the image next."""
    told = {Argument(path) for path in observed.time()}
    for name, sources in graph.trace.inputs.items():
        if sources and sources <= told and _goes_to_the_image(name, graph, sliding, seen):
            yield name


def _goes_to_the_image(name: str, graph: Graph, sliding: list[Group], seen: Seen) -> bool:
    """Whether the time goes to the image's first attention, or through modulation to its end alone.

    The time of a sound, of refined text, or of cross-attention gets to the image only later, or as text.
    """
    reached = graph.reached(name)
    if not any(isinstance(place, Attention) for place in reached):
        modulators = {place for place in reached if isinstance(place, str) and seen.streams[place] not in VISUAL}
        read = {place for place in modulators if not _together(place, name)}
        return bool(read) and not reached.isdisjoint(last_layers(seen))
    first = min(sliding, key=lambda group: group.first, default=None)
    return first is not None and any(seen.streams[member] in VISUAL for member in first.members if member in reached)


def _embeddings(graph: Graph, told: set[str]) -> tuple[set[str], dict[str, str]]:
    """An embedding is two layers, one behind the other in one module; a layer alone is a question."""
    found: set[str] = set()
    unsure: dict[str, str] = {}
    for name in told:
        followers = {other for other, given in graph.trace.inputs.items() if given == {name} and _together(name, other)}
        if followers:
            found |= {name, *followers}
        else:
            unsure[name] = "it is given the time first, but no second layer beside it makes an embedding of that"
    return found, unsure


def _together(one: str, other: str) -> bool:
    return one.rpartition(".")[0] == other.rpartition(".")[0]

"""What each layer sees: told by what its input changes its shape with when the text or the image grows."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from torch import Tensor, nn

from slider_plugin.probing.drawing import Observed, reshaped
from slider_plugin.probing.flow import Graph
from slider_plugin.probing.lengthen import text_lengths, with_more_text
from slider_plugin.probing.opening import first_line
from slider_plugin.probing.result import Stream
from slider_plugin.probing.trace import Trace, traced
from slider_plugin.probing.trees import Call, Path, table

Shapes = list[tuple[int, ...]]


@dataclass(slots=True)
class Seen:
    """The streams of all layers that were called, with what they were measured by."""

    plain: Trace
    wider: Trace
    streams: dict[str, Stream]
    how: str
    """How the text was lengthened, or why it was not."""

    unsure: dict[str, str] = field(default_factory=dict)


def seen(denoiser: nn.Module, observed: Observed) -> Seen:
    """Call the denoiser as it was called, with more text and with a wider image."""
    plain, wider = traced(denoiser, observed.plain), traced(denoiser, observed.wider)
    longer, how = with_more_text(observed)
    more = None
    if longer is not None:
        try:
            more = traced(denoiser, longer)
        except Exception as error:  # the denoiser is unknown, and may refuse this in any way; the reason is told
            how = f"the denoiser refuses more text tokens ({type(error).__name__}: {first_line(error)})"
    if more is None or longer is None:
        return _by_flow(observed, plain, wider, how)
    drift = _drift(observed, longer)
    names = dict.fromkeys((*plain.shapes, *more.shapes, *wider.shapes))
    found = {n: _stream(plain.shapes.get(n), more.shapes.get(n), wider.shapes.get(n), drift) for n in names}
    return Seen(plain, wider, _text_in_long_rows(observed, plain, found), how)


def _stream(plain: Shapes | None, more: Shapes | None, wider: Shapes | None, drift: float) -> Stream:
    text = plain != more
    image = plain != wider
    if drift and plain and more and wider:  # the wide image came with another text
        image = _numbers(wider) != _numbers(plain) + (_numbers(more) - _numbers(plain)) * drift
    return "joint" if text and image else "text" if text else "image" if image else "fixed"


def _numbers(shapes: Shapes) -> int:
    return sum(prod(shape) for shape in shapes)


def _drift(observed: Observed, longer: Call) -> float:
    """By how many text tokens the call with the wider image differs from the plain one, as a share of those in `longer`.

    Some pipelines write the size into the prompt, or the length of a sound.
    """
    if observed.same_text:
        return 0.0
    plain, more, wider = table(observed.plain), table(longer), table(observed.wider)
    paths = reshaped(observed.plain, longer) & observed.text()
    both = [p for p in paths if isinstance(wider.get(p), Tensor) and plain[p].ndim == more[p].ndim == wider[p].ndim]
    grown = [(_growth(plain[path], more[path]), _growth(plain[path], wider[path])) for path in both]
    counts = [(text, drift) for text, drift in grown if text]
    if not counts:
        return 0.0
    text, drift = min(counts, key=lambda count: abs(count[1]))
    return drift / text


def _growth(one: Tensor, other: Tensor) -> int:
    """Difference along the axis that differs; 0 where several do."""
    differences = [b - a for a, b in zip(one.shape, other.shape, strict=True) if a != b]
    return differences[0] if len(differences) == 1 else 0


def _text_in_long_rows(observed: Observed, plain: Trace, found: dict[str, Stream]) -> dict[str, Stream]:
    """Text may come in rows as long as text and image together: a layer that only text flows into sees text alone."""
    graph, text = Graph(plain), observed.text()

    def refined(name: str, stream: Stream) -> Stream:
        arguments = graph.arguments(name) if name in plain.inputs else frozenset()
        return "text" if stream == "joint" and arguments and arguments <= text else stream

    return {name: refined(name, stream) for name, stream in found.items()}


# --- Where the text cannot be lengthened ------------------------------------------------------------------------------


def _by_flow(observed: Observed, plain: Trace, wider: Trace, how: str) -> Seen:
    """Told by which arguments of the call flow into a layer; where both do, one may have been cut off on the way."""
    graph, text = Graph(plain), _token_paths(observed)
    found: dict[str, Stream] = {}
    unsure: dict[str, str] = {}
    for name, shapes in plain.shapes.items():
        flowing = graph.arguments(name).union(*map(graph.arguments, graph.askers(name)))
        sees_text = bool(flowing & text)
        sees_image = shapes != wider.shapes.get(name) and bool(flowing & observed.image())
        found[name] = "joint" if sees_text and sees_image else "text" if sees_text else "image" if sees_image else "fixed"
        if found[name] == "joint":
            unsure[name] = f"text and image flow into it, but whether it sees both was not measured: {how}"
    return Seen(plain, wider, found, how, unsure)


def _token_paths(observed: Observed) -> set[Path]:
    """Where the prompt's tokens are; a pooled prompt is no sequence."""
    leaves, lengths = table(observed.plain), text_lengths(observed)
    tensors = {path: leaves[path] for path in observed.text() if isinstance(leaves[path], Tensor)}
    return {path for path, leaf in tensors.items() if not lengths or lengths & set(leaf.shape)}

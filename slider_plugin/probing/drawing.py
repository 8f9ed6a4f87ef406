"""Let a pipeline begin to draw and keep what it asks its parts: the calls that a probe measures by.

Nothing is known about the pipeline, so it is asked for the smallest image that it agrees to, with the arguments that its call
names. The denoiser is the part whose arguments depend on the random seed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from slider_plugin.errors import UserError
from slider_plugin.probing.opening import first_line
from slider_plugin.probing.trees import Call, Path, changed_call, table

SIDES = (32, 64, 128, 256, 512)  # in pixels; the first that works
WIDER = (512, 256, 128, 64, 32, 1024, 2048)
"""Pixels by which the wide image is wider, the first that the model takes; many, as some pad to multiples of 32 tokens."""

FRAMES = (5, 9, 1, 7, 17, 25)  # most autoencoders count 1 + 4n or 1 + 8n
SECONDS, MORE_SECONDS = 1.0, 16.0
PROMPT = "a photo of one small red circle on the left in bright light"
MORE_TEXT = ", ".join(['the word "blue" in large letters on the right in dim light', PROMPT] * 4)
"""It begins otherwise, as it may be cut, and quotes: some models read what is to be written by an encoder of its own."""

TOKENS = (64, 128, None)
"""`max_sequence_length`, where a pipeline pads its text to it; None leaves it to the pipeline."""

MORE_TOKENS = 192  # times as many as 64 and more than 32 beyond 128
UNGUIDED = (1.0, None)
"""The guidance scale that is none, and none given: some pipelines take something else in its place."""

STEPS = 2
PATIENCE = 11  # requests with one thing changed that may be refused for the same reason


@dataclass(frozen=True, slots=True)
class Request:
    """What a pipeline is asked for."""

    side: int = SIDES[0]
    wider: int = 0
    frames: int = FRAMES[0]
    seconds: float = SECONDS
    prompt: str = PROMPT
    tokens: int | None = TOKENS[0]
    guidance: float | None = UNGUIDED[0]
    seed: int = 0

    def arguments(self, pipeline: Any) -> dict[str, Any]:
        """Those that the pipeline's call names."""
        wanted = {
            "prompt": self.prompt,
            "height": self.side,
            "width": self.side + self.wider,
            "num_frames": self.frames,
            "frames": self.frames,
            "audio_duration": self.seconds,
            "num_inference_steps": STEPS,
            "guidance_scale": self.guidance,
            "max_sequence_length": self.tokens,
            "use_resolution_binning": False,  # else the nearest of some published sizes is drawn
            "clean_caption": False,
            "generator": torch.Generator().manual_seed(self.seed),
            "output_type": "latent",  # nobody looks at the image
        }
        if self.guidance is None:
            wanted["guidance_schedule"] = [1.0] * STEPS
        named = inspect.signature(pipeline.__call__).parameters
        return {name: value for name, value in wanted.items() if name in named and value is not None}

    def __str__(self) -> str:
        return f"{self.side}x{self.side} pixels, {self.frames} frames where there are any, {self.tokens or 'its own'} tokens"


def requests() -> Iterator[Request]:
    """What to try, the smallest first: one thing changed, then two."""
    first = Request()
    changes: list[dict[str, Any]] = [
        *({"side": side} for side in SIDES[1:]),
        *({"tokens": tokens} for tokens in TOKENS[1:]),
        *({"guidance": guidance} for guidance in UNGUIDED[1:]),
        *({"frames": frames} for frames in FRAMES[1:]),
    ]
    yield first
    yield from (replace(first, **change) for change in changes)
    yield from (replace(first, **a, **b) for a, b in combinations(changes, 2) if not a.keys() & b.keys())


class _Enough(BaseException):
    """The call that was wanted has been seen; no `except Exception` of a pipeline may stop this."""


@dataclass(slots=True)
class Run:
    """The calls of one drawing, by component, and of the tables of tokens in them, by full name; what it ended with."""

    calls: dict[str, list[Call]]
    error: Exception | None = None


def draw(pipeline: Any, request: Request, seen: Callable[[str, Call], None] | None = None) -> Run:
    """Draw and note every call of a part of the pipeline, arguments copied.

    Args:
        pipeline: the pipeline.
        request: what to ask for.
        seen: called with each component's name and its call before that happens; may raise `_Enough`.
    """
    run = Run({})
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(request.seed)
        for name, part in _watched(pipeline):
            stack.enter_context(_noting(name, part, run, seen))
        stack.enter_context(_own_sizes(pipeline, request))
        try:
            pipeline(**request.arguments(pipeline))
        except _Enough:
            pass
        except Exception as error:  # anything: the pipeline is unknown. Whoever draws says what it means
            run.error = error
    return run


def _watched(pipeline: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """The parts of a pipeline, and inside them what reads tokens: a text encoder need not be called as a whole."""
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            yield name, part
            yield from ((f"{name}.{inner}", m) for inner, m in part.named_modules() if isinstance(m, torch.nn.Embedding))


@contextmanager
def _own_sizes(pipeline: Any, request: Request) -> Iterator[None]:
    """Some pipelines bring every size that they are asked for to the area, or to one of the sizes, of their training."""
    width, area = request.side + request.wider, request.side * (request.side + request.wider)
    sizes = {
        "default_sample_size": area**0.5 / getattr(pipeline, "vae_scale_factor", 8) * (1 + 1e-6),  # they round down
        "resolutions": [(width, request.side)],
    }
    before = {name: getattr(pipeline, name) for name in sizes if isinstance(getattr(pipeline, name, None), int | float | list)}
    for name in before:
        setattr(pipeline, name, sizes[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(pipeline, name, value)


@contextmanager
def _noting(name: str, part: torch.nn.Module, run: Run, seen: Callable[[str, Call], None] | None) -> Iterator[None]:
    def note(_: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        call = changed_call(lambda _, leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (arguments, named))
        run.calls.setdefault(name, []).append(call)
        if seen:
            seen(name, call)

    handle = part.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


# --- The calls that a probe measures by -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Observed:
    """A denoiser's own calls: one as it was, and the same one with other noise, later, with another text, and wider."""

    component: str
    request: Request
    plain: Call
    reseeded: Call
    later: Call
    """That of the next step: another time."""

    reworded: Call
    """With a longer prompt, and with more tokens where the pipeline pads to a number that can be given."""

    wider: Call
    """With a wider image, or a longer sound."""

    same_text: bool
    """Whether the text encoders read the same for the wider image: some pipelines write its size into the prompt."""

    def noise(self) -> set[Path]:
        """What is noise in the call."""
        return differing(self.plain, self.reseeded)

    def image(self) -> set[Path]:
        """The noise that is wider where the image is: not that of a sound beside it."""
        return {path for path in self.noise() if path in reshaped(self.plain, self.wider)} or self.noise()

    def time(self) -> set[Path]:
        """What the denoiser is told about the time."""
        return differing(self.plain, self.later) - self.noise()

    def text(self) -> set[Path]:
        """What the prompt is in."""
        return differing(self.plain, self.reworded) - self.noise() - self.time()


def differing(one: Call, other: Call) -> set[Path]:
    """Places of leaves that are not the same."""
    there = table(other)
    return {path for path, leaf in table(one).items() if path not in there or not _same(leaf, there[path])}


def reshaped(one: Call, other: Call) -> set[Path]:
    """Places of tensors whose shape is not the same."""
    there = table(other)
    return {
        path
        for path, leaf in table(one).items()
        if isinstance(leaf, Tensor) and not (isinstance(there.get(path), Tensor) and there[path].shape == leaf.shape)
    }


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))
    return type(one) is type(other) and (not isinstance(one, int | float | str) or one == other)


def observe(pipeline: Any) -> Observed:
    """Ask a pipeline for small images until it draws, then for what a probe compares.

    Raises:
        UserError: it drew nothing that was asked for, or no part of it saw noise.
    """
    name = type(pipeline).__name__
    first_error: Exception | None = None
    refusals: set[str] = set()
    for number, request in enumerate(requests()):
        run = draw(pipeline, request)
        component = _denoiser(pipeline, request, run)
        if component and (run.error is None or len(run.calls[component]) >= STEPS):
            return _observed(pipeline, request, component, run)
        first_error = first_error or run.error
        refusals.add(str(run.error))
        if number >= PATIENCE and len(refusals) == 1:
            break  # it is not the request that it minds
    if first_error is None:
        raise UserError(f"--probe: no part of this {name} was given noise, so there is no denoiser to watch")
    raise UserError(
        f"--probe: {name} drew none of the small images that it was asked for by a prompt alone{_without(pipeline)}; "
        f"the first refusal was {type(first_error).__name__}: {first_line(first_error)}"
    )


def _without(pipeline: Any) -> str:
    missing = [name for name, part in pipeline.components.items() if part is None]
    return f" (its folder has no {', '.join(missing)})" if missing else ""


def _denoiser(pipeline: Any, request: Request, run: Run) -> str | None:
    """The first part that is called with something else when the seed is another one."""
    counts: dict[str, int] = {}
    found: list[str] = []

    def compare(name: str, call: Call) -> None:
        count = counts[name] = counts.get(name, -1) + 1
        if count < len(run.calls.get(name, ())) and differing(run.calls[name][count], call):
            found.append(name)
            raise _Enough

    if run.calls:
        draw(pipeline, replace(request, seed=1), compare)
    return found[0] if found else None


def _observed(pipeline: Any, request: Request, component: str, run: Run) -> Observed:
    calls = run.calls[component]
    reseeded = _first_step(pipeline, replace(request, seed=1), component, len(calls))
    noise = differing(calls[0], reseeded[0])
    # A step may be several calls, with the prompt and without.
    step = next((n for n, call in enumerate(calls) if n and _moved_on(calls[0], call, noise)), len(calls))
    reworded = _first_step(pipeline, _reworded(request), component, step)
    if len(reworded) < step:  # it refused more tokens
        reworded = _first_step(pipeline, replace(request, prompt=MORE_TEXT), component, step)
    more = next((n for n in range(min(step, len(reworded))) if differing(calls[n], reworded[n]) - noise), 0)
    if len(reworded) <= more or len(calls) <= more + step:
        raise UserError(f"--probe: {type(pipeline).__name__} drew a short prompt, but not a long one, or only one step")
    wider = _wider(pipeline, request, component, calls[more], more)
    return Observed(
        component=component,
        request=request,
        plain=calls[more],
        reseeded=reseeded[more],
        later=calls[more + step],
        reworded=reworded[more],
        wider=wider.calls[component][more],
        same_text=_same_reading(run, wider, component),
    )


def _same_reading(run: Run, other: Run, component: str) -> bool:
    """Whether what reads tokens outside the denoiser read the same in both; where nothing does, nobody knows."""
    readers = [name for name in run.calls if "." in name and not name.startswith(f"{component}.")]
    return bool(readers) and all(
        name in other.calls and _tokens(run.calls[name][0]) == _tokens(other.calls[name][0]) for name in readers
    )


def _tokens(call: Call) -> list[int]:
    """The numbers that a table of tokens is asked for, each row of equal ones as one: padding may be of any length."""
    ids = next(leaf for leaf in table(call).values() if isinstance(leaf, Tensor))
    return [int(token) for token in ids.flatten().unique_consecutive()]


def _moved_on(first: Call, call: Call, noise: set[Path]) -> bool:
    """Whether a call is of a later step: the same noise in shape, not in value."""
    return bool(differing(first, call) & noise) and not reshaped(first, call) & noise


def _reworded(request: Request) -> Request:
    return replace(request, prompt=MORE_TEXT, tokens=request.tokens and max(MORE_TOKENS, 2 * request.tokens))


def _wider(pipeline: Any, request: Request, component: str, plain: Call, place: int) -> Run:
    for wider in WIDER:
        run = _until(pipeline, replace(request, wider=wider, seconds=MORE_SECONDS), component, place + 2)
        calls = run.calls.get(component, [])
        if len(calls) > place + 1 and reshaped(plain, calls[place]):  # the next call comes only if this one went well
            return run
    raise UserError(f"--probe: {type(pipeline).__name__} draws images of one size alone, so no module can be told to see them")


def _first_step(pipeline: Any, request: Request, component: str, count: int) -> list[Call]:
    return _until(pipeline, request, component, count).calls.get(component, [])


def _until(pipeline: Any, request: Request, component: str, count: int) -> Run:
    """Draw until the denoiser has been called so often; what comes after is not worth its time."""
    seen: list[Call] = []

    def note(name: str, call: Call) -> None:
        if name == component:
            seen.append(call)
            if len(seen) == count:
                raise _Enough

    return draw(pipeline, request, note)

"""Does training ask the denoiser what the published pipeline asks it?

The real pipeline starts to draw, without guidance, and its first call of the denoiser is recorded: prompt embeddings, masks,
positions, sizes, everything. The noisy latents in it are then replaced by those that `predict` gets, and the two answers of the
real denoiser are compared. A pooled embedding of the wrong layer, a forgotten mask, positions that begin elsewhere show here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from slider_plugin.testing.oracle import NOISY, TIME, drawing_arguments, first_answer, known_name
from slider_plugin.testing.subject import PROMPTS, Subject, answered_by
from slider_plugin.validation.render import undisturbed

UNGUIDED = 1.0  # the guidance scale that is none
CALLS = 2  # of the pipeline that are looked at: some ask without the prompt first


class _Enough(Exception):
    """The calls that were wanted have been seen."""


Call = tuple[tuple[Any, ...], dict[str, Any]]


@torch.no_grad()
def gap(subject: Subject) -> float:
    """The largest difference between the two answers, in standard deviations of ours; the nearest row of a batch counts."""
    noisy, text = subject.latents(), subject.conditioning(PROMPTS[1:2])
    subject.components.options = {**subject.components.options, **_guidance(subject)}
    calls = _calls_of(subject, lambda: _draw(subject))
    own = _at_the_same_time(calls[0], lambda told: _calls_of(subject, lambda: subject.predict_at(noisy, told, text))[0])
    real = type(subject.denoiser).forward
    ours = first_answer(real(subject.denoiser, *own[0], **own[1]))[0]
    rows: list[Tensor] = []
    for call in calls:
        ours_there = _beside_theirs(_named(own, NOISY, place=0), _named(call, NOISY, place=0), noisy)
        arguments, named = _with_latents(call, ours_there)
        rows += list(first_answer(real(subject.denoiser, *arguments, **named)))
    fitting = [row for row in rows if row.shape == ours.shape]
    assert fitting, f"predict's answer is {tuple(ours.shape)}, the pipeline's {tuple(rows[0].shape)}"
    return min(float((row - ours).abs().max() / ours.std()) for row in fitting)


def _at_the_same_time(theirs: Call, ours: Callable[[Tensor], Call]) -> Call:
    """Our call of the denoiser that tells it the time of theirs; `predict` may tell it a linear function of its own."""
    wanted = _time(theirs)
    call = ours(wanted)
    if torch.allclose(_time(call), wanted):
        return call
    half = _time(ours(wanted / 2))
    slope = (_time(call) - half) / (wanted / 2)
    return ours((wanted - (_time(call) - slope * wanted)) / slope)


def _time(call: Call) -> Tensor:
    time: Tensor = torch.as_tensor(_named(call, TIME, place=1)).reshape(-1)[:1].float()
    return time


def _guidance(subject: Subject) -> dict[str, float]:
    """What `guidance_scale` is in drawing, a distilled model has as an option of its own in training."""
    return dict.fromkeys((name for name in subject.components.options if name.endswith("_guidance_value")), UNGUIDED)


def _draw(subject: Subject) -> None:
    pipeline = subject.family.build_pipeline(subject.components)
    arguments = drawing_arguments(subject, pipeline, guidance_scale=UNGUIDED)
    with undisturbed(subject.components, pipeline):
        pipeline(prompt=[PROMPTS[1]], generator=[torch.Generator().manual_seed(3)], **arguments)


def _calls_of(subject: Subject, work: Callable[[], object]) -> list[Call]:
    """The arguments of the first calls of the denoiser."""
    real, calls = type(subject.denoiser).forward, []

    def note(*arguments: Any, **named: Any) -> Any:
        calls.append((arguments, named))
        if len(calls) == CALLS:
            raise _Enough
        return real(subject.denoiser, *arguments, **named)

    with answered_by(subject.denoiser, note), suppress(_Enough):
        work()
    return calls


def _named(call: Call, names: tuple[str, ...], place: int) -> Any:
    arguments, named = call
    return arguments[place] if len(arguments) > place else named[known_name(named, names)]


def _beside_theirs(ours: Any, theirs: Any, noisy: Tensor) -> Any:
    """Our noise with their further channels, where a model sees more than noise: a mask, a first frame (Wan image to video)."""
    further = isinstance(theirs, Tensor) and theirs.ndim == noisy.ndim and theirs.shape[1] > noisy.shape[1]
    if not further or ours.shape[1:] != theirs.shape[1:]:
        return ours
    channels = noisy.shape[1]
    return torch.cat([ours[:1, :channels], theirs[:1, channels:].to(ours)], dim=1)


def _with_latents(call: Call, latents: Any) -> Call:
    arguments, named = call
    theirs = _named(call, NOISY, place=0)
    if isinstance(theirs, list | tuple):
        put: Any = [latents[0]] * len(theirs)
    else:
        put = latents.expand(len(theirs), *latents.shape[1:])
    if arguments:
        return (put, *arguments[1:]), named
    return arguments, _replaced(named, put)


def _replaced(named: Mapping[str, Any], latents: Any) -> dict[str, Any]:
    return {**named, known_name(named, NOISY): latents}

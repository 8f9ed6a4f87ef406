"""Use finished sliders in a diffusers pipeline, each at its strength and in its part of the denoising steps.

A slider that begins late leaves the structure of the image to the base model and changes what comes after it: the `start_noise`
of Concept Sliders (arXiv 2311.12092, section 4.1; eval.py of its code sets the scale to 0 before that step).

diffusers loads the files and PEFT runs them; here is only who is on when. That is decided by time, not by counting calls: a
denoiser is called twice in a step for guidance, and twice at one time by schedulers of second order (Heun), whose list of times
has each of them twice. A step's place is that of its time among the different times of the scheduler, so an image-to-image
pipeline that begins in the middle of them begins in the middle of the window as well.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slider_plugin.errors import UserError
from slider_plugin.pipelines import layers_of, load_file, models_of

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


@dataclass(slots=True)
class SliderUse:
    """One slider in use. `strength` and the window may be changed between images, also inside `use_sliders`."""

    file: Path | str
    """LoRA that the pipeline's own loader reads."""

    strength: float = 1.0
    """What it is multiplied by, also below 0; 0 is the base model."""

    start: float = 0.0
    """Share of the steps after which it is on: 0 from the first one, 0.2 after a fifth of them."""

    end: float = 1.0
    """Share of the steps after which it is off again; 1 for never. At `start` or below it is never on."""

    def at(self, share: float) -> float:
        """Its strength at a step that this share of all steps comes before, 0 (the first) to below 1."""
        return self.strength if self.start <= share < self.end else 0.0


@contextmanager
def use_sliders(pipeline: Any, *uses: SliderUse) -> Iterator[None]:
    """Draw with sliders inside; outside the pipeline is what it was before, with the LoRAs of your own at their strengths.

        age = SliderUse("age.safetensors", strength=2.0, start=0.2)
        with use_sliders(pipeline, age, SliderUse("smile.safetensors", -1.0)):
            image = pipeline("portrait photo of a gardener").images[0]

    Args:
        pipeline: of diffusers, with a scheduler; changed in place inside.
        uses: the sliders. Their sum is what is drawn.

    Raises:
        UserError: a file cannot be loaded into this pipeline, a window is none, or the pipeline has no list of times.
    """
    _check(pipeline, uses)
    with ExitStack() as stack:
        loaded = _loaded(pipeline, uses, stack)
        clock = _Clock(pipeline)
        stack.callback(clock.stop)
        for model in {id(model): model for _, model, _ in loaded}.values():
            hook = _set_before(clock, [(use, layers) for use, of, layers in loaded if of is model])
            stack.callback(model.register_forward_pre_hook(hook).remove)
        yield


def _check(pipeline: Any, uses: Sequence[SliderUse]) -> None:
    if not hasattr(getattr(pipeline, "scheduler", None), "set_timesteps"):
        raise UserError(f"{type(pipeline).__name__} has no scheduler with a list of times, by which sliders are switched")
    for use in uses:
        if not 0.0 <= use.start <= 1.0 or not 0.0 <= use.end <= 1.0:
            raise UserError(f"{use.file}: start {use.start} and end {use.end} are shares of the steps, from 0 to 1")


# --- In the model -----------------------------------------------------------------------------------------------------

_Loaded = tuple[SliderUse, torch.nn.Module, list[tuple[str, Any]]]
"""A slider, a model that it is in, and its layers there with its name in them."""


class _Before:
    """What a model's LoRA layers were before: which adapters were active, and which parameters trainable."""

    def __init__(self, model: torch.nn.Module) -> None:
        layers = _all_layers(model)
        self.model = model
        self._active = {id(layer): list(layer.active_adapters) for layer in layers}
        self._first = list(layers[0].active_adapters) if layers else []
        self._trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def activate(self, more: Sequence[str] = ()) -> None:
        """Activate what was active and these; a layer that is new gets the names of all others, as diffusers does it."""
        for layer in _all_layers(self.model):
            layer.set_adapter([*self._active.get(id(layer), self._first), *more])

    def restore(self, names: Sequence[str]) -> None:
        """Take adapters out again."""
        model: Any = self.model
        inside = [name for name in names if layers_of(model, name)]
        if inside and any(name not in inside for layer in _all_layers(model) for name in layer.lora_A):
            model.delete_adapters(inside)
        elif inside:
            model.unload_lora()  # which puts the plain layers back
        self.activate()
        for parameter, trainable in self._trainable:
            parameter.requires_grad_(trainable)


def _loaded(pipeline: Any, uses: Sequence[SliderUse], stack: ExitStack) -> list[_Loaded]:
    """Load all files, beside the LoRAs that are active already; what is undone later goes on the stack."""
    models = list(models_of(pipeline).values())
    taken = {name for model in models for layer in _all_layers(model) for name in layer.lora_A}
    names = [_free_name(number, taken) for number in range(len(uses))]
    before = [_Before(model) for model in models]
    for state in before:
        stack.callback(state.restore, names)
    found: list[_Loaded] = []
    for name, use in zip(names, uses, strict=True):
        load_file(pipeline, Path(use.file), name)
        for model in models:
            layers = [(name, layer) for layer in layers_of(model, name).values()]
            found += [(use, model, layers)] if layers else []
    for state in before:
        state.activate(names)
    return found


def _free_name(number: int, taken: set[str]) -> str:
    name = f"slider_{number}"
    while name in taken:
        name += "_"
    return name


def _all_layers(model: torch.nn.Module) -> list[LoraLayer]:
    from peft.tuners.lora import LoraLayer

    found: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return found


def _set_before(clock: _Clock, inside: Sequence[tuple[SliderUse, list[tuple[str, Any]]]]) -> Any:
    """A hook in front of a denoiser: each slider in it gets the strength of this time."""
    now: dict[int, float] = {}

    def before(model: torch.nn.Module, arguments: Any) -> None:
        share = clock.share()
        for number, (use, layers) in enumerate(inside):
            strength = use.at(share)
            if now.get(number) != strength:  # most steps change nothing
                for name, layer in layers:
                    layer.set_scale(name, strength)
                now[number] = strength

    return before


# --- Time -------------------------------------------------------------------------------------------------------------


class _Clock:
    """Where a pipeline is among its scheduler's times: the scheduler says it, or its calls of `step` are counted."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._times: Any = None
        self._steps = 0
        self._scheduler: Any = None
        self._kind: Any = None

    def share(self) -> float:
        """Which share of all steps comes before this one, 0 to below 1."""
        scheduler = self._pipeline.scheduler
        if scheduler is not self._scheduler:
            self.stop()
            self._listen(scheduler)
        if scheduler.timesteps is not self._times:  # a new image: each call of a pipeline makes a new list
            self._times, self._steps = scheduler.timesteps, 0
        places = places_of([float(time) for time in self._times])
        index = getattr(scheduler, "step_index", None)  # some have none, or none before the first step
        if index is None:
            skipped = len(places) - int(getattr(self._pipeline, "num_timesteps", None) or len(places))
            index = max(0, skipped) + self._steps
        return places[min(index, len(places) - 1)]

    def stop(self) -> None:
        """Leave the scheduler as it was."""
        if self._scheduler is not None:
            self._scheduler.__class__ = self._kind
        self._scheduler = self._kind = None

    def _listen(self, scheduler: Any) -> None:
        """A class in between rather than an attribute: a copy of the scheduler, which some pipelines make, steps by itself."""
        kind = type(scheduler)

        @functools.wraps(kind.step)  # pipelines ask for its arguments
        def step(this: Any, *arguments: Any, **named: Any) -> Any:
            answer = kind.step(this, *arguments, **named)
            if this is scheduler:
                self._steps += 1
            return answer

        self._scheduler, self._kind = scheduler, kind
        scheduler.__class__ = type(kind.__name__, (kind,), {"step": step, "__module__": kind.__module__})


def places_of(times: Sequence[float]) -> list[float]:
    """For each entry of a scheduler's list the share of different times before it: `[9, 9, 5, 1]` is at 0, 0, 1/3, 2/3."""
    changes = [0]
    for before, after in pairwise(times):
        changes.append(changes[-1] + (after != before))
    return [change / (changes[-1] + 1) for change in changes]

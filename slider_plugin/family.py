"""One loaded family: a typed method for each hook, answered by the family or by the host's default, and checked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, NoReturn

import pluggy

from slider_hooks import (
    PROJECT,
    BucketInfo,
    Components,
    Conditioning,
    Family,
    LoadRequest,
    PromptEntry,
    ResolvedTargets,
    Sampler,
    TargetRequest,
    specs,
)
from slider_plugin.errors import PluginError, UserError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from slider_plugin.registry import PluginRow


class LoadedFamily:
    """One family and the host's defaults behind one typed method for each hook.

    The plugins of other families are not even registered, so none can answer for this one. What a hook raises passes
    through with a note that says whose hook it was; what it returns is checked.
    """

    def __init__(self, row: PluginRow, plugin: Any, defaults: Any) -> None:
        self.facts: Family = plugin.FAMILY
        self.distribution, self.version = row.distribution, row.version
        self._row, self._plugin = row, plugin
        manager = pluggy.PluginManager(PROJECT)
        manager.add_hookspecs(specs)
        manager.register(defaults, name="defaults")
        try:
            manager.register(plugin, name=row.key)  # last, so that it is asked first
        except pluggy.PluginValidationError as error:
            raise PluginError(f"{row} cannot be used: {error}. Way out: {row.way_out()}") from error
        self._hooks: dict[str, pluggy.HookCaller] = {name: getattr(manager.hook, name) for name in specs.HOOKS}

    def resolve_lora_targets(self, denoiser: Module, controlnet: Module | None, request: TargetRequest) -> ResolvedTargets:
        hook = "resolve_lora_targets"
        answer = self._call(hook, denoiser=denoiser, controlnet=controlnet, request=request)
        resolved: ResolvedTargets = self._expect(hook, answer, ResolvedTargets)
        try:
            re.compile(resolved.expression)
        except re.error as error:
            self._refuse(hook, f"gave {resolved.expression!r}, which is not a regular expression: {error}")
        return resolved

    def build_sampler(
        self, buckets: Sequence[BucketInfo], seed: int, weighting: str = "uniform", neutral_scale: float = 1.0
    ) -> Sampler:
        hook = "build_sampler"
        answer = self._call(hook, buckets=buckets, seed=seed, weighting=weighting, neutral_scale=neutral_scale)
        sampler: Sampler = self._expect(hook, answer, Sampler)
        return sampler

    def validation_prompt_scale(self, entry: PromptEntry, global_strength: float) -> float:
        hook = "validation_prompt_scale"
        answer = self._call(hook, entry=entry, global_strength=global_strength)
        if isinstance(answer, bool) or not isinstance(answer, Real) or not math.isfinite(answer):
            self._refuse(hook, f"gave {answer!r} for prompt {entry.name!r}, and a scale is a finite number")
        return float(answer)

    def load_components(self, request: LoadRequest) -> Components:
        hook = "load_components"
        components: Components = self._expect(hook, self._call(hook, request=request), Components)
        return components

    def encode_prompts(self, components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
        answer = self._call("encode_prompts", components=components, prompts=prompts)
        return self._one_each("encode_prompts", answer, len(prompts), "prompts")

    def encode_images(self, components: Components, images: Tensor) -> Tensor:
        latents: Tensor = self._call("encode_images", components=components, images=images)
        shape = getattr(latents, "shape", ())
        if not shape or shape[0] != images.shape[0]:
            self._refuse("encode_images", f"gave {_short(latents)} for {images.shape[0]} images")
        return latents

    def condition_on_images(self, components: Components, images: Tensor) -> Sequence[Conditioning]:
        answer = self._call("condition_on_images", components=components, images=images)
        return self._one_each("condition_on_images", answer, images.shape[0], "images")

    def predict(self, components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        output: Tensor = self._call("predict", components=components, noisy=noisy, time=time, conditioning=conditioning)
        if getattr(output, "shape", None) != noisy.shape:
            self._refuse("predict", f"gave {_short(output)} for noisy latents of shape {tuple(noisy.shape)}")
        return output

    def build_pipeline(self, components: Components) -> Any:
        pipeline = self._call("build_pipeline", components=components)
        if not callable(pipeline):
            self._refuse("build_pipeline", f"gave {_short(pipeline)}, which cannot be called")
        return pipeline

    def describe(self) -> dict[str, Any]:
        """Who made what this family makes, for the metadata of a run and of its files."""
        return {
            "family": self.facts.name,
            "distribution": self.distribution,
            "version": self.version,
            "contract": ".".join(map(str, self.facts.contract)),
            "hooks": {hook: self._owner(hook) for hook in specs.HOOKS},
        }

    def _owner(self, hook: str) -> str:
        """Who answers: the family, the host's default, or the default with the family's wrapper around it."""
        own = [impl for impl in self._hooks[hook].get_hookimpls() if impl.plugin is self._plugin]
        wrapped = all(impl.wrapper or impl.hookwrapper for impl in own)
        return "default" if not own else "wrapped default" if wrapped else "family"

    def _call(self, hook: str, **arguments: Any) -> Any:
        try:
            answer = self._hooks[hook](family=self.facts, **arguments)
        except UserError:
            raise
        except Exception as error:
            error.add_note(self._where(hook))
            raise
        if answer is None:
            self._refuse(hook, "gave None, and nobody else answers")
        return answer

    def _expect(self, hook: str, answer: Any, kind: type) -> Any:
        if not isinstance(answer, kind) or isinstance(answer, str):
            self._refuse(hook, f"gave {_short(answer)}, not a {kind.__name__}")
        return answer

    def _one_each(self, hook: str, answer: Any, count: int, of: str) -> Sequence[Conditioning]:
        encoded: Sequence[Conditioning] = self._expect(hook, answer, Sequence)
        if len(encoded) != count:
            self._refuse(hook, f"gave {len(encoded)} results for {count} {of}")
        for item in encoded:
            self._expect(hook, item, Mapping)
        return encoded

    def _where(self, hook: str) -> str:
        return f"in hook {hook} of {self._row}, answered by the {self._owner(hook)}"

    def _refuse(self, hook: str, complaint: str) -> NoReturn:
        raise PluginError(f"{self._where(hook)}: it {complaint}")


def _short(value: Any) -> str:
    """A value in a few words: never the numbers of a tensor."""
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + (f" of shape {tuple(shape)}" if shape is not None else "")

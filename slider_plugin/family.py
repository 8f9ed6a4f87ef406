"""One loaded family: a typed method for each hook, answered by the family or by the host's default, and checked."""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import pluggy

from slider_hooks import (
    PROJECT,
    BucketInfo,
    Components,
    Conditioning,
    Family,
    LoadRequest,
    Objective,
    PromptEntry,
    ResolvedTargets,
    Sampler,
    TargetRequest,
    specs,
)
from slider_plugin import console
from slider_plugin.control import steered
from slider_plugin.errors import PluginError, UserError
from slider_plugin.lint import IMPL
from slider_plugin.objectives import BUILT_IN

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from slider_plugin.discovery import PluginRow


TRACE = "SLIDER_PLUGIN_TRACE"
"""Environment variable: at 1, each call of a hook is printed, with who answered, how long it took and what came back."""

DEFAULT, FAMILY = "default", "family"
"""Names of those who may answer, besides `extension <distribution>:<name>`."""


class LoadedFamily:
    """One family, the extensions and the host's defaults behind one typed method for each hook.

    Extensions are asked first, then the family, then the defaults. The plugins of other families are not even registered, so
    none can answer for this one. What a hook raises passes through with a note that says whose hook it was; what it returns is
    checked.
    """

    def __init__(self, row: PluginRow, plugin: Any, defaults: Any, extensions: Sequence[tuple[PluginRow, Any]] = ()) -> None:
        self.facts: Family = plugin.FAMILY
        self.distribution, self.version = row.distribution, row.version
        self._row = row
        self._rows: dict[str, PluginRow] = {}
        self._answered: dict[str, str] = {}
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(specs)
        self._register(defaults, DEFAULT)
        self._register(plugin, FAMILY, row)  # whoever comes later is asked earlier
        for extension_row, extension in reversed(extensions):
            self._register(extension, f"extension {extension_row.key}", extension_row)
        self._hooks: dict[str, pluggy.HookCaller] = {name: getattr(self._manager.hook, name) for name in specs.EVERY}
        self._assert_one_replacement()

    def _register(self, plugin: Any, owner: str, row: PluginRow | None = None) -> None:
        """Register a plugin's hooks under its owner's name, each of them noting when it has answered."""
        if row is not None:
            self._rows[owner] = row
        try:
            self._manager.register(self._noting(plugin, owner), name=owner)
        except pluggy.PluginValidationError as error:
            raise PluginError(f"{row} cannot be used: {error}. Way out: {row and row.way_out()}") from error

    def _noting(self, plugin: Any, owner: str) -> SimpleNamespace:
        functions = {
            name: getattr(plugin, name) for name in dir(plugin) if inspect.isroutine(inspect.getattr_static(plugin, name))
        }
        implementations = {name: f for name, f in functions.items() if getattr(f, IMPL, None)}
        return SimpleNamespace(**{name: self._noted(name, f, owner) for name, f in implementations.items()})

    def _noted(self, name: str, function: Callable[..., Any], owner: str) -> Callable[..., Any]:
        options = getattr(function, IMPL)
        hook = options["specname"] or name
        if options["wrapper"] or options["hookwrapper"]:
            return function

        @functools.wraps(function)  # which keeps the marker, and the names of the arguments
        def noted(*arguments: Any) -> Any:
            try:
                answer = function(*arguments)
            except UserError:
                raise
            except Exception as error:
                error.add_note(self._where(hook, owner))
                raise
            if answer is not None:
                self._answered[hook] = owner
            return answer

        return noted

    def _assert_one_replacement(self) -> None:
        several = set(specs.BY_NAME)
        for hook in (name for name in (*specs.FOR_EVERY_FAMILY, *specs.SCORERS) if name not in several):
            rivals = [impl.plugin_name for impl in self._implementations(hook) if impl.plugin_name not in (DEFAULT, FAMILY)]
            if len(rivals) > 1:
                keys = [rival.removeprefix("extension ") for rival in rivals]
                raise PluginError(
                    f"{hook} is replaced by {' and by '.join(sorted(rivals))}, and one run has one; "
                    f"leave one out with SLIDER_PLUGIN_BLOCK={sorted(keys)[-1]}"
                )

    def resolve_lora_targets(self, denoiser: Module, controlnet: Module | None, request: TargetRequest) -> ResolvedTargets:
        hook = "resolve_lora_targets"
        answer = self._call(hook, denoiser=denoiser, controlnet=controlnet, request=request)
        resolved: ResolvedTargets = self._expect(hook, answer, ResolvedTargets)
        try:
            re.compile(resolved.expression)
        except re.error as error:
            self._refuse(hook, f"gave {resolved.expression!r}, which is not a regular expression: {error}")
        return resolved

    def build_objective(self, name: str, config: Mapping[str, Any]) -> Objective:
        hook = "build_objective"
        answer = self._call(hook, required=False, name=name, config=config)
        if answer is None:
            known = ", ".join(BUILT_IN)
            raise UserError(
                f"slider_objective: {name!r} is not among {known}, and no installed extension answers to it; correct the "
                "name, or install the extension that has it"
            )
        objective: Objective = self._expect(hook, answer, Objective)
        return objective

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

    def load_controlnet(self, components: Components, model: str | None) -> Module:
        controlnet: Module = self._call("load_controlnet", components=components, model=model)
        if not callable(getattr(controlnet, "forward", None)):
            self._refuse("load_controlnet", f"gave {_short(controlnet)}, which is no module")
        return controlnet

    def encode_control(self, components: Components, images: Tensor, latents: Tensor) -> Tensor:
        shown: Tensor = self._call("encode_control", components=components, images=images, latents=latents)
        if (getattr(shown, "shape", None) or (None,))[0] != images.shape[0]:
            self._refuse("encode_control", f"gave {_short(shown)} for {images.shape[0]} images")
        return shown

    def control(self, components: Components, shown: Tensor, strength: float, call: Mapping[str, Any]) -> Mapping[str, Any]:
        answer = self._call("control", components=components, shown=shown, strength=strength, call=call)
        residuals: Mapping[str, Any] = self._expect("control", answer, Mapping)
        return residuals

    def predict(self, components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        with steered(components, conditioning) as rest:  # by the ControlNet, if there is one
            output: Tensor = self._call("predict", components=components, noisy=noisy, time=time, conditioning=rest)
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

    def makers(self, hooks: Sequence[str]) -> dict[str, list[list[str]]]:
        """Who may have a hand in what each of these hooks answers: name, distribution, version and a hash of the code.

        The code is the module of the hook, and of a package that is not the host's own all of its modules.
        """
        return {hook: [self._maker(impl) for impl in self._hooks[hook].get_hookimpls()] for hook in hooks}

    def _maker(self, implementation: pluggy.HookImpl) -> list[str]:
        owner = implementation.plugin_name
        row = self._rows.get(owner)
        file = Path(inspect.unwrap(implementation.function).__code__.co_filename)
        folder = file.parent
        whole = row is not None and not row.builtin and (folder / "__init__.py").is_file()
        files = sorted(folder.rglob("*.py")) if whole else [file]
        code = hashlib.sha256(b"".join(f.read_bytes() for f in files if f.is_file())).hexdigest()
        return [owner, row.distribution if row else "", row.version if row else "", code]

    @property
    def has_scorer(self) -> bool:
        """Whether an extension scores images."""
        return bool(self._implementations("score_images"))

    def score_images(self, images: Sequence[Any], positive: str, negative: str) -> Sequence[float]:
        """What an extension says of pictures; `has_scorer` must be true."""
        answer = self._call("score_images", images=images, positive=positive, negative=negative)
        scores: Sequence[float] = self._expect("score_images", answer, Sequence)
        if len(scores) != len(images):
            self._refuse("score_images", f"gave {len(scores)} scores for {len(images)} images")
        wrong = [v for v in scores if isinstance(v, bool) or not isinstance(v, Real) or not math.isfinite(v)]
        if wrong:
            self._refuse("score_images", f"gave {wrong[0]!r}, and a score is a finite number")
        return [float(value) for value in scores]

    @property
    def is_observed(self) -> bool:
        """Whether an extension listens."""
        return bool(self._hooks["observe"].get_hookimpls())

    def observe(self, event: str, **facts: Any) -> None:
        """Tell the extensions that listen what has happened."""
        self._call("observe", event=event, facts=facts)

    def _owner(self, hook: str) -> str:
        """Who answered, or will answer if asked: `family`, `default`, `extension ...`; and who wraps the answer."""
        inner = [impl.plugin_name for impl in self._implementations(hook)]
        owner = self._answered.get(hook) or (inner[-1] if inner else "nobody")  # pluggy asks the last one first
        wrappers = [impl.plugin_name for impl in self._hooks[hook].get_hookimpls() if impl.wrapper or impl.hookwrapper]
        own = "wrapped " if FAMILY in wrappers else ""
        others = [wrapper for wrapper in wrappers if wrapper != FAMILY]
        return own + owner + "".join(f", wrapped by {wrapper}" for wrapper in others)

    def _implementations(self, hook: str) -> list[pluggy.HookImpl]:
        """Those that answer a hook, the one that is asked first at the end."""
        return [impl for impl in self._hooks[hook].get_hookimpls() if not (impl.wrapper or impl.hookwrapper)]

    def _call(self, hook: str, required: bool = True, **arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            answer = self._hooks[hook](family=self.facts, **arguments)
        except UserError:
            raise
        except Exception as error:
            if not hasattr(error, "__notes__"):  # a wrapper's; whoever answers notes it himself
                error.add_note(self._where(hook))
            raise
        if tracing():
            milliseconds = (time.perf_counter() - started) * 1000
            console.say(f"{hook}: {self._owner(hook)} of {self._row.key}, {milliseconds:.1f} ms: {_gist(answer)}")
        if answer is None and required:
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

    def _where(self, hook: str, owner: str | None = None) -> str:
        owner = owner or self._answered.get(hook)
        return f"in hook {hook} of {self._rows.get(owner or FAMILY, self._row)}, answered by the {owner or self._owner(hook)}"

    def _refuse(self, hook: str, complaint: str) -> NoReturn:
        row = self._rows.get(self._answered.get(hook, FAMILY), self._row)
        raise PluginError(f"{self._where(hook)}: it {complaint}. Way out: {row.way_out()}")


def tracing() -> bool:
    """Whether each call of a hook is to be printed."""
    return os.environ.get(TRACE, "0") not in ("", "0")


def _gist(value: Any) -> str:
    """The same for a trace: numbers as they are, and how long a list is."""
    if isinstance(value, Real):
        return f"{value:g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"a {type(value).__name__} of {len(value)}"
    return _short(value)


def _short(value: Any) -> str:
    """A value in a few words: never the numbers of a tensor."""
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + (f" of shape {tuple(shape)}" if shape is not None else "")

"""Read a plugin's hooks and facts, and say everything that is wrong with them at once.

pluggy itself is silent about most mistakes: a forgotten or misspelt marker is a hook that never runs, and before version 1.7
an argument with a default never receives the host's value. So each of these is a finding here, before anything is called.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

from slider_hooks import PROJECT, Diffusion, Family, Flow, Layout, Option, Targets, specs

IMPL, SPEC = f"{PROJECT}_impl", f"{PROJECT}_spec"  # the attributes in which pluggy's markers leave their options
EVERY_HOOK = specs.EVERY
NAME = re.compile(r"[a-z][a-z0-9_]*")
CLASS = re.compile(r"((?!\d)\w+(\.(?!\d)\w+)*:)?(?!\d)\w+")
"""A class of diffusers by its name, or one of a plugin's own as `package.module:Class`."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the known one that looks most like it, if any does."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def lint(plugin: object, name: str | None = None) -> list[str]:
    """Every finding about a family plugin; `name` is that of its entry point."""
    return [*lint_family(getattr(plugin, "FAMILY", None), name), *lint_hooks(plugin), *_lint_extension_hooks(plugin)]


def lint_extension(plugin: object) -> list[str]:
    """Every finding about an extension."""
    allowed = (*specs.FOR_EVERY_FAMILY, *specs.SCORERS, *specs.OBSERVERS)
    foreign = [hook for hook in specs.HOOKS if hook not in allowed and _implements(plugin, hook)]
    findings = [f"{hook}: only a family answers it; an extension may have {', '.join(allowed)}" for hook in foreign]
    return [*lint_hooks(plugin), *findings]


def _lint_extension_hooks(plugin: object) -> list[str]:
    heard = [hook for hook in specs.OBSERVERS if _implements(plugin, hook)]
    answered = [hook for hook in specs.SCORERS if _implements(plugin, hook)]
    return [
        *(f"{hook}: only extensions hear it; a family has no part in it" for hook in heard),
        *(f"{hook}: only extensions answer it; a family has no part in it" for hook in answered),
    ]


def _implements(plugin: object, hook: str) -> bool:
    functions = (getattr(plugin, name) for name in dir(plugin) if inspect.isroutine(inspect.getattr_static(plugin, name)))
    return any((options := getattr(f, IMPL, None)) and (options["specname"] or f.__name__) == hook for f in functions)


# --- Hooks -----------------------------------------------------------------------------------------------------------


def lint_hooks(plugin: object) -> list[str]:
    """Every finding about the functions of a plugin, of a family or not."""
    findings: list[str] = []
    for name in dir(plugin):
        function = inspect.getattr_static(plugin, name)  # without running properties, as pluggy does
        if inspect.isroutine(function):
            findings += _lint_function(name, getattr(plugin, name))
    return findings


def _lint_function(name: str, function: Callable[..., Any]) -> Iterator[str]:
    options = getattr(function, IMPL, None)
    if options is None:
        if name in EVERY_HOOK:
            marker = "is marked with hookspec" if hasattr(function, SPEC) else "has no marker"
            yield f"{name}: has the name of a hook but {marker}; write @hookimpl above it, or rename it"
        return
    hook = options["specname"] or name
    if hook not in EVERY_HOOK:
        yield f"{name}: no hook has this name{nearest(hook, EVERY_HOOK)}; the hooks are {', '.join(EVERY_HOOK)}"
        return
    yield from (f"{name}: {finding}" for finding in _lint_arguments(function, getattr(specs, hook)))
    yield from (f"{name}: {finding}" for finding in _lint_kind(function, options))


def _lint_arguments(function: Callable[..., Any], spec: Callable[..., Any]) -> Iterator[str]:
    known = list(inspect.signature(spec).parameters)
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            yield f"*{name} is never filled; name the arguments that it wants: {', '.join(known)}"
            continue
        if parameter.kind is parameter.KEYWORD_ONLY:
            yield f"argument {name!r} is keyword-only and never filled; move it in front of the *"
        if parameter.default is not parameter.empty:
            yield f"argument {name!r} has a default, which pluggy before 1.7 puts in place of the real value; remove it"
        if name not in known:
            yield f"argument {name!r} is not in the hook{nearest(name, known)}; it has {', '.join(known)}"


def _lint_kind(function: Callable[..., Any], options: dict[str, Any]) -> Iterator[str]:
    wrapper = options["wrapper"] or options["hookwrapper"]
    if inspect.iscoroutinefunction(function):
        yield "is async; hooks are called without an event loop"
    elif inspect.isgeneratorfunction(function) != wrapper:
        yield "a wrapper must yield once" if wrapper else "yields; return the result, or mark it @hookimpl(wrapper=True)"
    if options["trylast"] and not wrapper:
        yield "trylast lets the host's default answer first, so it would never run; remove it"


# --- Facts -----------------------------------------------------------------------------------------------------------


def lint_family(family: object, name: str | None = None) -> list[str]:
    """Every finding about a FAMILY; `name` is that of its entry point."""
    if family is None:
        return ["there is no FAMILY; state one: FAMILY = slider_hooks.Family(...)"]
    if not isinstance(family, Family):
        kind = type(family)
        return [f"FAMILY is a {kind.__module__}.{kind.__qualname__}, not a slider_hooks.Family"]
    parts = (
        _lint_names(family, name),
        _lint_noise(family),
        _lint_targets(family.targets),
        _lint_options(family),
        _lint_layouts(family),
    )
    return [f"FAMILY.{finding}" for part in parts for finding in part]


def _lint_names(family: Family, entry_point: str | None) -> Iterator[str]:
    if not NAME.fullmatch(family.name):
        yield f"name is {family.name!r}; it needs lower-case letters, digits and underscores, a letter first"
    if entry_point is not None and family.name != entry_point:
        yield f"name is {family.name!r}, but its entry point is named {entry_point!r}; make them equal"
    if not family.title.strip():
        yield "title is empty"
    if not family.denoiser.isidentifier():
        yield f"denoiser is {family.denoiser!r}; it is the name of a pipeline component, such as 'unet' or 'transformer'"
    if not CLASS.fullmatch(family.denoiser_class):
        yield (
            f"denoiser_class is {family.denoiser_class!r}; it is the _class_name in the config.json of the denoiser, "
            "or package.module:Class"
        )
    if family.default_flavour is not None and family.default_flavour not in family.flavours:
        close = nearest(family.default_flavour, family.flavours)
        yield f"default_flavour {family.default_flavour!r} is not one of flavours{close}"


def _lint_noise(family: Family) -> Iterator[str]:
    noise = family.noise
    if not isinstance(noise, (Flow, Diffusion)):
        yield f"noise is a {type(noise).__name__}; it is a Flow or a Diffusion"
    elif isinstance(noise, Flow) and noise.sign not in (1, -1):
        yield f"noise.sign is {noise.sign!r}; it is 1 or -1"
    elif isinstance(noise, Diffusion) and noise.prediction not in (None, "epsilon", "v_prediction"):
        yield f"noise.prediction is {noise.prediction!r}; it is 'epsilon', 'v_prediction' or None"


def _lint_targets(targets: Targets) -> Iterator[str]:
    if not isinstance(targets, Targets):
        yield f"targets is a {type(targets).__name__}, not a slider_hooks.Targets"
        return
    if isinstance(targets.documented, str):
        yield "targets.documented is one string; it is a tuple of suffixes"
    for item in fields(Targets):
        if item.name == "documented":
            continue
        try:
            re.compile(getattr(targets, item.name))
        except (re.error, TypeError) as error:
            yield f"targets.{item.name} is not a regular expression: {error}"


def _lint_layouts(family: Family) -> Iterator[str]:
    if not isinstance(family.layouts, Mapping):
        yield f"layouts is a {type(family.layouts).__name__}, not a mapping of names to slider_hooks.Layout"
        return
    for name, layout in family.layouts.items():
        if name not in ("kohya", "comfyui"):
            yield f"layouts has the name {name!r}; `slider export --to` knows kohya and comfyui"
        if not isinstance(layout, Layout):
            yield f"layouts[{name!r}] is a {type(layout).__name__}, not a slider_hooks.Layout"
            continue
        try:
            for expression, replacement in layout.names:
                re.sub(expression, replacement, "")  # which looks at the replacement's groups as well
            re.compile(layout.left_out)
        except (re.error, IndexError, TypeError, ValueError) as error:
            yield f"layouts[{name!r}] has names or left_out that are no expressions: {error}"


def _lint_options(family: Family) -> Iterator[str]:
    names = [option.name for option in family.options]
    yield from (f"options: {name!r} is there {names.count(name)} times" for name in sorted(set(names)) if names.count(name) > 1)
    for option in family.options:
        if not NAME.fullmatch(option.name):
            yield f"options: the name {option.name!r} needs lower-case letters, digits and underscores, a letter first"
        if not _accepts(option, option.default):
            yield f"options: the default of {option.name!r} is {option.default!r}, which is no {option.type.__name__}"
        elif option.choices and option.default is not None and option.default not in option.choices:
            yield f"options: the default of {option.name!r} is {option.default!r}, which is not one of {option.choices}"


def _accepts(option: Option, value: object) -> bool:
    """Whether an option may hold a value: None, its type, and whole numbers where a float is asked for."""
    if value is None:
        return True
    if isinstance(value, bool):
        return option.type is bool
    return isinstance(value, (int, float) if option.type is float else option.type)

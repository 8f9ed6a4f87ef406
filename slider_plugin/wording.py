"""What the configuration says to people: its keys in help, and pydantic's findings in plain English."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from slider_plugin.config import SECTIONS, RunConfig

NOT_FLAGS = ("base_loras", "buckets", "prompts", "lycoris", "slider_text", "objective_config", "family_options")
"""Keys that only a file can hold."""

SHORT = Repr()
SHORT.maxstring = SHORT.maxother = 80


def key_help() -> list[tuple[str, str, str, str, str]]:
    """(section, key, type, default, help) of every key that is also a flag."""
    rows, section = [], ""
    for name, info in RunConfig.model_fields.items():
        section = SECTIONS.get(name, section)
        if name not in NOT_FLAGS:
            default = "" if info.is_required() or info.default is None else _written(info.default)
            rows.append((section, name, _type_text(info.annotation), default, info.description or ""))
    return rows


def shown(value: Any) -> str:
    """A value as JSON spells it, at a length that fits a message."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else SHORT.repr(value)


def plain_words(problem: ErrorDetails, model: type[BaseModel]) -> str:
    """One of pydantic's findings in plain English: which key, what was given, what is allowed."""
    place = ".".join(str(part) for part in problem["loc"] if isinstance(part, (str, int)) and not is_branch(part))
    kind, given, context = problem["type"], problem["input"], problem.get("ctx", {})
    if kind == "missing":
        description = model.model_fields[str(problem["loc"][0])].description if problem["loc"] else ""
        return f"{place}: it is missing ({description})"
    wanted = {
        "int_parsing": "is not a whole number", "int_type": "is not a whole number", "int_from_float": "is not a whole number",
        "float_parsing": "is not a number", "float_type": "is not a number", "finite_number": "is not a finite number",
        "bool_parsing": "is neither true nor false", "bool_type": "is neither true nor false",
        "string_type": "is not text", "path_type": "is not a path", "string_too_short": "is empty",
        "tuple_type": "is not a list",
    }.get(kind)  # fmt: skip
    if wanted is None and kind == "literal_error":
        wanted = f"is not one of {context['expected']}".replace("'", "")
    if wanted is None and "_than" in kind:
        words = {"greater_than": "above", "greater_than_equal": "at least", "less_than": "below", "less_than_equal": "at most"}
        wanted = f"is out of range; it must be {words[kind]} {next(iter(context.values()))}"
    example = "; use e.g. 0.5 or -0.5" if place.endswith("strength") else ""
    return f"{place}: {shown(given)} {wanted or problem['msg']}{example}"


def is_branch(part: str | int) -> bool:
    """Whether a part of a place is pydantic's name for one side of a union."""
    return isinstance(part, str) and ("[" in part or part in ("str", "float", "int"))


def kind_of(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "nothing"}
    return kinds.get(type(value), "a number")


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(f"{v:g}" for v in value)
    return "" if value == {} else str(value)


def _type_text(annotation: Any) -> str:
    """A type as people say it."""
    parts = list(_leaves(annotation))
    if choices := [part for part in parts if isinstance(part, str)]:
        return " | ".join(["number"] * (float in parts) + choices)
    words = {tuple: "list", bool: "true | false", Path: "path", float: "number", int: "whole number", str: "text"}
    return next(word for kind, word in words.items() if kind in parts)


def _leaves(annotation: Any) -> Iterable[Any]:
    """The types, and the words of a Literal, that an annotation is made of."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _leaves(arguments[0])
    elif origin is Literal:
        yield from arguments
    elif origin is tuple or not arguments:
        yield origin or annotation
    else:
        for argument in arguments:
            yield from _leaves(argument)

"""What the value of a key may be, beyond Python's own types: how text from flags is read, and what is refused with which words.

Each is a type for a field of `config.py`.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, FiniteFloat
from pydantic_core import PydanticCustomError

SHARES = (0.25, 1.0)
"""What `random_strength: on` draws from: smaller strengths say little beside the noise."""


def _no_bool(value: object) -> object:
    """Python counts true as 1; somebody who writes it for a number has made a mistake."""
    if isinstance(value, bool):
        raise PydanticCustomError("float_type", "not a number")
    return value


def _listed(value: object) -> object:
    """A list may be written as text, as flags have it: `-1,0,1` or `[-1, 0, 1]`; one number is a list of one."""
    if isinstance(value, str):
        return [part.strip() for part in value.strip().strip("[]").split(",") if part.strip()]
    return [value] if isinstance(value, (int, float)) else value


def _modules(value: object) -> object:
    """Text that is a JSON list is a list; any other text is a regular expression."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            parsed = json.loads(value)
        except ValueError:
            return value  # a character class, such as [a-z]+
        return parsed if isinstance(parsed, list) else value
    return value


def _pairs(value: object) -> object:
    """`d_coef=2,safeguard_warmup=true`, as SimpleTuner has it, is an object; its values are typed by the optimizer's own."""
    if not isinstance(value, str):
        return value
    parts = [part.partition("=") for part in value.split(",") if part.strip()]
    names = [name.strip() for name, _, _ in parts]
    if not all(equals and name.strip() and text.strip() for name, equals, text in parts):
        raise PydanticCustomError("pairs", "is no list of settings; use e.g. d_coef=2,weight_decay=0")
    if len(set(names)) < len(names):
        raise PydanticCustomError("pairs", "has a setting twice; keep one")
    return {name.strip(): text.strip() for name, _, text in parts}


def _shift(value: object) -> object:
    """A number or `auto`."""
    if value is None:
        return None
    if isinstance(value, str) and value.strip().lower() == "auto":
        return "auto"
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else 0.0
    except ValueError:
        number = 0.0
    if 0.0 < number < float("inf"):
        return number
    raise PydanticCustomError("shift", "is neither a number above 0 nor auto; 1 does not shift")


def _window(value: object) -> object:
    """Two ends, 0 to 1, the lower one first."""
    listed = _listed(value)
    ends = [_no_bool(end) for end in listed] if isinstance(listed, (list, tuple)) else []
    try:
        low, high = map(float, ends)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        low, high = 1.0, 0.0
    if 0.0 <= low < high <= 1.0:
        return low, high
    raise PydanticCustomError("window", "is no part of the noise; use two rising numbers from 0 (image) to 1 (noise): 0.2,0.8")


def _one_line(value: object) -> object:
    """Text without line breaks."""
    return " ".join(value.split()) if isinstance(value, str) else value


def _shares(value: object) -> object:
    """`off` and `on` or two numbers above 0, the lower one first."""
    word = str(value).strip().lower()
    if value is None or word in ("off", "false", "no", "none"):
        return None
    if word in ("on", "true", "yes"):
        return SHARES
    listed = _listed(value)
    ends = list(listed) if isinstance(listed, (list, tuple)) else []
    try:
        low, high = map(float, ends)
    except (TypeError, ValueError):
        low, high = 1.0, 0.0
    if 0.0 < low < high < float("inf"):
        return low, high
    raise PydanticCustomError("shares", "is neither on, off nor two rising numbers above 0, such as 0.25,1")


def _size(value: object) -> object:
    """1024, "1024" and "1024x768" are sizes; they are kept as text."""
    text = str(value).strip().lower()
    if value is None or (not isinstance(value, bool) and re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5})?", text)):
        return None if value is None else text
    raise PydanticCustomError("size", "is not one size in pixels; use e.g. 1024 or 1024x768")


# The check for true and false comes last here, and therefore runs first.
Number = Annotated[FiniteFloat, BeforeValidator(_no_bool)]
Positive = Annotated[FiniteFloat, Field(gt=0), BeforeValidator(_no_bool)]
NotNegative = Annotated[FiniteFloat, Field(ge=0), BeforeValidator(_no_bool)]
Fraction = Annotated[FiniteFloat, Field(ge=0, lt=1), BeforeValidator(_no_bool)]
Chance = Annotated[FiniteFloat, Field(ge=0, le=1), BeforeValidator(_no_bool)]
Strength = Annotated[FiniteFloat, Field(examples=[0.5, -0.5]), BeforeValidator(_no_bool)]
Count = Annotated[int, Field(ge=1), BeforeValidator(_no_bool)]
Steps = Annotated[int, Field(ge=0), BeforeValidator(_no_bool)]
Words = Annotated[str, Field(min_length=1, max_length=200), BeforeValidator(_one_line)]
Seed = Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(_no_bool)]

Numbers = Annotated[tuple[Number, ...], BeforeValidator(_listed)]
Modules = Annotated[tuple[str, ...] | str | None, BeforeValidator(_modules)]
Settings = Annotated[dict[str, Any], BeforeValidator(_pairs)]
Shift = Annotated[float | Literal["auto"] | None, BeforeValidator(_shift)]
Window = Annotated[tuple[float, float], BeforeValidator(_window)]
Shares = Annotated[tuple[float, float] | None, BeforeValidator(_shares)]
Size = Annotated[str | None, BeforeValidator(_size)]

"""From the browser's form to config.json: what is written there is what `slider train` reads.

Names of inputs: `k.KEY` a key, `o.NAME` an option of the family, `b.0.KEY` a bucket's, `p.0.KEY` a prompt's, `l.0.KEY` a
LoRA's of the base. A bucket's strength has a direction (`more`, `neutral`, `less`) and an amount. A key that the form does
not know stays in the file as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from slider_hooks import Option
from slider_plugin.config import RunConfig
from slider_plugin.configfile import INHERITED, to_json
from slider_plugin.ui.schema import (
    AS_FOR_ALL,
    NOT_EMPTY_ABSENT,
    OWN_FORM,
    TABLES,
    Widget,
    empties,
    fields,
    kind_of_field,
    leaves,
    widget,
)
from slider_plugin.ui.workspace import HUB_ID, OutsideError, Workspace

PREFIXES = {"buckets": "b", "prompts": "p", "base_loras": "l"}
DIRECTIONS = ("more", "neutral", "less")
NEW_ROWS: Mapping[str, dict[str, Any]] = {
    "buckets": {"id": "", "instance_data_dir": "", "slider_strength": 0.5},
    "prompts": {"name": "", "prompt": ""},
    "base_loras": {"path": "", "weight": 1.0},
}
MOST_ROWS = 200
USUAL_STRENGTH = 0.5
"""Of a bucket that shows more or less, where no amount is written."""

HUB_KEYS = ("pretrained_model_name_or_path", "controlnet_model_name_or_path")
KEEP = ("model_family", "learning_rate")
"""Keys that stay in the file also at their default: that of the rate depends on the optimizer."""


class FormError(Exception):
    """Fields that cannot be written down at all; by input's name."""

    def __init__(self, problems: Mapping[str, str]) -> None:
        super().__init__("; ".join(problems.values()))
        self.problems = dict(problems)


# --- From the form ----------------------------------------------------------------------------------------------------


def parse(
    form: Mapping[str, str], workspace: Workspace, options: Iterable[Option] = (), before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What config.json is to hold.

    Args:
        form: the inputs; a switch that is off is absent.
        workspace: every path must lie in it.
        options: the chosen family's own keys.
        before: what the file held; keys that the form does not show are kept.

    Raises:
        FormError: paths outside, and JSON that is none. What any other value is worth, reading the file tells.
    """
    problems: dict[str, str] = {}
    reader = _Reader(form, workspace, problems)
    options = tuple(options)
    known = {*RunConfig.model_fields, *(option.name for option in options)}
    written = {key: value for key, value in (before or {}).items() if key not in known}
    written["model_family"] = form.get("k.model_family", "")
    written |= reader.object(RunConfig, "k.", OWN_FORM)
    for option in options:
        written |= reader.option(option)
    for key, model in TABLES.items():
        rows = [reader.row(model, f"{PREFIXES[key]}.{number}.") for number in _numbers(form, PREFIXES[key])]
        if rows:
            written[key] = rows
    if problems:
        raise FormError(problems)
    return written


class _Reader:
    """Reads the inputs of one form; what is wrong goes to `problems`."""

    def __init__(self, form: Mapping[str, str], workspace: Workspace, problems: dict[str, str]) -> None:
        self._form, self._workspace, self._problems = form, workspace, problems

    def object(self, model: type[BaseModel], prefix: str, leave_out: Iterable[str] = ()) -> dict[str, Any]:
        """The keys of one object that something is written for."""
        found: dict[str, Any] = {}
        for key, info in model.model_fields.items():
            if key not in leave_out:
                found |= self._key(key, info, prefix)
        return found

    def row(self, model: type[BaseModel], prefix: str) -> dict[str, Any]:
        found = self.object(model, prefix, ("slider_strength",))
        if f"{prefix}direction" in self._form:
            found["slider_strength"] = _strength(self._form[f"{prefix}direction"], self._form.get(f"{prefix}amount", ""))
        required = {key: "" for key, info in model.model_fields.items() if info.is_required()}
        return {key: value for key, value in (required | found).items() if key != "slider_strength" or value is not None}

    def _nulls(self, prefix: str) -> list[str]:
        """Keys of a bucket that the file says null for, rather than nothing: null is not what holds for all buckets."""
        return self._form.get(f"{prefix}nulls", "").split()

    def option(self, option: Option) -> dict[str, Any]:
        text = self._form.get(f"o.{option.name}", "")
        if option.type is bool:
            return {option.name: bool(text)} if bool(text) != option.default else {}
        if text == "" or (option.choices and text == str(option.default)):
            return {}
        return {option.name: text if option.type is str else _number(text, whole=option.type is int)}

    def _key(self, key: str, info: FieldInfo, prefix: str) -> dict[str, Any]:
        name, one = f"{prefix}{key}", widget(key, info, {}, prefix)
        if one.kind == "switch":
            on = self._form.get(name) == "on"
            return {key: on} if on != info.default else {}
        text = self._form.get(name, "").replace("\r\n", "\n")
        if text == "":
            return {key: None} if key in self._nulls(prefix) else _nothing(key, info)
        if (one.kind == "choice" or empties(info)) and text == str(info.default) and one.default != AS_FOR_ALL:
            return {}
        return {key: self._value(one, info, text)}

    def _value(self, one: Widget, info: FieldInfo, text: str) -> Any:
        if one.kind == "path":
            return self._path(one, text.strip())
        listed = text.lstrip().startswith("[") and (one.kind == "list" or one.key == "peft_lora_target_modules")
        if one.kind == "json" or listed:
            return self._json(one, text)
        if one.kind == "list":
            return [_number(part.strip()) for part in text.split(",") if part.strip()]
        if one.kind == "number":
            return _number(text, whole=float not in leaves(info.annotation))
        if kind_of_field(info) == "text" and float in leaves(info.annotation):  # a number, or a word
            return _number(text)
        return text

    def _path(self, one: Widget, text: str) -> str:
        if text == "latest" or (one.key in HUB_KEYS and HUB_ID.fullmatch(text) and not (self._workspace.root / text).exists()):
            return text
        try:
            return str(self._workspace.inside(text, writing=one.key in ("output_dir", "cache_dir")))
        except OutsideError as error:
            self._problems[one.name] = f"{one.key}: {error}"
            return ""

    def _json(self, one: Widget, text: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            if one.key == "optimizer_config" and not text.lstrip().startswith("{"):
                return text  # d_coef=2,slice_p=11
            if one.key == "peft_lora_target_modules":
                return text  # a pattern that begins with a class of characters
            self._problems[one.name] = f"{one.key}: this is not JSON: {error}"
            return None


def _numbers(form: Mapping[str, str], prefix: str) -> list[int]:
    """The rows of a table that the form has, in their order."""
    found = {int(match[1]) for name in form if (match := re.match(rf"{prefix}\.(\d{{1,6}})\.", name))}
    return sorted(found)[:MOST_ROWS]


def _nothing(key: str, info: FieldInfo) -> dict[str, Any]:
    """What an empty field stands for: the default, and null or nothing where the default is something."""
    if key in NOT_EMPTY_ABSENT:
        return {key: []}
    if empties(info):
        return {key: None}
    return {key: ""} if info.is_required() else {}


def _number(text: str, whole: bool = False) -> Any:
    """A number as JSON has it; anything else stays text, and reading the file says what is wrong with it."""
    text = text.strip()
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        return text
    return number if number - number == 0.0 and not (whole and number != int(number)) else text


def _strength(direction: str, amount: str) -> Any:
    """`more` 0.5 is 0.5, `less` 0.5 is -0.5; neutral is 0, or not given if nothing is written."""
    number = _number(amount) if amount.strip() else None
    if direction == "neutral":
        return None if number is None else 0.0
    if not isinstance(number, (int, float)) and number is not None:
        return number
    size = abs(number or USUAL_STRENGTH)
    return -size if direction == "less" else size


# --- To the form ------------------------------------------------------------------------------------------------------


def rows(written: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """The rows of a table, each with the widgets of its keys; prompts may also be an object of names."""
    found = written.get(key) or []
    if isinstance(found, dict):
        found = [{"name": name, **(value if isinstance(value, dict) else {"prompt": value})} for name, value in found.items()]
    listed = [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
    return [
        {
            "number": number,
            "given": row,
            "widgets": fields(TABLES[key], row, f"{PREFIXES[key]}.{number}."),
            "nulls": " ".join(name for name, value in row.items() if value is None and name in INHERITED),
            "direction": _direction(row.get("slider_strength")),
            "amount": _amount(row.get("slider_strength")),
        }
        for number, row in enumerate(listed)
    ]


def _direction(strength: Any) -> str:
    number = strength if isinstance(strength, (int, float)) else 0
    return "more" if number > 0 else "less" if number < 0 else "neutral"


def _amount(strength: Any) -> str:
    return f"{abs(strength):.12g}" if isinstance(strength, (int, float)) else ""


def compact(config: RunConfig) -> dict[str, Any]:
    """A configuration as the form writes it: without what is at its default anyway."""
    usual = RunConfig(model_family="").model_dump(mode="json")
    return {key: value for key, value in to_json(config).items() if key in KEEP or key not in usual or value != usual[key]}


def paths_shown(written: Mapping[str, Any], workspace: Workspace) -> dict[str, Any]:
    """The same with paths as the page shows them, relative to the workspace."""

    def one(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
        places = {key for key, widget in fields(model, {}, "").items() if widget.kind == "path"}
        absolute = {key for key in places if isinstance(values.get(key), str) and Path(values[key]).is_absolute()}
        return {key: workspace.shown(value) if key in absolute else value for key, value in values.items()}

    shown = one(RunConfig, written)
    for key, model in TABLES.items():
        if isinstance(shown.get(key), list):
            shown[key] = [one(model, row) if isinstance(row, dict) else row for row in shown[key]]
    return shown

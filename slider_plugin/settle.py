"""Bring what a file or the flags say under our own keys, one object at a time; problems are noted, and not raised."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from slider_hooks import Option
from slider_plugin.config import BaseLoraConfig, BucketConfig, PromptConfig, RunConfig, TextConfig
from slider_plugin.documents import read_document
from slider_plugin.errors import UserError
from slider_plugin.known_keys import ENTRY_RENAMED, MEANT, PROMPT_RENAMED, RENAMED, VALUES, Known
from slider_plugin.lycoris_config import LycorisConfig, LycorisPreset
from slider_plugin.wording import is_branch, kind_of, plain_words, shown

SPELLINGS: Mapping[type, Mapping[str, str]] = {
    RunConfig: RENAMED,
    BucketConfig: ENTRY_RENAMED,
    PromptConfig: PROMPT_RENAMED,
    BaseLoraConfig: {},
    TextConfig: {},
    LycorisConfig: {},
    LycorisPreset: {},
}

WORDS = {"true": True, "false": False}

WRITTEN = ("output_dir", "cache_dir")
"""Keys of folders that a run makes."""

NAMES_OF_PLACES = ("resume_from_checkpoint", "pretrained_model_name_or_path")
"""Keys that may be a path, besides those that always are."""


class Missing:
    """Stands for a value that was refused already."""


class Settler:
    """One reading: what was found wrong and what was ignored on the way."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.notes: list[str] = []

    def object(self, path: Path) -> dict[str, Any]:
        """The object of keys and values in a file; {} if it holds none, or none can be read."""
        value = self.document(path)
        if value is not None and not isinstance(value, dict):
            self.problems.append(f"{path.name}: it must hold an object of keys and values, not {kind_of(value)}")
        return value if isinstance(value, dict) else {}

    def document(self, path: Path) -> Any:
        """What a JSON or YAML file holds; None if it cannot be read."""
        try:
            return read_document(path)
        except UserError as error:
            self.problems.append(str(error))
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
            self.problems.append(f"{path}: {type(error).__name__}: {error}")
        return None

    def file(self, name: Any, key: str, where: str) -> Path | None:
        """The file that a key names, if there is one."""
        if isinstance(name, str) and Path(name).is_file():
            return Path(name)
        self.problems.append(f"{where}: {key}: there is no file {name if isinstance(name, str) else shown(name)}")
        return None

    def settle(
        self,
        written: Mapping[str, Any],
        model: type[BaseModel],
        known: Mapping[str, Known],
        where: str,
        base: Path | None,
        options: Mapping[str, Option] | None = None,
    ) -> dict[str, Any]:
        """The keys that are ours, under their own names, with paths resolved; all others are noted or refused."""
        fields, values = model.model_fields, {}
        for key, value in written.items():
            name = plain_name(str(key))
            name, value = MEANT.get((name, typed(bool, value)), (name, value)) if model is RunConfig else (name, value)
            name = name if name in fields else SPELLINGS[model].get(name, name)
            if name in fields and name != "family_options":
                if name in values:
                    self.problems.append(f"{where}: {name} is given twice, under two spellings; keep one")
                meant = self._value(name, value, where)
                if meant == "" and _is_path(name, fields):
                    meant = None if _may_be_null(fields[name]) else self._empty(name, where)
                if meant is not None or _may_be_null(fields[name]):
                    values[name] = meant
            elif options and name in options:
                if value is not None:
                    values[name] = value
            elif name in known:
                self._judge(name, value, known[name], where)
            else:
                self._unknown(name, [*fields, *(options or ())], known, where)
        return {name: self._resolved(name, value, fields, base, where) for name, value in values.items()}

    def _value(self, name: str, value: Any, where: str) -> Any:
        """A value as ours; one that only other tools have is replaced with a note, or refused."""
        if value == "None" or value == "null":
            return None
        foreign = VALUES.get(name, {})
        meant = foreign.get(value) if isinstance(value, (str, bool)) else None
        if meant is None:
            return value
        if meant.instead is None:
            self.problems.append(f"{where}: {name}: {shown(value)} cannot be used: {meant.why}")
            return Missing
        if meant.why:
            self.notes.append(f"{where}: {name}: {value!r}: {meant.why}")
        return meant.instead

    def _resolved(self, name: str, value: Any, fields: Mapping[str, Any], base: Path | None, where: str) -> Any:
        """A relative path as this module's docstring says."""
        place = _is_path(name, fields) or name in NAMES_OF_PLACES
        if not place or not isinstance(value, str) or not value or value == "latest":
            return value
        try:
            if name in WRITTEN:
                return str(Path(value).expanduser())
            found = _found(value, base)
            return str(Path(found).resolve()) if name == "instance_data_dir" else found
        except (OSError, RuntimeError, ValueError) as error:  # a name too long, an unknown ~user, a zero byte
            self.problems.append(f"{where}: {name}: {shown(value)} cannot be a path: {error}")
            return Missing

    def _empty(self, name: str, where: str) -> Any:
        self.problems.append(f"{where}: {name}: it is empty; write a path")
        return Missing

    def _judge(self, name: str, value: Any, known: Known, where: str) -> None:
        verdict = known.verdict(value)
        if verdict == "refused":
            self.problems.append(f"{where}: {name}: {shown(value)} cannot be used: {known.why}")
        elif verdict == "ignored":
            self.notes.append(f"{where}: {name} is ignored: {known.why}")

    def _unknown(self, name: str, ours: Iterable[str], known: Mapping[str, Known], where: str) -> None:
        names = [n for n in ours if n != "family_options"]
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.6) or difflib.get_close_matches(
            name, known, n=1, cutoff=0.8
        )
        hint = f"; did you mean {near[0]}?" if near else "; `slider train --keys` lists all keys"
        if where == "flags" and name == "config":
            hint = "; the configuration stands first, without a flag: slider train config.json"
        self.problems.append(f"{where}: {name}: no such key{hint}")

    def validated(self, model: type[Any], values: Mapping[str, Any], where: str) -> Any:
        """The values as one of our models; None if it refuses them."""
        given = {name: value for name, value in values.items() if value is not Missing}
        absent = {name for name, value in values.items() if value is Missing}
        try:
            config = model.model_validate(given)
        except ValidationError as error:
            told: set[object] = set()
            for problem in error.errors():
                key, side = problem["loc"][0], any(map(is_branch, problem["loc"][1:]))
                if key not in absent and not (side and key in told):  # a key of two types fails once for each
                    self.problems.append(f"{where}: {plain_words(problem, model)}")
                told.add(key)
            return None
        return config


def plain_name(key: str) -> str:
    """A key as we write it: `--learning-rate` is learning_rate."""
    return key.strip().removeprefix("--").replace("-", "_")


def _found(text: str, base: Path | None) -> str:
    """A path beside the file or below the current directory, whole; as written if it is at neither place."""
    here = Path(text).expanduser()
    beside = (base or Path()) / here
    return next((str(path.resolve()) for path in (beside, here) if path.exists()), text)


def _is_path(name: str, fields: Mapping[str, Any]) -> bool:
    return name in fields and Path in (fields[name].annotation, *get_args(fields[name].annotation))


def _may_be_null(info: FieldInfo) -> bool:
    return type(None) in get_args(info.annotation)


def typed(kind: type, value: Any) -> Any:
    """A value of an option's type, from itself or from text; None if it is none."""
    if kind is bool:
        return value if isinstance(value, bool) else WORDS.get(str(value).lower())
    if kind is str:
        return value if isinstance(value, str) else None
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    if number - number != 0.0:  # infinite, or not a number
        return None
    return number if kind is float else int(number) if number == int(number) else None

"""Read JSON and YAML documents strictly: what a file says twice, or not at all as its format wants it, is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from slider_plugin.errors import UserError

ORDER = "the configuration file comes first, and flags are written --key value"

LARGEST = 4 * 2**20
"""Bytes of a document; a configuration of more is no configuration."""


def read_document(path: Path) -> Any:
    """The value of a `.json`, `.yaml` or `.yml` file. Raises UserError with file, place and a hint."""
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes; a file of settings has at most {LARGEST:,}")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder; give a file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return _yaml(text, path) if path.suffix.lower() in (".yaml", ".yml") else _json(text, path)


def _json(text: str, path: Path) -> Any:
    def no_constant(word: str) -> NoReturn:
        raise UserError(f"{path}: {word} is not a number that can be used; write a finite one")

    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return _without_twins(pairs, path)

    try:
        return json.loads(text, parse_constant=no_constant, object_pairs_hook=no_twins)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}{_hint(text, error.pos)}") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply") from error


def _without_twins(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: {twin!r} stands there twice in one object; keep one")
    return found


def _hint(text: str, position: int) -> str:
    """What is usually meant where JSON breaks off."""
    before, at = text[:position].rstrip(), text[position : position + 1]
    if at in "}]" and before.endswith(","):
        return "; there is a comma too many before it"
    if at == "'":
        return '; JSON wants double quotes: "..."'
    if text[position : position + 2] in ("//", "/*") or at == "#":
        return "; JSON has no comments, use YAML for them"
    return ""


def _yaml(text: str, path: Path) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses twins, which YAML would resolve in favour of the last one without a word."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            self.flatten_mapping(node)
            pairs = [(str(self.construct_object(k, deep=True)), self.construct_object(v, deep=True)) for k, v in node.value]
            return _without_twins(pairs, path)

    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise UserError(f"{path}: aliases are not read; write the value out")
        return Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path}{place}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}") from error


def parse_flags(flags: list[str], switches: set[str], problems: list[str]) -> dict[str, Any]:
    """`--key value`, `--key=value` and, for a switch, `--key` alone, to keys and values. What fits nowhere is a problem.

    Args:
        flags: the arguments.
        switches: keys that are true or false.
        problems: takes what is wrong.
    """
    values: dict[str, Any] = {}
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or len(flag) < 3:
            problems.append(f"{flag!r} on the command line belongs to no key; {ORDER}")
            continue
        name, equals, value = flag[2:].partition("=")
        name = name.replace("-", "_")
        if not equals:
            if rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            elif name in switches:
                value = "true"
            else:
                problems.append(f"--{name}: a value is missing")
                continue
        if name in values:
            problems.append(f"--{name} is given twice; keep one")
        values[name] = value
    return values

"""Read a configuration: config.json, dataloader JSON, prompt library and flags, with every problem in one message.

A relative path in a file means a place beside that file if there is one, else a place below the current directory; in a
flag it means the current directory. `output_dir` and `cache_dir` always mean the current directory. null is a key that is not
given, except where a key may be empty.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from slider_hooks import Family, Option
from slider_plugin.config import BaseLoraConfig, BucketConfig, PromptConfig, RunConfig
from slider_plugin.data.captions import with_lyrics
from slider_plugin.documents import parse_flags, read_document
from slider_plugin.errors import ConfigError, UserError
from slider_plugin.known_keys import (
    CACHES,
    CONFIG_KEYS,
    ENTRY_KEYS,
    ENTRY_RENAMED,
    FOREIGN_DATA,
    MEANT,
    PROMPT_KEYS,
    PROMPT_RENAMED,
    REGULARISATION,
    RENAMED,
    VALUES,
    Known,
)
from slider_plugin.lycoris_config import SWITCHED_OFF, LycorisConfig, LycorisPreset, problems_of
from slider_plugin.paired_data import joined
from slider_plugin.wording import NOT_FLAGS, is_branch, kind_of, plain_words, shown

INHERITED = (
    "resolution", "resolution_type", "caption_strategy", "instance_prompt",
    "minimum_image_size", "maximum_image_size", "target_downsample_size",
)  # fmt: skip
"""Keys of the configuration that are the defaults of every bucket."""

FAMILY_KEY = "model_family"
SPELLINGS: Mapping[type, Mapping[str, str]] = {
    RunConfig: RENAMED,
    BucketConfig: ENTRY_RENAMED,
    PromptConfig: PROMPT_RENAMED,
    BaseLoraConfig: {},
    LycorisConfig: {},
    LycorisPreset: {},
}
SOURCES = {"data_backend_config": "buckets", "user_prompt_library": "prompts", "lycoris_config": "lycoris"}
"""Keys that name a file, and the keys that hold the same in the configuration itself."""


VALIDATION = "validation"
"""Name of the prompt that `validation_prompt` becomes."""

WRITTEN = ("output_dir", "cache_dir")
"""Keys of folders that a run makes."""

NAMES_OF_PLACES = ("resume_from_checkpoint", "pretrained_model_name_or_path")
"""Keys that may be a path, besides those that always are."""

WORDS = {"true": True, "false": False}

_LYCORIS_HINT = ", since lora_type is lycoris: `slider targets FAMILY --lycoris lokr` prints one"


def read_config(
    path: Path | None, flags: Sequence[str] = (), family: Callable[[str], Family] | None = None
) -> tuple[RunConfig, tuple[str, ...]]:
    """Read a run's configuration.

    Args:
        path: config.json (or YAML); None if everything is in the flags.
        flags: `--key value ...`; they win over the file.
        family: finds a family by name, and raises UserError if there is none.

    Returns:
        The configuration, complete in itself (buckets and prompts are read in), and lines about keys that were ignored.

    Raises:
        ConfigError: everything that is wrong, in whichever file.
    """
    return _Reader(family).read(path, flags)


def read_prompts(path: Path) -> tuple[PromptConfig, ...]:
    """Read a prompt library. Raises ConfigError with everything that is wrong with it."""
    reader = _Reader(None)
    prompts = reader.prompt_library(path)
    if reader.problems:
        raise ConfigError(reader.problems, where="the prompt library")
    return prompts


def to_json(config: RunConfig) -> dict[str, Any]:
    """The configuration as a JSON object that `read_config` reads back to the same; the family's options are plain keys."""
    values: dict[str, Any] = config.model_dump(mode="json")
    options = values.pop("family_options")
    empty = {name for name, info in RunConfig.model_fields.items() if info.default is None}  # null says nothing new there
    return {key: value for key, value in (values | options).items() if value is not None or key not in (empty | options.keys())}


class _Reader:
    """One reading: what was found wrong and what was ignored on the way."""

    def __init__(self, family: Callable[[str], Family] | None) -> None:
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._family = family

    def read(self, path: Path | None, flags: Sequence[str]) -> tuple[RunConfig, tuple[str, ...]]:
        written = self._object(path) if path else {}
        named = parse_flags(list(flags), set(), []).get(FAMILY_KEY)  # a family's own switches are not known before
        facts = self._facts(named or _by_plain_name(written, FAMILY_KEY))
        options = {option.name: option for option in facts.options} if facts else {}
        switches = {name for name, info in RunConfig.model_fields.items() if info.annotation is bool}
        switches |= {option.name for option in options.values() if option.type is bool}
        given = parse_flags(list(flags), switches, self.problems)
        for name in set(given) & set(NOT_FLAGS):
            self.problems.append(f"--{name}: only a file can hold it")
            del given[name]
        where = path.name if path else "flags"
        values = self._settle(written, RunConfig, CONFIG_KEYS, where, path.parent if path else None, options)
        values = self._overlaid(values, self._settle(given, RunConfig, CONFIG_KEYS, "flags", None, options))
        if facts or isinstance(values.get(FAMILY_KEY), str):
            values[FAMILY_KEY] = facts.name if facts else values[FAMILY_KEY].strip().lower().replace("-", "_")
        values["family_options"] = self._options(values, options, where)
        values["buckets"] = self._buckets(values, where, path)
        values["prompts"] = self._prompts(values, where)
        values["lycoris"] = self._lycoris(values, where)
        values["base_loras"] = self._base_loras(values, where, path)
        self._check_together(values, where)
        config = self._validated(RunConfig, values, where)
        if self.problems or config is None:
            raise ConfigError(dict.fromkeys(self.problems))
        return config, tuple(dict.fromkeys(self.notes))

    def _overlaid(self, values: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
        """Flags win, also over what the file holds itself where a flag names another file or prompt."""
        hidden = {inline for source, inline in SOURCES.items() if source in flags}
        kept = {name: value for name, value in values.items() if name not in hidden}
        if "validation_prompt" in flags and isinstance(kept.get("prompts"), list):
            kept["prompts"] = [p for p in kept["prompts"] if not (isinstance(p, dict) and p.get("name") == VALIDATION)]
        return {name: value for name, value in (kept | flags).items() if value is not _Missing}

    # --- files and families ---

    def _object(self, path: Path) -> dict[str, Any]:
        value = self._document(path)
        if value is not None and not isinstance(value, dict):
            self.problems.append(f"{path.name}: it must hold an object of keys and values, not {kind_of(value)}")
        return value if isinstance(value, dict) else {}

    def _document(self, path: Path) -> Any:
        try:
            return read_document(path)
        except UserError as error:
            self.problems.append(str(error))
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
            self.problems.append(f"{path}: {type(error).__name__}: {error}")
        return None

    def _file(self, name: Any, key: str, where: str) -> Path | None:
        """The file that a key names, if there is one."""
        if isinstance(name, str) and Path(name).is_file():
            return Path(name)
        self.problems.append(f"{where}: {key}: there is no file {name if isinstance(name, str) else shown(name)}")
        return None

    def _facts(self, name: object) -> Family | None:
        if not isinstance(name, str) or self._family is None:
            return None
        try:
            return self._family(name)
        except UserError as error:
            self.problems.append(f"{FAMILY_KEY}: {error}")
            return None

    # --- keys ---

    def _settle(
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
            name = _plain_name(str(key))
            name, value = MEANT.get((name, _typed(bool, value)), (name, value)) if model is RunConfig else (name, value)
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
            return _Missing
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
            return _Missing

    def _empty(self, name: str, where: str) -> Any:
        self.problems.append(f"{where}: {name}: it is empty; write a path")
        return _Missing

    def _judge(self, name: str, value: Any, known: Known, where: str) -> None:
        verdict = known.verdict(value)
        if verdict == "refused":
            self.problems.append(f"{where}: {name}: {shown(value)} cannot be used: {known.why}")
        elif verdict == "ignored":
            self.notes.append(f"{where}: {name} is ignored: {known.why}")

    def _lycoris(self, values: dict[str, Any], where: str) -> LycorisConfig | None:
        """The configuration of lycoris-lora, from its file or from the key that holds it."""
        source, inline = values.get("lycoris_config"), values.pop("lycoris", None)
        if values.get("lora_type") != "lycoris":
            values.pop("lycoris_config", None)  # SimpleTuner's configurations name one in any case
            return None
        if (source is None) == (inline is None):
            wrong = "is needed" if source is None else "and lycoris are both given; keep one"
            self.problems.append(f"{where}: lycoris_config {wrong}{_LYCORIS_HINT if source is None else ''}")
            return None
        written, name = inline, where
        if source is not None:
            file = self._file(source, "lycoris_config", where)
            written, name = (self._document(file), file.name) if file else (None, where)
        values.pop("lycoris_config", None)
        if not isinstance(written, dict):
            if written is not None:
                self.problems.append(f"{name}: it must hold an object of keys and values, not {kind_of(written)}")
            return None
        self.problems += (f"{name}: {problem}" for problem in problems_of(written))
        own = self._settle(_without(written, SWITCHED_OFF), LycorisConfig, {}, name, None)
        preset = own.get("apply_preset", {})
        if isinstance(preset, dict):
            known = self._settle(preset, LycorisPreset, {}, f"{name}: apply_preset", None)
            own["apply_preset"] = self._validated(LycorisPreset, known, f"{name}: apply_preset")
        config: LycorisConfig | None = self._validated(LycorisConfig, {k: v for k, v in own.items() if v is not None}, name)
        return config

    def _unknown(self, name: str, ours: Iterable[str], known: Mapping[str, Known], where: str) -> None:
        names = [n for n in ours if n != "family_options"]
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.6) or difflib.get_close_matches(
            name, known, n=1, cutoff=0.8
        )
        hint = f"; did you mean {near[0]}?" if near else "; `slider train --keys` lists all keys"
        self.problems.append(f"{where}: {name}: no such key{hint}")

    def _options(self, values: dict[str, Any], options: Mapping[str, Option], where: str) -> dict[str, Any]:
        """Take the family's own keys out of `values`, typed, with defaults for those that are not given."""
        return {
            name: self._option(option, values.pop(name), where) if name in values else option.default
            for name, option in options.items()
        }

    def _option(self, option: Option, value: Any, where: str) -> Any:
        typed = _typed(option.type, value)
        if typed is None:
            kind = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[option.type]
            self.problems.append(f"{where}: {option.name}: {shown(value)} is not {kind}")
        elif option.choices and typed not in option.choices:
            self.problems.append(f"{where}: {option.name}: {value!r} is not one of {', '.join(map(str, option.choices))}")
        return typed

    # --- buckets ---

    def _buckets(self, values: dict[str, Any], where: str, path: Path | None) -> list[BucketConfig]:
        source, inline = values.pop("data_backend_config", None), values.pop("buckets", None)
        if source is not None and inline:
            self.problems.append(f"{where}: data_backend_config and buckets are both given; keep one")
        entries, name, base = inline or None, where, path.parent if path else None
        if source is not None:
            file = self._file(source, "data_backend_config", where)
            entries, name, base = (self._document(file), file.name, file.parent) if file else (None, where, base)
        if entries is None:
            return []
        if not isinstance(entries, list):
            self.problems.append(f"{name}: it must hold a list of buckets, not {kind_of(entries)}")
            return []
        entries = joined(entries, name, self.problems)
        buckets = [self._bucket(entry, number, name, base, values) for number, entry in enumerate(entries, start=1)]
        return [bucket for bucket in buckets if bucket is not None]

    def _bucket(
        self, entry: Any, number: int, where: str, base: Path | None, defaults: Mapping[str, Any]
    ) -> BucketConfig | None:
        if not isinstance(entry, dict):
            self.problems.append(f"{where}: entry {number}: it must be an object of keys and values, not {kind_of(entry)}")
            return None
        place = f"{where}: bucket {shown(entry['id'])}" if "id" in entry else f"{where}: entry {number}"
        if entry.get("dataset_type") in CACHES:
            self.notes.append(f"{place} is ignored: {ENTRY_KEYS['cache_dir'].why}")
            return None
        foreign = ENTRY_KEYS["type"].verdict(entry.get("type")) == "refused" or entry.get("dataset_type") in FOREIGN_DATA
        if foreign and any(_typed(bool, entry.get(key)) for key in ("disabled", "disable")):
            self.notes.append(f"{place} is ignored: it is disabled, and no folder of images")
            return None
        keys = {k: v for k, v in entry.items() if k not in REGULARISATION}
        if len(keys) < len(entry):
            self._regularisation(entry, place)
        if isinstance(entry.get("video"), dict) and set(entry["video"]) <= {"num_frames"}:
            keys = {k: v for k, v in keys.items() if k != "video"} | entry["video"]
        own = self._settle(keys, BucketConfig, ENTRY_KEYS, place, base)
        inherited = {key: defaults[key] for key in INHERITED if defaults.get(key) is not None}
        bucket: BucketConfig | None = self._validated(BucketConfig, inherited | own, place)
        if bucket and bucket.caption_strategy == "instanceprompt" and not bucket.instance_prompt:
            self.problems.append(f"{place}: caption_strategy instanceprompt needs an instance_prompt")
        return bucket

    def _regularisation(self, entry: Mapping[str, Any], place: str) -> None:
        for key in REGULARISATION:
            if _typed(bool, entry.get(key)) and _typed(float, entry.get("slider_strength")):
                self.problems.append(f"{place}: {key}: such images are neutral here; take it or slider_strength out")

    # --- LoRAs of the base ---

    def _base_loras(self, values: dict[str, Any], where: str, path: Path | None) -> list[BaseLoraConfig]:
        entries = values.pop("base_loras", None) or []
        if not isinstance(entries, list):
            self.problems.append(f"{where}: base_loras: it must be a list of path and weight, not {kind_of(entries)}")
            return []
        found = [self._base_lora(entry, f"{where}: base_loras, entry {n}", path) for n, entry in enumerate(entries, start=1)]
        return [lora for lora in found if lora is not None]

    def _base_lora(self, entry: Any, place: str, path: Path | None) -> BaseLoraConfig | None:
        if not isinstance(entry, dict):
            self.problems.append(f"{place}: it must be an object of path and weight, not {kind_of(entry)}")
            return None
        own = self._settle(entry, BaseLoraConfig, {}, place, path.parent if path else None)
        lora: BaseLoraConfig | None = self._validated(BaseLoraConfig, own, place)
        return lora

    # --- prompts ---

    def _prompts(self, values: dict[str, Any], where: str) -> list[PromptConfig]:
        prompts = list(self._inline_prompts(values.pop("prompts", None), where))
        library = values.pop("user_prompt_library", None)
        file = self._file(library, "user_prompt_library", where) if library is not None else None
        prompts += self.prompt_library(file) if file else ()
        text = values.get("validation_prompt")
        if isinstance(text, str):
            del values["validation_prompt"]
        if text and isinstance(text, str):
            prompts.append(PromptConfig(name=VALIDATION, prompt=text))
        self._check_names([p.name for p in prompts], where)
        return prompts

    def _check_names(self, names: list[str], where: str) -> None:
        twins = sorted({name for name in names if names.count(name) > 1})
        self.problems += [f"{where}: two prompts are named {name!r}; give each its own name" for name in twins]

    def _inline_prompts(self, entries: Any, where: str) -> Iterable[PromptConfig]:
        if entries is None:
            return
        if isinstance(entries, dict):
            yield from self._library(entries, f"{where}: prompts")
            return
        if not isinstance(entries, list):
            self.problems.append(f"{where}: prompts: it must be an object of names and prompts, not {kind_of(entries)}")
            return
        for number, entry in enumerate(entries, start=1):
            found = self._validated(PromptConfig, entry, f"{where}: prompt {number}") if isinstance(entry, dict) else None
            if found is not None:
                yield found
            elif not isinstance(entry, dict):
                self.problems.append(f"{where}: prompt {number}: it must be an object of name and prompt, not {kind_of(entry)}")

    def prompt_library(self, path: Path) -> tuple[PromptConfig, ...]:
        """The entries of a library file; what is wrong goes to `problems`."""
        before = len(self.problems)
        library = self._object(path)
        if len(self.problems) == before and not library:
            self.problems.append(f"{path.name}: it holds no prompt; write a name and a text")
        return self._library(library, path.name)

    def _library(self, library: Mapping[str, Any], where: str) -> tuple[PromptConfig, ...]:
        self._check_names([str(name).strip() for name in library], where)
        entries = [self._prompt(str(name), value, where) for name, value in library.items()]
        return tuple(entry for entry in entries if entry is not None)

    def _prompt(self, name: str, value: Any, where: str) -> PromptConfig | None:
        place = f"{where}: prompt {name!r}"
        if not name.strip():
            self.problems.append(f"{where}: a prompt has an empty name; give it one")
            return None
        if isinstance(value, str):
            return PromptConfig(name=name.strip(), prompt=value)
        if not isinstance(value, dict):
            self.problems.append(
                f"{place}: it must be a text, or an object of prompt and adapter_strength, not {kind_of(value)}"
            )
            return None
        if "name" in value:
            self.problems.append(f"{place}: name: take it out; a prompt's name is the key in front of it")
        keys = {k: v for k, v in value.items() if k not in ("name", "lyrics")}
        own = self._settle(keys, PromptConfig, PROMPT_KEYS, place, None)
        if "lyrics" in value:
            own["prompt"] = self._sung(own.get("prompt", ""), value["lyrics"], place)
        prompt: PromptConfig | None = self._validated(PromptConfig, own | {"name": name.strip()}, place)
        return prompt

    def _sung(self, prompt: Any, lyrics: Any, place: str) -> Any:
        if isinstance(lyrics, str) and isinstance(prompt, str):
            return with_lyrics(prompt, lyrics)
        self.problems.append(f"{place}: lyrics: {shown(lyrics)} is not text")
        return prompt

    # --- checks ---

    def _check_together(self, values: Mapping[str, Any], where: str) -> None:
        """What no key can be blamed for alone."""
        if not values["buckets"] and not self.problems:
            self.problems.append(
                f"{where}: there are no images: set data_backend_config to a JSON list of buckets, each with id, "
                "instance_data_dir and slider_strength"
            )
        names = [bucket.id for bucket in values["buckets"]]
        twins = sorted({name for name in names if names.count(name) > 1})
        self.problems += [f"{where}: {names.count(t)} buckets have the id {t!r}; give each its own" for t in twins]
        resume = values.get("resume_from_checkpoint")
        if isinstance(resume, str) and resume != "latest" and not Path(resume).is_dir():
            self.problems.append(
                f"{where}: resume_from_checkpoint: {resume} is no folder; write latest, or a checkpoint's folder"
            )

    def _validated(self, model: type[Any], values: Mapping[str, Any], where: str) -> Any:
        given = {name: value for name, value in values.items() if value is not _Missing}
        absent = {name for name, value in values.items() if value is _Missing}
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
        if isinstance(config, RunConfig):
            self.problems += (f"{where}: {problem}" for problem in _together(config))
        return config


class _Missing:
    """Stands for a value that was refused already."""


# --- Small helpers ----------------------------------------------------------------------------------------------------


def _together(config: RunConfig) -> Iterable[str]:
    """What two keys that are right by themselves have against each other."""
    if config.lr_warmup_steps >= config.max_train_steps and config.lr_warmup_steps:
        yield f"lr_warmup_steps: {config.lr_warmup_steps} is no less than max_train_steps {config.max_train_steps}"
    if config.lr_scheduler == "polynomial" and config.lr_end >= config.learning_rate:
        yield f"lr_end: {config.lr_end:g} is no less than learning_rate {config.learning_rate:g}; give a smaller one"
    if config.timestep_sampling == "uniform" and (config.timestep_logit_mean, config.timestep_logit_scale) != (0.0, 1.0):
        yield "timestep_logit_mean, timestep_logit_scale: they mean nothing to uniform; write timestep_sampling: logit_normal"


def _plain_name(key: str) -> str:
    return key.strip().removeprefix("--").replace("-", "_")


def _without(written: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: value for key, value in written.items() if key not in keys}


def _by_plain_name(written: Mapping[str, Any], name: str) -> Any:
    return next((value for key, value in written.items() if _plain_name(str(key)) == name), None)


def _found(text: str, base: Path | None) -> str:
    """A path beside the file or below the current directory, whole; as written if it is at neither place."""
    here = Path(text).expanduser()
    beside = (base or Path()) / here
    return next((str(path.resolve()) for path in (beside, here) if path.exists()), text)


def _is_path(name: str, fields: Mapping[str, Any]) -> bool:
    return name in fields and Path in (fields[name].annotation, *get_args(fields[name].annotation))


def _may_be_null(info: FieldInfo) -> bool:
    return type(None) in get_args(info.annotation)


def _typed(kind: type, value: Any) -> Any:
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

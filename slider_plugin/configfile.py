"""Read a configuration: config.json, dataloader JSON, prompt library and flags, with every problem in one message.

A relative path in a file means a place beside that file if there is one, else a place below the current directory; in a
flag it means the current directory. `output_dir` and `cache_dir` always mean the current directory. null is a key that is not
given, except where a key may be empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slider_hooks import Family, Option
from slider_plugin.config import BaseLoraConfig, BucketConfig, RunConfig, TextConfig
from slider_plugin.documents import parse_flags
from slider_plugin.errors import ConfigError, UserError
from slider_plugin.known_keys import (
    CACHES,
    CONFIG_KEYS,
    ENTRY_KEYS,
    FOREIGN_DATA,
    REGULARISATION,
)
from slider_plugin.lycoris_file import read_lycoris
from slider_plugin.objectives import BUILT_IN
from slider_plugin.paired_data import joined
from slider_plugin.promptfile import VALIDATION, Prompts
from slider_plugin.settle import Missing, Settler, plain_name, typed
from slider_plugin.wording import NOT_FLAGS, kind_of, shown

INHERITED = (
    "resolution", "resolution_type", "caption_strategy", "instance_prompt",
    "minimum_image_size", "maximum_image_size", "target_downsample_size",
)  # fmt: skip
"""Keys of the configuration that are the defaults of every bucket."""

FAMILY_KEY = "model_family"
OF_OBJECTIVES = {
    "pair": ("pair_target", "pair_mask"),
    "text": ("slider_text", "text_guidance", "text_rollout_steps", "text_rollout_guidance"),
}
"""Keys that mean something to one objective."""

OF_IMAGES = ("bucket", "pair")
"""Objectives that learn from images."""

SOURCES = {"data_backend_config": "buckets", "user_prompt_library": "prompts", "lycoris_config": "lycoris"}
"""Keys that name a file, and the keys that hold the same in the configuration itself."""


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


def to_json(config: RunConfig) -> dict[str, Any]:
    """The configuration as a JSON object that `read_config` reads back to the same; the family's options are plain keys."""
    values: dict[str, Any] = config.model_dump(mode="json")
    options = values.pop("family_options")
    empty = {name for name, info in RunConfig.model_fields.items() if info.default is None}  # null says nothing new there
    return {key: value for key, value in (values | options).items() if value is not None or key not in (empty | options.keys())}


class _Reader(Settler):
    """The reading of one run's configuration."""

    def __init__(self, family: Callable[[str], Family] | None) -> None:
        super().__init__()
        self._family = family

    def read(self, path: Path | None, flags: Sequence[str]) -> tuple[RunConfig, tuple[str, ...]]:
        written = self.object(path) if path else {}
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
        values = self.settle(written, RunConfig, CONFIG_KEYS, where, path.parent if path else None, options)
        values = self._overlaid(values, self.settle(given, RunConfig, CONFIG_KEYS, "flags", None, options))
        if facts or isinstance(values.get(FAMILY_KEY), str):
            values[FAMILY_KEY] = facts.name if facts else values[FAMILY_KEY].strip().lower().replace("-", "_")
        values["family_options"] = self._options(values, options, where)
        values["buckets"] = self._buckets(values, where, path)
        values["prompts"] = Prompts(self).of(values, where)
        values["lycoris"] = read_lycoris(self, values, where)
        values["base_loras"] = self._base_loras(values, where, path)
        values["slider_text"] = self._text(values, where)
        self._check_together(values, where)
        config: RunConfig | None = self.validated(RunConfig, values, where)
        self.problems += [f"{where}: {line}" for line in ((*_together(config), *_objective(config)) if config else ())]
        if self.problems or config is None:
            raise ConfigError(dict.fromkeys(self.problems))
        return config, tuple(dict.fromkeys(self.notes))

    def _overlaid(self, values: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
        """Flags win, also over what the file holds itself where a flag names another file or prompt."""
        hidden = {inline for source, inline in SOURCES.items() if source in flags}
        kept = {name: value for name, value in values.items() if name not in hidden}
        if "validation_prompt" in flags and isinstance(kept.get("prompts"), list):
            kept["prompts"] = [p for p in kept["prompts"] if not (isinstance(p, dict) and p.get("name") == VALIDATION)]
        return {name: value for name, value in (kept | flags).items() if value is not Missing}

    def _facts(self, name: object) -> Family | None:
        if not isinstance(name, str) or self._family is None:
            return None
        try:
            return self._family(name)
        except UserError as error:
            self.problems.append(f"{FAMILY_KEY}: {error}")
            return None

    # --- the family's own keys ---

    def _options(self, values: dict[str, Any], options: Mapping[str, Option], where: str) -> dict[str, Any]:
        """Take the family's own keys out of `values`, typed, with defaults for those that are not given."""
        return {
            name: self._option(option, values.pop(name), where) if name in values else option.default
            for name, option in options.items()
        }

    def _option(self, option: Option, value: Any, where: str) -> Any:
        meant = typed(option.type, value)
        if meant is None:
            kind = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[option.type]
            self.problems.append(f"{where}: {option.name}: {shown(value)} is not {kind}")
        elif option.choices and meant not in option.choices:
            self.problems.append(f"{where}: {option.name}: {value!r} is not one of {', '.join(map(str, option.choices))}")
        return meant

    # --- buckets ---

    def _buckets(self, values: dict[str, Any], where: str, path: Path | None) -> list[BucketConfig]:
        source, inline = values.pop("data_backend_config", None), values.pop("buckets", None)
        if source is not None and inline:
            self.problems.append(f"{where}: data_backend_config and buckets are both given; keep one")
        entries, name, base = inline or None, where, path.parent if path else None
        if source is not None:
            file = self.file(source, "data_backend_config", where)
            entries, name, base = (self.document(file), file.name, file.parent) if file else (None, where, base)
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
        if foreign and any(typed(bool, entry.get(key)) for key in ("disabled", "disable")):
            self.notes.append(f"{place} is ignored: it is disabled, and no folder of images")
            return None
        keys = {k: v for k, v in entry.items() if k not in REGULARISATION}
        if len(keys) < len(entry):
            self._regularisation(entry, place)
        if isinstance(entry.get("video"), dict) and set(entry["video"]) <= {"num_frames"}:
            keys = {k: v for k, v in keys.items() if k != "video"} | entry["video"]
        own = self.settle(keys, BucketConfig, ENTRY_KEYS, place, base)
        inherited = {key: defaults[key] for key in INHERITED if defaults.get(key) is not None}
        bucket: BucketConfig | None = self.validated(BucketConfig, inherited | own, place)
        if bucket and bucket.caption_strategy == "instanceprompt" and not bucket.instance_prompt:
            self.problems.append(f"{place}: caption_strategy instanceprompt needs an instance_prompt")
        return bucket

    def _regularisation(self, entry: Mapping[str, Any], place: str) -> None:
        for key in REGULARISATION:
            if typed(bool, entry.get(key)) and typed(float, entry.get("slider_strength")):
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
        own = self.settle(entry, BaseLoraConfig, {}, place, path.parent if path else None)
        lora: BaseLoraConfig | None = self.validated(BaseLoraConfig, own, place)
        return lora

    # --- prompts of a text slider ---

    def _text(self, values: dict[str, Any], where: str) -> list[TextConfig]:
        entries = values.pop("slider_text", None) or []
        entries = [entries] if isinstance(entries, dict) else entries
        if not isinstance(entries, list):
            self.problems.append(f"{where}: slider_text: it must be an object of prompts, or a list, not {kind_of(entries)}")
            return []
        places = [f"{where}: slider_text" + (f", entry {n}" if len(entries) > 1 else "") for n in range(1, len(entries) + 1)]
        found = [self._text_set(entry, place) for entry, place in zip(entries, places, strict=True)]
        return [text for text in found if text is not None]

    def _text_set(self, entry: Any, place: str) -> TextConfig | None:
        if not isinstance(entry, dict):
            self.problems.append(f"{place}: it must be an object of prompts, not {kind_of(entry)}")
            return None
        text: TextConfig | None = self.validated(TextConfig, self.settle(entry, TextConfig, {}, place, None), place)
        return text

    # --- checks ---

    def _check_together(self, values: Mapping[str, Any], where: str) -> None:
        """What no key can be blamed for alone."""
        if not values["buckets"] and not self.problems and values.get("slider_objective", "bucket") in OF_IMAGES:
            self.problems.append(
                f"{where}: there are no images: set data_backend_config to a JSON list of buckets, each with id, "
                "instance_data_dir and slider_strength (slider_objective text needs none)"
            )
        names = [bucket.id for bucket in values["buckets"]]
        twins = sorted({name for name in names if names.count(name) > 1})
        self.problems += [f"{where}: {names.count(t)} buckets have the id {t!r}; give each its own" for t in twins]
        resume = values.get("resume_from_checkpoint")
        if isinstance(resume, str) and resume != "latest" and not Path(resume).is_dir():
            self.problems.append(
                f"{where}: resume_from_checkpoint: {resume} is no folder; write latest, or a checkpoint's folder"
            )


# --- Small helpers ----------------------------------------------------------------------------------------------------


def _together(config: RunConfig) -> Iterable[str]:
    """What two keys that are right by themselves have against each other."""
    if config.lr_warmup_steps >= config.max_train_steps and config.lr_warmup_steps:
        yield f"lr_warmup_steps: {config.lr_warmup_steps} is no less than max_train_steps {config.max_train_steps}"
    if config.lr_scheduler == "polynomial" and config.lr_end >= config.learning_rate:
        yield f"lr_end: {config.lr_end:g} is no less than learning_rate {config.learning_rate:g}; give a smaller one"
    if config.timestep_sampling == "uniform" and (config.timestep_logit_mean, config.timestep_logit_scale) != (0.0, 1.0):
        yield "timestep_logit_mean, timestep_logit_scale: they mean nothing to uniform; write timestep_sampling: logit_normal"


def _objective(config: RunConfig) -> Iterable[str]:
    """Keys of an objective that is not the run's."""
    usual = RunConfig(model_family=config.model_family)
    for owner, keys in OF_OBJECTIVES.items() if config.slider_objective in BUILT_IN else ():
        for key in keys:
            if config.slider_objective != owner and getattr(config, key) != getattr(usual, key):
                yield f"{key}: it is for slider_objective {owner}, and this one is {config.slider_objective}; take it out"
    if config.slider_objective == "text" and not config.slider_text:
        yield "slider_text: slider_objective text needs it: an object with target, positive and negative"
    if config.objective_config and config.slider_objective in BUILT_IN:
        yield f"objective_config: slider_objective {config.slider_objective} has keys of its own; take it out"


def _by_plain_name(written: Mapping[str, Any], name: str) -> Any:
    return next((value for key, value in written.items() if plain_name(str(key)) == name), None)

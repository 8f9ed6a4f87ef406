"""The form's fields, from the schema of the command line and the configuration file: `RunConfig`, and families' options."""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from slider_hooks import Option
from slider_plugin.config import SECTIONS, BaseLoraConfig, BucketConfig, PromptConfig, RunConfig
from slider_plugin.configfile import INHERITED
from slider_plugin.settle import NAMES_OF_PLACES

TABLES: Mapping[str, type[BaseModel]] = {"buckets": BucketConfig, "prompts": PromptConfig, "base_loras": BaseLoraConfig}
"""Keys that hold a list of objects, which the form shows as rows."""

OWN_FORM = (*TABLES, "family_options", "model_family")
"""Keys that are no plain field of the form."""

LABELS = {
    "slider_lora_target": "Use slider LoRA targets",
    "pretrained_model_name_or_path": "Model folder or hub id",
    "model_flavour": "Flavour",
    "lora_type": "Type",
    "lora_rank": "Rank",
    "lora_alpha": "Alpha",
    "max_train_steps": "Steps",
    "train_batch_size": "Images per draw",
    "lr_scheduler": "Schedule",
    "validation_adapter_strength": "Strength of prompts without one",
    "validation_strengths": "Strengths of the strips",
    "validation_step_interval": "Draw every … steps",
    "validation_num_inference_steps": "Denoising steps",
    "num_validation_images": "Seeds per prompt",
    "checkpoint_step_interval": "Checkpoint every … steps",
    "lycoris": "LyCORIS settings",
    "instance_data_dir": "Folder",
    "id": "Name",
}
"""What people call some keys; the others are called as they are written."""

BASIC = {
    "model": ("pretrained_model_name_or_path",),
    "adapter": ("lora_type", "lora_rank", "lora_alpha", "lycoris"),
    "data": ("resolution", "caption_strategy", "instance_prompt"),
    "training": ("max_train_steps", "learning_rate", "lr_scheduler", "train_batch_size", "mixed_precision", "seed"),
    "validation": (
        *("validation_strengths", "validation_step_interval", "validation_num_inference_steps"),
        *("validation_guidance", "validation_adapter_strength", "num_validation_images"),
    ),
    "output": ("checkpoint_step_interval",),
}
"""Keys of each section that are shown at once; all others are under Advanced."""

FIRST_ADVANCED = ("slider_lora_target",)
TITLES = {
    "model": "Model",
    "adapter": "LoRA config",
    "data": "Data",
    "validation": "Validation prompts",
    "training": "Training",
}
ORDER = ("model", "adapter", "data", "validation", "training", "output", "behaviour")
"""Sections as somebody sets up a run; `output` and `behaviour` are part of the last one."""

BUCKET_BASIC = ("id", "instance_data_dir", "slider_strength")
AS_FOR_ALL = "as for all"
"""What stands in a bucket's field that takes what the configuration says for every bucket."""

NOT_EMPTY_ABSENT = ("validation_strengths",)
"""Keys where nothing written means an empty list, and not the default."""


@dataclass(frozen=True, slots=True)
class Widget:
    """One field of the form."""

    name: str
    """Of the input, such as `k.lora_rank`, `b.0.id`, `o.pocket_time_scale`."""

    key: str
    label: str
    help: str
    kind: Literal["switch", "choice", "number", "text", "path", "json", "list"]
    text: str
    """What stands in it; for a switch `on` or nothing."""

    default: str
    """What holds where nothing is written."""

    choices: tuple[str, ...] = ()
    nullable: bool = False
    wants: str = ""
    """`folder` or `file` of a path."""

    @property
    def place(self) -> str:
        """The element's id."""
        return "f-" + self.name.replace(".", "-")


def is_path(info: FieldInfo) -> bool:
    """Whether a field holds a path."""
    return Path in leaves(info.annotation)


def empties(info: FieldInfo) -> bool:
    """Whether null means something else than the default: nothing written in the field is null then."""
    return type(None) in leaves(info.annotation) and info.default is not None and info.default is not PydanticUndefined


def leaves(annotation: Any) -> set[Any]:
    """The types, and the words of a Literal, that an annotation is made of."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return leaves(arguments[0])
    if origin is Literal:
        return {str, *arguments}
    if origin in (Union, types.UnionType):
        return {leaf for argument in arguments for leaf in leaves(argument)}
    return {origin or annotation}


def kind_of_field(info: FieldInfo) -> Literal["switch", "choice", "number", "text", "path", "json", "list"]:
    """How a field is written in a form."""
    found = leaves(info.annotation)
    words = {leaf for leaf in found if isinstance(leaf, str)}
    if found == {bool}:
        return "switch"
    if tuple in found:
        return "text" if str in found else "list"
    if dict in found or any(isinstance(leaf, type) and issubclass(leaf, BaseModel) for leaf in found):
        return "json"
    if words:
        return "text" if float in found else "choice"
    return "path" if Path in found else "number" if found & {int, float} else "text"


def fields(model: type[BaseModel], values: Mapping[str, Any], prefix: str) -> dict[str, Widget]:
    """A widget for each plain key of a model, by key."""
    return {
        key: widget(key, info, values, prefix)
        for key, info in model.model_fields.items()
        if not (model is RunConfig and key in OWN_FORM)
    }


def widget(key: str, info: FieldInfo, values: Mapping[str, Any], prefix: str) -> Widget:
    """The widget of one key, with what is written for it."""
    kind, default = kind_of_field(info), None if info.default is PydanticUndefined else info.default
    inherits = prefix.startswith("b.") and key in INHERITED
    stands = (kind in ("switch", "choice") and not inherits) or key in NOT_EMPTY_ABSENT or empties(info)
    given = values.get(key, default if stands else None)
    place = kind == "path" or key in NAMES_OF_PLACES or key == "controlnet_model_name_or_path"
    folder = "dir" in key or key in ("pretrained_model_name_or_path", "controlnet_model_name_or_path", "assistant_lora_path")
    return Widget(
        name=f"{prefix}{key}",
        key=key,
        label=LABELS.get(key) or key.replace("_", " ").capitalize().replace("Lora", "LoRA").replace("lora", "LoRA"),
        help=info.description or "",
        kind="path" if place else kind,
        text=written_text(given),
        default=AS_FOR_ALL if inherits else written_text(default),
        choices=(*([""] if inherits and kind == "choice" else []), *_words(info.annotation)),
        nullable=type(None) in leaves(info.annotation),
        wants=("folder" if folder else "file") if place and key != "resume_from_checkpoint" else "",
    )


def option_widget(option: Option, values: Mapping[str, Any]) -> Widget:
    """The widget of a key that one family alone has."""
    kind: Literal["switch", "choice", "number", "text"] = "number" if option.type in (int, float) else "text"
    kind = "switch" if option.type is bool else "choice" if option.choices else kind
    given = values.get(option.name, option.default if kind in ("switch", "choice") else None)
    label = option.name.replace("_", " ").capitalize()
    choices = tuple(str(choice) for choice in option.choices)
    return Widget(
        f"o.{option.name}", option.name, label, option.help, kind, written_text(given), written_text(option.default), choices
    )


def sections(values: Mapping[str, Any]) -> dict[str, tuple[list[Widget], list[Widget]]]:
    """(shown at once, advanced) of each section."""
    section = ""
    found: dict[str, tuple[list[Widget], list[Widget]]] = {name: ([], []) for name in ORDER}
    of_key: dict[str, str] = {}
    for key in RunConfig.model_fields:
        section = SECTIONS.get(key, section)
        of_key[key] = section
    for key, one in fields(RunConfig, values, "k.").items():
        found.setdefault(of_key[key], ([], []))[key not in BASIC.get(of_key[key], ())].append(one)
    for name, (basic, advanced) in found.items():
        basic.sort(key=lambda one: BASIC.get(name, ()).index(one.key))
        advanced.sort(key=lambda one: one.key not in FIRST_ADVANCED)
    return found


def written_text(value: Any) -> str:
    """A value as it stands in a field."""
    if value is None or value is False:
        return ""
    if value is True:
        return "on"
    if isinstance(value, BaseModel):
        return json.dumps(value.model_dump(mode="json"), ensure_ascii=False)
    if isinstance(value, dict):
        return json.dumps(value, indent=1, ensure_ascii=False) if value else ""
    if isinstance(value, (list, tuple)):
        numbers = all(isinstance(part, (int, float)) and not isinstance(part, bool) for part in value)
        return ", ".join(f"{part:.12g}" for part in value) if numbers else json.dumps(list(value), ensure_ascii=False)
    return f"{value:.17g}" if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)


def _words(annotation: Any) -> Iterable[str]:
    """The words of a Literal, in their order."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        yield from (str(argument) for argument in arguments)
        return
    for argument in arguments[:1] if origin is Annotated else arguments:
        yield from _words(argument)

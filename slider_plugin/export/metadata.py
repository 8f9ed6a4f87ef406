"""What a file's header says: `slider.*` of our own, and what other programs look for, all strings."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib import metadata as distributions
from pathlib import Path
from typing import Any

from slider_hooks import CONTRACT, Family


def slider_metadata(
    *,
    family: str,
    flavour: str | None,
    plugin: str,
    plugin_version: str,
    targets: str,
    targets_source: str,
    strengths: Sequence[float],
    adapter: Mapping[str, str],
    steps: int,
    seed: int,
    base_model: str,
    objective: str,
    positive: str | None = None,
    negative: str | None = None,
    extra: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The `slider.*` strings of a file; what is None is left out, and `extra` adds keys of its own (with any prefix).

    `adapter` is what `Adapter.facts` says; `slider.rank` and `slider.alpha` in it tell how it was trained: the file itself has
    alpha folded in and runs at strength 1 as trained.
    """
    values: dict[str, Any] = {
        "version": _own_version(),
        "family": family,
        "flavour": flavour,
        "plugin": plugin,
        "plugin_version": plugin_version,
        "contract": ".".join(map(str, CONTRACT)),
        "targets": targets,
        "targets_source": targets_source,
        "strengths": json.dumps([float(strength) for strength in strengths]),
        "steps": steps,
        "seed": seed,
        "base_model": _last_part(base_model),
        "objective": objective,
        "positive": positive,
        "negative": negative,
    }
    return (
        {f"slider.{key}": str(value) for key, value in values.items() if value is not None} | dict(adapter) | dict(extra or {})
    )


def for_programs(header: Mapping[str, str], family: Family, name: str) -> dict[str, str]:
    """A header with what other programs and people look for: `ss_*` (kohya), `modelspec.*` (1.0.1), the range, a usage hint.

    All of it follows from `slider.*`, so a file that is exported again says the same. The rank stands for alpha as well, which
    is folded in. A recommended range that is there already is kept; otherwise it is that of the trained strengths.

    Args:
        header: `slider_metadata`'s strings, or those of a file.
        family: for `Family.file_metadata`.
        name: of the file, without its suffix.
    """
    told = dict(header)
    low, high = trained_range(told)
    told.setdefault("slider.recommended_min", f"{low:g}")
    told.setdefault("slider.recommended_max", f"{high:g}")
    hint = usage_hint(told)
    is_lora = told.get("slider.adapter", "lora") == "lora"
    programs: dict[str, str | None] = {
        "ss_network_module": "networks.lora" if is_lora else "lycoris.kohya",
        "ss_network_dim": told.get("slider.rank"),
        "ss_network_alpha": told.get("slider.rank") if is_lora else told.get("slider.alpha"),
        "ss_output_name": name,
        "ss_sd_model_name": told.get("slider.base_model"),
        "ss_learning_rate": told.get("slider.learning_rate"),
        "ss_steps": told.get("slider.steps"),
        "ss_seed": told.get("slider.seed"),
        "ss_training_comment": hint,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family.name}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title(told),
        "modelspec.resolution": told.get("slider.resolution"),
        "modelspec.usage_hint": hint,
        "modelspec.tags": "concept slider",
    }
    return told | {key: value for key, value in programs.items() if value is not None} | dict(family.file_metadata)


def words(header: Mapping[str, str]) -> tuple[str, str]:
    """What a header calls the positive and the negative side."""
    positive, negative = header.get("slider.positive"), header.get("slider.negative")
    return positive or "more of the concept", negative or "less of the concept"


def title(header: Mapping[str, str]) -> str:
    """`negative to positive`, as far as the header has words."""
    if "slider.positive" in header or "slider.negative" in header:
        positive, negative = words(header)
        return f"{negative} to {positive}"
    return "concept slider"


def usage_hint(header: Mapping[str, str]) -> str:
    """One sentence on strengths and what they do."""
    positive, negative = words(header)
    low, high = header["slider.recommended_min"], header["slider.recommended_max"]
    return f"strength {low} to {high}; above 0: {positive}; below 0: {negative}"


def trained_range(header: Mapping[str, str]) -> tuple[float, float]:
    """The lowest and highest strength that a header says was trained, with 0 between them; -1 and 1 where it says nothing."""
    listed = _strengths(header)
    low, high = min([0.0, *listed]), max([0.0, *listed])
    return (low, high) if low < high else (-1.0, 1.0)


def _strengths(header: Mapping[str, str]) -> list[float]:
    try:
        listed = [float(strength) for strength in json.loads(header["slider.strengths"])]
    except (KeyError, TypeError, ValueError):  # somebody else's file
        return []
    return listed if all(map(math.isfinite, listed)) else []


def flipped(header: Mapping[str, str]) -> dict[str, str]:
    """The header of a slider whose two sides were swapped: words, strengths and range are, too. A calibration is left out."""
    strengths = sorted({0.0 - strength for strength in _strengths(header)})
    mirrored = {
        "slider.positive": header.get("slider.negative"),
        "slider.negative": header.get("slider.positive"),
        "slider.recommended_min": _negated(header.get("slider.recommended_max")),
        "slider.recommended_max": _negated(header.get("slider.recommended_min")),
        "slider.strengths": json.dumps(strengths) if "slider.strengths" in header else None,
        "slider.calibration": None,
        "slider.flipped": None if "slider.flipped" in header else "true",
    }
    kept = {key: value for key, value in header.items() if key not in mirrored}
    return kept | {key: value for key, value in mirrored.items() if value is not None}


def _negated(number: str | None) -> str | None:
    try:
        return None if number is None else f"{0.0 - float(number):g}"
    except ValueError:  # somebody else's file
        return None


def _own_version() -> str:
    try:
        return distributions.version("slider-plugin")
    except distributions.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def _last_part(place: str) -> str:
    """Name of a model folder, or of a hub repository: the path to it tells about somebody's machine."""
    name = re.split(r"[/\\]", place.rstrip("/\\"))[-1]
    return Path(place).resolve().name if name in ("", ".", "..") else name

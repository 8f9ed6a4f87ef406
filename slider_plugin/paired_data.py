"""SimpleTuner's way to name conditioning images: an entry of the dataloader JSON for them, and its id in the bucket's entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

KIND, NAMED = "conditioning", "conditioning_data"
SHOWN_TO_A_CONTROLNET = (None, "controlnet")
"""Of SimpleTuner's kinds of conditioning images, those that are shown to a ControlNet."""


def joined(entries: Sequence[Any], where: str, problems: list[str]) -> list[Any]:
    """The entries of the buckets alone, each with the folder of its conditioning images as `conditioning_data_dir`.

    Args:
        entries: of a dataloader JSON, as they were read.
        where: name of the file, for messages.
        problems: what is wrong is added here.
    """
    sets = {e.get("id"): e for e in entries if isinstance(e, dict) and e.get("dataset_type") == KIND and not _disabled(e)}
    named = {name for entry in entries if isinstance(entry, dict) for name in _names(entry)}
    for name, entry in sets.items():
        if entry.get("conditioning_type") not in SHOWN_TO_A_CONTROLNET:
            kind = entry["conditioning_type"]
            problems.append(f"{where}: bucket {name!r}: conditioning_type: {kind!r} is not trained here; write controlnet")
        if name not in named:
            problems.append(f"{where}: bucket {name!r} holds conditioning images, and no bucket names it in {NAMED}")
    buckets = [entry for entry in entries if not (isinstance(entry, dict) and entry.get("dataset_type") == KIND)]
    return [_with_folder(entry, sets, where, problems) if isinstance(entry, dict) else entry for entry in buckets]


def _with_folder(entry: Mapping[str, Any], sets: Mapping[Any, Any], where: str, problems: list[str]) -> dict[str, Any]:
    rest = {key: value for key, value in entry.items() if key != NAMED}
    names = _names(entry)
    if not names:
        return rest
    place = f"{where}: bucket {entry.get('id')!r}: {NAMED}"
    if len(names) > 1:
        problems.append(f"{place}: {len(names)} sets of conditioning images; a ControlNet is shown one")
    elif names[0] not in sets:
        problems.append(f"{place}: there is no entry of dataset_type {KIND} with the id {names[0]!r}")
    elif "conditioning_data_dir" in entry:
        problems.append(f"{place} and conditioning_data_dir are both given; keep one")
    else:
        rest["conditioning_data_dir"] = sets[names[0]].get("instance_data_dir")
    return rest


def _names(entry: Mapping[str, Any]) -> list[Any]:
    named = entry.get(NAMED)
    return [name for name in (named if isinstance(named, list) else [named]) if name]


def _disabled(entry: Mapping[str, Any]) -> bool:
    return any(str(entry.get(key, False)).lower() == "true" for key in ("disabled", "disable"))

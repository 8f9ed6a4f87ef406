"""Training images as small pictures, and the pictures that a run drew. Nothing is decoded that is larger than a run takes.

numpy and Pillow are imported when the first picture is asked for: the page itself is there sooner.
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from slider_plugin.errors import UserError

MOST_PIXELS = 64_000_000
THUMB = 192
"""Longer side of a small picture, in pixels."""

SHOWN = 12
"""Training images of a folder that are shown."""

LOOKED_AT = 400
"""Training images of a folder whose headers are read."""

TRIES = "tries"
"""Folder in `output_dir` of what was drawn on request."""

BESIDE = "beside.json"
"""Beside such a drawing: names of the sliders that were drawn along."""

_decoding = threading.Semaphore(2)  # a large image takes some hundred megabytes while it is decoded


@dataclass(frozen=True, slots=True)
class Preview:
    """What a training folder holds."""

    images: int
    captions: int
    shown: tuple[Path, ...]
    sizes: tuple[tuple[str, int], ...]
    """Sizes and how many have it, the most common first."""

    broken: tuple[str, ...]
    """Files that cannot be trained on, each with the reason."""


def preview(folder: Path) -> Preview:
    """Count and look at the images below a folder; reads headers alone."""
    from slider_plugin.data.images import find_images, image_size

    images = find_images(folder)
    sizes: dict[str, int] = {}
    broken = []
    for path in images[:LOOKED_AT]:
        try:
            width, height = image_size(path)
            if width * height > MOST_PIXELS:
                raise UserError(f"{width}x{height} pixels are too many")
        except UserError as error:
            broken.append(f"{path.name}: {str(error).removeprefix(f'{path}: ').partition(';')[0]}")
            continue
        sizes[f"{width}×{height}"] = sizes.get(f"{width}×{height}", 0) + 1
    common = sorted(sizes.items(), key=lambda pair: -pair[1])
    captions = sum(path.with_suffix(".txt").is_file() for path in images)
    return Preview(len(images), captions, tuple(images[:SHOWN]), tuple(common), tuple(broken[:SHOWN]))


def thumbnail(path: Path) -> bytes:
    """A small JPEG of an image. Raises UserError for what is no image, is damaged, or has too many pixels."""
    facts = path.stat()
    return _thumbnail(path, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=512)
def _thumbnail(path: Path, changed: int, size: int) -> bytes:
    from PIL import Image

    from slider_plugin.data.images import check_image, load_image

    with _decoding:
        check_image(path, MOST_PIXELS)
        image = load_image(path, MOST_PIXELS)
        image.thumbnail((THUMB, THUMB), Image.Resampling.LANCZOS)
        held = io.BytesIO()
        image.save(held, format="JPEG", quality=82)
        return held.getvalue()


# --- What a run drew --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Drawn:
    """One picture."""

    path: Path
    prompt: str
    seed: int
    scale: float
    step: int
    """Optimizer steps before it was drawn; those that were drawn on request count as the finished slider's."""

    settings: str
    """How it was drawn: only pictures of equal settings are compared."""

    beside: str = ""
    """Other sliders that were drawn along, with their strengths."""


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt and seed at every strength that was drawn, rising."""

    prompt: str
    seed: int
    step: int
    beside: str
    pictures: tuple[Drawn, ...]

    @property
    def strengths(self) -> list[float]:
        return [picture.scale for picture in self.pictures]


def validations(output: Path) -> list[Path]:
    """The folders of a run's validations, by rising step."""
    return sorted((output / "validation_images").glob("step_*/prompts.json"))


def strips(sidecar: Path) -> list[Path]:
    """The strips of a validation; where none were asked for, the contact sheet."""
    found = sorted(sidecar.parent.glob("*_strip.png"))
    return found or sorted(sidecar.parent.glob("contact_sheet.png"))


def rows(output: Path) -> list[Row]:
    """What can be moved by hand: pictures of the latest validation, and those drawn on request since then."""
    trained = validations(output)[-1:]
    asked = sorted((output / TRIES).glob("*/step_*/prompts.json"))
    if trained:  # those of an earlier slider are of no use
        asked = [path for path in asked if path.stat().st_mtime >= trained[0].stat().st_mtime]
    groups: dict[tuple[str, int, str, str], dict[float, Drawn]] = {}
    for sidecar in (*trained, *asked):
        for one in drawn(sidecar):
            groups.setdefault((one.prompt, one.seed, one.beside, one.settings), {}).setdefault(one.scale, one)
    return [
        Row(prompt, seed, max(p.step for p in by_scale.values()), beside, tuple(by_scale[scale] for scale in sorted(by_scale)))
        for (prompt, seed, beside, _), by_scale in groups.items()
    ]


def drawn(sidecar: Path) -> Iterable[Drawn]:
    """The pictures that a validation's `prompts.json` lists; what it lists beside its folder is passed over."""
    try:
        facts = json.loads(sidecar.read_text(encoding="utf-8"))
        listed = facts["images"]
        along = sidecar.parents[1] / BESIDE
        beside = ", ".join(map(str, json.loads(along.read_text(encoding="utf-8")))) if along.is_file() else ""
        settings = json.dumps({**facts["settings"], "batch_size": 0}, sort_keys=True)
        for entry in listed:
            path = sidecar.parent / Path(entry["file"]).name
            if path.is_file():
                seed, scale, step = int(entry["seed"]), float(entry["scale"]), int(facts["step"])
                yield Drawn(path, str(entry["prompt"]), seed, scale, step, settings, beside)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{sidecar}: it lists no pictures: {error}") from error


def report_of(output: Path) -> dict[str, Any] | None:
    """The latest report card of a run; None if there is none."""
    found = sorted((*output.glob("reports/step_*/report.json"), *output.glob("report/report.json")), key=_changed)
    if not found:
        return None
    try:
        facts = json.loads(found[-1].read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def _changed(path: Path) -> float:
    return path.stat().st_mtime

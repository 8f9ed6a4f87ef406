"""Rescale a finished slider so that strength 1 means the same everywhere.

After calibration +1 and -1 are `FRACTION` of the distance between negative and positive images away from 0, on the mean of
both sides; where the slider is not usable that far, they are the edge of its usable interval. A LoRA's B (of LyCORIS the
first factor of each layer) is multiplied by the factor in float32: the change of each weight is linear in it, so the new file
at 1 draws what the old one draws at that strength.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from slider_hooks import Family
from slider_plugin.adapterfile import read_adapter, read_tensors
from slider_plugin.adapters.lycoris_tensors import CARRYING
from slider_plugin.errors import UserError
from slider_plugin.export import write_verified
from slider_plugin.export.metadata import for_programs
from slider_plugin.report.card import Card
from slider_plugin.report.scores import response

FRACTION = 0.25
"""Of the distance from the mean negative to the mean positive image: from -1 to +1 a calibrated slider spans half of it."""

FULL = ("full_strength", "usable_edge")
"""What ±1 is in a calibrated file: the strength that reaches `FRACTION`, or the edge of the usable interval."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Where ±1 goes."""

    factor: float
    """The old strength that becomes 1."""

    reached: float
    """The response there, mean of both sides."""

    at_edge: bool
    """Whether the usable interval ends before `FRACTION` is reached."""

    low: float
    """The usable interval in new strengths."""

    high: float


def calibration_of(card: Card) -> Calibration:
    """Find the factor. Raises UserError for a slider that goes the wrong way or nowhere, or is not usable at all."""
    if wrong := card.codes & {"wrong_direction", "no_effect"}:
        raise UserError(f"--calibrate: there is nothing to scale ({', '.join(sorted(wrong))}): {card.verdict}")
    strengths, mean_S = np.asarray(card.curves.strengths), response(card.curves)
    low, high = card.scores.usable
    edge = min(-low, high)
    if edge <= 0:
        raise UserError("--calibrate: one side is usable at no strength that was drawn; draw smaller --strengths")
    at = np.unique(np.abs(strengths))
    at = at[at <= edge + 1e-9]
    span = np.array([(np.interp(s, strengths, mean_S) - np.interp(-s, strengths, mean_S)) / 2 for s in at])
    beyond = np.flatnonzero(span >= FRACTION)
    if len(beyond) == 0:
        return Calibration(float(edge), float(span[-1]), True, low / edge, high / edge)
    after = int(beyond[0])  # above 0, where the span is 0
    share = (FRACTION - span[after - 1]) / (span[after] - span[after - 1])
    factor = float(at[after - 1] + share * (at[after] - at[after - 1]))
    return Calibration(factor, FRACTION, False, low / factor, high / factor)


def check_calibration(file: Path) -> None:
    """Raise UserError if the strength of a file cannot be rescaled exactly."""
    tensors, metadata = read_tensors(file)
    _scaled(file, tensors, 1.0)
    if "slider.calibration" in metadata:
        raise UserError(f"--calibrate: {file} is calibrated already; start from the file that it was made of")


def calibrate(file: Path, card: Card, family: Family) -> Path:
    """Write `NAME_calibrated.safetensors` beside a file, and return its path.

    Raises:
        UserError: see `calibration_of` and `check_calibration`.
    """
    found = calibration_of(card)
    tensors, metadata = read_tensors(file)
    about = {
        "factor": round(found.factor, 6),
        "fraction": FRACTION,
        "reached": round(found.reached, 4),
        "one_is": FULL[found.at_edge],
    }
    header = metadata | {
        "slider.recommended_min": f"{found.low:.3g}",
        "slider.recommended_max": f"{found.high:.3g}",
        "slider.calibration": json.dumps(about, sort_keys=True),
        "slider.strengths": json.dumps(_divided(metadata.get("slider.strengths", "[]"), found.factor)),
    }
    path = file.with_name(f"{file.stem}_calibrated.safetensors")
    scaled = _scaled(file, tensors, found.factor)
    names = {name.rsplit(".", 2)[0] for name in scaled}
    ranks = sorted({int(t.shape[0]) for name, t in scaled.items() if name.endswith(".lora_A.weight")})
    write_verified(path, scaled, for_programs(header, family, path.stem), modules=len(names), ranks=ranks)
    return path


def _divided(strengths: str, factor: float) -> list[float]:
    return [round(float(value) / factor, 4) for value in json.loads(strengths)]


def _scaled(file: Path, tensors: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """All tensors in float32, those that carry the strength multiplied. Raises UserError if that is not exact for one layer."""
    lycoris = any(name.startswith("lycoris_") for name in tensors)
    if not lycoris:
        read_adapter(file)  # which refuses what is not a LoRA of ours
        return {name: value.float() * (factor if ".lora_B." in name else 1.0) for name, value in tensors.items()}
    carrying = {name.split(".", 1)[0] for name in tensors if name.split(".", 1)[1] in CARRYING}
    if others := sorted({name.split(".", 1)[0] for name in tensors} - carrying):
        raise UserError(
            f"--calibrate: {file} holds {others[0]}, whose change is not linear in its weights (Diag-OFT) or not known; use it "
            "at the strength that the report names"
        )
    return {name: value.float() * (factor if name.split(".", 1)[1] in CARRYING else 1.0) for name, value in tensors.items()}

"""What `slider report` reads from its command line and prints; nothing heavy is imported before a report is made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slider_plugin.errors import UserError

if TYPE_CHECKING:
    from slider_plugin.config import RunConfig

CONFIG = "config.json"
"""Every run leaves its configuration beside its slider."""


@dataclass(frozen=True, slots=True)
class Printed:
    """What the command says at its end."""

    json: str
    lines: tuple[str, ...]


def split(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The adapters' files and the flags behind them. Raises UserError if there is no file."""
    count = next((i for i, word in enumerate(arguments) if word.startswith("--")), len(arguments))
    if not count:
        raise UserError("slider report: give the file of a slider, such as smile/slider.safetensors")
    return [Path(word) for word in arguments[:count]], list(arguments[count:])


def config_of(config: Path | None, adapter: Path) -> Path:
    """The configuration to read. Raises UserError if none is given and none lies beside the slider."""
    found = config or adapter.parent / CONFIG
    if config is None and not found.is_file():
        raise UserError(f"--config: there is no {CONFIG} beside {adapter}; name the configuration that it was trained with")
    return found


def asked(
    strengths: str | None,
    prompts: Sequence[str],
    seeds: int,
    scorer: str | None,
    positive: str,
    negative: str,
    calibrate: bool,
) -> dict[str, Any]:
    """The options by the names of `report.command.Options`. Raises UserError for strengths that are no numbers."""
    found: dict[str, Any] = {"prompts": tuple(prompts), "seeds": seeds, "scorer": scorer, "calibrate": calibrate}
    if strengths is not None:
        try:
            found["strengths"] = tuple(float(part) for part in strengths.strip("[]").split(","))
        except ValueError as error:
            raise UserError(f"--strengths: {strengths!r} is no list of numbers; write e.g. -2,-1,0,1,2") from error
    return found | {"words": (positive, negative)}


def _words(config: RunConfig, positive: str, negative: str) -> tuple[str, str]:
    """Those that were given, else the prompts that a text slider was trained on."""
    if config.slider_objective == "text" and config.slider_text and not (positive or negative):
        return config.slider_text[0].positive, config.slider_text[0].negative
    return positive, negative


def run(config: RunConfig, adapters: Sequence[Path], output: Path | None, asked: dict[str, Any]) -> Printed:
    """Make the report of one slider, or the leakage matrix of several."""
    from slider_plugin.report.command import Options, report
    from slider_plugin.report.scorers import Words

    options = Options(**(asked | {"words": Words(*_words(config, *asked["words"]))}))
    folder = output or adapters[0].parent / "report"
    if len(adapters) > 1:
        from slider_plugin.report.sets import report_set

        matrix = report_set(config, adapters, folder, options)
        return Printed(json.dumps(matrix.json, indent=1), (*matrix.table, str(matrix.path)))
    done = report(config, adapters[0], folder, options)
    files = [str(folder / done.json[name]) for name in ("strip", "plot")] + [str(done.path)]
    files += [str(done.calibrated)] if done.calibrated else []
    flags = [f"{flag.code}: {flag.text}" for flag in done.card.flags[1:]]
    return Printed(json.dumps(done.json, indent=1), (done.card.verdict, *flags, *files))

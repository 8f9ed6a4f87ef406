"""Reports while a run trains: the best checkpoint is kept and named, and a run that goes wrong is said early.

Each report goes into `reports/step_000200/`, and as a line into `reports.jsonl`: its JSON, with `report`, the folder. The file
`best.json` names the step with the highest score so far and its checkpoint, which rotation spares. The weights as a slider of
that step has them are kept in `reports/best.safetensors`, from which the run's end exports them. A run that is killed forgets
what it had reported after the checkpoint that it goes on from, and reports that again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from slider_plugin import console
from slider_plugin.config import RunConfig
from slider_plugin.data.buckets import Bucket
from slider_plugin.files import replacing, write_atomic, write_json
from slider_plugin.report import card as cards
from slider_plugin.report.about import captions_of, facts_about
from slider_plugin.report.ends import Ends, of_buckets
from slider_plugin.report.probe import Request, curves_of, draw, strip
from slider_plugin.training.ema import finished_weights
from slider_plugin.training.processes import draws_here
from slider_plugin.validation.settings import draw_settings, validation_seeds, validation_size

if TYPE_CHECKING:
    from slider_plugin.preflight import Preflight
    from slider_plugin.report.card import Card
    from slider_plugin.training.loop import Trainer
    from slider_plugin.training.parking import Parked

LINES, BEST = "reports.jsonl", "best.json"
FOLDER, WEIGHTS = "reports", "best.safetensors"
EXPORTED = "slider_best.safetensors"
"""The best slider in `output_dir`, where it is not the last one."""

SHARES = (-1.0, -0.5, 0.0, 0.5, 1.0)
"""Strengths that are drawn, as shares of the largest one that is trained."""

LEAST_SEEDS = 2  # of each prompt, or nothing would be known about chance
WRONG_TWICE = {"wrong_direction", "broken"}
"""Flags that end a run with validation_report_stop when two reports in a row have one of them."""

PATIENCE = 3
"""Reports in a row without a new best that end it."""


class Reports:
    """The reports of one run; without `validation_report` none is ever due."""

    def __init__(self, config: RunConfig, trainer: Trainer, checked: Preflight, parked: Parked | None) -> None:
        """Take up what an earlier part of the run has reported."""
        self._config, self._trainer, self._checked, self._parked = config, trainer, checked, parked
        self._ends: Ends | None = None
        self._rows: list[dict[str, Any]] = []
        self._best: dict[str, Any] | None = None
        self.stopped = False
        """Whether the run is to end, as `validation_report_stop` has it."""
        if config.validation_report and draws_here(trainer.processes):
            self._take_up()

    def due(self, step: int) -> bool:
        """Whether there is a report after this step, which the last one always has."""
        interval = self._config.report_interval
        on_time = step == self._config.max_train_steps or (interval > 0 and step % interval == 0)
        return self._config.validation_report and on_time and draws_here(self._trainer.processes)

    def make(self) -> bool:
        """Report on the slider as it is now; returns whether it is the best so far, whose checkpoint is to be kept."""
        step = self._trainer.step
        with finished_weights(self._trainer.optimizer, self._trainer.ema):
            with self._parked.awake() if self._parked else nullcontext():
                card, written = self._measure(step)
            best = self._best is None or card.score > self._best["score"]
            if best and self._trainer.processes.is_main:
                self._keep(self._trainer.adapter.tensors())
        self._say(card, step)
        self._rows.append(written | {"report": f"{FOLDER}/step_{step:06d}"})
        if best:
            self._best = {"step": step, "checkpoint": f"checkpoint-{step:06d}", "score": card.score, "verdict": card.verdict}
        if self._trainer.processes.is_main:
            self._write(best)
        self.stopped = self._config.validation_report_stop and bool(reason := self.why_stop())
        if self.stopped and step < self._config.max_train_steps:
            console.say(f"validation_report_stop: the run ends after step {step}: {reason}")
        return best

    def why_stop(self) -> str:
        """Why going on is of no use; "" as long as it may be."""
        wrong = [_codes(row) & WRONG_TWICE for row in self._rows[-2:]]
        if len(wrong) == 2 and all(wrong):
            return f"{min(wrong[-1])} in two reports in a row"
        best = self._best["step"] if self._best else 0
        since = [row for row in self._rows if row["step"] > best]
        early = self._trainer.step < self._config.max_train_steps / 2 and "no_effect" in _codes(self._rows[-1])
        return "" if early or len(since) < PATIENCE else f"no report was better than that of step {best}"

    # --- one report -------------------------------------------------------------------------------------------------

    def _measure(self, step: int) -> tuple[Card, dict[str, Any]]:
        trainer, config = self._trainer, self._config
        self._ends = self._ends or of_buckets(trainer.data, pictures=False)
        size = validation_size(config) or self._checked.size
        settings = draw_settings(config, trainer.family, trainer.components, size)
        request, trained = self._request(), _trained(self._checked.buckets)
        drawn = draw(trainer.family, trainer.components, trainer.adapter, request, settings, self._ends.grid)
        axis = self._ends.axis()
        card = cards.card_of(curves_of(drawn, axis, 1.0, trained), config.seed, axis.separation)
        written = cards.as_json(card, facts_about(trainer.family, f"checkpoint-{step:06d}", step, request, None, self._ends))
        if trainer.processes.is_main:
            path = cards.write(config.output_dir / FOLDER / f"step_{step:06d}", written, strip(drawn))
            trainer.family.observe("report", step=step, path=path.parent)
        return card, written

    def _request(self) -> Request:
        config, trained = self._config, _trained(self._checked.buckets)
        prompts = tuple(dict.fromkeys(p.prompt for p in config.prompts)) or captions_of(self._checked.buckets)
        seeds = validation_seeds(config, max(LEAST_SEEDS, config.num_validation_images))
        return Request(prompts, tuple(seeds), tuple(share * trained for share in SHARES))

    def _say(self, card: Card, step: int) -> None:
        line = f"report after step {step}: {card.verdict}"
        early = card.codes == {"no_effect"} and step < self._config.max_train_steps / 4
        (console.warn if card.flags and not early else console.say)(line)
        if self._trainer.accelerator.trackers:
            names = ("monotonicity", "range", "balance", "preservation")
            values = {f"report/{name}": getattr(card.scores, name) for name in names}
            self._trainer.accelerator.log(values | {"report/score": card.score}, step=step)

    # --- files ------------------------------------------------------------------------------------------------------

    def _take_up(self) -> None:
        """Read what was reported up to the present step; what came later is reported again."""
        done, folder = self._trainer.step, self._config.output_dir
        self._rows = [row for row in _rows(folder / LINES) if row["step"] <= done]
        best = best_of(folder)
        self._best = best if best and best["step"] <= done else None
        if not self._trainer.processes.is_main:
            return
        if (folder / LINES).exists():
            write_atomic(folder / LINES, "".join(json.dumps(row) + "\n" for row in self._rows))
        if best and self._best is None:
            (folder / BEST).unlink()

    def _keep(self, tensors: Mapping[str, Any]) -> None:
        path = self._config.output_dir / FOLDER / WEIGHTS
        with replacing(path) as temporary:
            save_file(dict(tensors), temporary, {"format": "pt"})

    def _write(self, best: bool) -> None:
        folder = self._config.output_dir
        if best:
            write_json(folder / BEST, dict(self._best or {}))
        with (folder / LINES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._rows[-1]) + "\n")


def _codes(row: Mapping[str, Any]) -> set[str]:
    return {flag["code"] for flag in row["flags"]}


def best_of(folder: Path) -> dict[str, Any] | None:
    """The contents of `best.json`: step, checkpoint, score, verdict; None where there is none."""
    path = folder / BEST
    if not path.is_file():
        return None
    best: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return best


def best_checkpoint(folder: Path) -> str:
    """The name of the checkpoint that rotation spares; "" where there is none."""
    best = best_of(folder)
    return str(best["checkpoint"]) if best else ""


def best_weights(folder: Path) -> dict[str, Any]:
    """The adapter's tensors at the best step."""
    tensors: dict[str, Any] = load_file(folder / FOLDER / WEIGHTS)
    return tensors


def _rows(path: Path) -> list[dict[str, Any]]:
    """The lines of `reports.jsonl`; one that a kill cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(dict(json.loads(line)))
        except ValueError:
            continue
    return rows


def _trained(buckets: Sequence[Bucket]) -> float:
    return max(abs(bucket.strength or 0.0) for bucket in buckets)

"""Reports while a run trains: files, the best checkpoint, stopping, and that training does not notice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from trainers import trainer_of

from slider_plugin import run
from slider_plugin.cli import execute
from slider_plugin.configfile import read_config
from slider_plugin.preflight import preflight
from slider_plugin.registry import Plugins
from slider_plugin.report import card as cards
from slider_plugin.report import watching
from slider_plugin.report.watching import Reports
from slider_plugin.training.checkpoint import checkpoints

Project = Callable[..., Path]
KEYS: dict[str, Any] = {
    "validation_report": True, "validation_report_interval": 2, "validation_num_inference_steps": 1, "max_train_steps": 6,
    "checkpoint_step_interval": 1, "checkpoints_total_limit": 2, "validation_prompt": "a red circle",
    "validation_strengths": [],
}  # fmt: skip


def train(config: Path, *flags: str) -> run.Outcome:
    return run.train(read_config(config, flags, Plugins.discover().facts)[0])


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "reports.jsonl").read_text().splitlines()]


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], None]:
    """Give the reports of these steps these scores: random models have none that a test could rely on."""

    def fix(by_step: dict[int, float]) -> None:
        order: Iterator[float] = iter(by_step.values())
        real = cards.card_of

        def card_of(*arguments: Any) -> Any:
            card, score = real(*arguments), next(order)
            return SimpleNamespace(
                curves=card.curves, scores=card.scores, certain=card.certain, flags=card.flags, verdict=card.verdict,
                low_S=card.low_S, high_S=card.high_S, codes=card.codes, score=score,
            )  # fmt: skip

        monkeypatch.setattr(cards, "card_of", card_of)

    return fix


def test_a_run_reports_at_its_intervals_and_exports_the_best(
    project: Project, tmp_path: Path, scored: Callable[[dict[int, float]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    scored({2: 0.6, 4: 0.4, 6: 0.5})
    done = train(project("sd1", **KEYS))
    out = tmp_path / "out"
    assert done.finished
    assert [(row["step"], row["score"], row["report"]) for row in rows(out)] == [
        (2, 0.6, "reports/step_000002"), (4, 0.4, "reports/step_000004"), (6, 0.5, "reports/step_000006"),
    ]  # fmt: skip
    for row in rows(out):
        written = json.loads((out / row["report"] / "report.json").read_text())
        assert row == written | {"report": row["report"]}
        assert written["strengths"] == [-0.5, -0.25, 0.0, 0.25, 0.5] and len(written["seeds"]) == 2
        assert (out / row["report"] / written["strip"]).is_file() and (out / row["report"] / written["plot"]).is_file()
    best = json.loads((out / "best.json").read_text())
    assert (best["step"], best["checkpoint"], best["score"]) == (2, "checkpoint-000002", 0.6)
    # Two are kept besides the best one.
    assert [path.name for path in checkpoints(out)] == ["checkpoint-000002", "checkpoint-000005", "checkpoint-000006"]
    trained = load_file(out / "checkpoint-000002" / "adapter.safetensors")
    exported = load_file(out / "slider_best.safetensors")
    ups = {name.removeprefix("unet.").removesuffix(".weight"): value for name, value in exported.items()}
    assert all(torch.equal(ups[name], value) for name, value in trained.items())
    assert exported.keys() == load_file(out / "slider.safetensors").keys()
    with safe_open(out / "slider_best.safetensors", "pt") as opened:
        assert opened.metadata()["slider.steps"] == "2"
    assert "best report: step 2, score 0.60 (checkpoint-000002)" in capsys.readouterr().err


def test_the_last_one_is_not_exported_twice(
    project: Project, tmp_path: Path, scored: Callable[[dict[int, float]], None]
) -> None:
    scored({2: 0.1, 4: 0.2, 6: 0.3})
    train(project("sd1", **KEYS))
    assert json.loads((tmp_path / "out" / "best.json").read_text())["step"] == 6
    assert not (tmp_path / "out" / "slider_best.safetensors").exists()
    assert [p.name for p in checkpoints(tmp_path / "out")] == ["checkpoint-000004", "checkpoint-000005", "checkpoint-000006"]


def test_training_does_not_notice(project: Project, tmp_path: Path) -> None:
    """Dropout and caption dropout draw from generators that reports must leave alone; without prompts captions are drawn."""
    keys = KEYS | {"validation_prompt": None, "lora_dropout": 0.2, "use_ema": True}
    config = project("sd1", neutral=True, **{key: value for key, value in keys.items() if value is not None})
    with_reports = train(config, "--output_dir", str(tmp_path / "a")).adapter
    without = train(config, "--output_dir", str(tmp_path / "b"), "--validation_report", "false").adapter
    assert with_reports and without and with_reports.read_bytes() == without.read_bytes()
    assert not (tmp_path / "b" / "reports.jsonl").exists()
    written = json.loads((tmp_path / "a" / "reports" / "step_000002" / "report.json").read_text())
    assert written["prompts"] == [f"a photo of a circle {i}" for i in range(4)]


def test_a_run_that_goes_on_reports_as_if_it_had_never_stopped(project: Project, tmp_path: Path) -> None:
    config = project("sd1", **KEYS)
    whole = train(config, "--output_dir", str(tmp_path / "whole")).adapter
    part = tmp_path / "part"
    train(config, "--output_dir", str(part), "--max_train_steps", "4")
    for later in ("slider.safetensors", "slider_best.safetensors"):
        (part / later).unlink(missing_ok=True)
    for step in (3, 4):  # a kill after step 2, whose later reports are on the disk
        shutil.rmtree(part / f"checkpoint-{step:06d}", ignore_errors=True)
    if not checkpoints(part):
        pytest.fail("the best checkpoint was not kept")
    resumed = train(config, "--output_dir", str(part), "--resume_from_checkpoint", "latest").adapter
    assert whole and resumed and whole.read_bytes() == resumed.read_bytes()
    assert rows(part) == rows(tmp_path / "whole")
    assert (part / "best.json").read_text() == (tmp_path / "whole" / "best.json").read_text()


def test_what_a_run_cannot_report_on_is_said_beforehand(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["train", str(project("sd1", **KEYS | {"validation_disable": True}))]) == 2
    assert "validation_report: validation_disable draws nothing" in " ".join(capsys.readouterr().err.split())


def test_stopping_without_reports_is_said_beforehand(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["train", str(project("sd1", validation_report_stop=True))]) == 2
    assert "validation_report_stop: there are no reports to stop by" in " ".join(capsys.readouterr().err.split())


# --- Stopping -----------------------------------------------------------------------------------------------------------


def reports_of(config: Path, *flags: str) -> Reports:
    read = read_config(config, flags, Plugins.discover().facts)[0]
    trainer = trainer_of(config, *flags)
    return Reports(read, trainer, preflight(read, trainer.family), None)


@pytest.mark.parametrize(
    ("flags", "scores", "step", "stops"),
    [
        ([["wrong_direction"], ["wrong_direction"]], [0.0, 0.0], 2, "wrong_direction in two reports in a row"),
        ([["wrong_direction"], []], [0.0, 0.1], 2, ""),
        ([[], ["broken"], ["broken"]], [0.5, 0.1, 0.1], 3, "broken in two reports in a row"),
        ([[], [], []], [0.5, 0.4, 0.3], 3, ""),
        ([[], [], [], []], [0.5, 0.4, 0.3, 0.2], 4, "no report was better than that of step 1"),
        ([[], [], [], []], [0.1, 0.2, 0.3, 0.4], 4, ""),
        ([["no_effect"]] * 4, [0.1, 0.0, 0.0, 0.0], 4, ""),
        ([["no_effect"]] * 4, [0.1, 0.0, 0.0, 0.0], 80, "no report was better than that of step 1"),
    ],
)
def test_when_a_run_is_of_no_use(project: Project, flags: list[list[str]], scores: list[float], step: int, stops: str) -> None:
    reports = reports_of(project("sd1", **KEYS | {"max_train_steps": 100}))
    reports._rows = [
        {"step": number, "flags": [{"code": code} for code in codes], "score": score}
        for number, (codes, score) in enumerate(zip(flags, scores, strict=True), start=1)
    ]
    top = scores.index(max(scores)) + 1
    reports._best = {"step": top, "score": max(scores)}
    reports._trainer.step = step
    assert reports.why_stop() == stops


def test_a_run_that_stops_early_exports_as_usual(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watching.Reports, "why_stop", lambda self: "it is of no use" if self._trainer.step == 4 else "")
    done = train(project("sd1", **KEYS), "--validation_report_stop")
    assert (done.finished, done.steps) == (True, 4)
    assert done.adapter is not None and done.adapter.is_file() and done.images is not None
    assert "validation_report_stop: the run ends after step 4: it is of no use" in " ".join(capsys.readouterr().err.split())

"""That every benchmark runs and measures what it says; no timing is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks import __main__ as everything
from benchmarks import published, quality, steps
from benchmarks.models import tiny_pipeline, write_run
from benchmarks.timing import ratio, table

from slider_plugin.demo import measure


@pytest.mark.slow
def test_all_run_with_one_command(tmp_path: Path) -> None:
    report = everything.main(["--quick", "--out", str(tmp_path / "results.json")])
    assert json.loads((tmp_path / "results.json").read_text()) == report
    assert set(report) == {"machine", "step", "pairing", "objective", "memory", "start", "draws", "cache"}
    assert report["objective"][0]["our forwards"] == 2 and report["objective"][0]["published forwards"] == 8
    assert report["memory"][0]["ratio"] <= 1.03
    assert [row["start"] for row in report["start"]] == ["cold", "warm"]
    assert all(row["s"] > 0 and row["bare, s"] > 0 for row in report["start"])


def test_another_bare_loop_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_run("z_image", tiny_pipeline("z_image", tmp_path), tmp_path / "run", 64)
    monkeypatch.setitem(steps.FORWARDS, "z_image", lambda *asked: -steps.z_image(*asked))
    with pytest.raises(AssertionError, match="something else"):
        steps.measure("turned round", config, 1)


@pytest.mark.slow
def test_published_sizes_run_small_and_refuse_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    rows = published.main(["--small", "--no-compile", "--repeats", "1", "--json"])
    assert [(row["model"].split("`")[1], row["checkpointing"]) for row in rows] == [
        (name, told) for name in published.MODELS for told in ("no", "yes")
    ]
    assert all(row["step, ms"] > 0 for row in rows)
    assert not torch.cuda.is_available()
    with pytest.raises(SystemExit):
        published.main([])
    assert "need a GPU" in capsys.readouterr().err


def test_ratios_are_of_repetitions() -> None:
    found = ratio([2.0, 2.0, 8.0], [1.0, 2.0, 2.0])
    assert (found.low, found.median, found.high) == (1.5, 2.0, 3.0)
    assert table([{"a": 1, "b": "x"}]).splitlines() == ["| a | b |", "| --- | --- |", "| 1 | x |"]


def test_prompts_of_the_quality_benchmark_say_the_concept_at_both_ends_and_are_not_held_out() -> None:
    held_out = {measure.prompt(*words) for words in measure.PROMPTS}
    for concept, (more, less) in {
        "size": ("large", "small"),
        "brightness": ("bright", "dim"),
        "position": ("right", "left"),
    }.items():
        sets = quality.text_sets(concept)
        assert len(sets) == 6 and not held_out & {words["target"] for words in sets}
        for words in sets:
            assert more in words["positive"].split() and less in words["negative"].split()
            assert not {more, less} & set(words["target"].split())


def test_the_tables_of_the_docs_are_those_of_the_committed_rows() -> None:
    rows = json.loads(Path(quality.__file__).with_suffix(".json").read_text())
    page = (Path(__file__).parents[1] / "docs" / "quality.md").read_text(encoding="utf-8")
    assert quality.table(rows) in page and quality.comparison(rows) in page


def test_formulas_are_compared_over_the_seeds_that_both_have() -> None:
    row = {"family": "sd1", "concept": "size", "steps": 120, "monotonicity": 1.0, "at": [0.1, 0.2, 0.3]}
    ours = [row | {"objective": "text", "seed": seed, "balance": seed / 10, "moved": 1.0} for seed in (5, 7)]
    theirs = [row | {"objective": "concept-text", "seed": 7, "balance": 0.5, "moved": 1.0}]
    lines = quality.comparison([*ours, *theirs]).splitlines()[2:]
    cost = f"{measure.AREA_RANGE / 0.1:.2f} ± 0.00"  # all of its range moved, for a response of 0.1 each way
    assert lines == [
        f"| `sd1` | size | concept-text | 1.000 ± 0.000 | 0.50 ± 0.00 | 1.000 ± 0.000 | {cost} | 1 |",
        f"| `sd1` | size | text | 1.000 ± 0.000 | 0.70 ± 0.00 | 1.000 ± 0.000 | {cost} | 1 |",
    ]
    backwards = quality.comparison([*ours, theirs[0] | {"at": [0.3, 0.2, 0.1]}]).splitlines()[2]
    assert backwards.endswith("| the wrong way | 1 |")


def test_the_table_of_qualities_marks_what_misses_a_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"family": "sd1", "concept": "size", "objective": "pair", "steps": 120, "moved": 0.05, "at": [0.2, 0.3, 0.4]}
    rows = [row | {"seed": seed, "monotonicity": 1.0, "balance": balance} for seed, balance in ((7, 0.4), (8, 0.6))]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert quality.main(["--table", str(tmp_path / "rows.json")]) == rows
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "| `sd1` | size | pair | 1.000 | **0.50** | 0.2, 0.3, 0.4 | 0.050 | 120 |"

"""`slider targets`: the published model without weights, a folder, and everything that can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from slider_plugin.cli import execute

FIELDS = {
    "family": str, "model_class": str, "matched": int, "joint": int, "documented_list_matched": int, "by_kind": dict,
    "patterns": list, "dead": list, "forbidden_matched": list,
}  # fmt: skip


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert execute(["targets", *arguments, "--json"]) == 0
    answer: dict[str, object] = json.loads(capsys.readouterr().out)
    return answer


def test_the_published_model(capsys: pytest.CaptureFixture[str]) -> None:
    answer = asked(capsys, "z_image")
    assert all(isinstance(answer[field], kind) for field, kind in FIELDS.items())
    assert (answer["matched"], answer["joint"], answer["documented_list_matched"]) == (132, 120, 0)
    assert answer["model_class"] == "ZImageTransformer2DModel"
    assert answer["by_kind"] == {"self": 8, "joint": 120, "io": 2, "time": 2}
    assert answer["dead"] == answer["forbidden_matched"] == []


def test_without_joint_modules(capsys: pytest.CaptureFixture[str]) -> None:
    answer = asked(capsys, "z_image", "--no-include-joint")
    assert (answer["matched"], answer["joint"]) == (12, 0)
    assert not any("layers" in pattern and "noise" not in pattern for pattern in answer["patterns"])  # type: ignore[attr-defined]


def test_a_flavour(capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(capsys, "sd3")["matched"] == 100
    assert asked(capsys, "sd3", "--flavour", "sd3.5-medium")["matched"] == 152


def test_a_folder(capsys: pytest.CaptureFixture[str], tiny_folders: Callable[[str], Path]) -> None:
    answer = asked(capsys, "sd1", "--model", str(tiny_folders("sd1")))
    assert answer["matched"] == 28 and answer["flavour"] is None


def test_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["targets", "wan"]) == 0
    text = capsys.readouterr().out
    assert "164 modules" in text and r"blocks\.\d+\.attn1" in text and "first and last frame" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope"], "there is no family 'nope'"),
        (["sdx"], "did you mean 'sdxl'?"),
        (["sd1", "--flavour", "9"], "sd1 has no flavour '9'; it has 1.5"),
        (["sd1", "--model", "missing-folder/x/y"], "does not exist"),
        (["sd1", "--model", ".", "--flavour", "1.5"], "give one of them"),
        (["ernie", "--no-include-joint"], "match no attention module"),
    ],
)
def test_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert execute(["targets", *arguments]) == 2
    text = capsys.readouterr().err.strip()
    assert said in text and "\n" not in text


def test_a_folder_of_another_family(capsys: pytest.CaptureFixture[str], tiny_folders: Callable[[str], Path]) -> None:
    assert execute(["targets", "sd1", "--model", str(tiny_folders("flux"))]) == 2
    assert "has no unet/config.json" in capsys.readouterr().err

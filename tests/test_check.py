"""`slider plugins check`, and family files that are used without being installed (`--plugin`)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slider_plugin import check_cmd, loose
from slider_plugin.cli import execute
from slider_plugin.registry import Plugins
from slider_plugin.testing.rules import RULES

POCKET = Path(__file__).parents[1] / "fixtures" / "third-party-family" / "slider_family_pocket.py"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """A copy of the pocket family as a loose file, with changes; it is forgotten afterwards."""
    monkeypatch.setenv(loose.EXTRA, "")
    before = set(sys.modules)

    def write(name: str = "my_pocket", *changes: tuple[str, str]) -> Path:
        text = POCKET.read_text().replace('name="pocket"', f'name="{name}"')
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        return path

    yield write
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_every_rule_has_a_remedy() -> None:
    assert set(check_cmd.REMEDIES) == {check_cmd.IMPORTS, check_cmd.TINY, *RULES}


def test_a_file_passes_every_rule(file: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["plugins", "check", str(file()), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [result["rule"] for result in results] == [check_cmd.IMPORTS, check_cmd.TINY, *RULES]
    assert all(result["passed"] and result["remedy"] == "" and result["family"] for result in results)
    assert set(results[0]) == {"family", "rule", "passed", "seconds", "reason", "remedy"}


def test_a_failed_rule_says_why_and_what_to_do(file: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    leaky = file(
        "leaky",
        (r'self_attention=r"transformer_blocks\.\d+\.attn1', r'self_attention=r"transformer_blocks\.\d+\.attn[12]'),
        (r'forbidden=r"transformer_blocks\.\d+\.attn2\..+|caption_projection\..+",', ""),
    )  # fmt: skip
    assert execute(["plugins", "check", str(leaky)]) == 2
    out = capsys.readouterr().out
    assert "FAIL no_target_sees_text_alone" in out and "slider targets see text alone" in out and "attn2.to_k" in out
    assert "-> move the modules that are named to Targets.forbidden" in out
    assert "ok   minus_mirrors_plus" in out, "the other rules are asked all the same"


def test_a_wrong_sign_is_found(file: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    turned = file("turned", ("noise=Flow(", "noise=Flow(sign=-1, "))
    assert execute(["plugins", "check", str(turned)]) == 2
    assert "FAIL the_published_sampler_lands_on_the_clean_latents" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ZeroDivisionError('here')", "ZeroDivisionError: here"),
        ("x = 1", "there is no FAMILY"),
        ("def broken(:", "SyntaxError"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_failed_rule(
    tmp_path: Path, file: Callable[..., Path], capsys: pytest.CaptureFixture[str], code: str, said: str
) -> None:
    path = tmp_path / "bad_family.py"
    path.write_text(code)
    assert execute(["plugins", "check", str(path)]) == 2
    out = capsys.readouterr().out
    assert out.count("FAIL") == 1 and said in out and "bad_family.py" in out


def test_a_module_and_attribute(file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file("by_target")
    (tmp_path / "holder.py").write_text("import by_target as plugin\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # for the process that reads the slider again
    results = list(check_cmd.results_of("holder:plugin"))
    assert results[2].family == "by_target"
    assert all(result.passed for result in results), results


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("nope", "there is no family 'nope'"),
        ("no_such_module:plugin", "no_such_module"),
        ("missing.py", "there is no such Python file"),
    ],
)
def test_what_is_not_there(what: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["plugins", "check", what]) == 2
    assert said in capsys.readouterr().out


# --- Files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_a_family_like_any_other(file: Callable[..., Path]) -> None:
    loose.add([str(file("loose_one"))])
    plugins = Plugins.discover()
    family = plugins.load("loose_one")
    assert family.distribution == "(file)" and len(family.version) == 12
    assert "loose_one" in plugins.families() and "sd1" in plugins.families()
    assert plugins.facts("loose_one") is family.facts


def test_a_file_trains(
    file: Callable[..., Path], tmp_path: Path, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = file("file_family")
    loose.add([str(path)])
    tiny = Plugins.discover().facts("file_family").tiny
    assert tiny is not None
    (tmp_path / "model").mkdir()
    tiny(tmp_path / "model")
    monkeypatch.setenv(loose.EXTRA, "")
    entries = [
        {"id": side, "instance_data_dir": str(image_folder(tmp_path / side, 2, light)), "slider_strength": strength}
        for side, light, strength in (("more", 220, 1.0), ("less", 40, -1.0))
    ]
    Path("buckets.json").write_text(json.dumps(entries))
    keys = "--model_family file_family --pretrained_model_name_or_path model --data_backend_config buckets.json --resolution 32"
    more = "--slider_lora_target true --max_train_steps 1 --mixed_precision no --output_dir out --lora_rank 2"
    assert execute(["train", *keys.split(), *more.split(), "--plugin", path.name]) == 0
    assert Path("out/slider.safetensors").is_file()


def test_a_file_with_the_name_of_a_built_in_is_refused_with_a_way_out(
    file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file("sd1")
    assert execute(["targets", "sd1", "--plugin", str(path)]) == 2
    err = capsys.readouterr().err
    assert "is shadowed" in err and "slider-plugin 0" in err and "SLIDER_PLUGIN_BLOCK=slider-plugin:sd1" in err
    monkeypatch.setenv("SLIDER_PLUGIN_BLOCK", "slider-plugin:sd1")
    loose.add([str(path)])
    assert Plugins.discover().load("sd1").facts.title == "Pocket"


@pytest.mark.parametrize(
    ("name", "said"), [("json.py", "has the name of another module"), ("a-b.py", "is no name of a module")]
)
def test_a_file_that_cannot_be_a_module(
    file: Callable[..., Path], tmp_path: Path, name: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_text(file().read_text())
    assert execute(["targets", "pocket", "--plugin", str(path)]) == 2
    assert said in capsys.readouterr().err


def test_a_file_in_the_current_folder_is_no_other_module(
    file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file("right_here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    loose.add([path.name])
    assert Plugins.discover().load("right_here").facts.name == "right_here"


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["targets", "sd1", "--plugin", "nowhere.py"]) == 2
    assert "--plugin nowhere.py: there is no such Python file" in capsys.readouterr().err

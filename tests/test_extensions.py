"""Extensions serve every family: they may replace or wrap two hooks, and hear what a run does; who answered is recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from site_packages import Site, error_of

from slider_hooks import PromptEntry
from slider_plugin.cli import execute
from slider_plugin.registry import Plugins

ENTRY = PromptEntry(name="one", prompt="a", adapter_strength=None)
START = "from slider_hooks import hookimpl\n\n"
TWICE = START + "@hookimpl\ndef validation_prompt_scale(global_strength):\n    return 2 * global_strength\n"
PLUS_ONE = START + "@hookimpl(wrapper=True)\ndef validation_prompt_scale():\n    return (yield) + 1\n"


def extend(site: Site, distribution: str, name: str, code: str) -> None:
    site.module(f"{name}.py", code)
    site.install(distribution, {name: name}, kind="extensions")


def test_an_extension_answers_before_the_family_and_the_family_before_the_default(site: Site) -> None:
    site.family("own", code="@hookimpl\ndef validation_prompt_scale():\n    return 7.0\n")
    site.family("plain")
    assert site.plugins().load("own").validation_prompt_scale(ENTRY, 0.5) == 7.0
    extend(site, "dist-twice", "twice", TWICE)
    for name in ("own", "plain"):
        family = site.plugins().load(name)
        assert family.validation_prompt_scale(ENTRY, 0.5) == 1.0
        assert family.describe()["hooks"]["validation_prompt_scale"] == "extension dist-twice:twice"
        assert family.describe()["hooks"]["predict"] == "default"


def test_an_extension_that_has_no_answer_hands_on(site: Site) -> None:
    site.family("plain")
    extend(site, "dist-twice", "twice", START + "@hookimpl\ndef validation_prompt_scale(entry):\n    return None\n")
    family = site.plugins().load("plain")
    assert family.validation_prompt_scale(ENTRY, 0.5) == 0.5
    assert family.describe()["hooks"]["validation_prompt_scale"] == "default", "it is who answered that counts"


def test_wrappers_go_around_in_the_order_of_their_distributions(site: Site) -> None:
    site.family("plain")
    extend(site, "dist-b", "plus_one", PLUS_ONE)
    extend(site, "dist-a", "tenfold", PLUS_ONE.replace("+ 1", "* 10"))
    family = site.plugins().load("plain")
    assert family.validation_prompt_scale(ENTRY, 0.5) == (0.5 + 1) * 10, "dist-a is the outer one"
    who = family.describe()["hooks"]["validation_prompt_scale"]
    assert who.startswith("default, wrapped by ") and "dist-a:tenfold" in who and "dist-b:plus_one" in who


def test_two_that_replace_the_same_hook_are_an_error_with_a_way_out(site: Site) -> None:
    site.family("plain")
    extend(site, "dist-a", "first", TWICE)
    extend(site, "dist-b", "second", TWICE)
    message = error_of(lambda: site.plugins().load("plain"))
    assert message == (
        "validation_prompt_scale is replaced by extension dist-a:first and by extension dist-b:second, and one run has one; "
        "leave one out with SLIDER_PLUGIN_BLOCK=dist-b:second"
    )
    assert site.plugins(BLOCK="dist-b:second").load("plain").validation_prompt_scale(ENTRY, 1.0) == 2.0


@pytest.mark.parametrize("hook", ["predict", "encode_images", "resolve_lora_targets"])
def test_an_extension_may_not_answer_for_families(site: Site, hook: str) -> None:
    site.family("plain")
    extend(site, "dist-greedy", "greedy", START + f"@hookimpl\ndef {hook}(family):\n    return None\n")
    message = error_of(lambda: site.plugins().load("plain"))
    assert "extension greedy (dist-greedy 1.0" in message and "greedy.py" in message
    assert f"{hook}: only a family answers it" in message and "SLIDER_PLUGIN_BLOCK=dist-greedy:greedy" in message


def test_a_family_may_not_score_images(site: Site) -> None:
    site.family("judge", code="@hookimpl\ndef score_images(images):\n    return [0.0 for _ in images]\n")
    assert "score_images: only extensions answer it" in error_of(lambda: site.plugins().load("judge"))


def test_a_family_may_not_observe(site: Site) -> None:
    site.family("curious", code="@hookimpl\ndef observe(event):\n    pass\n")
    assert "observe: only extensions hear it" in error_of(lambda: site.plugins().load("curious"))


@pytest.mark.parametrize("code", ["import no_such_module", "raise SystemExit(3)"])
def test_a_broken_extension_stops_what_would_run_without_it_and_nothing_else(site: Site, code: str) -> None:
    site.family("plain")
    extend(site, "dist-broken", "broken", code)
    plugins = site.plugins()
    assert plugins.families() == ["plain"] and plugins.facts("plain").title == "A title"
    message = error_of(lambda: plugins.load("plain"))
    assert "extension broken (dist-broken 1.0, broken, " in message and "SLIDER_PLUGIN_BLOCK=dist-broken:broken" in message
    assert site.plugins(BLOCK="dist-broken").load("plain").facts.name == "plain"


def test_an_extension_whose_module_is_gone_is_told_as_well(site: Site) -> None:
    site.family("plain")
    site.install("dist-gone", {"gone": "gone_module"}, kind="extensions")
    assert "extension dist-gone:gone is missing" in error_of(lambda: site.plugins().load("plain"))


def test_nonsense_of_an_extension_is_blamed_on_it(site: Site) -> None:
    site.family("plain")
    extend(site, "dist-nan", "nan", START + "@hookimpl\ndef validation_prompt_scale():\n    return float('nan')\n")
    message = error_of(lambda: site.plugins().load("plain").validation_prompt_scale(ENTRY, 1.0))
    assert "extension nan (dist-nan 1.0" in message and "gave nan" in message and "BLOCK=dist-nan:nan" in message


def test_what_an_extension_raises_is_noted_with_its_name(site: Site) -> None:
    site.family("plain")
    extend(
        site, "dist-bang", "bang", START + "@hookimpl\ndef validation_prompt_scale():\n    raise ZeroDivisionError('in here')\n"
    )
    with pytest.raises(ZeroDivisionError) as caught:
        site.plugins().load("plain").validation_prompt_scale(ENTRY, 1.0)
    (note,) = caught.value.__notes__
    assert "extension bang (dist-bang 1.0" in note


WATCH = """
from pathlib import Path

import json

from slider_hooks import hookimpl
from slider_plugin.data.sampler import CycleSampler

LOG = Path(__file__).with_name("heard.jsonl")


@hookimpl
def observe(family, event, facts):
    plain = {k: v if isinstance(v, (int, float, str, dict)) else str(v) for k, v in facts.items()}
    with LOG.open("a") as file:
        file.write(json.dumps([family.name, event, plain], default=str) + "\\n")


@hookimpl
def build_sampler(buckets, seed, weighting, neutral_scale):
    return CycleSampler(buckets, seed + 1, weighting, neutral_scale)
"""


def test_a_run_tells_what_it_does_and_the_file_says_who_answered(
    site: Site,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_folders: Callable[[str], Path],
    image_folder: Callable[..., Path],
) -> None:
    extend(site, "dist-watch", "watch_runs", WATCH)
    monkeypatch.setenv("SLIDER_PLUGIN_ALLOW", "slider-plugin,dist-watch")
    monkeypatch.chdir(tmp_path)
    entries = [
        {"id": side, "instance_data_dir": str(image_folder(tmp_path / side, 2, light)), "slider_strength": strength}
        for side, light, strength in (("more", 220, 1.0), ("less", 40, -1.0))
    ]
    Path("buckets.json").write_text(json.dumps(entries))
    config = {
        "model_family": "sd1", "pretrained_model_name_or_path": str(tiny_folders("sd1")), "data_backend_config": "buckets.json",
        "slider_lora_target": True, "lora_rank": 2, "resolution": 32, "max_train_steps": 2, "mixed_precision": "no",
        "output_dir": "out", "validation_prompt": "a circle", "validation_strengths": [1], "validation_num_inference_steps": 1,
    }  # fmt: skip
    Path("config.json").write_text(json.dumps(config))
    assert execute(["train", "config.json"]) == 0

    heard = [json.loads(line) for line in (tmp_path / "heard.jsonl").read_text().splitlines()]
    assert [event for _, event, _ in heard] == ["loaded", "step", "step", "checkpoint", "exported", "validation"]
    assert {family for family, _, _ in heard} == {"sd1"}
    facts = {event: facts for _, event, facts in heard}
    assert facts["step"]["step"] == 2 and facts["step"]["loss/positive"] > 0
    assert facts["loaded"]["config"]["lora_rank"] == 2
    assert facts["exported"]["path"] == str(Path("out") / "slider.safetensors") and facts["exported"]["step"] == 2

    with safe_open("out/slider.safetensors", "pt") as opened:
        hooks = json.loads(opened.metadata()["slider.hooks"])
    assert hooks["build_sampler"] == "extension dist-watch:watch_runs"
    assert hooks["predict"] == "default" and hooks["validation_prompt_scale"] == "default"


def test_a_trace_has_a_line_for_each_call(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site.family("plain")
    extend(site, "dist-twice", "twice", TWICE)
    family = site.plugins().load("plain")
    family.validation_prompt_scale(ENTRY, 0.5)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("SLIDER_PLUGIN_TRACE", "1")
    family.validation_prompt_scale(ENTRY, 0.5)
    line = capsys.readouterr().err
    assert line.startswith("validation_prompt_scale: extension dist-twice:twice of dist-plain:plain, ") and line.endswith(
        " ms: 1\n"
    )


def test_the_strict_switch_makes_any_broken_plugin_an_error(site: Site) -> None:
    site.family("plain")
    site.family("broken", code="import no_such_module")
    site.install("dist-gone", {"gone": "gone_module"})
    assert site.plugins(STRICT="0").families() == ["broken", "plain"]
    message = error_of(lambda: site.plugins(STRICT="1"))
    assert "2 plugins cannot be used" in message
    assert (
        "dist-broken:broken is broken: " in message and "no_such_module" in message and "dist-gone:gone is missing: " in message
    )
    assert site.plugins(STRICT="1", BLOCK="broken,gone").load("plain")


def test_our_own_environment_is_strict_clean() -> None:
    assert Plugins.discover(environ={"SLIDER_PLUGIN_ALLOW": "slider-plugin", "SLIDER_PLUGIN_STRICT": "1"}).families()


OBJECTIVE = """
from slider_hooks import Objective, UserError, hookimpl


class Halfway(Objective):
    '''Half the way from the frozen answer to the image's own target, on the upper rows alone.'''

    def __init__(self, rows):
        self.rows = rows

    def asks(self, question):
        return [question.ask]

    def target(self, question, frozen):
        return (frozen[0] + question.truth(question.clean, question.noise)) / 2

    def weight(self, question):
        weight = question.clean.new_zeros(len(question.clean), 1, *question.clean.shape[2:])
        weight[:, :, : self.rows] = 1.0
        return weight


@hookimpl
def build_objective(name, config):
    if name != "halfway":
        return None
    if set(config["objective_config"]) != {"rows"}:
        raise UserError("objective_config: halfway wants rows")
    return Halfway(**config["objective_config"])
"""
ANOTHER = OBJECTIVE.replace('"halfway"', '"elsewhere"')


def test_an_extension_trains_with_an_objective_of_its_own(
    site: Site, monkeypatch: pytest.MonkeyPatch, project: Callable[..., Path], tmp_path: Path
) -> None:
    """Beside another extension with another one: each answers for its own name."""
    import torch
    from trainers import trainer_of

    extend(site, "dist-half", "halfway_objective", OBJECTIVE)
    extend(site, "dist-else", "another_objective", ANOTHER)
    monkeypatch.setenv("SLIDER_PLUGIN_ALLOW", "slider-plugin,dist-half,dist-else")
    path = project("sd1", slider_objective="halfway", objective_config={"rows": 3}, random_strength="on")
    trainer = trainer_of(path)
    assert trainer.family.describe()["hooks"]["build_objective"] == "extension dist-half:halfway_objective"
    batch = trainer.data.batch(next(trainer.sampler))
    (asked,) = trainer._questions([batch])
    with torch.no_grad(), trainer.adapter.scaled(0.0):  # a new adapter changes nothing
        (frozen,) = trainer._answers([asked.ask])
        wanted = 0.25 * asked.strength**2 * (asked.noise - frozen)[:, :, :3].square().mean()
        assert float(trainer.loss(batch)) == pytest.approx(float(wanted), rel=1e-4)
    assert execute(["train", str(path), "--max_train_steps", "2"]) == 0
    with safe_open(tmp_path / "out" / "slider.safetensors", "pt") as opened:
        assert opened.metadata()["slider.objective"] == "halfway"


def test_an_objective_says_what_is_wrong_with_its_settings(
    site: Site, monkeypatch: pytest.MonkeyPatch, project: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    extend(site, "dist-half", "halfway_objective", OBJECTIVE)
    monkeypatch.setenv("SLIDER_PLUGIN_ALLOW", "slider-plugin,dist-half")
    path = project("sd1", slider_objective="halfway", objective_config={"columns": 3})
    assert execute(["train", str(path)]) == 2
    assert "objective_config: halfway wants rows" in capsys.readouterr().err
    monkeypatch.setenv("SLIDER_PLUGIN_BLOCK", "dist-half")
    assert execute(["train", str(path)]) == 2
    assert "'halfway' is not among bucket, pair, text, and no installed extension" in " ".join(capsys.readouterr().err.split())

"""`slider plugins new`: what it writes is whole, well formed and a family that works; nothing is ever overwritten."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from slider_hooks import Diffusion, Flow, ResolvedTargets, TargetRequest, Targets
from slider_plugin import plugins_new
from slider_plugin.cli import execute
from slider_plugin.errors import UserError
from slider_plugin.lint import lint
from slider_plugin.probing import Probe
from slider_plugin.reference import reference_denoiser
from slider_plugin.registry import Plugins
from slider_plugin.targets import match, resolve_targets

NAMES = ["clay", "my_model_2", "a", "quite_a_long_name_for_a_family_of_models"]


def imported(package: Path) -> ModuleType:
    """The family module of a package that is not installed."""
    (path,) = package.glob("slider_family_*.py")
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def texts(folder: Path) -> dict[str, str]:
    """Every text of a package by its path, captions and images left out."""
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file() and "buckets" not in p.parts}
    return {name: path.read_text(encoding="utf-8") for name, path in found.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_package_is_whole_and_bears_its_own_name_everywhere(name: str, tmp_path: Path) -> None:
    folder = plugins_new.create(name, tmp_path / "package")
    found = texts(folder)
    assert set(found) == {
        "pyproject.toml", "README.md", f"slider_family_{name}.py", f"tests/test_{name}.py",
        "example/config.json", "example/buckets.json",
    }  # fmt: skip
    everything = "\n".join([*found, *found.values()])
    for word in ("my_model", "my-model", "My Model", "$"):
        assert word not in everything.replace("my_model_2", "").replace("my-model-2", "").replace("My Model 2", ""), word
    project = tomllib.loads(found["pyproject.toml"])
    assert project["project"]["entry-points"] == {"slider_plugin.architectures": {name: f"slider_family_{name}"}}
    assert project["project"]["name"] == f"slider-family-{name.replace('_', '-')}"
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"] == [f"slider_family_{name}.py"]
    assert json.loads(found["example/config.json"])["model_family"] == name
    for bucket in json.loads(found["example/buckets.json"]):
        images = folder / "example" / bucket["instance_data_dir"]
        assert len(list(images.glob("*.png"))) >= 4, images
    assert lint(imported(folder), name) == []


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_formatted(name: str, tmp_path: Path) -> None:
    assert_formatted(plugins_new.create(name, tmp_path / "package"))


def assert_formatted(folder: Path) -> None:
    pytest.importorskip("ruff")
    settings = ["--isolated", "--line-length", "128"]
    for command in (["check", "--select", "E,F,W,UP,B", *settings], ["format", "--check", *settings]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, str(folder)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Clay", "'Clay' is no name"),
        ("9clay", "a letter first"),
        ("my-model", "lower-case letters"),
        ("my__model", "single underscores"),
        ("model_", "single underscores"),
        ("", "is no name"),
        ("../clay", "is no name"),
        ("sd1", "there is a family sd1 already, from slider-plugin"),
        ("sd15", "there is a family sd15 already as another name of sd1"),
        ("flux_1", None),
    ],
)
def test_a_name_is_checked(
    name: str, words: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = execute(["plugins", "new", "--", name])
    said = " ".join(capsys.readouterr().err.split())
    if words is None:
        assert code == 0, said
    else:
        assert code == 2 and words in said and "Traceback" not in said
        assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert execute(["plugins", "new", "clay"]) == 0
    assert capsys.readouterr().out == "slider-family-clay\n"
    module = tmp_path / "slider-family-clay" / "slider_family_clay.py"
    module.write_text("mine")
    assert execute(["plugins", "new", "clay"]) == 2
    assert "exists already and is not overwritten" in " ".join(capsys.readouterr().err.split())
    assert module.read_text() == "mine"
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for taken in ("empty", "dangling"):
        assert execute(["plugins", "new", "mud", "--output", taken]) == 2
    assert not list((tmp_path / "empty").iterdir())
    assert execute(["plugins", "new", "mud", "--output", "deeper/down"]) == 0
    assert (tmp_path / "deeper" / "down" / "slider_family_mud.py").is_file()


def test_a_package_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> Path:
        raise UserError("the fixtures are not in this installation")

    monkeypatch.setattr(plugins_new, "fixtures", gone)
    with pytest.raises(UserError):
        plugins_new.create("clay", tmp_path / "package")
    assert list(tmp_path.iterdir()) == []


def test_it_needs_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'diffusers', 'peft', 'accelerate', 'transformers')))\n"
        f"sys.argv = ['slider', 'plugins', 'new', 'clay', '--output', {str(tmp_path / 'package')!r}]\n"
        "from slider_plugin.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    steps = [line.removeprefix("next: ") for line in done.stderr.splitlines()]
    assert steps[1:] == [
        'pip install -e ".[test]"',
        "python -m slider_family_clay tiny-model",
        "slider train example/config.json",
    ]


# --- --from ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "noise"), [("sd1", Diffusion), ("pixart", Diffusion), ("ltxvideo", Flow)])
def test_a_package_from_a_folder_has_the_facts_of_the_family_that_describes_it(
    family: str, noise: type, tmp_path: Path, tiny_folders: Callable[[str], Path]
) -> None:
    source = tiny_folders(family)
    folder = plugins_new.create("clay", tmp_path / "package", source)
    found = texts(folder)
    assert "$" not in "\n".join(found.values())
    assert json.loads(found["example/config.json"])["pretrained_model_name_or_path"] == str(source)
    assert str(source) not in found["slider_family_clay.py"] + found["README.md"]
    assert_formatted(folder)
    module = imported(folder)
    assert lint(module, "clay") == []
    facts, known = module.FAMILY, Plugins.discover().load(family)
    assert (facts.denoiser, facts.denoiser_class) == (known.facts.denoiser, known.facts.denoiser_class)
    assert facts.pipeline_class == known.facts.pipeline_class and isinstance(facts.noise, noise) and facts.tiny is None
    assert (facts.modalities, facts.guidance_scale) == (known.facts.modalities, known.facts.guidance_scale)
    denoiser = reference_denoiser(facts)
    expected = resolve_targets(known, denoiser, TargetRequest(slider=True)).modules
    assert expected == match(facts, denoiser, ResolvedTargets(expression=facts.targets.slider(), source="slider")).modules


@pytest.mark.parametrize(
    ("family", "outcome", "said"),
    [("sd1", "3 passed", ""), ("pixart", "2 failed, 1 passed", "in hook predict of family clay")],
)
def test_the_test_of_such_a_package_tells_whether_the_defaults_fit(
    family: str, outcome: str, said: str, tmp_path: Path, tiny_folders: Callable[[str], Path],
    place_package: Callable[[Path, Path], None],
) -> None:  # fmt: skip
    """They do for Stable Diffusion 1. PixArt's denoiser takes its arguments in another order, and has a mask."""
    folder, site = plugins_new.create("clay", tmp_path / "package", tiny_folders(family)), tmp_path / "site"
    site.mkdir()
    place_package(folder, site)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLIDER_PLUGIN_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(folder)],
        capture_output=True, text=True, check=False, cwd=folder, env=environment | {"PYTHONPATH": str(site)},
    )  # fmt: skip
    assert outcome in done.stdout and said in done.stdout, done.stdout + done.stderr
    assert re.search(r"\b\d+ skipped", done.stdout), "the rules wait for a tiny pipeline"


@pytest.mark.parametrize("broken", ["nowhere", "empty"])
def test_a_folder_that_cannot_be_probed_leaves_nothing(broken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    source, output = tmp_path / broken, tmp_path / "package"
    assert execute(["plugins", "new", "clay", "--from", str(source), "--output", str(output)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"--from: {source} " in said and "--probe" not in said
    assert not output.exists()


def probe_of(expression: str, unsure: dict[str, str]) -> Probe:
    return Probe(
        folder="", pipeline_class="P", denoiser="unet", denoiser_class="D", streams={}, roles={},
        proposal=Targets(self_attention=expression, io="proj_out"), unsure=unsure,
    )  # fmt: skip


def test_unsure_modules_are_a_comment_with_equal_blocks_together() -> None:
    unsure = {f"blocks.{n}.gate": "sees both" for n in range(3)} | {"last": "called twice"}
    assert plugins_new._unsure(probe_of("a", unsure)).splitlines()[1:] == [
        "    #   last (1): called twice", "    #   blocks.N.gate (3): sees both",
    ]  # fmt: skip


def test_long_expressions_are_written_one_alternative_to_a_line() -> None:
    long = "|".join(rf"blocks_{letter}\.\d+\.attn\.(to_q|to_k)" for letter in "abcd")
    text = plugins_new._targets(probe_of(long, {}))
    assert eval(f"dict({text})") == {"self_attention": long, "io": "proj_out"}
    assert len(text.splitlines()) == 7 and max(map(len, text.splitlines())) < 60
    single = r"(down_blocks\.\d+|up_blocks\.\d+)\.attentions\.\d+\.transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)"
    text = plugins_new._targets(probe_of(single, {}))
    assert eval(f"dict({text})")["self_attention"] == single
    assert max(map(len, text.splitlines())) <= 128

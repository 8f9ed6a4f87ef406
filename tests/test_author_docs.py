"""hooks/README.md is true: its tutorial runs word by word, its examples are plugins, its hooks are the contract's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from site_packages import Site

from slider_hooks import CONTRACT, specs
from slider_plugin import discovery, family, hook_docs, loose, registry
from slider_plugin.errors import UserError
from slider_plugin.lint import lint, lint_extension, lint_hooks

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "hooks" / "README.md").read_text(encoding="utf-8")
TUTORIAL = "From an empty folder to a trained slider"
ENVIRONMENT = ("python3 -m venv", ". sliders/bin/activate", "pip install -c")
"""How the lines begin that make an environment with slider-plugin in it; the quick test is in one."""

INSTALLATION = 'pip install -e ".[test]"'

TEN_MINUTES = 600  # seconds


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## )", PAGE, re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def tutorial() -> list[str]:
    """The commands of the tutorial, one to a line."""
    return [line for block in blocks(section(TUTORIAL), "bash") for line in block.splitlines() if line]


def shell(lines: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run lines in one shell, as somebody who types them would; the first that fails is the last."""
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("SLIDER_", "PYTHONPATH", "PYTEST_"))}
    script = "\n".join(["set -e", *lines])
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, env=outside | variables, capture_output=True, text=True, check=False, timeout=3000
    )


def assert_trained(package: Path, said: str) -> None:
    losses = [float(loss) for loss in re.findall(r"\[\+\] (\d\.\d+) ", said)]
    assert losses[-1] < 0.85 * losses[0], "the loss falls"
    found = re.search(r"the loss falls from (\S+) to (\S+)\.", section(TUTORIAL))
    assert found
    assert [round(losses[0], 2), round(losses[-1], 2)] == pytest.approx([float(found[1]), float(found[2])], abs=0.015)
    output = package / "example" / "output"
    assert (output / "slider.safetensors").is_file()
    assert len(list(output.glob("validation_images/step_*/*_scale*.png"))) == 2
    assert len(list(output.glob("validation_images/step_*/*_base.png"))) == 1


def test_the_tutorial_s_commands_run_word_by_word(tmp_path: Path) -> None:
    """In this environment: instead of being installed, the package lies on the path and has its metadata beside it."""
    lines = [line for line in tutorial() if not line.startswith(ENVIRONMENT)]
    assert len(lines) == len(tutorial()) - len(ENVIRONMENT)
    package, site = tmp_path / "slider-family-clay", tmp_path / "site"
    Site(site).install("slider-family-clay", {"clay": "slider_family_clay"})
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    lines[lines.index(INSTALLATION)] = f"export PYTHONPATH={package}{os.pathsep}{site}"
    done = shell(lines, tmp_path, PATH=path, OMP_NUM_THREADS="1")  # more threads only wait, on models this small
    assert done.returncode == 0, done.stdout + done.stderr
    assert_trained(package, done.stderr)
    assert re.search(r"^clay +architecture", done.stdout, re.MULTILINE)
    assert "FAIL" not in done.stdout and re.search(r" \d+ passed\b", done.stdout)
    points = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    assert points == {"slider_plugin.architectures": {"clay": "slider_family_clay"}}


@pytest.mark.slow
def test_the_tutorial_in_an_environment_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "slider-plugin").symlink_to(ROOT)
    started = time.perf_counter()
    done = shell([*tutorial(), "deactivate"], tmp_path)
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stdout + done.stderr
    assert_trained(tmp_path / "slider-family-clay", done.stderr)
    print(f"{seconds:.0f} s in all")
    assert seconds < TEN_MINUTES, "the page promises less than ten minutes"


def test_the_page_holds_the_hooks_of_the_contract() -> None:
    assert hook_docs.written(PAGE) == PAGE, "renew it: python -m slider_plugin.hook_docs"
    part = PAGE.partition(hook_docs.START)[2].partition(hook_docs.END)[0]
    assert re.findall(r"^### (\w+)$", part, re.MULTILINE) == [*specs.EVERY]


def test_a_page_without_markers_is_refused() -> None:
    for page in ("", hook_docs.START, hook_docs.END):
        with pytest.raises(UserError, match="has no line"):
            hook_docs.written(page)


def test_writing_the_page_changes_nothing_but_the_hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{hook_docs.START}old\n{hook_docs.END}\nafter\n")
    monkeypatch.setattr(hook_docs, "PAGE", page)
    hook_docs.main()
    assert page.read_text() == f"before\n{hook_docs.START}{hook_docs.markdown()}{hook_docs.END}\nafter\n"
    monkeypatch.setattr(hook_docs, "PAGE", tmp_path / "nowhere.md")
    with pytest.raises(UserError, match="in a checkout"):
        hook_docs.main()


def examples() -> list[str]:
    """The Python of the page, but for the hooks' own examples, which tests/test_contract.py runs."""
    before, _, rest = PAGE.partition(hook_docs.START)
    return blocks(before + rest.partition(hook_docs.END)[2], "python")


@pytest.mark.parametrize("number", range(len(examples())))
def test_an_example_is_a_valid_plugin(number: int) -> None:
    module = ModuleType(f"example_{number}")
    exec(compile(examples()[number], module.__name__, "exec"), vars(module))
    assert lint_hooks(module) == []
    if hasattr(module, "FAMILY"):
        assert lint(module, "clay") == []
    if hasattr(module, "observe"):
        assert lint_extension(module) == []
    assert [name for name in vars(module) if not name.startswith("_")], "it defines something"


def test_the_page_knows_every_variable_and_links_to_what_exists() -> None:
    variables = {discovery.BLOCK, discovery.ALLOW, registry.STRICT, loose.EXTRA, family.TRACE}
    assert set(re.findall(r"SLIDER_PLUGIN_[A-Z]+", PAGE)) == variables
    titles = {re.sub(r"[^a-z0-9 -]", "", t.lower()).replace(" ", "-") for t in re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)}
    prose = re.sub(r"```.*?```|`[^`\n]+`", "", PAGE, flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)]+)\)", prose):
        exists = link.removeprefix("#") in titles if link.startswith("#") else (ROOT / "hooks" / link).exists()
        assert exists, link
    for named in re.findall(r"`((?:slider_plugin|fixtures)/[\w/.-]+)`", PAGE):
        assert (ROOT / named).exists(), named


def test_the_page_s_contract_version_is_of_this_major() -> None:
    assert {int(major) for major in re.findall(r"contract=\((\d+), \d+\)", PAGE)} == {CONTRACT[0]}

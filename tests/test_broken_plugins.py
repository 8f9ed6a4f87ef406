"""Fifteen broken packages installed at once: each gets a line that says what to do, and nothing else suffers.

A site folder on PYTHONPATH holds what pip would have put there; the slow tier has pip do it.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path for path in (ROOT / "fixtures" / "broken-plugins").iterdir() if path.is_dir())
HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "lycoris", "safetensors", "numpy", "PIL")

Site = Path
Slider = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, place_package: Callable[[Path, Path], None]) -> Site:
    """All broken packages, installed."""
    folder = tmp_path_factory.mktemp("site")
    for package in PACKAGES:
        place_package(package, folder)
    return folder


@pytest.fixture
def slider(site: Site, tmp_path: Path) -> Slider:
    """The command in a process of its own, where the broken packages are installed beside the host."""

    def run(*arguments: str, python: tuple[str, ...] = (), **environ: str) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("SLIDER_")}
        env = kept | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"} | {f"SLIDER_PLUGIN_{k}": v for k, v in environ.items()}
        command = [sys.executable, *python, "-m", "slider_plugin", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=300)

    return run


def rows_of(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    """The rows of third parties by distribution."""
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    assert [row["status"] for row in rows if row["distribution"] == "slider-plugin"] == ["available"] * own_families()
    return {row["distribution"]: row for row in rows if row["distribution"] != "slider-plugin"}


def own_families() -> int:
    return len(list((ROOT / "slider_plugin" / "architectures").glob("[!_]*.py")))


# --- What each is told ------------------------------------------------------------------------------------------------

WAY_OUT = (
    "Way out: {install}update it, remove it with `pip uninstall {distribution}`, or leave it out with "
    "SLIDER_PLUGIN_BLOCK={distribution}:{family}"
)
WHO = "family {family} ({distribution} 1.0, {family}, {site}/{family}.py)"
CLASH = (
    "family broken_clash is claimed by broken-clash-one 1.0 and broken-clash-two 1.0 "
    "({site}/broken_clash_one.py, {site}/broken_clash_two.py). Way out: leave one out with "
    "SLIDER_PLUGIN_BLOCK=broken-clash-one:broken_clash or SLIDER_PLUGIN_BLOCK=broken-clash-two:broken_clash, or remove one "
    "with `pip uninstall broken-clash-one` or `pip uninstall broken-clash-two`"
)

AT_ONCE = {
    "broken-clash-one": ("clash", CLASH),
    "broken-clash-two": ("clash", CLASH),
    "broken-missing": (
        "missing",
        "family broken_missing (broken-missing 1.0, broken_missing, no file): broken-missing 1.0 says that it is in "
        f"broken_missing, which does not exist. {WAY_OUT}",
    ),
    "broken-shadow": (
        "shadowed",
        "family sdxl (broken-shadow 1.0, broken_shadow, {site}/broken_shadow.py) has the name of a built-in family, and "
        "slider-plugin {host} wins. Way out: leave the built-in one out with SLIDER_PLUGIN_BLOCK=slider-plugin:sdxl",
    ),
}
"""What is known without an import: status and error by distribution."""

WHEN_IMPORTED = {
    "broken-import": f"{WHO} cannot be imported (contract 1.0 here): RuntimeError: this family needs a GPU. {WAY_OUT}",
    "broken-exit": f"{WHO} cannot be imported (contract 1.0 here): SystemExit: no licence was found. {WAY_OUT}",
    "broken-dependency": (
        f"{WHO} cannot be imported (contract 1.0 here): ModuleNotFoundError: No module named 'library_that_nobody_has'. "
        f"{WAY_OUT}"
    ),
    "broken-contract": f"{WHO} is written for contract 2.0, and this host has 1.0. {WAY_OUT}",
    "broken-no-family": (
        f"{WHO} cannot be used:\n  - there is no FAMILY; state one: FAMILY = slider_hooks.Family(...)\n{WAY_OUT}"
    ),
    "broken-name": (
        f"{WHO} cannot be used:\n  - FAMILY.name is 'broken_title', but its entry point is named 'broken_name'; make them equal"
        f"\n{WAY_OUT}"
    ),
    "broken-signature": (
        f"{WHO} cannot be used:\n"
        "  - predict: argument 'tiem' is not in the hook (did you mean 'time'?); it has family, components, noisy, time, "
        "conditioning\n"
        "  - predict: argument 'conditioning' has a default, which pluggy before 1.7 puts in place of the real value; remove it"
        f"\n{WAY_OUT}"
    ),
    "broken-hook": (
        f"{WHO} cannot be used:\n  - encode_promts: no hook has this name (did you mean 'encode_prompts'?); the hooks are "
        f"{{hooks}}\n{WAY_OUT}"
    ),
    "broken-marker": (
        f"{WHO} cannot be used:\n  - encode_prompts: has the name of a hook but has no marker; write @hookimpl above it, or "
        f"rename it\n{WAY_OUT}"
    ),
}
"""What an import finds: errors by distribution."""

SOUND_TO_LOOK_AT = {"broken-at-run-time", "broken-heavy"}


def filled(text: str, distribution: str, site: Site) -> str:
    from importlib.metadata import version

    from slider_plugin.lint import EVERY_HOOK

    install = "install what brings the module 'library_that_nobody_has', " if distribution == "broken-dependency" else ""
    return text.format(
        distribution=distribution, family=distribution.replace("-", "_"), site=site, install=install,
        hooks=", ".join(EVERY_HOOK), host=version("slider-plugin"),
    )  # fmt: skip


def test_a_list_shows_a_row_for_each_and_imports_none(slider: Slider, site: Site) -> None:
    done = slider("plugins", "list", "--json", python=("-X", "importtime"))
    rows = rows_of(done)
    assert set(rows) == {path.name for path in PACKAGES} == {*AT_ONCE, *WHEN_IMPORTED, *SOUND_TO_LOOK_AT}
    for distribution, row in rows.items():
        status, error = AT_ONCE.get(distribution, ("available", None))
        expected = error and filled(error, distribution, site)
        assert (row["status"], row["error"], row["version"]) == (status, expected, "1.0"), distribution
    assert_light(done.stderr)


def assert_light(import_times: str) -> None:
    """Neither a heavy library nor any of the broken packages was imported; one of them imports torch at its top."""
    imported = set(re.findall(r"\| +([\w.]+)$", import_times, re.MULTILINE))
    assert "slider_plugin.registry" in imported
    assert not {name for name in imported if name.split(".")[0] in HEAVY or name.startswith("broken")}


def test_a_check_tells_each_what_is_wrong(slider: Slider, site: Site) -> None:
    rows = rows_of(slider("plugins", "list", "--check", "--json"))
    found = {distribution: (row["status"], row["error"]) for distribution, row in rows.items()}
    expected = {d: (status, filled(error, d, site)) for d, (status, error) in AT_ONCE.items()}
    expected |= {d: ("broken", filled(error, d, site)) for d, error in WHEN_IMPORTED.items()}
    assert found == expected | dict.fromkeys(SOUND_TO_LOOK_AT, ("available", None))


# --- Whoever needs one is stopped -------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", [*sorted(WHEN_IMPORTED), "broken-clash-one", "broken-missing"])
def test_a_run_that_needs_it_stops_at_once(slider: Slider, site: Site, tmp_path: Path, distribution: str) -> None:
    family = "broken_clash" if "clash" in distribution else distribution.replace("-", "_")
    done = slider("train", "--model_family", family, "--output_dir", "out", python=("-X", "importtime"))
    assert done.returncode == 2
    said = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("import time:"))
    status, error = AT_ONCE.get(distribution, ("broken", WHEN_IMPORTED.get(distribution, "")))
    key = f"{distribution}:{family} is missing: " if status == "missing" else ""
    lines = f"error: a problem in the configuration:\n  - model_family: {key}{filled(error, distribution, site)}"
    assert said == lines
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE), "it is told before anything heavy is loaded"
    assert not (tmp_path / "out").exists()


def test_what_only_a_run_can_see_stops_the_run(slider: Slider, site: Site, project: Callable[..., Path]) -> None:
    done = slider("train", str(project("sd1")), "--model_family", "broken_at_run_time")
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last == "error: in hook encode_prompts of " + filled(
        f"{WHO}, answered by the family: it gave 3 results for 4 prompts. {WAY_OUT}", "broken-at-run-time", site
    )


def test_an_unknown_family_says_which_were_not_looked_into(slider: Slider) -> None:
    done = slider("train", "--model_family", "brokne_title")
    assert done.returncode == 2
    unread = ", ".join(f"{d}:{d.replace('-', '_')}" for d in sorted(WHEN_IMPORTED))
    assert done.stderr.strip().endswith(f"Not looked into, as they are broken: {unread} (`slider plugins list --check`)")


# --- Whoever needs none goes on ---------------------------------------------------------------------------------------


def test_targets_of_another_family_are_shown(slider: Slider) -> None:
    done = slider("targets", "sd1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["matched"] == 100


def test_another_family_trains(slider: Slider, project: Callable[..., Path], tmp_path: Path) -> None:
    done = slider("train", str(project("sd1", max_train_steps=1)))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "slider.safetensors").is_file()
    assert "broken" not in done.stderr


def test_the_built_in_family_answers_to_its_name_until_it_is_blocked(slider: Slider) -> None:
    assert json.loads(slider("targets", "sdxl", "--json").stdout)["matched"] == 306
    rows = rows_of_all(slider("plugins", "list", "--json", BLOCK="slider-plugin:sdxl"))
    assert {key: row["status"] for key, row in rows.items() if row["name"] == "sdxl"} == {
        "broken-shadow:sdxl": "available",
        "slider-plugin:sdxl": "blocked",
    }


def rows_of_all(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return {f"{row['distribution']}:{row['name']}": row for row in json.loads(done.stdout)}


@pytest.mark.parametrize("word", ["broken_import", "broken-import", "broken-import:broken_import", "Broken_Import"])
def test_one_is_blocked_by_family_or_distribution(slider: Slider, word: str) -> None:
    done = slider("plugins", "list", "--check", "--json", BLOCK=word)
    rows = rows_of(done)
    assert (rows["broken-import"]["status"], rows["broken-exit"]["status"]) == ("blocked", "broken")
    assert rows["broken-import"]["error"] == "named in SLIDER_PLUGIN_BLOCK; take it out of there to use it"
    assert slider("train", "--model_family", "broken_import", BLOCK=word).returncode == 2


def test_blocking_one_side_ends_a_clash(slider: Slider) -> None:
    rows = rows_of(slider("plugins", "list", "--check", "--json", BLOCK="broken-clash-one"))
    assert (rows["broken-clash-one"]["status"], rows["broken-clash-two"]["status"]) == ("blocked", "available")


def test_all_but_those_that_are_allowed_are_left_out(slider: Slider) -> None:
    rows = rows_of(slider("plugins", "list", "--check", "--json", ALLOW="slider-plugin,broken_at_run_time"))
    assert {row["status"] for d, row in rows.items() if d != "broken-at-run-time"} == {"blocked"}
    assert rows["broken-at-run-time"]["status"] == "available"
    assert rows["broken-hook"]["error"] == "not named in SLIDER_PLUGIN_ALLOW; add broken-hook:broken_hook there to use it"


@pytest.mark.parametrize("variable", ["BLOCK", "ALLOW"])
def test_a_name_that_nobody_has_is_an_error(slider: Slider, variable: str) -> None:
    done = slider("plugins", "list", **{variable: "broken_improt"})
    assert done.returncode == 2
    start = f"error: SLIDER_PLUGIN_{variable} names what is not installed: broken_improt (did you mean 'broken_import'?). Write"
    assert done.stderr.startswith(start)


# --- As pip installs them ---------------------------------------------------------------------------------------------

FAST_ENOUGH = 0.5  # seconds that a list may take


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment: pip has installed the host's wheel and all broken packages; libraries are ours."""
    root = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(root / "venv")], check=True)
    bin_folder = root / "venv" / ("Scripts" if os.name == "nt" else "bin")
    install = [str(bin_folder / "python"), "-m", "pip", "install", "-q", "--no-deps"]
    subprocess.run([*install, str(ROOT), *map(str, PACKAGES)], check=True, timeout=1800)
    where = [str(bin_folder / "python"), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    new_site = Path(subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip())
    (new_site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")  # behind the new ones on sys.path
    return bin_folder


@pytest.mark.slow
def test_what_pip_has_installed_is_listed_in_no_time(environment: Path, tmp_path: Path) -> None:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLIDER_", "PYTHONPATH"))}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True, check=False, timeout=300)

    rows = rows_of(run(str(environment / "slider"), "plugins", "list", "--json"))
    assert {d: row["status"] for d, row in rows.items()} == {
        path.name: AT_ONCE.get(path.name, ("available", ""))[0] for path in PACKAGES
    }
    where = [str(environment / "python"), "-c", "import slider_plugin; print(slider_plugin.__file__)"]
    assert run(*where).stdout.startswith(str(environment.parent)), "the wheel, not this checkout"
    checked = rows_of(run(str(environment / "slider"), "plugins", "list", "--check", "--json"))
    assert {d for d, row in checked.items() if row["status"] == "broken"} == set(WHEN_IMPORTED)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        assert run(str(environment / "slider"), "plugins", "list").returncode == 0
        seconds.append(time.perf_counter() - started)
    assert statistics.median(seconds) < FAST_ENOUGH, seconds
    assert_light(run(str(environment / "python"), "-X", "importtime", "-m", "slider_plugin", "plugins", "list").stderr)

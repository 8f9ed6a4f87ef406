"""What is shipped works where the checkout is not: the wheel, and a third party's family beside it, in a fresh environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(ROOT)]
    subprocess.run(command, check=True, timeout=600)
    return next(out.glob("slider_plugin-*.whl"))


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment with the wheel and the third party's package installed."""
    venv = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    bin_folder = venv / ("Scripts" if os.name == "nt" else "bin")
    packages = [str(wheel), str(ROOT / "fixtures" / "third-party-family")]
    command = [str(bin_folder / "python"), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), *packages]
    subprocess.run(command, check=True, timeout=1800)
    return bin_folder


def run(fresh: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLIDER_", "PYTHONPATH"))}
    command = [str(fresh / "slider"), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=1200)


def test_the_wheel_holds_host_contract_and_fixtures(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in (
        "slider_plugin/run.py", "slider_hooks/specs.py", "slider_hooks/py.typed", "slider_plugin/py.typed",
        "slider_plugin/fixtures/tiny/sd1/model_index.json", "slider_plugin/fixtures/tiny/z_image/model_index.json",
        "slider_plugin/fixtures/buckets/size/more/00.png",
    ):  # fmt: skip
        assert wanted in names, wanted
    assert not [n for n in names if n.startswith(("tests/", "hooks/"))]
    assert wheel.stat().st_size < 40e6


def test_the_demo_runs_from_the_wheel(fresh: Path, tmp_path: Path) -> None:
    result = run(fresh, "demo", "--steps", "2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "slider-demo" / "strip.png").is_file()


def test_a_third_party_s_family_trains_without_a_line_changed_in_the_host(
    fresh: Path, tmp_path: Path, image_folder: Callable[..., Path]
) -> None:
    rows = json.loads(run(fresh, "plugins", "list", "--json", cwd=tmp_path).stdout)
    found = {row["family"]: (row["distribution"], row["status"]) for row in rows}
    assert found.pop("pocket") == ("slider-family-pocket", "available")
    assert {"sd1", "z_image"} < set(found) and set(found.values()) == {("slider-plugin", "available")}
    build = "from slider_family_pocket import FAMILY; import pathlib; FAMILY.tiny(pathlib.Path('model'))"
    subprocess.run([str(fresh / "python"), "-c", build], cwd=tmp_path, check=True)
    buckets = [
        {"id": side, "instance_data_dir": str(image_folder(tmp_path / side, 4, light)), "slider_strength": strength}
        for side, light, strength in (("more", 220, 1.0), ("less", 40, -1.0))
    ]
    config = {
        "model_family": "pocket", "pretrained_model_name_or_path": "model", "data_backend_config": "buckets.json",
        "slider_lora_target": True, "resolution": 32, "max_train_steps": 3, "mixed_precision": "no", "output_dir": "out",
        "validation_prompt": "a circle", "validation_num_inference_steps": 2, "pocket_time_scale": 10,
    }  # fmt: skip
    (tmp_path / "buckets.json").write_text(json.dumps(buckets))
    (tmp_path / "config.json").write_text(json.dumps(config))
    doctor = run(fresh, "doctor", "config.json", cwd=tmp_path)
    assert doctor.returncode == 0 and "Pocket" in doctor.stdout, doctor.stderr
    result = run(fresh, "train", "config.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "slider.safetensors").is_file()
    assert list((tmp_path / "out" / "validation_images").rglob("contact_sheet.png"))
    bad = run(fresh, "train", "config.json", "--pocket_time_scale", "fast", "--output_dir", "other", cwd=tmp_path)
    assert bad.returncode == 2 and "pocket_time_scale" in bad.stderr

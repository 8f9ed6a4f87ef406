"""The command line: quick without torch, and one clear line with exit code 2 for whatever the user gets wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from slider_plugin import architectures
from slider_plugin.cli import execute

Project = Callable[..., Path]

LIST_KEYS = ["family", "distribution", "version", "target", "status", "error", "kind", "name"]


@pytest.mark.parametrize("arguments", [["--help"], ["plugins", "list"], ["plugins", "list", "--json"], ["train", "--keys"]])
def test_commands_that_only_tell_import_no_torch(arguments: list[str]) -> None:
    script = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'diffusers', 'peft', 'accelerate', 'transformers')))\n"
        f"sys.argv = ['slider', *{arguments!r}]\n"
        "from slider_plugin.cli import main\nmain()"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_plugins_list_json_is_api(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["plugins", "list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [list(row) for row in rows] == [LIST_KEYS] * len(rows)
    families = sorted(path.stem for path in Path(architectures.__file__).parent.glob("[!_]*.py"))
    assert [(r["family"], r["distribution"], r["status"]) for r in rows] == [
        (family, "slider-plugin", "available") for family in families
    ]


def test_keys_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["train", "--keys"]) == 0
    text = capsys.readouterr().out
    for key in ("slider_lora_target", "validation_strengths", "resume_from_checkpoint"):
        assert key in text


def test_doctor_tells_the_plan_and_writes_nothing(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["doctor", str(project("sd1", neutral=True))]) == 0
    text = capsys.readouterr().out
    for part in ("28 modules (slider)", "16 self", "more", "+0.5", "less", "-0.5", "neutral", "3 draws", "MiB"):
        assert part in text, text
    assert not (tmp_path / "out").exists()


def test_validate_draws_the_finished_slider(project: Project, tmp_path: Path) -> None:
    config = project("sd1", max_train_steps=1)
    assert execute(["train", str(config)]) == 0
    library = tmp_path / "user_prompt_library.json"
    library.write_text(json.dumps({"plain": "a circle", "../minus/": {"prompt": "a circle", "adapter_strength": -1.2}}))
    flags = ["--user_prompt_library", str(library), "--validation_num_inference_steps", "2", "--validation_strengths=-1,0,1"]
    assert execute(["validate", str(config), *flags, "--output", str(tmp_path / "drawn")]) == 0
    folder = tmp_path / "drawn" / "step_000000"
    images = json.loads((folder / "prompts.json").read_text())["images"]
    assert {i["scale"] for i in images} == {-1.2, -1.0, 0.0, 1.0}
    assert (folder / "contact_sheet.png").is_file()
    assert all((folder / i["file"]).resolve().parent == folder.resolve() for i in images)


def _without(folder: Path, name: str, to: Path) -> Path:
    """A copy of a model folder without one of its parts."""
    import shutil

    shutil.copytree(folder, to)
    target = to / name
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    return to


def _empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def missing_model(config: dict[str, Any], root: Path) -> str:
    config["pretrained_model_name_or_path"] = str(root / "nowhere")
    return "pretrained_model_name_or_path: .*nowhere does not exist"


def no_pipeline(config: dict[str, Any], root: Path) -> str:
    config["pretrained_model_name_or_path"] = str(
        _without(Path(config["pretrained_model_name_or_path"]), "model_index.json", root / "m")
    )
    return "is not a diffusers pipeline folder: it has no model_index.json"


def wrong_family(config: dict[str, Any], root: Path) -> str:
    config["model_family"] = "z_image"
    return "is not a Z-Image model"


def inpainting_model(config: dict[str, Any], root: Path) -> str:
    folder = _without(Path(config["pretrained_model_name_or_path"]), "vae", root / "m")
    denoiser = folder / "unet" / "config.json"
    denoiser.write_text(json.dumps(json.loads(denoiser.read_text()) | {"in_channels": 9}))
    config["pretrained_model_name_or_path"] = str(folder)
    return "in_channels is 9 instead of 4 or 16"


def unknown_key(config: dict[str, Any], root: Path) -> str:
    config["slider_lora_targets"] = True
    return "slider_lora_targets.*did you mean slider_lora_target"


def wrong_type(config: dict[str, Any], root: Path) -> str:
    config["lora_rank"] = "many"
    return "lora_rank.*many"


def missing_images(config: dict[str, Any], root: Path) -> str:
    (root / "data" / "more").rename(root / "data" / "moved")
    return "bucket 'more'.*does not exist"


def empty_bucket(config: dict[str, Any], root: Path) -> str:
    _empty(root / "data" / "more")
    return "bucket 'more': no images in"


def unreadable_image(config: dict[str, Any], root: Path) -> str:
    (root / "data" / "more" / "0.png").write_text("no image")
    return r"bucket 'more'.*0\.png"


def missing_caption(config: dict[str, Any], root: Path) -> str:
    (root / "data" / "more" / "0.txt").unlink()
    return r"bucket 'more'.*0\.txt"


def strength_of_words(config: dict[str, Any], root: Path) -> str:
    entries = json.loads((root / "buckets.json").read_text())
    entries[0]["slider_strength"] = "strong"
    (root / "buckets.json").write_text(json.dumps(entries))
    return "slider_strength.*strong"


def strength_nan(config: dict[str, Any], root: Path) -> str:
    text = (root / "buckets.json").read_text()
    (root / "buckets.json").write_text(text.replace('"slider_strength": 0.5', '"slider_strength": NaN'))
    return "slider_strength|NaN"


def unknown_family(config: dict[str, Any], root: Path) -> str:
    config["model_family"] = "sd11"
    return "sd11.*sd1.*z_image"


def broken_library(config: dict[str, Any], root: Path) -> str:
    (root / "prompts.json").write_text('{"a": ')
    config["user_prompt_library"] = "prompts.json"
    return r"prompts\.json"


def output_is_a_file(config: dict[str, Any], root: Path) -> str:
    (root / "taken").write_text("mine")
    config["output_dir"] = str(root / "taken")
    return "taken"


def damaged_resume(config: dict[str, Any], root: Path) -> str:
    (root / "checkpoint-000001").mkdir()
    config["resume_from_checkpoint"] = str(root / "checkpoint-000001")
    return "checkpoint-000001 is damaged or no checkpoint"


def resume_of_nothing(config: dict[str, Any], root: Path) -> str:
    config["resume_from_checkpoint"] = "latest"
    Path(config["output_dir"]).mkdir()
    (Path(config["output_dir"]) / "slider.safetensors").write_text("finished")
    return "holds a finished slider and no checkpoint"


def dora(config: dict[str, Any], root: Path) -> str:
    config["use_dora"] = True
    return "use_dora.*mirror"


def no_buckets(config: dict[str, Any], root: Path) -> str:
    del config["data_backend_config"]
    return "data_backend_config"


CASES = [
    missing_model, no_pipeline, wrong_family, inpainting_model, unknown_key, wrong_type, missing_images, empty_bucket,
    unreadable_image, missing_caption, strength_of_words, strength_nan, unknown_family, broken_library, output_is_a_file,
    damaged_resume, resume_of_nothing, dora, no_buckets,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)
def test_bad_input_is_told_and_nothing_is_written(
    case: Callable[[dict[str, Any], Path], str], project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = project("sd1")
    config = json.loads(path.read_text())
    expected = case(config, tmp_path)
    path.write_text(json.dumps(config))
    before = sorted(p for p in tmp_path.rglob("*"))
    assert execute(["train", str(path)]) == 2
    message = " ".join(capsys.readouterr().err.split())
    import re

    assert re.search(expected, message), message
    assert "Traceback" not in message
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_all_problems_come_in_one_message(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = project("sd1", lora_rank=0, slider_lora_targets=True)
    (tmp_path / "prompts.json").write_text("[]")
    config = json.loads(path.read_text()) | {"user_prompt_library": "prompts.json"}
    path.write_text(json.dumps(config))
    assert execute(["train", str(path)]) == 2
    message = capsys.readouterr().err
    for part in ("lora_rank", "slider_lora_targets", "prompts.json"):
        assert part in message


def test_model_and_data_problems_come_together(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = project("sd1", pretrained_model_name_or_path=str(tmp_path / "nowhere"))
    (tmp_path / "data" / "less" / "1.png").write_bytes(b"")
    (tmp_path / "out").write_text("a file")
    assert execute(["train", str(path)]) == 2
    message = " ".join(capsys.readouterr().err.split())
    for part in ("nowhere", "1.png", "out"):
        assert part in message


def test_an_unreadable_image_is_skipped_if_asked(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = project("sd1", max_train_steps=1, skip_unreadable_images=True)
    (tmp_path / "data" / "more" / "0.png").write_text("no image")
    assert execute(["train", str(path)]) == 0
    assert "0.png" in capsys.readouterr().err


def test_warnings_come_before_training(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = project("sd1", max_train_steps=1)
    (tmp_path / "data" / "more" / "0.png").unlink()
    assert execute(["train", str(path)]) == 0
    err = " ".join(capsys.readouterr().err.split())
    assert err.index("one-sided") < err.index("training")


def test_a_run_needs_no_file(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads(project("sd1").read_text()) | {"data_backend_config": str(tmp_path / "buckets.json")}
    flags = [part for key, value in config.items() for part in (f"--{key}", "true" if value is True else str(value))]
    assert execute(["doctor", *flags, "--validation_strengths", "-1,0"]) == 0
    assert "28 modules" in capsys.readouterr().out
    assert execute(["doctor", "--strict", "true", str(tmp_path / "config.json")]) == 2
    assert "the configuration file comes first" in " ".join(capsys.readouterr().err.split())


def test_unknown_options_and_commands_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["plugins", "list", "--nonsense"]) == 2
    assert execute(["trian"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--family", "sdxl"], ["--concept", "age"]])
def test_demo_refuses_what_it_does_not_have(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["demo", *flags, "--output", str(tmp_path / "demo")]) == 2
    assert flags[1] in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_ctrl_c_leaves_a_checkpoint_and_exit_code_130(project: Project, tmp_path: Path) -> None:
    import signal

    config = project("sd1", max_train_steps=100_000)
    process = subprocess.Popen([sys.executable, "-m", "slider_plugin", "train", str(config)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "resume_from_checkpoint latest" in err
    steps = len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    assert (tmp_path / "out" / f"checkpoint-{steps:06d}" / "state.json").is_file()


def test_a_large_image_is_refused_before_it_is_decoded(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = project("sd1")
    Image.new("L", (9000, 9000)).save(tmp_path / "data" / "more" / "bomb.png")
    (tmp_path / "data" / "more" / "bomb.txt").write_text("a bomb\n")
    assert execute(["train", str(path)]) == 2
    assert "bomb.png" in " ".join(capsys.readouterr().err.split())

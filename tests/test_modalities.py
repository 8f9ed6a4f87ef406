"""Whole runs on videos and on sounds, from files to strips."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from slider_plugin import run
from slider_plugin.configfile import read_config
from slider_plugin.errors import ConfigError
from slider_plugin.registry import Plugins

RATE = 16000


def films(folder: Path, light: int) -> Path:
    """Two folders of frames."""
    for number in range(2):
        clip = folder / f"clip{number}"
        clip.mkdir(parents=True)
        for n in range(6):
            Image.new("RGB", (32, 32), (light, 10 * n, 30 * number)).save(clip / f"{n}.png")
        (folder / f"clip{number}.txt").write_text("a red circle\n")
    return folder


def sounds(folder: Path, loudness: float) -> Path:
    folder.mkdir(parents=True)
    for number in range(2):
        time = np.arange(RATE // 2) / RATE
        soundfile.write(folder / f"{number}.wav", loudness * np.sin(2 * np.pi * 220 * (number + 1) * time), RATE)
        (folder / f"{number}.txt").write_text("a small light\n")
        (folder / f"{number}.lyrics").write_text("on the left\n")
    return folder


def configured(tmp_path: Path, model: Path, family: str, more: Path, less: Path, bucket: dict[str, Any], **keys: Any) -> Path:
    entries = [
        {"id": "more", "instance_data_dir": str(more), "slider_strength": 0.5, **bucket},
        {"id": "less", "instance_data_dir": str(less), "slider_strength": -0.5, **bucket},
    ]
    (tmp_path / "buckets.json").write_text(json.dumps(entries))
    config = {
        "model_family": family, "pretrained_model_name_or_path": str(model), "data_backend_config": "buckets.json",
        "output_dir": str(tmp_path / "out"), "slider_lora_target": True, "lora_rank": 2, "resolution": 32,
        "max_train_steps": 2, "mixed_precision": "no", "validation_prompt": "a blue square", "validation_strengths": [-1, 1],
        "validation_num_inference_steps": 2, "validation_negative_prompt": None,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config | keys))
    return tmp_path / "config.json"


def trained(path: Path) -> run.Outcome:
    return run.train(read_config(path, (), Plugins.discover().facts)[0])


def test_a_slider_for_videos(tmp_path: Path, tiny_folders: Callable[[str], Path]) -> None:
    clip = {"dataset_type": "video", "num_frames": 5}
    path = configured(tmp_path, tiny_folders("wan"), "wan", films(tmp_path / "a", 250), films(tmp_path / "b", 20), clip)
    outcome = trained(path)
    assert outcome.finished and outcome.images
    drawn = sorted(p.name for p in outcome.images.glob("*.webp"))
    assert len(drawn) == 3  # -1, 0 and +1
    with Image.open(outcome.images / drawn[0]) as film:
        assert film.n_frames == 5
    assert (outcome.images / "contact_sheet.png").is_file()


@pytest.fixture
def from_image(tmp_path: Path, tiny_image_to_video: Callable[[bool], Path]) -> Callable[..., Path]:
    """The configuration of a run on a model that begins its videos with an image."""
    folders = films(tmp_path / "a", 250), films(tmp_path / "b", 20)
    clip = {"dataset_type": "video", "num_frames": 5}
    return lambda **keys: configured(tmp_path, tiny_image_to_video(True), "wan", *folders, clip, **keys)


def test_a_slider_for_videos_that_begin_with_an_image(tmp_path: Path, from_image: Callable[..., Path]) -> None:
    images = []
    for name, light in (("dark", 10), ("light", 240)):
        Image.new("RGB", (50, 40), (light, light, light)).save(tmp_path / f"{name}.png")
        out = tmp_path / f"out-{name}"
        outcome = trained(from_image(validation_image=f"{name}.png", output_dir=str(out)))
        assert outcome.finished and outcome.images
        drawn = sorted(outcome.images.glob("*.webp"))
        assert len(drawn) == 3
        images.append(drawn[0].read_bytes())
    assert images[0] != images[1], "the image makes no difference"


def test_the_image_that_videos_begin_with_is_checked_before_loading(
    tmp_path: Path, from_image: Callable[..., Path], tiny_folders: Callable[[str], Path]
) -> None:
    with pytest.raises(ConfigError, match="validation_image: WanImageToVideoPipeline begins its videos with an image"):
        trained(from_image())
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"broken\.png"):
        trained(from_image(validation_image="broken.png"))
    Image.new("RGB", (50, 40)).save(tmp_path / "first.png")
    text_to_video = str(tiny_folders("wan"))
    with pytest.raises(ConfigError, match="validation_image: WanPipeline begins with no image; leave the key out"):
        trained(from_image(validation_image="first.png", pretrained_model_name_or_path=text_to_video))
    assert not (tmp_path / "out").exists()


def test_a_slider_for_sounds(tmp_path: Path, tiny_folders: Callable[[str], Path]) -> None:
    piece = {"dataset_type": "audio", "seconds": 0.3}
    model = tiny_folders("ace_step")
    path = configured(
        tmp_path, model, "ace_step", sounds(tmp_path / "a", 0.9), sounds(tmp_path / "b", 0.1), piece, ace_step_seconds=0.3
    )
    outcome = trained(path)
    assert outcome.finished and outcome.images
    assert len(list(outcome.images.glob("*.wav"))) == 3
    assert (outcome.images / "contact_sheet.png").is_file()


def test_data_that_a_family_does_not_make(tmp_path: Path, tiny_folders: Callable[[str], Path]) -> None:
    clip = {"dataset_type": "video", "num_frames": 5}
    path = configured(tmp_path, tiny_folders("sd1"), "sd1", films(tmp_path / "a", 250), films(tmp_path / "b", 20), clip)
    with pytest.raises(ConfigError, match="bucket 'more': dataset_type video, but sd1 makes image"):
        trained(path)

"""Images, videos and sounds that pipelines answer: their still pictures, and the files beside them."""

from __future__ import annotations

import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from slider_plugin.errors import PluginError, UserError
from slider_plugin.validation.render import call_arguments
from slider_plugin.validation.samples import Picture, Sound, Video, samples_of


def grey(value: int) -> Image.Image:
    return Image.new("RGB", (8, 6), (value,) * 3)


def test_an_image_is_its_own_picture(tmp_path: Path) -> None:
    (sample,) = samples_of(SimpleNamespace(images=[grey(7)]), None, 1)
    assert isinstance(sample, Picture) and sample.still() == grey(7)
    assert sample.write_original(tmp_path / "a.png") is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize("as_array", [True, False])
def test_a_video_shows_some_frames_and_is_written_whole(tmp_path: Path, as_array: bool) -> None:
    frames: Any = [grey(20 * n) for n in range(9)]
    if as_array:
        frames = np.stack([np.asarray(frame, dtype=np.float32) / 255 for frame in frames])
    (sample,) = samples_of(SimpleNamespace(frames=[frames]), None, 1)
    assert isinstance(sample, Video)
    still = np.asarray(sample.still())
    assert still.shape == (4 * 6, 8, 3)
    assert [int(row) for row in still[::6, 0, 0]] == [0, 60, 100, 160]  # the first, the last, two between
    path = sample.write_original(tmp_path / "a.png")
    assert path == tmp_path / "a.webp"
    with Image.open(path) as film:
        assert film.n_frames == 9
        film.seek(5)
        assert film.convert("RGB").getpixel((0, 0)) == (100, 100, 100)


def test_a_video_of_one_frame_needs_no_film(tmp_path: Path) -> None:
    assert Video([grey(1)]).write_original(tmp_path / "a.png") is None


def test_a_sound_is_drawn_and_written(tmp_path: Path) -> None:
    ramp = torch.linspace(0, 1, 1000).repeat(2, 1)
    pipeline = SimpleNamespace(sample_rate=8000)
    (sample,) = samples_of(SimpleNamespace(audios=ramp[None]), pipeline, 1)
    assert isinstance(sample, Sound)
    black = (np.asarray(sample.still())[..., 0] == 0).sum(axis=0)
    assert black[0] <= 2 and black[-1] > 90 and black[128] == pytest.approx(48, abs=3)
    path = sample.write_original(tmp_path / "a.png")
    assert path is not None
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 8000, 1000)
        last = np.frombuffer(file.readframes(1000), dtype="<i2")[-2:]
    assert list(last) == [32767, 32767]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (SimpleNamespace(images=[]), "answered 0"),
        (SimpleNamespace(images=["no image"]), "answered 0"),
        (SimpleNamespace(latents=1), "must have images, frames or audios"),
        (SimpleNamespace(audios=torch.zeros(1, 2, 9)), "states a sampling rate"),
    ],
)
def test_wrong_answers(answer: Any, said: str) -> None:
    with pytest.raises(PluginError, match=said):
        samples_of(answer, SimpleNamespace(), 1)


def test_a_pipeline_gets_the_arguments_that_it_names() -> None:
    def sound(prompt: list[str], guidance_scale: float) -> None: ...

    def anything(prompt: list[str], **kwargs: Any) -> None: ...

    wanted = {"height": 8, "guidance_scale": 2.0}
    assert call_arguments(sound, wanted) == {"guidance_scale": 2.0}
    assert call_arguments(anything, wanted) == wanted
    with pytest.raises(UserError, match="takes no negative prompt"):
        call_arguments(sound, {"negative_prompt": ["x"]})

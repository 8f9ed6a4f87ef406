"""Videos and sounds: real files, found, cut to one length and read into tensors."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from slider_plugin.config import BucketConfig, RunConfig
from slider_plugin.data.buckets import open_buckets
from slider_plugin.data.captions import captions_of
from slider_plugin.data.media import KINDS
from slider_plugin.errors import ConfigError

FRAMES, FPS, SIZE = 20, 10, (48, 32)


def film(path: Path, frames: int = FRAMES) -> Path:
    """A video whose frame number n is of grey 10 n."""
    pictures = [Image.new("RGB", SIZE, (10 * n,) * 3) for n in range(frames)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=1000 // FPS)
        return path
    codec, kind = ("libvpx-vp9", "yuv420p") if path.suffix == ".webm" else ("mpeg4", "yuv420p")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(FPS))
        stream.width, stream.height, stream.pix_fmt = *SIZE, kind
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return path


def frames_folder(path: Path, frames: int = FRAMES) -> Path:
    path.mkdir(parents=True)
    for n in range(frames):
        Image.new("RGB", SIZE, (10 * n,) * 3).save(path / f"{n:03}.png")
    return path


def tone(path: Path, seconds: float, rate: int = 8000, channels: int = 1) -> Path:
    """A sound that gets louder from 0 to 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 1, round(seconds * rate), dtype=np.float32)
    soundfile.write(path, np.stack([ramp] * channels, axis=1), rate)
    return path


def bucket(folder: Path, kind: str, **keys: Any) -> BucketConfig:
    defaults = {"resolution": 32, "resolution_type": "pixel", "caption_strategy": "instanceprompt", "instance_prompt": "x"}
    return BucketConfig(id="b", instance_data_dir=folder, dataset_type=kind, slider_strength=1, **{**defaults, **keys})


def opened(config: BucketConfig) -> Any:
    run = RunConfig(model_family="any", buckets=(config,), output_dir=Path("unused"))
    return open_buckets(run, alignment=8)


def greys(tensor: torch.Tensor) -> list[int]:
    """The frame numbers of a loaded clip."""
    return [round(float((frame.mean() + 1) * 127.5) / 10) for frame in tensor.unbind(1)]


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif", "a"])
def test_a_clip_is_the_middle_of_a_video(tmp_path: Path, name: str) -> None:
    path = film(tmp_path / name) if "." in name else frames_folder(tmp_path / name)
    config = bucket(tmp_path, "video", num_frames=5)
    (item,) = opened(config).buckets[0].items
    assert item.path == path
    clip = KINDS["video"].load(path, config, item.placement, 10**6, 0)
    assert clip.shape == (3, 5, 32, 48) and clip.dtype == torch.float32
    assert greys(clip) == [7, 8, 9, 10, 11]


def test_fewer_frames_a_second(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4")
    config = bucket(tmp_path, "video", num_frames=4, fps=5)  # every second one
    (item,) = opened(config).buckets[0].items
    assert greys(KINDS["video"].load(path, config, item.placement, 10**6, 0)) == [6, 8, 10, 12]


def test_short_videos_are_left_out(tmp_path: Path) -> None:
    film(tmp_path / "long.mp4")
    film(tmp_path / "short.mp4", frames=4)
    found = opened(bucket(tmp_path, "video", num_frames=5))
    assert [item.path.name for item in found.buckets[0].items] == ["long.mp4"]
    assert any("1 video shorter than num_frames 5" in line for line in found.warnings)


@pytest.mark.parametrize(
    ("kind", "keys", "said"),
    [
        ("video", {}, "dataset_type video needs num_frames"),
        ("audio", {}, "dataset_type audio needs seconds"),
        ("image", {"num_frames": 5}, "num_frames belongs to dataset_type video"),
        ("video", {"num_frames": 5, "seconds": 1}, "seconds belongs to dataset_type audio"),
        ("video", {"num_frames": 5}, "no videos in"),
        ("audio", {"seconds": 1}, "no sounds in"),
    ],
)
def test_wrong_keys(tmp_path: Path, kind: str, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        opened(bucket(tmp_path, kind, **keys))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video at all")
    with pytest.raises(ConfigError, match=r"a\.mp4: cannot be read as a video"):
        opened(bucket(tmp_path, "video", num_frames=2))
    (tmp_path / "a.wav").write_bytes(b"no sound at all")
    with pytest.raises(ConfigError, match=r"a\.wav: cannot be read as a sound"):
        opened(bucket(tmp_path, "audio", seconds=1))


@pytest.mark.parametrize("rate", [8000, 16000])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_sound_is_cut_and_resampled(tmp_path: Path, rate: int, channels: int) -> None:
    path = tone(tmp_path / "a.wav", 2.0, channels=channels)
    config = bucket(tmp_path, "audio", seconds=1.0)
    (item,) = opened(config).buckets[0].items
    sound = KINDS["audio"].load(path, config, item.placement, 0, rate)
    assert sound.shape == (2, rate) and torch.equal(sound[0], sound[1])
    assert float(sound[0, rate // 2]) == pytest.approx(0.5, abs=0.01)  # the middle of the file is the middle of the cut
    assert float(sound[0, rate // 10]) == pytest.approx(0.3, abs=0.01)


def test_short_sounds_are_left_out(tmp_path: Path) -> None:
    tone(tmp_path / "long.flac", 2.0)
    tone(tmp_path / "short.flac", 0.5)
    found = opened(bucket(tmp_path, "audio", seconds=1.5))
    assert [item.path.name for item in found.buckets[0].items] == ["long.flac"]


def test_lyrics_follow_the_caption(tmp_path: Path) -> None:
    path = tone(tmp_path / "song.wav", 1.0)
    (tmp_path / "song.txt").write_text("folk, guitar\n")
    (tmp_path / "song.lyrics").write_text("[verse]\nla la\n")
    config = bucket(tmp_path, "audio", seconds=1.0, caption_strategy="textfile", instance_prompt=None)
    assert captions_of(path, config) == ("folk, guitar\n[lyrics]\n[verse]\nla la",)


def test_the_caption_of_a_folder_of_frames(tmp_path: Path) -> None:
    path = frames_folder(tmp_path / "clip.1", 2)
    (tmp_path / "clip.1.txt").write_text("a walk\n")
    config = bucket(tmp_path, "video", num_frames=2, caption_strategy="textfile", instance_prompt=None)
    assert captions_of(path, config) == ("a walk",)

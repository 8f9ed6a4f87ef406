"""What a pipeline drew: an image, a video or a sound, each with a still picture of it for strips and sheets."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageDraw

from slider_plugin.errors import PluginError
from slider_plugin.files import replacing

FRAMES_SHOWN = 4  # of a video in its still picture, evenly spread, one under the other
FRAME_MS = 125  # a frame of an animation, in milliseconds
WAVE_SIZE = (256, 96)  # width and height of a sound's still picture, in pixels
AMPLITUDE = 32767  # of a 16-bit sample


class Sample(Protocol):
    """One thing that was drawn."""

    def still(self) -> Image.Image:
        """A picture of it."""
        ...

    def write_original(self, stem: Path) -> Path | None:
        """Write it whole, beside its still picture, as `stem` plus a suffix; None where the picture is all there is."""
        ...


@dataclass(frozen=True, slots=True)
class Picture:
    """An image."""

    image: Image.Image

    def still(self) -> Image.Image:
        return self.image

    def write_original(self, stem: Path) -> Path | None:
        return None


@dataclass(frozen=True, slots=True)
class Video:
    """Frames in order."""

    frames: Sequence[Image.Image]

    def still(self) -> Image.Image:
        """Some frames, the first on top."""
        count = min(FRAMES_SHOWN, len(self.frames))
        shown = [self.frames[round(i * (len(self.frames) - 1) / max(1, count - 1))] for i in range(count)]
        width, height = shown[0].size
        sheet = Image.new("RGB", (width, height * count))
        for number, frame in enumerate(shown):
            sheet.paste(frame, (0, number * height))
        return sheet

    def write_original(self, stem: Path) -> Path | None:
        """An animation that every browser shows, without losses."""
        if len(self.frames) == 1:
            return None
        path = stem.with_suffix(".webp")
        with replacing(path) as temporary:
            first, *rest = self.frames
            first.save(temporary, format="WEBP", save_all=True, append_images=rest, duration=FRAME_MS, loop=0, lossless=True)
        return path


@dataclass(frozen=True, slots=True)
class Sound:
    """Samples `(channels, N)`, float32 in -1..1, at `rate` per second."""

    samples_CN: np.ndarray
    rate: int

    def still(self) -> Image.Image:
        """The outline of the wave: the loudest sample in each column."""
        width, height = WAVE_SIZE
        picture = Image.new("RGB", WAVE_SIZE, "white")
        pen = ImageDraw.Draw(picture)
        loudness_N = np.abs(self.samples_CN).max(axis=0)
        for x, column in enumerate(np.array_split(loudness_N, width)):
            half = min(1.0, float(column.max(initial=0.0))) * (height / 2 - 1)
            pen.line((x, height / 2 - half, x, height / 2 + half), fill="black")
        return picture

    def write_original(self, stem: Path) -> Path | None:
        """A 16-bit WAV file."""
        path = stem.with_suffix(".wav")
        pcm_NC = np.round(np.clip(self.samples_CN.T, -1.0, 1.0) * AMPLITUDE).astype("<i2")
        with replacing(path) as temporary, wave.open(str(temporary), "wb") as file:
            file.setnchannels(pcm_NC.shape[1])
            file.setsampwidth(2)
            file.setframerate(self.rate)
            file.writeframes(pcm_NC.tobytes())
        return path


def samples_of(answer: Any, pipeline: Any, count: int) -> list[Sample]:
    """What a pipeline's result holds: `images`, `frames` or `audios`.

    Raises:
        PluginError: it holds none of these, or not `count` of them.
    """
    if (images := getattr(answer, "images", None)) is not None:
        found: list[Sample] = [Picture(image) for image in images if isinstance(image, Image.Image)]
    elif (videos := getattr(answer, "frames", None)) is not None:
        found = [Video(_pil_frames(frames)) for frames in videos]
    elif (audios := getattr(answer, "audios", None)) is not None:
        found = [Sound(_numpy(audio), sampling_rate(pipeline)) for audio in audios]
    else:
        raise PluginError(
            f"the pipeline of build_pipeline answered a {type(answer).__name__}; it must have images, frames or audios"
        )
    if len(found) != count:
        raise PluginError(
            f"the pipeline of build_pipeline answered {len(found)} images, videos or sounds to {count} prompts; images must be "
            "PIL images"
        )
    return found


def _pil_frames(frames: Any) -> list[Image.Image]:
    """Frames as PIL images; arrays `(F, H, W, 3)` are in 0..1."""
    if all(isinstance(frame, Image.Image) for frame in frames):
        return list(frames)
    return [Image.fromarray(np.round(np.clip(frame, 0.0, 1.0) * 255).astype(np.uint8)) for frame in _numpy(frames)]


def _numpy(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().float().cpu().numpy()
    array: np.ndarray = np.asarray(values, dtype=np.float32)
    return array


def sampling_rate(pipeline: Any) -> int:
    """Samples per second, as the pipeline or its autoencoder states it. Raises PluginError if neither does."""
    config = getattr(getattr(pipeline, "vae", None), "config", None)
    for holder, name in ((pipeline, "sample_rate"), (config, "sampling_rate"), (config, "sample_rate")):
        rate = getattr(holder, name, None)
        if isinstance(rate, int | float):
            return int(rate)
    raise PluginError("the pipeline is one of sound, but neither it nor its vae states a sampling rate")

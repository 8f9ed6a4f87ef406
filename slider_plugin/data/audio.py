"""Sounds: wav and flac files, cut to one length and brought to the model's sampling rate."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from slider_plugin.data.images import ImageError
from slider_plugin.errors import UserError

SUFFIXES = frozenset({".wav", ".flac"})
CHANNELS = 2  # what the autoencoders take; one channel is heard on both sides
WAY_OUT = "remove it, or set skip_unreadable_images"


def find_sounds(folder: Path) -> list[Path]:
    """All sounds below `folder`, by relative name. Hidden files and folders are passed over."""
    found: list[Path] = []
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(where, n) for n in files if not n.startswith(".") and Path(n).suffix.lower() in SUFFIXES]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def seconds_of(path: Path) -> float:
    """Length in seconds, from the header. Raises ImageError for a file that cannot be read."""
    soundfile = _soundfile()
    try:
        info = soundfile.info(str(path))
    except (soundfile.SoundFileError, OSError) as error:
        raise _unreadable(path, error) from error
    return float(info.frames) / float(info.samplerate)


def load_sound(path: Path, seconds: float, rate: int) -> np.ndarray:
    """The middle of a sound: float32 `(2, round(seconds * rate))` in -1..1.

    Raises:
        ImageError: it cannot be read, or is shorter than that.
    """
    soundfile = _soundfile()
    try:
        with soundfile.SoundFile(str(path)) as file:
            own_rate, frames = file.samplerate, file.frames
            wanted = round(seconds * own_rate)
            if frames < wanted:
                raise ImageError(f"{path}: {frames / own_rate:.2f} seconds, and {seconds:g} are asked for; {WAY_OUT}")
            file.seek((frames - wanted) // 2)
            samples_NC = file.read(wanted, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise _unreadable(path, error) from error
    stereo_NC = samples_NC.repeat(CHANNELS, axis=1) if samples_NC.shape[1] == 1 else samples_NC[:, :CHANNELS]
    return np.ascontiguousarray(_resampled(stereo_NC, own_rate, rate, round(seconds * rate)).T)


def _resampled(samples_NC: np.ndarray, own_rate: int, rate: int, length: int) -> np.ndarray:
    if own_rate == rate:
        return samples_NC[:length]
    import soxr

    resampled: np.ndarray = soxr.resample(samples_NC, own_rate, rate)[:length]
    return np.pad(resampled, ((0, length - len(resampled)), (0, 0)))  # rounding may leave a sample short


def _unreadable(path: Path, error: Exception) -> ImageError:
    return ImageError(f"{path}: cannot be read as a sound ({error}); {WAY_OUT}")


def _soundfile() -> Any:
    try:
        import soundfile
        import soxr  # noqa: F401  needed as soon as rates differ: better to say so before the run
    except ImportError as error:
        raise UserError("dataset_type audio needs soundfile and soxr: pip install 'slider-plugin[audio]'") from error
    return soundfile

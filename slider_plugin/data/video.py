"""Videos: files that PyAV reads, or folders of frames. A training clip is `num_frames` frames from the middle."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from slider_plugin.data.images import ImageError, check_image, find_images, load_image
from slider_plugin.errors import UserError

SUFFIXES = frozenset({".mp4", ".webm", ".gif", ".mov", ".mkv"})
WAY_OUT = "remove it, or set skip_unreadable_images"


@dataclass(frozen=True, slots=True)
class Clip:
    """Which frames of a video are trained."""

    num_frames: int
    fps: float | None
    """Frames per second that are taken; None takes every frame."""


@dataclass(frozen=True, slots=True)
class Video:
    """What is known of a video before its frames are decoded."""

    width: int
    height: int
    frames: int
    fps: float | None
    """Frames per second; None for a folder of frames."""


def find_videos(folder: Path) -> list[Path]:
    """Video files below `folder`, and the folders that hold frames and no video, by relative name."""
    found = {path.parent for path in find_images(folder) if path.parent != folder}
    files = [path for path in sorted(folder.rglob("*")) if _is_video(path, folder)]
    frames = [path for path in found if not any(file.is_relative_to(path) for file in files)]
    return sorted([*files, *frames], key=lambda path: path.relative_to(folder).as_posix())


def _is_video(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return path.suffix.lower() in SUFFIXES and path.is_file() and not hidden


def check_video(path: Path, max_pixels: int) -> Video:
    """Size and length of a video. A file is decoded once, because containers lie about their length.

    Raises:
        ImageError: it cannot be read, holds no frame, or a frame has more than `max_pixels`.
    """
    if path.is_dir():
        return _check_frames(find_images(path), max_pixels)
    with _opened(path) as container:
        stream = container.streams.video[0]
        if stream.width * stream.height > max_pixels:
            raise ImageError(
                f"{path}: its {stream.width}x{stream.height} pixels are more than max_image_pixels {max_pixels}; {WAY_OUT}"
            )
        count = sum(1 for _ in container.decode(stream))
        if not count:
            raise ImageError(f"{path}: it holds no frame; {WAY_OUT}")
        return Video(stream.width, stream.height, count, float(stream.average_rate or 0) or None)


def _check_frames(images: Sequence[Path], max_pixels: int) -> Video:
    sizes = {check_image(image, max_pixels) for image in images}
    if len(sizes) > 1:
        raise ImageError(f"{images[0].parent}: its frames differ in size ({sorted(sizes)[0]}, {sorted(sizes)[1]}); {WAY_OUT}")
    width, height = sizes.pop()
    return Video(width, height, len(images), None)


def frames_needed(video: Video, clip: Clip) -> int:
    """How many frames of the file a clip spans."""
    return math.floor((clip.num_frames - 1) * _stride(video, clip)) + 1


def _stride(video: Video, clip: Clip) -> float:
    return 1.0 if clip.fps is None or video.fps is None else video.fps / clip.fps


def load_clip(path: Path, clip: Clip, max_pixels: int) -> list[Image.Image]:
    """The frames of the clip, RGB; from the middle of the video, so that nothing depends on when it was cut.

    Raises:
        ImageError: it cannot be read, or is shorter than the clip.
    """
    video = check_video(path, max_pixels)
    needed, stride = frames_needed(video, clip), _stride(video, clip)
    if video.frames < needed:
        raise ImageError(f"{path}: {video.frames} frames, and the clip spans {needed}; {WAY_OUT}")
    first = (video.frames - needed) // 2
    wanted = [first + math.floor(i * stride) for i in range(clip.num_frames)]
    if path.is_dir():
        images = find_images(path)
        return [load_image(images[number], max_pixels) for number in wanted]
    decoded = dict(_decoded(path, set(wanted)))
    return [decoded[number] for number in wanted]


def _decoded(path: Path, wanted: set[int]) -> Iterator[tuple[int, Image.Image]]:
    with _opened(path) as container:
        for number, frame in enumerate(container.decode(container.streams.video[0])):
            if number in wanted:
                yield number, frame.to_image().convert("RGB")
            if number >= max(wanted):
                return


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A container of PyAV, whose many errors come out as one line about the file."""
    av = _pyav()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ImageError(f"{path}: it holds no video; {WAY_OUT}")
            yield container
    except (av.FFmpegError, OSError) as error:
        raise ImageError(f"{path}: cannot be read as a video ({error}); {WAY_OUT}") from error


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError("dataset_type video needs PyAV: pip install 'slider-plugin[video]'") from error
    return av

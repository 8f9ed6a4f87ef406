"""Where the caption of an image comes from: its file name, a text file beside it, or one prompt for all.

An image may have several captions (variants); one is chosen each time it is shown. A sound may have lyrics in a file beside it
(`song.lyrics` for `song.wav`), which follow the caption after a line `[lyrics]`.
"""

from __future__ import annotations

from pathlib import Path

from slider_plugin.config import BucketConfig
from slider_plugin.errors import UserError

LYRICS = "[lyrics]"
"""The line between a caption and what is sung."""


class CaptionError(UserError):
    """An image has no usable caption. The message is one line: the file, what is wrong, the way out."""


def caption_problems(bucket: BucketConfig) -> list[str]:
    """What is wrong with a bucket's caption keys, whatever its images are."""
    if (bucket.instance_prompt or "").strip():
        return []
    asking = [key for key in ("only_instance_prompt", "prepend_instance_prompt") if getattr(bucket, key)]
    if bucket.caption_strategy == "instanceprompt":
        asking.append("caption_strategy instanceprompt")
    return [f"{key} needs an instance_prompt: add one" for key in asking]


def captions_of(path: Path, bucket: BucketConfig) -> tuple[str, ...]:
    """The captions of a file, with its lyrics where it is a sound that has them."""
    captions = _captions(path, bucket)
    return _sung(path, captions) if bucket.dataset_type == "audio" else captions


def _captions(path: Path, bucket: BucketConfig) -> tuple[str, ...]:
    """The caption variants of the image at `path`, at least one, none of them empty.

    Raises:
        CaptionError: the text file is missing, empty or not UTF-8, or the file name says nothing.
    """
    prompt = (bucket.instance_prompt or "").strip()
    if bucket.only_instance_prompt or bucket.caption_strategy == "instanceprompt":
        return (prompt,)
    captions = _from_name(path) if bucket.caption_strategy == "filename" else _from_text(path, bucket.disable_multiline_split)
    return tuple(f"{prompt} {caption}" for caption in captions) if bucket.prepend_instance_prompt else captions


def with_lyrics(caption: str, lyrics: str) -> str:
    """A caption and what is sung, as one text; families of music part it again at the line `[lyrics]`."""
    return f"{caption}\n{LYRICS}\n{lyrics.strip()}" if lyrics.strip() else caption


def _sung(path: Path, captions: tuple[str, ...]) -> tuple[str, ...]:
    """The captions with the lyrics beside the file, if there are any."""
    beside = _beside(path, ".lyrics")
    if not beside.is_file():
        return captions
    lyrics = _read(beside, path)
    return tuple(with_lyrics(caption, lyrics) for caption in captions)


def _beside(path: Path, suffix: str) -> Path:
    """The file with another suffix; beside a folder of frames its whole name counts."""
    return path.with_name(path.name + suffix) if path.is_dir() else path.with_suffix(suffix)


def _from_name(path: Path) -> tuple[str, ...]:
    caption = " ".join(path.stem.replace("_", " ").split())
    if not caption:
        raise CaptionError(f"{path}: the file name holds no caption; rename it, or set caption_strategy to textfile")
    return (caption,)


def _from_text(path: Path, whole: bool) -> tuple[str, ...]:
    beside = _beside(path, ".txt")
    text = _read(beside, path)
    captions = tuple(part.strip() for part in ([text] if whole else text.splitlines()) if part.strip())
    if not captions:
        raise CaptionError(f"{beside}: the caption of {path.name} is empty; write one, or remove the image")
    return captions


def _read(beside: Path, path: Path) -> str:
    try:
        return beside.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        fix = f"write {beside.name}, or set caption_strategy to filename or instanceprompt"
        raise CaptionError(f"{path}: no caption file beside it; {fix}") from error
    except UnicodeDecodeError as error:
        raise CaptionError(f"{beside}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise CaptionError(f"{beside}: cannot be read ({error.strerror}); check the file") from error

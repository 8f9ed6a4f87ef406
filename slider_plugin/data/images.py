"""Finding, checking and reading image files: always upright, always 8 bit RGB, never by surprise.

What goes wrong silently elsewhere and is handled here: EXIF rotation, transparency (a transparent red pixel is not red),
16 bit greys (a plain conversion saturates them to white), damaged files, and files that decode to gigabytes.
"""

from __future__ import annotations

import os
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from slider_plugin.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp"})
WAY_OUT = "remove it, or set skip_unreadable_images"
WHITE = (255, 255, 255)

# What Pillow's decoders are seen to raise on broken files. MemoryError is left out: it is not the file's fault.
_DECODER_ERRORS = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, RuntimeError, ArithmeticError, AssertionError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = frozenset({5, 6, 7, 8})

_opening = threading.Lock()


class ImageError(UserError):
    """An image file cannot be used. The message is one line: the file, what is wrong, the way out."""


def find_images(folder: Path) -> list[Path]:
    """All images below `folder`, by relative name. Hidden files and folders, and linked folders, are passed over."""
    found: list[Path] = []
    for where, folders, files in os.walk(folder, onerror=_refuse_folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(where, name) for name in files if _is_image_name(name)]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def load_image(path: Path, max_pixels: int, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """Read an image: upright, RGB, transparency laid over `background`, the first frame of an animation.

    Raises:
        ImageError: the file is missing, damaged, of another format, or has more than `max_pixels` (refused before decoding).
    """
    with _opened(path, max_pixels) as image:
        orientation = _orientation(image, path)
        image.load()
        rgb = _flattened(_eight_bit(image), background)
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of the upright image, from the file's header alone."""
    with _opened(path) as image:
        return _upright_size(image, path)


def check_image(path: Path, max_pixels: int) -> tuple[int, int]:
    """`image_size`, after a check that the file is whole. Costs reading the file, hardly any decoding.

    Raises:
        ImageError: as `load_image`, apart from damage that only decoding can show.
    """
    with _opened(path, max_pixels) as image:
        size = _upright_size(image, path)
        _WHOLE[image.format or ""](image, path)
        return size


# --- Opening ----------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path, max_pixels: int | None = None) -> Iterator[Image.Image]:
    try:
        with _header(path) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise _too_large(path, f"{image.width}x{image.height}", max_pixels)
            yield image
    except _DECODER_ERRORS as error:
        raise ImageError(f"{path}: {_what_is_wrong(path, error)}; {WAY_OUT}") from error


def _header(path: Path) -> Image.Image:
    # Pillow warns of sizes that we check ourselves. Warning filters are global, so threads take turns to change them.
    with _opening, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path, formats=FORMATS)


def _too_large(path: Path, size: str, max_pixels: int) -> ImageError:
    return ImageError(f"{path}: its {size} pixels are more than max_image_pixels {max_pixels}; make it smaller, {WAY_OUT}")


def _what_is_wrong(path: Path, error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "the file is empty" if path.stat().st_size == 0 else "not a png, jpg, webp, avif or bmp image, or damaged"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be opened ({error.strerror})"
    if isinstance(error, Image.DecompressionBombError):
        return "more pixels than Pillow opens"
    return f"the file is damaged ({' '.join(str(error).split()) or type(error).__name__})"


def _is_image_name(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES


def _refuse_folder(error: OSError) -> None:
    # os.walk passes over folders that it cannot read unless it is told otherwise.
    raise ImageError(f"{error.filename}: the folder cannot be read ({error.strerror}); check its permissions") from error


# --- Orientation ------------------------------------------------------------------------------------------------------


def _upright_size(image: Image.Image, path: Path) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if _orientation(image, path) in _SIDEWAYS else (width, height)


def _orientation(image: Image.Image, path: Path) -> int:
    """The EXIF orientation, 1 to 8. Asked before decoding, so that `load_image` and `image_size` cannot disagree."""
    # PngImageFile.getexif would decode the image to find data behind the pixels; the base class reads the header.
    exif = Image.Image.getexif(image)
    if image.format == "PNG" and ExifTags.Base.Orientation not in exif and (late := _late_exif(path)):
        exif.load(late)
    return int(exif.get(ExifTags.Base.Orientation, 1))


def _late_exif(path: Path) -> bytes | None:
    """EXIF data of a PNG, also where a tool has added it behind the pixels."""
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                return file.read(length)
            file.seek(length + 4, os.SEEK_CUR)
    return None


# --- Pixels -----------------------------------------------------------------------------------------------------------


def _eight_bit(image: Image.Image) -> Image.Image:
    """16 bit greys divided by 257 (65535 is white); any other mode as it is."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    grey = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if (key := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def _flattened(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    under = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(under, image.convert("RGBA")).convert("RGB")


# --- Is the file whole? -----------------------------------------------------------------------------------------------


def _png_is_whole(image: Image.Image, path: Path) -> None:
    image.verify()  # checksums of every chunk, up to the last


def _jpeg_is_whole(image: Image.Image, path: Path) -> None:
    with path.open("rb") as file:
        file.seek(-2, os.SEEK_END)
        if file.read() == b"\xff\xd9":
            return
    # No end marker at the end: cut off, or a camera has added data. Decoding at an eighth of the size tells.
    image.draft(None, (1, 1))
    image.load()


def _webp_is_whole(image: Image.Image, path: Path) -> None:
    """Opening has found out: the WebP reader takes whole files only."""


def _avif_is_whole(image: Image.Image, path: Path) -> None:
    """Opening overlooks a short last box, so walk them: size (1: the real one follows; 0: the rest), kind, content."""
    end, size = 0, path.stat().st_size
    with path.open("rb") as file:
        while end < size:
            file.seek(end)
            length, _, long = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
            end += {0: size - end, 1: max(long, 16)}.get(length, max(length, 8))
    if end > size:
        raise ValueError(f"{size} of {end} bytes are there")


def _bmp_is_whole(image: Image.Image, path: Path) -> None:
    image.load()  # uncompressed: as cheap as any check


_WHOLE: dict[str, Callable[[Image.Image, Path], None]] = {
    "PNG": _png_is_whole,
    "JPEG": _jpeg_is_whole,
    "MPO": _jpeg_is_whole,  # several JPEG pictures in one file
    "WEBP": _webp_is_whole,
    "AVIF": _avif_is_whole,
    "BMP": _bmp_is_whole,
}

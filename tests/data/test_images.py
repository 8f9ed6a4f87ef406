"""Image files are read upright, in 8 bit RGB, and refused in one clear line when they cannot be used."""

from __future__ import annotations

import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from slider_plugin.data.images import ImageError, check_image, find_images, image_size, load_image
from slider_plugin.errors import UserError

LIMIT = 1_000_000
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def noise(width: int = 40, height: int = 20) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def quarters() -> Image.Image:
    """A 40x20 image: red, green above blue, white."""
    image = Image.new("RGB", (40, 20), WHITE)
    for colour, corner in ((RED, (0, 0)), (GREEN, (20, 0)), (BLUE, (0, 10))):
        image.paste(colour, (*corner, corner[0] + 20, corner[1] + 10))
    return image


def corners(image: Image.Image) -> list[object]:
    right, bottom = image.width - 1, image.height - 1
    return [image.getpixel(at) for at in ((0, 0), (right, 0), (0, bottom), (right, bottom))]


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[ExifTags.Base.Orientation] = orientation
    return data


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, colour_type: int, depth: int, rows: bytes, extra: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.jpeg", "a.webp", "a.avif", "a.bmp"])
def test_formats_are_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    Image.new("RGB", (40, 20), (200, 100, 50)).save(path)
    image = load_image(path, LIMIT)
    assert (image.mode, image.size, image_size(path), check_image(path, LIMIT)) == ("RGB", (40, 20), (40, 20), (40, 20))
    assert np.abs(np.asarray(image).astype(int) - (200, 100, 50)).max() <= 4


def test_the_content_decides_the_format(tmp_path: Path) -> None:
    quarters().save(tmp_path / "really.png")
    (tmp_path / "really.png").rename(tmp_path / "named.jpg")
    assert corners(load_image(tmp_path / "named.jpg", LIMIT)) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "PPM"])
def test_other_formats_are_refused_whatever_their_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    quarters().save(path, format=kind)
    with pytest.raises(ImageError, match="not a png, jpg, webp, avif or bmp image"):
        load_image(path, LIMIT)


UPRIGHT = {
    1: [RED, GREEN, BLUE, WHITE],
    2: [GREEN, RED, WHITE, BLUE],
    3: [WHITE, BLUE, GREEN, RED],
    4: [BLUE, WHITE, RED, GREEN],
    5: [RED, BLUE, GREEN, WHITE],
    6: [BLUE, RED, WHITE, GREEN],
    7: [WHITE, GREEN, BLUE, RED],
    8: [GREEN, WHITE, RED, BLUE],
    9: [RED, GREEN, BLUE, WHITE],  # no such orientation
}


@pytest.mark.parametrize(("orientation", "expected"), UPRIGHT.items())
def test_exif_rotation(tmp_path: Path, orientation: int, expected: list[object]) -> None:
    path = tmp_path / "a.png"
    quarters().save(path, exif=exif(orientation))
    image = load_image(path, LIMIT)
    assert corners(image) == expected
    assert image.size == image_size(path) == check_image(path, LIMIT) == ((20, 40) if 5 <= orientation <= 8 else (40, 20))


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".avif"])
def test_exif_rotation_of_other_formats(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    noise().save(path, exif=exif(6).tobytes())
    assert load_image(path, LIMIT).size == image_size(path) == (20, 40)


def test_exif_behind_the_pixels_of_a_png(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    quarters().save(path)
    data = path.read_bytes()
    path.write_bytes(data[:-12] + chunk(b"eXIf", exif(8).tobytes()[6:]) + data[-12:])
    assert image_size(path) == (20, 40)
    assert corners(load_image(path, LIMIT)) == UPRIGHT[8]


def test_the_size_is_read_without_the_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise(400, 300).save(path)
    path.write_bytes(path.read_bytes()[:200])
    assert image_size(path) == (400, 300)


def transparent(mode: str) -> Image.Image:
    image = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (2, 0, 4, 2))
    return image.convert(mode)


def test_alpha_is_laid_over_the_background(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    transparent("RGBA").save(path)
    assert corners(load_image(path, LIMIT)) == [WHITE, BLUE, WHITE, BLUE]
    assert corners(load_image(path, LIMIT, background=GREEN)) == [GREEN, BLUE, GREEN, BLUE]


def test_half_transparent_is_mixed(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 0, 0, 128)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", LIMIT, BLACK).getpixel((0, 0)) == (128, 0, 0)


def test_grey_with_alpha(tmp_path: Path) -> None:
    transparent("LA").save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", LIMIT, GREEN)
    assert image.getpixel((0, 0)) == GREEN
    assert image.getpixel((3, 0)) == (29, 29, 29)


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    assert corners(load_image(tmp_path / "a.png", LIMIT, GREEN))[:2] == [GREEN, BLUE]


def test_a_colour_that_means_transparent(tmp_path: Path) -> None:
    quarters().save(tmp_path / "a.png", transparency=RED)
    assert corners(load_image(tmp_path / "a.png", LIMIT, BLACK)) == [BLACK, GREEN, BLUE, WHITE]


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (256, 1), (32896, 128), (65535, 255)])
def test_16_bit_grey_is_scaled(tmp_path: Path, value: int, expected: int) -> None:
    Image.fromarray(np.full((2, 3), value, np.uint16)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", LIMIT).getpixel((0, 0)) == (expected,) * 3


def test_16_bit_grey_with_a_transparent_value(tmp_path: Path) -> None:
    rows = b"\0" + struct.pack(">HH", 1000, 65535)
    (tmp_path / "a.png").write_bytes(png(2, 1, 0, 16, rows, chunk(b"tRNS", struct.pack(">H", 1000))))
    assert corners(load_image(tmp_path / "a.png", LIMIT, BLUE))[:2] == [BLUE, WHITE]


def test_16_bit_colour(tmp_path: Path) -> None:
    rows = b"\0" + struct.pack(">HHH", 65535, 32896, 0)
    (tmp_path / "a.png").write_bytes(png(1, 1, 2, 16, rows))
    assert load_image(tmp_path / "a.png", LIMIT).getpixel((0, 0)) == (255, 128, 0)


def test_one_bit_and_grey(tmp_path: Path) -> None:
    for mode, value, expected in (("1", 1, WHITE), ("L", 77, (77, 77, 77))):
        Image.new(mode, (2, 2), value).save(tmp_path / "a.png")
        assert load_image(tmp_path / "a.png", LIMIT).getpixel((0, 0)) == expected


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = load_image(tmp_path / "a.jpg", LIMIT).getpixel((4, 4))  # type: ignore[misc]
    assert red < 5 and green > 250 and blue > 250


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_the_first_frame_of_an_animation(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    assert check_image(path, LIMIT) == (8, 8)
    assert load_image(path, LIMIT).getpixel((4, 4)) == RED


# --- Files that cannot be used ----------------------------------------------------------------------------------------


def message(path: Path, limit: int = LIMIT) -> str:
    """What both `load_image` and `check_image` say; the same file, one line, with the way out."""
    with pytest.raises(ImageError) as loading:
        load_image(path, limit)
    with pytest.raises(ImageError) as checking:
        check_image(path, limit)
    for caught in (loading, checking):
        assert isinstance(caught.value, UserError)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
        assert str(caught.value).endswith("remove it, or set skip_unreadable_images")
    return str(checking.value)


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    assert "the file is empty" in message(tmp_path / "a.png")


def test_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("<html>404</html>")
    assert "not a png, jpg, webp, avif or bmp image" in message(tmp_path / "a.jpg")


def test_a_missing_file(tmp_path: Path) -> None:
    assert "cannot be opened (No such file" in message(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".avif", ".bmp"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_a_truncated_file(tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"a{suffix}"
    noise(100, 80).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    assert "damaged" in message(path)


@pytest.mark.parametrize("suffix", [".webp", ".avif", ".bmp"])  # of a PNG it is a checksum of nothing
def test_a_file_without_its_last_byte(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    noise(100, 80).save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ImageError, match="damaged"):
        check_image(path, LIMIT)


def test_a_flipped_bit_in_a_png(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise().save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ImageError, match="damaged"):
        check_image(path, LIMIT)


def test_a_jpeg_with_data_behind_its_end_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    noise().save(path)
    path.write_bytes(path.read_bytes() + b"SEFT" * 10)
    assert check_image(path, LIMIT) == load_image(path, LIMIT).size == (40, 20)


def test_too_many_pixels_are_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(1001, 1000, 0, 8, b""))  # decoding would fail in another way
    assert "1001x1000 pixels are more than max_image_pixels 1000000" in message(path)
    quarters().save(path)
    assert load_image(path, 800).size == (40, 20)
    assert "max_image_pixels 799" in message(path, 799)


def test_a_decompression_bomb_is_refused_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path.write_bytes(png(10_000, 10_000, 0, 8, b""))
        assert "max_image_pixels" in message(path)
        path.write_bytes(png(60_000, 60_000, 0, 8, b""))
        assert "more pixels than Pillow opens" in message(path, 2**40)


def test_threads_leave_the_warning_filters_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise().save(path)
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [load_image(path, LIMIT) for _ in range(30)]) for _ in range(4)]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            step(thread)
    assert list(warnings.filters) == before


# --- Finding ----------------------------------------------------------------------------------------------------------


def test_images_are_found_in_a_stable_order(tmp_path: Path) -> None:
    names = ["b.png", "a.JPG", "z/1.webp", "c/y/2.AVIF", "c/x.bmp", "d.jpeg"]
    for name in [*names, "a.txt", "e.tif", ".hidden.png", ".cache/f.png", "._a.jpg"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)] == sorted(names)


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="missing: the folder cannot be read"):
        find_images(tmp_path / "missing")

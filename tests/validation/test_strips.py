"""Strips and contact sheets: sizes, labels, and any text at all."""

import pytest
from PIL import Image, ImageChops

from slider_plugin.validation import strips
from slider_plugin.validation.strips import contact_sheet, fit, format_strength, pair, strip


def plain(width: int, height: int, colour: tuple[int, int, int] = (200, 30, 30)) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def area(image: Image.Image, colour: tuple[int, int, int] = (200, 30, 30)) -> int:
    """Pixels of exactly this colour."""
    return sum(count for count, value in image.getcolors(1 << 24) or [] if value == colour)


def ink(image: Image.Image) -> tuple[int, int, int, int] | None:
    """Bounding box of everything that is not white."""
    return ImageChops.difference(image, Image.new("RGB", image.size, "white")).getbbox()


@pytest.mark.parametrize(
    ("value", "text"),
    [(-2, "-2"), (-0.5, "-0.5"), (0, "0"), (-0.0, "0"), (0.5, "+0.5"), (1.0, "+1"), (1.25, "+1.25"), (10, "+10")],
)
def test_strengths_read_as_people_write_them(value: float, text: str) -> None:
    assert format_strength(value) == text


def test_different_strengths_never_print_alike() -> None:
    values = [1.0, 1.00000001, 0.1 + 0.2, 0.3, -1e-9, 1e-9, 123456789.0, 123456788.0, 1e30]
    assert [float(format_strength(value)) for value in values] == values
    assert all(format_strength(value).startswith(("+", "-")) for value in values)


@pytest.mark.parametrize(
    ("size", "edge"), [((32, 32), 128), ((100, 100), 200), ((127, 64), 128), ((128, 128), 128), ((300, 200), 200)]
)
def test_small_images_grow_in_whole_steps(size: tuple[int, int], edge: int) -> None:
    factor = edge // min(size)
    made = strip([plain(*size)] * 3, ["-1", "0", "+1"])
    assert area(made) == 3 * size[0] * size[1] * factor**2


def test_pixels_stay_squares() -> None:
    board = Image.new("RGB", (2, 2))
    board.putdata([(255, 0, 0), (0, 0, 255), (0, 0, 255), (255, 0, 0)])
    made = strip([board], ["0"])
    assert area(made, (255, 0, 0)) == area(made, (0, 0, 255)) == 128 * 128 // 2


def test_a_sliver_does_not_explode() -> None:
    made = strip([plain(1, 1500)], ["0"])
    assert made.width * made.height < 4_000_000


def test_margins_are_balanced_and_images_stand_in_order() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    made = strip([plain(128, 128, colour) for colour in colours], ["-1", "0", "+1"])
    box = ink(made)
    assert box is not None
    left, top, right, bottom = box[0], box[1], made.width - box[2], made.height - box[3]
    assert left == right == top and abs(bottom - top) <= 8
    found = [made.getpixel((x, made.height // 3)) for x in range(made.width)]
    assert list(dict.fromkeys(value for value in found if value in colours)) == colours


def test_a_label_stands_under_every_image() -> None:
    made = strip([plain(128, 128)] * 2, ["-0.5", "+0.5"], framed=False)
    for left in (0, made.width - 128):
        assert ink(made.crop((left, 128, left + 128, made.height))) is not None


def test_a_title_adds_height_and_unframed_drops_the_margins() -> None:
    images, labels = [plain(128, 128)] * 2, ["0", "+1"]
    base, titled, bare = strip(images, labels), strip(images, labels, "a cat"), strip(images, labels, framed=False)
    assert titled.height > base.height and titled.width == base.width
    assert bare.width < base.width and bare.height < base.height


def test_modes_and_sizes_may_differ() -> None:
    images = [Image.new(mode, (64 + 8 * i, 128)) for i, mode in enumerate(("L", "RGBA", "P", "CMYK", "1", "LA", "I;16"))]
    assert strip(images, [str(i) for i in range(7)]).mode == "RGB"


def test_transparent_is_white() -> None:
    made = strip([Image.new("RGBA", (128, 128), (0, 0, 0, 0))], [""])
    assert ink(made) is None


def test_a_label_that_is_too_long_shrinks() -> None:
    made = strip([plain(128, 128)] * 2, ["-0.30000000000000004", "+0.30000000000000004"], framed=False)
    middle = made.crop((128, 128, made.width - 128, made.height))
    assert middle.width > 0 and ink(middle) is None


@pytest.mark.parametrize("labels", [[], ["0"], ["0", "1", "2"]])
def test_labels_must_match(labels: list[str]) -> None:
    with pytest.raises(ValueError, match="labels"):
        strip([plain(8, 8)] * 2, labels)
    with pytest.raises(ValueError, match="0 images"):
        strip([], [])


def test_a_pair_is_two_images() -> None:
    made = pair(plain(128, 128, (0, 0, 255)), plain(128, 128), ("0", "+1"))
    assert area(made) == area(made, (0, 0, 255)) == 128 * 128


TITLES = [
    "a red cat", "", " ", "日本語のプロンプト" * 40, "😀👩‍👩‍👧", "שלום עולם", "مرحبا بالعالم", "\ud800", "\x00\x07",
    "a\nb\r\n\tc\u2028d", "w" * 5000, "long words " * 500, "\u202ereversed", "e\u0301" * 50, "\U0010ffff",
]  # fmt: skip


@pytest.mark.parametrize("title", TITLES)
def test_any_text_can_be_a_title_and_a_row(title: str) -> None:
    row = strip([plain(32, 32)] * 3, ["-1", "0", "+1"], title)
    sheet = contact_sheet([(title, row), (title, row)])
    assert row.height < 400 and sheet.height < 900


def test_any_text_without_installed_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "_FALLBACK_FONTS", ("no such font.ttf",))
    for title in TITLES:
        strip([plain(32, 32)], ["0"], title)


def test_long_titles_wrap_and_end_in_dots() -> None:
    font = strips._font_for("a", 20)
    lines = strips._wrapped("one two three " * 60, font, 300)
    assert len(lines) == 3 and lines[-1].endswith("...") and all(font.getlength(line) <= 300 for line in lines)
    assert strips._wrapped("one two", font, 300) == ["one two"]
    assert len(strips._wrapped("x" * 60, font, 300)) > 1


def test_the_contact_sheet_stays_within_its_width() -> None:
    wide = strip([plain(1024, 1024)] * 3, ["-1", "0", "+1"], framed=False)
    assert fit(wide).width == strips.SHEET_WIDTH and fit(plain(10, 10)).size == (10, 10)
    sheet = contact_sheet([("a", wide), ("b", strip([plain(32, 32)], ["0"]))])
    assert strips.SHEET_WIDTH < sheet.width < strips.SHEET_WIDTH + 100


def test_a_long_contact_sheet_says_what_it_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "SHEET_ROWS", 2)
    row = plain(400, 50)
    assert contact_sheet([("a", row)] * 2).height < contact_sheet([("a", row)] * 50).height < 400
    with pytest.raises(ValueError, match="needs a row"):
        contact_sheet([])

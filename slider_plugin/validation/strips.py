"""Pictures of pictures: strips at rising strengths, pairs with the base, and the contact sheet of a validation.

Lettering grows with the images, so that a strip stays legible when the contact sheet scales it down.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

SMALLEST = 128
"""Images with a shorter edge are enlarged, in whole steps, so that each pixel stays a square."""

SHEET_WIDTH = 1680
"""Rows of a contact sheet are scaled down to this width."""

SHEET_ROWS = 100
"""A longer contact sheet says how many rows it leaves out."""

_LONGEST = 2048
_TITLE_LINES = 3
_TITLE_CHARACTERS = 400

_WHITE = (255, 255, 255)
_INK = (28, 28, 30)
_GREY = (110, 110, 115)
_RULE = (224, 224, 228)

_FALLBACK_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "arial.ttf",
    "Arial Unicode.ttf",
    "NotoSansCJK-Regular.ttc",
    "msyh.ttc",
    "PingFang.ttc",
)
"""Tried, where installed, for titles that Pillow's own font cannot write: it knows little more than ASCII."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


# --- What a validation shows ------------------------------------------------------------------------------------------


def format_strength(value: float) -> str:
    """`-2`, `-0.5`, `0`, `+1`: short, signed, and different for different strengths."""
    number = float(value) + 0.0  # -0.0 becomes 0.0
    if number == 0.0:
        return "0"
    short = f"{number:+g}"
    return short if float(short) == number else f"{'+' if number > 0 else ''}{number!r}"


def strip(
    images: Sequence[Image.Image], labels: Sequence[str], title: str | None = None, *, framed: bool = True
) -> Image.Image:
    """Images side by side on white, each with its label below, under an optional title.

    `framed` leaves a margin all round; a row of a contact sheet needs none, as the sheet has its own.

    Raises:
        ValueError: no images, or not one label for each.
    """
    if not images or len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels")
    cells = [_enlarged(_on_white(image)) for image in images]
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    size = max(15, round(min(width, height) * 0.085))
    gap, margin = max(4, size // 3), size if framed else 0
    total = 2 * margin + len(cells) * width + (len(cells) - 1) * gap
    heading = _title_block(title, size, total - 2 * margin) if title else None
    top = margin + (heading.height + size // 2 if heading else 0)

    canvas = Image.new("RGB", (total, top + height + round(size * 1.3) + margin), _WHITE)
    if heading:
        canvas.paste(heading, (margin, margin))
    draw = ImageDraw.Draw(canvas)
    for column, (cell, label) in enumerate(zip(cells, labels, strict=True)):
        left = margin + column * (width + gap)
        canvas.paste(cell, (left + (width - cell.width) // 2, top + (height - cell.height) // 2))
        _centred(draw, label, left + width / 2, top + height + size // 2, size, width)
    return canvas


def pair(base: Image.Image, image: Image.Image, labels: tuple[str, str]) -> Image.Image:
    """An image at its own scale (right) beside the one at scale 0 (left)."""
    return strip([base, image], labels)


def contact_sheet(rows: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Several strips below each other, each under its prompt; a thin line between them.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("a contact sheet needs a row")
    shown = [(title, fit(image)) for title, image in rows[:SHEET_ROWS]]
    width = max(360, *(image.width for _, image in shown))
    blocks = [_sheet_row(title, image, width) for title, image in shown]
    if len(rows) > SHEET_ROWS:
        blocks.append(_text_row(f"... and {len(rows) - SHEET_ROWS} more, in files of their own", width))
    return _stacked(blocks, width)


def fit(image: Image.Image) -> Image.Image:
    """Scale a strip down to the width of the contact sheet; a smaller one stays as it is."""
    if image.width <= SHEET_WIDTH:
        return image
    height = max(1, round(image.height * SHEET_WIDTH / image.width))
    return image.convert("RGB").resize((SHEET_WIDTH, height), Image.Resampling.LANCZOS)


# --- Layout -----------------------------------------------------------------------------------------------------------


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, (*_WHITE, 255)), layer).convert("RGB")


def _enlarged(image: Image.Image) -> Image.Image:
    """Whole steps until the shorter edge has `SMALLEST` pixels, unless the longer one would become absurd."""
    wanted = -(-SMALLEST // min(image.size))
    factor = max(1, min(wanted, _LONGEST // max(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST) if factor > 1 else image


def _centred(draw: ImageDraw.ImageDraw, text: str, middle: float, top: int, size: int, room: int) -> None:
    text = _printable(text)
    font = _font_for(text, size)
    while font.getlength(text) > room and size > 9:
        size -= 1
        font = _font_for(text, size)
    draw.text((middle, top), text, font=font, fill=_INK, anchor="mt")


def _title_block(title: str, size: int, width: int) -> Image.Image:
    """The wrapped title alone, as wide as its lines may be."""
    text = _printable(title)
    font = _font_for(text, size)
    lines = _wrapped(text, font, width)
    pitch = round(size * 1.35)
    block = Image.new("RGB", (width, pitch * len(lines)), _WHITE)
    draw = ImageDraw.Draw(block)
    for number, line in enumerate(lines):
        draw.text((0, number * pitch + pitch // 2), line, font=font, fill=_INK, anchor="lm")
    return block


_SHEET_MARGIN = 28
_SHEET_TEXT = 19


def _sheet_row(title: str, image: Image.Image, width: int) -> Image.Image:
    heading = _title_block(title or "(empty prompt)", _SHEET_TEXT, width)
    top = heading.height + _SHEET_TEXT // 2
    row = Image.new("RGB", (width, top + image.height), _WHITE)
    row.paste(heading, (0, 0))
    row.paste(_on_white(image), (0, top))
    return row


def _text_row(text: str, width: int) -> Image.Image:
    row = Image.new("RGB", (width, round(_SHEET_TEXT * 1.6)), _WHITE)
    ImageDraw.Draw(row).text((0, 0), text, font=_font_for(text, _SHEET_TEXT), fill=_GREY, anchor="lt")
    return row


def _stacked(blocks: Sequence[Image.Image], width: int) -> Image.Image:
    gap = 2 * (_SHEET_MARGIN // 2) + 1
    height = 2 * _SHEET_MARGIN + sum(block.height for block in blocks) + gap * (len(blocks) - 1)
    sheet = Image.new("RGB", (width + 2 * _SHEET_MARGIN, height), _WHITE)
    draw = ImageDraw.Draw(sheet)
    top = _SHEET_MARGIN
    for number, block in enumerate(blocks):
        if number:
            rule = top + gap // 2
            draw.line((_SHEET_MARGIN, rule, _SHEET_MARGIN + width, rule), fill=_RULE)
            top += gap
        sheet.paste(block, (_SHEET_MARGIN, top))
        top += block.height
    return sheet


# --- Text -------------------------------------------------------------------------------------------------------------


def _printable(text: str) -> str:
    """One line that every font backend takes: spaces for white space, `?` for control characters and lone surrogates."""
    line = " ".join(text[: 4 * _TITLE_CHARACTERS].split())
    clean = "".join("?" if unicodedata.category(character) in ("Cc", "Cs") else character for character in line)
    return clean if len(clean) <= _TITLE_CHARACTERS else clean[:_TITLE_CHARACTERS] + "..."


def _wrapped(text: str, font: Font, width: int) -> list[str]:
    """Break at spaces, or inside a word that is longer than a line; what does not fit in three lines ends in dots."""
    lines = [""]
    for word in text.split(" "):
        candidate = f"{lines[-1]} {word}" if lines[-1] else word
        if font.getlength(candidate) <= width:
            lines[-1] = candidate
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    if len(lines) > _TITLE_LINES:
        last = lines[_TITLE_LINES - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        lines = [*lines[: _TITLE_LINES - 1], last + "..."]
    return lines


def _font_for(text: str, size: int) -> Font:
    """Pillow's own font where it can write the text, else the installed font that misses the fewest characters."""
    best = _font(None, size)
    missing = _missing(best, text)
    for name in _FALLBACK_FONTS if missing else ():
        font = _font(name, size)
        if font is not None and (count := _missing(font, text)) < missing:
            best, missing = font, count
        if not missing:
            break
    assert best is not None  # Pillow's own font always loads
    return best


@lru_cache(maxsize=64)
def _font(name: str | None, size: int) -> Font | None:
    if name is None:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(name, size)
    except OSError:  # not installed here, which is why there are several
        return None


def _missing(font: Font | None, text: str) -> int:
    """How many different characters of `text` the font draws as its empty box."""
    if font is None:
        return len(text) + 1
    box = bytes(font.getmask("\U0010ffff"))
    return sum(bytes(font.getmask(character)) == box for character in set(text))

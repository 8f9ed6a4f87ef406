"""Captions from names, text files and prompts, and what is said where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slider_plugin.config import BucketConfig
from slider_plugin.data.captions import CaptionError, caption_problems, captions_of
from slider_plugin.errors import UserError


def bucket(**keys: Any) -> BucketConfig:
    return BucketConfig(id="b", instance_data_dir=Path("images"), **keys)


def beside(tmp_path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    (tmp_path / "cat.txt").write_bytes(data)
    return tmp_path / "cat.png"


@pytest.mark.parametrize(
    ("name", "caption"), [("a_red_cat.png", "a red cat"), ("a.b_c.jpg", "a.b c"), ("_x__y_.png", "x y"), ("grüße.png", "grüße")]
)
def test_filename(name: str, caption: str) -> None:
    assert captions_of(Path("somewhere_else") / name, bucket(caption_strategy="filename")) == (caption,)


def test_a_filename_that_says_nothing() -> None:
    with pytest.raises(CaptionError, match=r"___\.png: the file name holds no caption"):
        captions_of(Path("___.png"), bucket(caption_strategy="filename"))


def test_textfile_is_the_default(tmp_path: Path) -> None:
    assert captions_of(beside(tmp_path, "a cat\n"), bucket()) == ("a cat",)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_are_variants(tmp_path: Path, end: str) -> None:
    assert captions_of(beside(tmp_path, end.join([" a cat ", "", "one cat"])), bucket()) == ("a cat", "one cat")


def test_a_text_that_is_not_split(tmp_path: Path) -> None:
    path = beside(tmp_path, "a cat,\nsitting\n")
    assert captions_of(path, bucket(disable_multiline_split=True)) == ("a cat,\nsitting",)


def test_a_byte_order_mark_is_no_part_of_the_caption(tmp_path: Path) -> None:
    assert captions_of(beside(tmp_path, "\ufeffeine Kätzin"), bucket()) == ("eine Kätzin",)


def test_only_the_last_suffix_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "cat.v2.txt").write_text("second")
    assert captions_of(tmp_path / "cat.v2.png", bucket()) == ("second",)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CaptionError) as caught:
        captions_of(tmp_path / "cat.png", bucket())
    assert str(caught.value).startswith(f"{tmp_path / 'cat.png'}: no caption file beside it; write cat.txt")
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("content", ["", "\n \n\t", "\ufeff"])
@pytest.mark.parametrize("whole", [True, False])
def test_an_empty_file_is_named(tmp_path: Path, content: str, whole: bool) -> None:
    with pytest.raises(CaptionError, match=r"cat\.txt: the caption of cat\.png is empty"):
        captions_of(beside(tmp_path, content), bucket(disable_multiline_split=whole))


def test_other_encodings_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(CaptionError, match=r"cat\.txt: not UTF-8 text \(byte 1\); save it as UTF-8"):
        captions_of(beside(tmp_path, "Kätzin".encode("latin-1")), bucket())


def test_a_folder_instead_of_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "cat.txt").mkdir()
    with pytest.raises(CaptionError, match=r"cat\.txt: cannot be read"):
        captions_of(tmp_path / "cat.png", bucket())


def test_instanceprompt_needs_no_file() -> None:
    assert captions_of(Path("x.png"), bucket(caption_strategy="instanceprompt", instance_prompt=" a cat ")) == ("a cat",)


def test_only_instance_prompt_ignores_captions(tmp_path: Path) -> None:
    keys = {"only_instance_prompt": True, "instance_prompt": "a dog"}
    assert captions_of(beside(tmp_path, "a cat"), bucket(**keys)) == ("a dog",)
    assert captions_of(tmp_path / "missing.png", bucket(**keys)) == ("a dog",)


def test_prepend_goes_in_front_of_every_variant(tmp_path: Path) -> None:
    keys = {"prepend_instance_prompt": True, "instance_prompt": "photo of"}
    assert captions_of(beside(tmp_path, "a cat\nthe cat"), bucket(**keys)) == ("photo of a cat", "photo of the cat")
    assert captions_of(Path("a_cat.png"), bucket(caption_strategy="filename", **keys)) == ("photo of a cat",)


def test_an_instance_prompt_alone_changes_no_caption(tmp_path: Path) -> None:
    assert captions_of(beside(tmp_path, "a cat"), bucket(instance_prompt="photo")) == ("a cat",)


@pytest.mark.parametrize("prompt", [None, "", "  "])
@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"caption_strategy": "instanceprompt"}, "caption_strategy instanceprompt"),
        ({"only_instance_prompt": True}, "only_instance_prompt"),
        ({"prepend_instance_prompt": True}, "prepend_instance_prompt"),
    ],
)
def test_a_prompt_that_is_needed_and_missing(prompt: str | None, keys: dict[str, Any], named: str) -> None:
    assert caption_problems(bucket(instance_prompt=prompt, **keys)) == [f"{named} needs an instance_prompt: add one"]
    assert caption_problems(bucket(instance_prompt="a cat", **keys)) == []


def test_no_prompt_is_needed_otherwise() -> None:
    assert caption_problems(bucket()) == []

"""Files appear whole or not at all, and their names suit every file system."""

import json
import os
from pathlib import Path

import pytest

from slider_plugin import files
from slider_plugin.errors import UserError
from slider_plugin.files import check_writable, folder_replacing, replacing, safe_name, write_atomic, write_json


class Boom(Exception):
    """The failure in the middle."""


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# --- files ------------------------------------------------------------------------------------------------------------


def test_write_atomic_makes_the_folder_and_writes_text_and_bytes(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a/b/text.txt", "ü\n")
    write_atomic(tmp_path / "a/b/bytes", b"\x00\xff")
    assert (tmp_path / "a/b/text.txt").read_bytes() == "ü\n".encode()
    assert (tmp_path / "a/b/bytes").read_bytes() == b"\x00\xff"
    assert names(tmp_path / "a/b") == ["bytes", "text.txt"]


def test_replacing_keeps_the_suffix_and_stays_in_the_folder(tmp_path: Path) -> None:
    with replacing(tmp_path / "image.png") as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".png" and temporary.name.startswith(files.TEMPORARY)
        assert not (tmp_path / "image.png").exists()
        temporary.write_bytes(b"new")
    assert (tmp_path / "image.png").read_bytes() == b"new"


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
def test_a_failure_in_the_middle_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["file.txt"]


def test_a_failing_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise PermissionError("in use")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(PermissionError):
        write_atomic(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == ["file.txt"]


def test_the_content_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda fd: (order.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(files.os, "replace", lambda a, b: (order.append("replace"), replace(a, b))[1])
    write_atomic(tmp_path / "file", "x")
    assert order[:2] == ["fsync", "replace"]


def test_json_is_readable_exact_and_never_nan(tmp_path: Path) -> None:
    value = {"prompt": "猫 café", "half": "\ud800", "n": [1, 0.1]}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value and "猫 café" in text
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == value


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with folder_replacing(tmp_path / "runs/checkpoint-5") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub/a").write_text("a")
        assert names(tmp_path / "runs") == [temporary.name] and temporary.name.startswith(files.TEMPORARY)
    assert names(tmp_path / "runs") == ["checkpoint-5"]
    assert (tmp_path / "runs/checkpoint-5/sub/a").read_text() == "a"


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
def test_a_failed_folder_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), folder_replacing(tmp_path / "checkpoint-5") as temporary:
        (temporary / "a").write_text("a")
        raise error
    assert names(tmp_path) == []


def test_an_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-5"
    path.mkdir()
    with pytest.raises(UserError, match="exists already"), folder_replacing(path):
        pytest.fail("must refuse before the work")
    assert names(tmp_path) == ["checkpoint-5"]


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-5"
    with pytest.raises(UserError, match="exists already"), folder_replacing(path) as temporary:
        (temporary / "a").write_text("a")
        path.mkdir()  # a rename would silently replace an empty folder
    assert names(tmp_path) == ["checkpoint-5"] and names(path) == []


# --- names ------------------------------------------------------------------------------------------------------------

AWKWARD = [
    "", " ", ".", "..", "../../etc/passwd", "a/b", "a\\b", "C:\\x", "con", "CON", "Nul", "com1", "aux.txt", "name.", "name ",
    "-rf", "Cat", "cat", "CAT", "cafe", "café", "cafe\u0301", "猫", "犬", "😀", "\ud800", "\x00", "a\nb", "שלום", "ﬁ", "fi",
    "x" * 40, "x" * 41, "x" * 5000, "%s{}", "a:b*c?d\"e<f>g|h", safe_name("Cat"),
]  # fmt: skip


def test_names_are_plain_short_and_different_even_without_case() -> None:
    made = [safe_name(text) for text in AWKWARD]
    for name in made:
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_") and 0 < len(name) <= 60
        assert name[0] not in "-_" and name not in ("con", "nul", "com1", "aux", "prn", "lpt1")
        assert "\0" not in name
    assert len({name.casefold() for name in made}) == len(AWKWARD)


def test_plain_names_stay_and_the_index_stands_in_front() -> None:
    assert safe_name("portrait_2") == "portrait_2"
    assert safe_name("portrait", 3) == "03_portrait"
    assert safe_name("A red cat!", 104).startswith("104_a-red-cat-")
    assert safe_name("A red cat!") == safe_name("A red cat!")


def test_names_can_be_written(tmp_path: Path) -> None:
    for index, text in enumerate(AWKWARD):
        write_atomic(tmp_path / f"{safe_name(text, index)}.txt", "x")
    assert len(names(tmp_path)) == len(AWKWARD)


# --- places -----------------------------------------------------------------------------------------------------------


def test_a_writable_place_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path)
    check_writable(tmp_path / "new/deeper")
    monkeypatch.chdir(tmp_path)
    check_writable(Path("relative"))
    assert names(tmp_path) == []


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(UserError, match="is a file"):
            check_writable(place)
    assert names(tmp_path) == ["file"]


def test_broken_links_and_impossible_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place in (tmp_path / "link/out", tmp_path / "a\0b", tmp_path / "new" / ("x" * 300)):
        with pytest.raises(UserError, match="cannot write to"):
            check_writable(place)
    assert names(tmp_path) == ["link"]


def test_a_place_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: Path, *_: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files.os, "open", deny)  # permission bits mean nothing to root, who may run this test
    with pytest.raises(UserError, match=r"cannot write to .*out: Permission denied"):
        check_writable(tmp_path / "out")
    assert names(tmp_path) == []

"""What the page refuses: foreign sites, foreign names, foreign paths, and files that are meant to hurt."""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPT = "<script>alert(1)</script>"
LEADS_OUT = (
    "../outside", "/etc/passwd", "data/../../outside", "link", "link/secret.png", "..", "/", "runs/../../outside/secret.png",
    ".slider-ui", ".slider-ui/lock", "data/more/\0", "x" * 5000, "data/" + "../" * 40 + "etc/passwd",
)  # fmt: skip


@pytest.fixture
def outside(place: Path) -> Path:
    """A folder beside the workspace, to which a link in it leads."""
    folder = place.parent / "outside"
    folder.mkdir()
    (folder / "secret.png").write_bytes((place / "data" / "more" / "00.png").read_bytes())
    (folder / "secret.json").write_text('{"model_family": "sd1"}')
    (place / "link").symlink_to(folder)
    return folder


@pytest.fixture
def run(client: Any) -> str:
    assert client.post("/runs", data={"name": "one", "family": "sd1"}).status_code == 303
    return "/runs/one"


# --- Paths ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", LEADS_OUT)
@pytest.mark.parametrize("route", ["/file", "/thumb", "/browse"])
def test_no_route_reads_outside(client: Any, outside: Path, route: str, path: str) -> None:
    answer = client.get(route, params={"path": path})
    assert answer.status_code in (403, 404), path[:50]
    assert "secret" not in answer.text.replace(path, "")


def test_the_preview_reads_nothing_outside(client: Any, outside: Path) -> None:
    for path in LEADS_OUT[:7]:
        assert client.get("/preview", params={"b.0.instance_data_dir": path}).status_code == 403


@pytest.mark.parametrize("path", LEADS_OUT)
def test_nothing_is_uploaded_or_made_outside(client: Any, outside: Path, path: str) -> None:
    before = sorted(outside.iterdir())
    files = [("images", ("a.png", (outside / "secret.png").read_bytes(), "image/png"))]
    assert client.post("/upload", data={"folder": path}, files=files).status_code in (400, 403)
    assert client.post("/folders", data={"parent": path, "name": "made"}).status_code in (400, 403)
    assert sorted(outside.iterdir()) == before


@pytest.mark.parametrize(
    "name", ["../../outside/a.png", "..\\..\\outside\\a.png", ".hidden.png", "a.svg", "a.png/", "a\n.png", ""]
)
def test_names_of_uploads_make_no_path(client: Any, place: Path, outside: Path, name: str) -> None:
    data = (outside / "secret.png").read_bytes()
    client.post("/upload", data={"folder": "data"}, files=[("images", (name, data, "image/png"))])
    assert {path.name for path in outside.iterdir()} == {"secret.png", "secret.json"}
    assert {path.name for path in (place / "data").iterdir()} <= {"more", "less", "plain", "a.png", "a%0A.png"}


def path_fields() -> list[str]:
    from slider_plugin.config import RunConfig
    from slider_plugin.ui.schema import TABLES, fields

    rows = {"buckets": "b.0.", "prompts": "p.0.", "base_loras": "l.0."}
    found = [(f"k.{key}", one) for key, one in fields(RunConfig, {}, "k.").items()]
    found += [(f"{rows[table]}{key}", one) for table, model in TABLES.items() for key, one in fields(model, {}, "").items()]
    return [name for name, one in found if one.kind == "path"]


@pytest.mark.parametrize("field", path_fields())
def test_no_field_of_the_form_leads_outside(client: Any, place: Path, outside: Path, run: str, field: str) -> None:
    before = (place / "runs" / "one" / "config.json").read_text()
    for path in ("../outside", "/etc/passwd", "link/secret.json"):
        answer = client.post(f"{run}/setup", data={"k.model_family": "sd1", field: path})
        assert "is outside the workspace" in answer.text and "Not saved" in answer.text, (field, path)
        assert f"f-{field.replace('.', '-')}" in answer.text, "it is told at its field"
    assert (place / "runs" / "one" / "config.json").read_text() == before


@pytest.mark.parametrize(
    "key", ["output_dir", "instance_data_dir", "path", "pretrained_model_name_or_path", "data_backend_config"]
)
def test_a_file_that_was_made_elsewhere_leads_nowhere_either(client: Any, place: Path, outside: Path, key: str) -> None:
    bucket = {"id": "a", "instance_data_dir": str(place / "data" / "more"), "slider_strength": 1}
    written: dict[str, Any] = {"model_family": "sd1", "buckets": [bucket]}
    if key == "instance_data_dir":
        bucket[key] = str(outside)
    elif key == "path":
        written["base_loras"] = [{"path": str(outside / "secret.json")}]
    elif key == "data_backend_config":
        written = {"model_family": "sd1", key: str(outside / "secret.json")}
    else:
        written[key] = str(outside)
    (place / "strange.json").write_text(json.dumps(written))
    answer = client.post("/runs", data={"name": "strange", "source": "strange.json"})
    assert answer.status_code == 400 and "is outside the workspace" in answer.text
    assert client.post("/runs", data={"name": "one", "family": "sd1"}).status_code == 303
    assert client.post("/runs/one/text", data={"text": json.dumps(written)}).status_code == 204
    assert client.post("/runs/one/start").status_code in (400, 403), "what was saved as text is looked at before it starts"
    assert not list((place / ".slider-ui" / "jobs").iterdir())


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "%2e%2e", ".slider-ui", "a" * 60, "A b", "", "con/../x"])
def test_names_of_runs_make_no_path(client: Any, place: Path, name: str) -> None:
    assert client.post("/runs", data={"name": name, "family": "sd1"}).status_code == 400
    assert client.get(f"/runs/{name}/setup").status_code in (404, 405)
    assert not (place / "runs").exists()


# --- Who asks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "http://127.0.0.1.evil.example", "http://127.0.0.1:81", "null", None]
)
def test_other_sites_change_nothing(client: Any, place: Path, origin: str | None) -> None:
    del client.headers["Origin"]
    headers = {"Origin": origin} if origin else {}
    answer = client.post("/runs", data={"name": "one", "family": "sd1"}, headers=headers)
    assert answer.status_code == 403 and not (place / "runs").exists()


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "192.168.0.7", "127.0.0.1.evil.example", ""])
def test_other_names_are_not_answered(client: Any, host: str) -> None:
    """A name that somebody makes point at this machine reads nothing."""
    assert client.get("/", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:9999", "[::1]:7860"])
def test_our_own_names_are(client: Any, host: str) -> None:
    assert client.get("/", headers={"Host": host}).status_code == 200


def test_an_address_that_others_reach_needs_the_token(place: Path, make_client: Callable[..., Any]) -> None:
    with make_client(place, "192.168.0.7", "right") as client:
        for path in ("/", "/static/app.js", "/file?path=data/more/00.png", "/?token=wrong"):
            assert client.get(path).status_code == 401, path
        assert client.post("/runs?token=right", data={"name": "one", "family": "sd1"}).status_code == 401
        entered = client.get("/?token=right")
        assert entered.status_code == 303 and entered.headers["location"] == "/", "the token leaves the address bar"
        cookie = entered.headers["set-cookie"]
        assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower()
        assert client.get("/").status_code == 200
        client.cookies.set("slider_token", "wrong", domain="192.168.0.7")
        client.cookies.delete("slider_token")
        assert client.get("/", headers={"Cookie": "slider_token=wrong"}).status_code == 401


def test_the_token_is_long_and_only_asked_for_where_others_reach_it() -> None:
    from slider_plugin.ui.security import is_loopback

    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.7", "example.org", "", "localhost.example.org")))


def test_no_page_runs_foreign_script_or_is_framed(client: Any) -> None:
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    for path in ("/", "/static/app.js", "/nowhere", "/file?path=nothing"):
        assert client.get(path).headers["x-content-type-options"] == "nosniff"


# --- Content -------------------------------------------------------------------------------------------------------------


def test_script_in_texts_stays_text(client: Any, place: Path, run: str) -> None:
    folder = place / "data" / f"{SCRIPT.replace('/', '')}"
    folder.mkdir()
    (folder / 'x"><img src=x onerror=alert(1)>.png').write_bytes((place / "data" / "more" / "00.png").read_bytes())
    shown = folder.relative_to(place)
    form = {"k.model_family": "sd1", "b.0.id": SCRIPT, "b.0.instance_data_dir": str(shown), "b.0.direction": "more"}
    form |= {"p.0.name": SCRIPT, "p.0.prompt": f"</textarea>{SCRIPT}", "k.instance_prompt": f'" onfocus="{SCRIPT}'}
    assert "Not saved" not in client.post(f"{run}/setup", data=form).text
    pictures = place / "runs" / "one" / "output" / "validation_images" / "step_000001"
    pictures.mkdir(parents=True)
    (pictures / "a.png").write_bytes((place / "data" / "more" / "00.png").read_bytes())
    entry = {"name": SCRIPT, "prompt": f"</script>{SCRIPT}", "seed": 1, "scale": 0.0, "file": "a.png"}
    (pictures / "prompts.json").write_text(json.dumps({"step": 1, "settings": {}, "images": [entry]}))
    (place / "runs" / "one" / "output" / "reports.jsonl").write_text(json.dumps({"step": 1, "monotonicity": SCRIPT}) + "\n")
    paths = [f"{run}/{tab}" for tab in ("setup", "watch", "try", "page.html")] + ["/browse?path=data", "/"]
    paths += [f"/browse?path={shown}&target={SCRIPT}", f"/preview?x.instance_data_dir={shown}", f"/nowhere{SCRIPT}"]
    for path in paths:
        text = client.get(path).text
        assert SCRIPT not in text and "<img src=x" not in text, path
        assert not re.search(r"<[^>]* onfocus=", text), path


def bomb(path: Path, side: int) -> Path:
    """A PNG of a few kilobytes that decodes to gigabytes."""
    row = b"\0" + b"\0" * (side // 8)
    press = zlib.compressobj(9)
    data = b"".join(press.compress(row) for _ in range(side)) + press.flush()
    parts = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


@pytest.mark.parametrize(
    ("side", "shown_as", "refused_as"),
    [(10_000, "10000x10000 pixels are too many", "more than max_image_pixels"),
     (30_000, "more pixels than Pillow opens", "more pixels than Pillow opens")],
)  # fmt: skip
def test_a_picture_that_would_fill_the_memory_is_not_decoded(
    client: Any, place: Path, side: int, shown_as: str, refused_as: str
) -> None:
    import tracemalloc

    path = bomb(place / "data" / "more" / "bomb.png", side)
    assert path.stat().st_size < 300_000
    tracemalloc.start()
    assert client.get("/thumb", params={"path": "data/more/bomb.png"}).status_code == 400
    shown = client.get("/preview", params={"x.instance_data_dir": "data/more"}).text
    uploaded = client.post("/upload", data={"folder": "data"}, files=[("images", ("b.png", path.read_bytes(), "image/png"))])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"bomb.png: {shown_as}" in shown and peak < 50e6
    assert refused_as in uploaded.text and not (place / "data" / "b.png").exists()


def test_two_hundred_megabytes_are_not_taken(client: Any, place: Path) -> None:
    """Neither where the header says so nor where it does not: what comes is counted."""
    size = 200 * 2**20
    taken = 0

    def pieces() -> Iterator[bytes]:
        nonlocal taken
        head = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\n'
        yield head
        while taken < size:
            taken += 2**20
            yield b"\0" * 2**20

    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    assert client.post("/upload", content=pieces(), headers=kind).status_code == 413
    assert client.post("/upload", content=b"", headers=kind | {"Content-Length": str(size)}).status_code == 413
    assert sorted(path.name for path in (place / "data").iterdir()) == ["less", "more", "plain"]


def test_other_kinds_of_files_are_not_shown(client: Any, place: Path) -> None:
    for name in ("a.html", "a.svg", "a.py", "a.txt", "noname", ".hidden.png"):
        (place / name).write_text(SCRIPT)
        assert client.get("/file", params={"path": name}).status_code == 404
    (place / "a.safetensors").write_text(SCRIPT)
    assert "attachment" in client.get("/file", params={"path": "a.safetensors"}).headers["content-disposition"]

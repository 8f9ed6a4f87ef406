"""What is shown of a run: numbers, curves, strips, the report card, the pictures to move, and the page to keep."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from PIL import Image

from slider_plugin.cli import execute
from slider_plugin.ui import pictures, runs, try_routes
from slider_plugin.ui.charts import MOST_POINTS, Line, chart
from slider_plugin.ui.jobs import RENDER, Jobs

REPORT = {
    "step": 4, "strengths": [-1, 0, 1], "response": [-0.6, 0, 0.7], "response_low": [-0.7, 0, 0.6],
    "response_high": [-0.5, 0, 0.8], "preservation": [0.9, 1, 0.8], "monotonicity": 0.97, "balance": 0.86,
    "verdict": "It does what it should.", "flags": [{"code": "one_sided", "text": "plus does more than minus"}],
}  # fmt: skip


@pytest.fixture
def run(client: Any, place: Path) -> Path:
    """A run that was trained: metrics, two validations, a report and a slider. Returns its output folder."""
    client.post("/runs", data={"name": "one", "family": "sd1"})
    form = {"k.model_family": "sd1", "b.0.id": "more", "b.0.instance_data_dir": "data/more", "b.0.direction": "more"}
    assert "Saved." in client.post("/runs/one/setup", data=form | {"k.max_train_steps": "8"}).text
    output = place / "runs" / "one" / "output"
    for step in (2, 4):
        validation(output / "validation_images" / f"step_{step:06d}", step, (-1.0, 0.0, 1.0))
    lines = [
        {"step": n, "loss/positive": 0.5 / n, "loss/negative": 0.25, "seconds": 0.5, "peak_memory_mb": 1500.0}
        for n in range(1, 5)
    ]
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "lo')
    (output / "reports.jsonl").write_text(
        json.dumps(REPORT | {"step": 2, "monotonicity": 0.5}) + "\n" + json.dumps(REPORT) + "\n"
    )
    (output / "reports" / "step_000004").mkdir(parents=True)
    (output / "reports" / "step_000004" / "report.json").write_text(json.dumps(REPORT))
    (output / "slider.safetensors").write_bytes(b"x")
    return output


def validation(folder: Path, step: int, scales: tuple[float, ...], prompt: str = "a cat", settings: Any = None) -> None:
    folder.mkdir(parents=True)
    entries = []
    for scale in scales:
        name = f"01_a_seed42_{'base' if scale == 0 else f'scale{scale:+g}'}.png"
        Image.new("RGB", (8, 8), (int(100 + 50 * scale), step, 0)).save(folder / name)
        entries.append({"name": "a", "prompt": prompt, "seed": 42, "scale": scale, "file": name})
    Image.new("RGB", (24, 8)).save(folder / "01_a_seed42_strip.png")
    about = {"step": step, "settings": settings or {"width": 8, "batch_size": step}, "images": entries}
    (folder / "prompts.json").write_text(json.dumps(about))


def data(text: str) -> Any:
    return json.loads(text.partition('<script type="application/json">')[2].partition("</script>")[0])


def test_the_numbers_of_a_run(client: Any, run: Path) -> None:
    text = client.get("/runs/one/live").text
    assert re.search(r"<dt>Step</dt><dd>4 <span[^>]*>of 8</span>", text)
    assert '<dd class="less">0.2500</dd>' in text, "a constant loss is its own average"
    assert "<dd>2.00</dd>" in text and "1.50 GB" in text
    assert text.count("<polyline") == 4, "each sign, smoothed and as it was"
    progress = runs.Progress(runs.read_lines(run / "metrics.jsonl"), 8)
    assert (progress.step, progress.rate, progress.left, progress.share) == (4, 2.0, "0:00:02", 0.5)
    assert progress.smoothed()["positive"] < 0.5


def test_a_part_is_sent_again_only_when_it_has_changed(client: Any, run: Path) -> None:
    for part in ("live", "strips", "stage", "jobs"):
        first = client.get(f"/runs/one/{part}")
        seen = re.search(r"seen=(\w{16})", first.text)
        assert seen
        assert client.get(f"/runs/one/{part}?seen={seen[1]}").status_code == 204
    page = client.get("/runs/one/watch").text
    seen = re.search(r"/live\?seen=(\w{16})", page)
    assert seen and client.get(f"/runs/one/live?seen={seen[1]}").status_code == 204, "the page holds what is asked for next"
    with (run / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 6, "loss/positive": 1}\n')
    assert client.get(f"/runs/one/live?seen={seen[1]}").status_code == 200


def test_strips_and_report_card(client: Any, run: Path) -> None:
    text = client.get("/runs/one/watch").text
    assert text.index("Strips at step 4") < text.index("<summary>Step 2</summary>")
    source = re.search(r'<img class="strip" src="([^"]+)"', text)
    assert source and client.get(source[1].replace("&amp;", "&")).content.startswith(b"\x89PNG")
    assert "It does what it should." in text and "plus does more than minus" in text
    assert 'aria-label="Response to the strength: response 0.7; preservation 0.8"' in text and "<polygon" in text
    assert 'aria-label="Report card over steps: monotonicity 0.97; balance 0.86; preservation 0.8"' in text


@pytest.mark.parametrize(
    "broken", ["", "{", "[]", '{"strengths": [1, "x"], "response": 3}', '{"strengths": [1], "response": [1, 2]}']
)
def test_a_report_that_cannot_be_read_hides_itself_alone(client: Any, run: Path, broken: str) -> None:
    (run / "reports" / "step_000004" / "report.json").write_text(broken)
    (run / "reports.jsonl").write_text(broken + "\n")
    text = client.get("/runs/one/watch").text
    assert "Strips at step 4" in text and "Response to the strength" not in text


def test_a_chart_of_many_points_stays_small() -> None:
    points = [(float(n), 1.0 + n % 7) for n in range(50_000)]
    drawn = str(chart("Loss", [Line("a", "positive", points)], "step", logarithmic=True))
    assert drawn.count(",") <= MOST_POINTS + 5 and len(drawn) < 10_000
    assert chart("Loss", [Line("a", "positive", [])], "step") == ""
    assert "<circle" in chart("Loss", [Line("a", "positive", [(1.0, 0.0)])], "step", logarithmic=True)


# --- Try -----------------------------------------------------------------------------------------------------------------


def test_the_pictures_to_move(client: Any, run: Path) -> None:
    """The latest validation, and what was drawn on request since: of one prompt, seed and settings in one row."""
    assert [row["strengths"] for row in data(client.get("/runs/one/try").text)] == [[-1.0, 0.0, 1.0]]
    validation(run / "tries" / "1" / "step_000000", 9, (0.0, 1.5))
    validation(run / "tries" / "2" / "step_000000", 9, (0.0, 1.0), settings={"width": 16})
    validation(run / "tries" / "3" / "step_000000", 9, (0.0, 1.0))
    (run / "tries" / "3" / pictures.BESIDE).write_text('["other +0.5"]')
    rows = data(client.get("/runs/one/try").text)
    assert [(row["strengths"], row["beside"]) for row in rows] == [
        ([-1.0, 0.0, 1.0, 1.5], ""), ([0.0, 1.0], ""), ([0.0, 1.0], "other +0.5")
    ]  # fmt: skip
    images = [client.get(source).content for source in rows[0]["images"]]
    assert len(set(images)) == 4


def test_pictures_beside_the_sidecar_alone_are_shown(client: Any, run: Path, place: Path) -> None:
    sidecar = run / "validation_images" / "step_000004" / "prompts.json"
    facts = json.loads(sidecar.read_text())
    for entry in facts["images"]:
        entry["file"] = "../../../../../data/more/00.png"
    sidecar.write_text(json.dumps(facts))
    assert "Nothing drawn yet" in client.get("/runs/one/try").text


@pytest.fixture
def held(place: Path) -> Iterator[Jobs]:
    """Nothing that is queued begins."""
    with FileLock(place / ".slider-ui" / "runner.lock"):
        jobs = Jobs(place / ".slider-ui")
        yield jobs
        for job in jobs.active():
            jobs.stop(job)


def test_other_strengths_are_drawn_on_request(client: Any, run: Path, held: Jobs) -> None:
    form = {"prompt": "a </script> dog\r\n", "strengths": "1.5, \N{MINUS SIGN}2", "seed": "7"}
    assert "waiting for the queue" in client.post("/runs/one/render", data=form).text
    (job,) = held.of("one", RENDER)
    from slider_plugin.configfile import read_config

    config, notes = read_config(job.folder / "config.json")
    assert not notes and config.validation_strengths == (-2.0, 1.5) and config.validation_seed == 7
    assert [prompt.prompt for prompt in config.prompts] == ["a </script> dog\n"]
    assert job.arguments[:4] == ("validate", str(job.folder / "config.json"), "--adapter", str(run / "slider.safetensors"))
    assert client.post("/runs/one/render", data=form).status_code == 409


@pytest.mark.parametrize(
    "wrong", [{"strengths": ""}, {"strengths": "x"}, {"strengths": "nan"}, {"strengths": "1e9"}, {"seed": "-1"}, {"seed": "x"},
              {"strengths": ",".join(map(str, range(30)))}, {"prompt": "x" * 5000}],
)  # fmt: skip
def test_what_cannot_be_drawn(client: Any, run: Path, held: Jobs, wrong: dict[str, str]) -> None:
    form = {"prompt": "a", "strengths": "1", "seed": "1"} | wrong
    assert client.post("/runs/one/render", data=form).status_code == 400
    assert not held.all()


def test_several_sliders_together(client: Any, run: Path, place: Path, held: Jobs) -> None:
    """Others of the family count as part of the base, each at its own strength; of other families none is offered."""
    for name, family in (("two", "sd1"), ("three", "sdxl")):
        client.post("/runs", data={"name": name, "family": family})
        (place / "runs" / name / "output").mkdir()
        (place / "runs" / name / "output" / "slider.safetensors").write_bytes(b"x")
    text = client.get("/runs/one/try").text
    assert 'name="with.two"' in text and "with.three" not in text
    form = {"prompt": "a", "strengths": "1", "seed": "1", "with.two": "-0.5", "with.three": "1"}
    client.post("/runs/one/render", data=form)
    (job,) = held.of("one", RENDER)
    loras = json.loads((job.folder / "config.json").read_text())["base_loras"]
    assert loras == [{"path": str(place / "runs" / "two" / "output" / "slider.safetensors"), "weight": -0.5}]
    (beside,) = (run / "tries").glob(f"*/{pictures.BESIDE}")
    assert json.loads(beside.read_text()) == ["two \N{MINUS SIGN}0.5"]


def test_export_is_offered_where_there_is_such_a_command(
    client: Any, run: Path, held: Jobs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    execute(["--help"])
    assert try_routes.can_export() == bool(re.search(r"^\s+export\s", capsys.readouterr().out, re.MULTILINE))
    monkeypatch.setattr(try_routes, "can_export", lambda: False)
    assert 'name="to"' not in client.get("/runs/one/try").text
    assert client.post("/runs/one/export", data={"to": "kohya"}).status_code == 400
    monkeypatch.setattr(try_routes, "can_export", lambda: True)
    assert 'value="kohya"' in client.get("/runs/one/try").text
    assert client.post("/runs/one/export", data={"to": "../x"}).status_code == 400
    assert client.post("/runs/one/export", data={"to": "kohya", "flip": "true"}).status_code == 200
    (job,) = held.all()
    file = str(run / "one_kohya_flipped.safetensors")
    assert job.arguments == ("export", str(run / "slider.safetensors"), "--to", "kohya", "--output", file, "--flip")


# --- The page to keep ----------------------------------------------------------------------------------------------------


def test_the_kept_page_needs_nothing_else(client: Any, run: Path, place: Path) -> None:
    answer = client.get("/runs/one/page.html")
    text = answer.text
    assert answer.headers["content-disposition"] == 'attachment; filename="one.html"'
    assert not re.search(r"""(?:src|href)=["'](?!data:|\#)""", text) and "@import" not in text and "url(" not in text
    rows = data(text)
    pixels = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in rows[0]["images"]]
    assert pixels[0] == (run / "validation_images" / "step_000004" / "01_a_seed42_scale-1.png").read_bytes()
    assert str(place) not in text, "whoever gets it need not know where it was"
    assert "Strips at step 2" in text and "It does what it should." in text and "<polyline" in text


def test_too_many_pictures_are_left_out_and_counted(client: Any, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slider_plugin.ui import share

    monkeypatch.setattr(share, "MOST_BYTES", 200)
    assert "pictures were left out" in client.get("/runs/one/page.html").text


def test_ui_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import sys

    assert execute(["ui", "--workspace", str(tmp_path / "nowhere")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert execute(["ui", "--workspace", str(tmp_path), "--host", "203.0.113.7"]) == 2
    assert "cannot listen at 203.0.113.7" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert execute(["ui", "--workspace", str(tmp_path)]) == 2
    assert "pip install 'slider-plugin[ui]'" in capsys.readouterr().err


def test_an_address_for_others_is_printed_with_its_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    import uvicorn

    seen: list[Callable[..., Any]] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: seen.append(self.config.app))
    tokens = []
    for _ in range(2):
        assert execute(["ui", "--workspace", str(place), "--host", "0.0.0.0", "--port", "0"]) == 0
        said = capsys.readouterr()
        match = re.fullmatch(r"http://0\.0\.0\.0:\d+/\?token=([\w-]{32})\n", said.out)
        assert match and "can be reached from other machines" in said.err
        tokens.append(match[1])
    assert len(set(tokens)) == 2
    assert execute(["ui", "--workspace", str(place), "--port", "0"]) == 0
    assert "token" not in capsys.readouterr().out and len(seen) == 3

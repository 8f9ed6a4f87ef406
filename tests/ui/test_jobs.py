"""Jobs outlive the browser, the server and the queue's runner; and one run is started once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil
import pytest
from filelock import FileLock

from slider_plugin.ui.jobs import TRAIN, BusyError, Job, Jobs

QUICK = ["plugins", "list", "--json"]
LONG = ["ui", "--port", "0", "--workspace", "data"]  # a command that goes on until it is interrupted

pytestmark = pytest.mark.usefixtures("no_jobs_left")


@pytest.fixture
def jobs(place: Path) -> Jobs:
    return Jobs(place / ".slider-ui")


def until(true: Callable[[], object], seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.1)


def runners(place: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "slider_plugin.ui.runner" in line and str(place / ".slider-ui") in line:
            found.append(process)
    return found


def configured(client: Any, place: Path, name: str = "one") -> None:
    """A run that can be queued."""
    client.post("/runs", data={"name": name, "family": "sd1"})
    form = {"k.model_family": "sd1", "b.0.id": "more", "b.0.instance_data_dir": "data/more", "b.0.direction": "more"}
    assert "Saved." in client.post(f"/runs/{name}/setup", data=form).text


def test_jobs_run_in_order_and_one_at_a_time(jobs: Jobs) -> None:
    made = [jobs.add(f"run-{number}", TRAIN, QUICK) for number in range(3)]
    until(lambda: all(job.ended for job in made))
    assert [job.ended and job.ended["code"] for job in made] == [0, 0, 0]
    assert all("ace_step" in job.log for job in made)
    for before, after in pairwise(made):
        assert before.ended and after.started and before.ended["time"] <= after.started["time"]
    until(lambda: not runners(jobs.workspace))


def test_a_job_that_fails_says_so_and_the_next_one_runs(jobs: Jobs) -> None:
    failing, good = jobs.add("a", TRAIN, ["no-such-command"]), jobs.add("b", TRAIN, QUICK)
    until(lambda: good.ended)
    assert failing.ended and failing.ended["code"] == 2 and "error:" in failing.log
    assert good.ended and good.ended["code"] == 0


def test_nothing_of_the_workspace_is_imported(jobs: Jobs) -> None:
    """A file there by the name of a library is no library."""
    (jobs.workspace / "rich.py").write_text("raise SystemExit('imported')")
    job = jobs.add("a", TRAIN, QUICK)
    until(lambda: job.ended)
    assert job.ended and job.ended["code"] == 0, job.log


def test_many_start_one_run_at_once_and_one_of_them_does(client: Any, place: Path, make_client: Callable[..., Any]) -> None:
    """Browsers of two servers on one workspace."""
    configured(client, place)
    with FileLock(place / ".slider-ui" / "runner.lock"), make_client(place) as second:  # nothing begins meanwhile
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit((client, second)[n % 2].post, "/runs/one/start") for n in range(8)]
            codes = sorted(answer.result().status_code for answer in asked)
        assert codes == [303] + [409] * 7
        found = Jobs(place / ".slider-ui").all()
        assert len(found) == 1 and found[0].arguments[0] == "train"
        assert "queued" in second.get("/runs/one/watch").text
        form = {"k.model_family": "sd1", "k.lora_rank": "9"}
        assert "nothing was saved" in client.post("/runs/one/setup", data=form).text
        assert client.post("/runs/one/stop").status_code == 303
        assert found[0].ended and not found[0].started
    assert "not started yet" in client.get("/runs/one/watch").text


def test_a_run_is_interrupted_as_by_ctrl_c(jobs: Jobs) -> None:
    job = jobs.add("a", TRAIN, LONG)
    until(lambda: "workspace" in job.log)
    with pytest.raises(BusyError):
        jobs.add("a", TRAIN, QUICK)
    jobs.stop(job)
    until(lambda: job.ended)
    assert job.is_stopping and not job.is_active


def test_a_killed_runner_is_followed_by_one_that_waits_for_its_job(jobs: Jobs, place: Path) -> None:
    first = jobs.add("a", TRAIN, LONG)
    until(lambda: "workspace" in first.log)
    (runner,) = runners(place)
    runner.kill()
    runner.wait(10)
    assert first.is_active, "the job goes on"
    second = jobs.add("b", TRAIN, QUICK)
    time.sleep(1.5)
    assert second.started is None, "one at a time"
    jobs.stop(first)
    until(lambda: second.ended)
    assert first.ended and first.ended["code"] is None, "nobody saw how it ended"


def test_a_process_id_that_is_somebody_else_s_now_is_not_the_job(jobs: Jobs) -> None:
    with FileLock(jobs.workspace / ".slider-ui" / "runner.lock"):
        job = jobs.add("a", TRAIN, QUICK)
        other = psutil.Process(os.getpid())
        facts = {"pid": other.pid, "born": other.create_time() - 100, "time": time.time()}
        (job.folder / "started.json").write_text(json.dumps(facts))
        assert job.process() is None and not job.is_active
        jobs.stop(job)  # which must not interrupt this very process
    until(lambda: job.ended)


@pytest.mark.parametrize(
    ("code", "state", "words"),
    [(0, "finished", "the slider is ready"), (130, "stopped", "there is a checkpoint to go on from"),
     (2, "failed", "folder is missing"), (None, "cut off", "ended from outside"), (-9, "cut off", "Resume")],
)  # fmt: skip
def test_states_of_a_run(client: Any, place: Path, code: int | None, state: str, words: str) -> None:
    configured(client, place)
    with FileLock(place / ".slider-ui" / "runner.lock"):
        job = Jobs(place / ".slider-ui").add("one", TRAIN, QUICK)
        (job.folder / "started.json").write_text(json.dumps({"pid": 2**22 + 1, "born": 0.0, "time": time.time() + 60}))
        (job.folder / "log").write_text("loading\nerror: the\n  - folder is missing\n")
        job.end(code)
    checkpoint = place / "runs" / "one" / "output" / "checkpoint-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    text = client.get("/runs/one/watch").text
    assert f">{state}</span>" in text and words in text
    assert f">{state}</span>" in client.get("/").text


def test_a_run_outlives_its_server(server: Any, place: Path) -> None:
    """kill -9 in mid-run: it goes on, the page shows it when it is back, and it ends as it would have."""
    config = {
        "model_family": "sd1", "pretrained_model_name_or_path": "model", "resolution": 64, "mixed_precision": "no",
        "max_train_steps": 40, "lora_rank": 2, "slider_lora_target": True,
        "buckets": [{"id": "more", "instance_data_dir": "data/more", "slider_strength": 1}],
    }  # fmt: skip
    (place / "config.json").write_text(json.dumps(config))
    post(server, "/runs", b"name=one&source=config.json")
    post(server, "/runs/one/start")
    (job,) = Jobs(place / ".slider-ui").all()
    until(lambda: job.started)
    server.kill()
    assert job.is_active
    server.start()
    state = urlopen(f"{server.url}runs/one/live").read().decode()
    assert ">preparing</span>" in state or ">running</span>" in state
    until(lambda: job.ended, 300)
    assert job.ended and job.ended["code"] == 0, job.log
    assert ">finished</span>" in urlopen(f"{server.url}runs/one/live").read().decode()
    assert (place / "runs" / "one" / "output" / "slider.safetensors").is_file()


def post(server: Any, path: str, data: bytes = b"") -> None:
    urlopen(Request(server.url.rstrip("/") + path, data, {"Origin": server.url.rstrip("/")})).read()


# --- The web process -----------------------------------------------------------------------------------------------------


def test_the_web_process_imports_no_torch(place: Path) -> None:
    script = f"""
import sys
from itertools import pairwise
from pathlib import Path
from starlette.testclient import TestClient
from slider_plugin.ui.app import create_app
from slider_plugin.ui.security import Guard
from slider_plugin.ui.workspace import Workspace
with TestClient(create_app(Workspace.open(Path({str(place)!r})), Guard("127.0.0.1")), base_url="http://127.0.0.1") as client:
    client.headers["Origin"] = "http://127.0.0.1"
    assert client.post("/runs", data={{"name": "one", "family": "z_image"}}, follow_redirects=False).status_code == 303
    for tab in ("setup", "watch", "try", "page.html"):
        assert client.get("/runs/one/" + tab).status_code == 200
    assert client.get("/preview?x.instance_data_dir=data/more").status_code == 200
    assert client.get("/thumb?path=data/more/00.png").status_code == 200
heavy = [name for name in ("torch", "diffusers", "transformers", "peft", "accelerate") if name in sys.modules]
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_page_weighs_less_than_300_kb(client: Any) -> None:
    import re

    client.post("/runs", data={"name": "one", "family": "sd1"})
    for tab in ("setup", "watch", "try"):
        text = client.get(f"/runs/one/{tab}").text
        parts = set(re.findall(r'(?:src|href)="(/static/[^"]+)"', text))
        assert len(parts) >= 4
        assert len(text.encode()) + sum(len(client.get(part).content) for part in parts) < 300_000


def test_a_job_ends_with_its_interrupt_in_the_background_of_a_script(jobs: Jobs) -> None:
    """A shell's background job ignores Ctrl-C, and what it starts would inherit that."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        job = jobs.add("a", TRAIN, LONG)
    finally:
        signal.signal(signal.SIGINT, before)
    until(lambda: "workspace" in job.log)
    jobs.stop(job)
    until(lambda: job.ended)


def test_jobs_are_what_their_files_say(jobs: Jobs) -> None:
    with FileLock(jobs.workspace / ".slider-ui" / "runner.lock"):
        made = jobs.add("a", TRAIN, ["train", "{job}/config.json"], {"config.json": {"x": 1}})
        again: Job | None = Jobs(jobs.workspace / ".slider-ui").get(made.number)
        assert again == made and again is not None
        assert json.loads(Path(again.arguments[1]).read_text()) == {"x": 1}
        jobs.stop(made)

"""A workspace with the bundled tiny model and its folders of images, and the page on it: in this process, and as a server."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slider_plugin.demo import bundle

ORIGIN = {"Origin": "http://127.0.0.1"}
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _same_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that the page starts run the code that is tested."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "hooks"), ""]))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A workspace: `data/more`, `data/less` and `data/plain` with images of the size concept."""
    root = tmp_path / "work"
    buckets = bundle.fixtures() / "buckets"
    for name, source in (("more", "size/more"), ("less", "size/less"), ("plain", "neutral")):
        shutil.copytree(buckets / source, root / "data" / name)
    return root


@pytest.fixture
def model(place: Path) -> Path:
    """The bundled tiny pipeline, in the workspace."""
    return Path(shutil.copytree(bundle.fixtures() / "tiny" / "sd1", place / "model"))


@pytest.fixture
def client(place: Path) -> Iterator[Any]:
    """The page in this process, as the browser on this machine sees it."""
    with client_of(place) as found:
        yield found


def client_of(place: Path, host: str = "127.0.0.1", token: str | None = None) -> Any:
    from starlette.testclient import TestClient

    from slider_plugin.ui.app import create_app
    from slider_plugin.ui.security import Guard
    from slider_plugin.ui.workspace import Workspace

    app = create_app(Workspace.open(place), Guard(host, token))
    return TestClient(app, base_url=f"http://{host}", headers={"Origin": f"http://{host}"}, follow_redirects=False)


@pytest.fixture
def make_client() -> Callable[..., Any]:
    """`client_of`, for tests in other files."""
    return client_of


class Server:
    """`slider ui` as a process of its own."""

    def __init__(self, place: Path, log: Path) -> None:
        self._place, self._log = place, log
        self.start()

    def start(self) -> None:
        began = time.perf_counter()
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "slider_plugin", "ui", "--workspace", str(self._place), "--port", "0"],
                stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        assert self.process.stdout
        line = self.process.stdout.readline()
        match = re.fullmatch(r"(http://127\.0\.0\.1:\d+/)\n", line)
        assert match, line + self._log.read_text()
        self.url, self.seconds = match[1], time.perf_counter() - began

    def kill(self) -> None:
        """As a crash would end it."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(20)


@pytest.fixture
def server(place: Path, model: Path, tmp_path: Path) -> Iterator[Server]:
    found = Server(place, tmp_path / "server.log")
    yield found
    found.close()
    end_jobs(place)


@pytest.fixture
def no_jobs_left(place: Path) -> Iterator[None]:
    """Whatever a test queued is ended with it."""
    yield
    end_jobs(place)


def end_jobs(place: Path) -> None:
    """End the jobs of a workspace, so that none outlives its test."""
    from slider_plugin.ui.jobs import Jobs

    jobs = Jobs(place / ".slider-ui")
    for _ in range(200):
        active = jobs.active()
        if not active:
            return
        for job in active:
            if job.started is None:
                jobs.stop(job)
            elif process := job.process():
                process.kill()
        time.sleep(0.1)
    raise AssertionError("jobs do not end")

"""The queue's runner: `python -m slider_plugin.ui.runner STATE`, a process of its own that works off jobs one at a time.

It lives as long as there are jobs. A run therefore goes on, and the next one begins, when the page is closed and its server
ended. There is one runner in a workspace, by a lock that the system takes back from a killed one; the next runner waits for
a job that the killed one had begun.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from filelock import FileLock, Timeout

from slider_plugin.ui.children import environment, python
from slider_plugin.ui.jobs import Job, Jobs

PATIENCE = 10.0
"""Seconds that a second runner waits: the first one may be just about to leave."""

POLL = 0.5  # seconds between looks at a process that is nobody's child any more


def main(state: Path) -> None:
    """Work off the queue of a workspace; leave at once if somebody does already."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it, and its children would, too
    jobs = Jobs(state)
    try:
        with FileLock(state / "runner.lock", timeout=PATIENCE):
            while (job := _next(jobs)) is not None:
                _work(jobs, job)
    except Timeout:
        return


def _next(jobs: Jobs) -> Job | None:
    return next((job for job in jobs.all() if job.ended is None), None)


def _work(jobs: Jobs, job: Job) -> None:
    with jobs.lock:
        if job.ended is not None:  # taken out in the meantime
            return
        child = None if job.started else _start(job, jobs)
    if child is not None:
        job.end(child.wait())
        return
    while job.process() is not None:  # begun by a runner that is no more
        time.sleep(POLL)
    job.end(None)


def _start(job: Job, jobs: Jobs) -> subprocess.Popen[bytes]:
    command = python("slider_plugin", *job.arguments)
    quiet = {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "100", "PYTHONUNBUFFERED": "1"}
    with (job.folder / "log").open("ab") as log:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            cwd=jobs.workspace, env=environment(**quiet), start_new_session=True,
        )  # fmt: skip
    job.begin(child)
    return child


if __name__ == "__main__":
    main(Path(sys.argv[1]))

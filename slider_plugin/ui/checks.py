"""`slider doctor` for the form, while it is filled in.

A child process keeps the libraries loaded and answers one configuration after the other: the same command, without its ten
seconds of start. It holds some hundred megabytes, and is ended after a time without questions, and with the server.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from slider_plugin.ui.children import environment, python

IDLE = 600.0
"""Seconds without a question after which the child is ended."""

WIDTH = "96"


@dataclass(frozen=True, slots=True)
class Finding:
    """What `slider doctor` said."""

    code: int
    """Its exit code; 0: the run can begin."""

    plan: str
    warnings: tuple[str, ...]
    problems: tuple[str, ...]

    def about(self, bucket: str) -> list[str]:
        """What is said of one bucket."""
        start = f"bucket {bucket!r}: "
        return [line.partition(start)[2] for line in (*self.problems, *self.warnings) if start in line]


class Checker:
    """Answers one question at a time; the others wait."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._asked = time.monotonic()

    def ask(self, *arguments: str) -> Finding:
        """`slider doctor` with these arguments."""
        with self._lock:
            self._asked = time.monotonic()
            for _ in range(2):  # one that was ended from outside is started again
                child = self._started()
                try:
                    return finding(**json.loads(_exchange(child, arguments)))
                except (OSError, ValueError):
                    self._end()
            return Finding(1, "", (), ("the check ended before it could answer; `slider doctor` on the command line says why",))

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._end()

    def tidy(self) -> None:
        """End the child if nobody has asked for a while."""
        if time.monotonic() - self._asked > IDLE:
            self.close()

    def _started(self) -> subprocess.Popen[str]:
        if self._child is None or self._child.poll() is not None:
            self._child = subprocess.Popen(
                python("slider_plugin.ui.checks"),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
                cwd=self._folder, env=environment(NO_COLOR="1", TERM="dumb", COLUMNS=WIDTH), start_new_session=True,
            )  # fmt: skip
        return self._child

    def _end(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None


def finding(code: int, out: str, err: str) -> Finding:
    """What a command's exit code and its two outputs tell."""
    warnings = [line.partition("warning: ")[2] for line in err.splitlines() if line.startswith("warning: ")]
    plan = [line.rstrip() for line in out.splitlines()]
    warnings += [line.partition("warning: ")[2] for line in plan if line.lstrip().startswith("warning: ")]
    kept = "\n".join(line for line in plan if not line.lstrip().startswith("warning: "))
    return Finding(code, kept, tuple(dict.fromkeys(warnings)), tuple(problems_in(err)) if code else ())


def problems_in(err: str) -> list[str]:
    """The problems of the message that a command ended with; those of a list one by one."""
    _, found, message = err.rpartition("error: ")
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    listed = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    return listed or (lines if found else [err.strip()])


def _exchange(child: subprocess.Popen[str], arguments: Sequence[str]) -> str:
    assert child.stdin and child.stdout
    child.stdin.write(json.dumps(arguments) + "\n")
    child.stdin.flush()
    return child.stdout.readline()


# --- The child --------------------------------------------------------------------------------------------------------


def answer() -> None:
    """Read the arguments of one command from each line of standard input, and answer each with a line of JSON."""
    from slider_plugin.cli import execute

    answers = sys.stdout
    for line in sys.stdin:
        with _captured() as (out, err):
            code = execute(["doctor", *json.loads(line)])
        answers.write(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}) + "\n")
        answers.flush()


@contextlib.contextmanager
def _captured() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield out, err


if __name__ == "__main__":
    answer()

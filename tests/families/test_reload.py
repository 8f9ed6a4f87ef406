"""Every family's slider, written here, read in a new process: the same answer of the denoiser, bit for bit.

It is a rule of the kit; one process reads them all, since starting one takes longer than everything that it does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from slider_plugin.registry import Plugins
from slider_plugin.testing import reload
from slider_plugin.testing.rules import attached, compare_answers
from slider_plugin.testing.subject import Subject

FAMILIES = sorted(Path(__file__).parents[2].joinpath("slider_plugin", "architectures").glob("[!_]*.py"))


@pytest.fixture(scope="module")
def reread(
    tmp_path_factory: pytest.TempPathFactory, tiny_folders: Callable[[str], Path]
) -> dict[str, tuple[reload.Answers, reload.Answers]]:
    """By family the answers here and there."""
    room = tmp_path_factory.mktemp("reload")
    here, saved = {}, {}
    for name in [path.stem for path in FAMILIES]:
        subject = Subject.load(Plugins.discover().load(name), tiny_folders(name))
        adapter = attached(subject, trained=True)
        here[name] = reload.answers(subject, adapter)
        saved[name] = (tiny_folders(name), reload.save(subject, adapter, room / f"{name}.safetensors"))
    there = reload.answers_elsewhere(saved, room)
    return {name: (here[name], there[name]) for name in saved}


@pytest.mark.parametrize("family", [path.stem for path in FAMILIES])
def test_a_new_process_answers_the_same(reread: dict[str, tuple[reload.Answers, reload.Answers]], family: str) -> None:
    compare_answers(*reread[family])

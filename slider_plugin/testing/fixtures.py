"""The fixtures of the kit for pytest, for tests that ask for them: `pytest_plugins = ["slider_plugin.testing"]`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from slider_plugin.registry import Plugins

if TYPE_CHECKING:
    from slider_plugin.testing.subject import Subject


@pytest.fixture(scope="session")
def slider_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a family's tiny random pipeline, built once in a session."""
    from slider_plugin.testing.subject import write_tiny

    root = tmp_path_factory.mktemp("slider-tiny")
    return lambda family: write_tiny(Plugins.discover().facts(family), root / family)


@pytest.fixture
def slider_subject(slider_tiny: Callable[[str], Path]) -> Callable[[str], Subject]:
    """A family on its tiny pipeline, loaded anew at each call, for the rules of the kit."""
    from slider_plugin.testing.subject import Subject

    return lambda family: Subject.load(Plugins.discover().load(family), slider_tiny(family))


@pytest.fixture
def isolated_plugins(monkeypatch: pytest.MonkeyPatch) -> Callable[[Iterable[str]], None]:
    """Leave out every third party's plugin but those of the distributions that the call names."""
    return lambda distributions: monkeypatch.setenv("SLIDER_PLUGIN_ALLOW", ",".join(["slider-plugin", *distributions]))

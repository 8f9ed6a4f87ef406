"""A site-packages folder for tests: real metadata that importlib.metadata reads, without an installation."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slider_plugin.errors import PluginError
from slider_plugin.registry import Plugins

FAMILY = """
from slider_hooks import *

FAMILY = Family(name="{name}", title="A title", denoiser="unet", denoiser_class="Net", noise=Flow(), {more})
"""


class Site:
    """A site-packages folder: modules, and distributions that say which plugins are in them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.folders = folder, [folder]

    def module(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def family(self, name: str, distribution: str = "", more: str = "", code: str = "", module: str = "") -> None:
        """Install a family in a module of its own, with more facts and more code."""
        module = module or f"module_{name}"
        self.module(f"{module}.py", FAMILY.format(name=name, more=more) + inspect.cleandoc(code))
        self.install(distribution or f"dist-{name}", {name: module})

    def install(
        self, distribution: str, families: dict[str, str], version: str = "1.0", kind: str = "architectures", egg: bool = False,
        folder: Path | None = None,
    ) -> None:  # fmt: skip
        suffix, metadata = ("egg-info", "PKG-INFO") if egg else ("dist-info", "METADATA")
        info = (folder or self.folder) / f"{distribution.replace('-', '_')}-{version}.{suffix}"
        info.mkdir(parents=True, exist_ok=True)
        (info / metadata).write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        points = "\n".join(f"{name} = {target}" for name, target in families.items())
        (info / "entry_points.txt").write_text(f"[slider_plugin.{kind}]\n{points}\n\n[console_scripts]\nother = other:main\n")

    def plugins(self, **environ: str) -> Plugins:
        importlib.invalidate_caches()
        found = importlib.metadata.distributions(path=[str(folder) for folder in self.folders])
        points = [point for dist in found for point in dist.entry_points]
        return Plugins.discover(points, {f"SLIDER_PLUGIN_{key}": value for key, value in environ.items()})

    def statuses(self, **environ: str) -> dict[str, str]:
        return {row.key: row.status for row in self.plugins(**environ).rows()}


def error_of(call: Callable[[], Any]) -> str:
    with pytest.raises(PluginError) as caught:
        call()
    return str(caught.value)

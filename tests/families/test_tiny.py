"""Tiny pipelines are a matter of their seed: the same files in every process, small, and free of this machine's paths."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from slider_plugin.registry import Plugins

BUILD = """
import json, sys
from pathlib import Path
from slider_plugin.registry import Plugins
for name, folder in json.loads(sys.argv[1]).items():
    Plugins.discover().facts(name).tiny(Path(folder))
"""
KINDS = ("flux", "lumina2", "z_image", "hunyuan_video", "kolors")  # tokenizers of every kind
LIMIT = 25 * 2**20


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors", ".model")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_in_every_process(tmp_path: Path, tiny_folders: Callable[[str], Path]) -> None:
    there = {name: str(tmp_path / name) for name in KINDS}
    result = subprocess.run([sys.executable, "-c", BUILD, json.dumps(there)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    for name in KINDS:
        assert digests(tiny_folders(name)) == digests(tmp_path / name), name


@pytest.mark.parametrize("name", sorted(Plugins.discover().families()))
def test_small(name: str, tiny_folders: Callable[[str], Path]) -> None:
    assert sum(path.stat().st_size for path in tiny_folders(name).rglob("*") if path.is_file()) < LIMIT

"""Every family's slider, written here, read in a new process: the same answer of the denoiser, bit for bit.

One process reads them all, since starting one takes longer than everything that it does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slider_plugin.export import export_diffusers
from slider_plugin.registry import Plugins
from slider_plugin.testing.rules import attached
from slider_plugin.testing.subject import PROMPTS, Subject

READ_THEM = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from slider_plugin.registry import Plugins
from slider_plugin.stages import attach_file
from slider_plugin.testing.subject import PROMPTS, Subject

for name, (folder, adapter, out) in json.loads(sys.stdin.read()).items():
    subject = Subject.load(Plugins.discover().load(name), Path(folder))
    latents, text = subject.latents(2), subject.conditioning(PROMPTS)
    loaded = attach_file(Path(adapter), subject.family, subject.components)
    answers = {}
    with torch.no_grad():
        for scale in (-1.0, 0.0, 1.0):
            with loaded.scaled(scale):
                answers[f"{scale:+g}"] = subject.predict(latents, text).contiguous()
    save_file(answers, out)
"""


@pytest.fixture(scope="module")
def reread(tmp_path_factory: pytest.TempPathFactory, tiny_folders: Callable[[str], Path]) -> dict[str, tuple[dict, dict]]:
    """By family the answers here and there, by scale."""
    root = tmp_path_factory.mktemp("reload")
    here: dict[str, dict[str, torch.Tensor]] = {}
    manifest: dict[str, tuple[str, str, str]] = {}
    for name in Plugins.discover().families():
        subject = Subject.load(Plugins.discover().load(name), tiny_folders(name))
        latents, text = subject.latents(2), subject.conditioning(PROMPTS)
        adapter = attached(subject, trained=True)
        path = root / f"{name}.safetensors"
        denoiser = subject.family.facts.denoiser
        export_diffusers(adapter.state(), adapter.scalings(), denoiser, {"slider.family": name}, path, torch.float32)
        here[name] = {}
        with torch.no_grad():
            for scale in (-1.0, 0.0, 1.0):
                with adapter.scaled(scale):
                    here[name][f"{scale:+g}"] = subject.predict(latents, text)
        manifest[name] = (str(tiny_folders(name)), str(path), str(root / f"{name}.answers"))
    result = subprocess.run(
        [sys.executable, "-c", READ_THEM], input=json.dumps(manifest), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return {name: (here[name], load_file(out)) for name, (_, _, out) in manifest.items()}


@pytest.mark.parametrize("family", sorted(Plugins.discover().families()))
def test_a_new_process_answers_the_same(reread: dict[str, tuple[dict, dict]], family: str) -> None:
    here, there = reread[family]
    for scale, answer in here.items():
        assert torch.equal(answer, there[scale]), f"at {scale} the answers differ by {(answer - there[scale]).abs().max()}"
    assert not torch.equal(here["+1"], here["-1"])

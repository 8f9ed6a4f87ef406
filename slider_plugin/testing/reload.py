"""Does a slider that was written here answer the same in a new process? Several families share one: starting it is slow."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slider_plugin.adapters.attach import attach_file
from slider_plugin.adapters.base import Adapter
from slider_plugin.registry import Plugins
from slider_plugin.testing.subject import PROMPTS, Subject
from slider_plugin.validation.render import ScalableAdapter

SCALES = (-1.0, 0.0, 1.0)
Answers = dict[str, Tensor]
"""By scale, what the denoiser answers."""


def answers(subject: Subject, adapter: ScalableAdapter) -> Answers:
    """The denoiser's answers to the test media of two prompts at three scales."""
    latents, text = subject.latents(2), subject.conditioning(PROMPTS)
    found = {}
    with torch.no_grad():
        for scale in SCALES:
            with adapter.scaled(scale):
                found[f"{scale:+g}"] = subject.predict(latents, text).contiguous()
    return found


def save(subject: Subject, adapter: Adapter, path: Path) -> Path:
    """Export the adapter as `slider train` does."""
    facts = subject.family.facts
    metadata = {"slider.family": facts.name, **adapter.facts()}
    return adapter.export(path, facts.denoiser, metadata, torch.float32).path


def answers_elsewhere(saved: Mapping[str, tuple[Path, Path]], room: Path) -> dict[str, Answers]:
    """What a new process answers, by family.

    Args:
        saved: by family the folder of its tiny pipeline and the slider's file.
        room: a folder for what the process writes.

    Raises:
        AssertionError: the process failed, with the end of what it said.
    """
    jobs = {name: [*map(str, paths), str(room / f"{name}.answers")] for name, paths in saved.items()}
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"a new process could not read the slider: {done.stderr.strip()[-2000:]}"
    return {name: load_file(out) for name, (*_, out) in jobs.items()}


def _serve() -> None:
    """The new process: jobs on standard input."""
    for name, (folder, file, out) in json.load(sys.stdin).items():
        subject = Subject.load(Plugins.discover().load(name), Path(folder))
        save_file(answers(subject, attach_file(Path(file), subject.family, subject.components)), out)


if __name__ == "__main__":
    _serve()

"""Measure a pipeline that no family describes: which modules of its denoiser a slider may train.

`probe_folder` loads a diffusers pipeline, lets it begin to draw, and watches its denoiser: once as it is, once with more
text, once with a wider image. No name decides; what a module sees is what its input changes with.
"""

from __future__ import annotations

from pathlib import Path

from slider_plugin.probing.result import Probe, Role, Stream

__all__ = ["Probe", "Role", "Stream", "probe_folder"]


def probe_folder(folder: Path) -> Probe:
    """Probe the diffusers pipeline in a folder, in float32 on the processor.

    Raises:
        UserError: the folder holds no pipeline that can be loaded and asked for an image by a prompt alone.
    """
    from slider_plugin.probing.probe import probe

    return probe(folder)

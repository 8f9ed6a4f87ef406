"""`slider targets --probe DIR`: what a probe found, for people and for programs."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from slider_plugin.probing.result import Probe

if TYPE_CHECKING:
    from rich.console import RenderableType

KIND_FIELDS = ("self_attention", "joint_attention", "projections", "io", "time", "forbidden", "standard")
"""Fields of `Targets` that a probe proposes."""


def facts(probe: Probe) -> dict[str, Any]:
    """What `--json` prints; the names are an interface."""
    return {
        "folder": probe.folder,
        "pipeline_class": probe.pipeline_class,
        "denoiser": probe.denoiser,
        "denoiser_class": probe.denoiser_class,
        "matched": len(probe.targets()),
        "joint": len(probe.targets()) - len(probe.targets(include_joint=False)),
        "targets": {name: getattr(probe.proposal, name) for name in KIND_FIELDS},
        "slider": probe.proposal.slider(),
        "slider_without_joint": probe.proposal.slider(include_joint=False),
        "modules": {name: {"sees": probe.streams[name], "is": probe.roles[name]} for name in probe.streams},
        "unsure": dict(probe.unsure),
        "notes": list(probe.notes),
    }


def as_json(probe: Probe) -> str:
    """The facts as one JSON object."""
    return json.dumps(facts(probe), indent=2)


def render(probe: Probe) -> RenderableType:
    """Modules by pattern, the proposal as a family module states it, and what it is unsure of; no line is broken."""
    from rich.text import Text

    lines = [
        f"{probe.pipeline_class}: the {probe.denoiser} is of the class {probe.denoiser_class}",
        *probe.notes,
        "",
        *_modules(probe),
        "",
        *_proposal(probe),
    ]
    if probe.unsure:
        lines += ["", "unsure, look at these yourself:", *(f"  {name}: {reason}" for name, reason in probe.unsure.items())]
    return Text("\n".join(lines), no_wrap=True, overflow="ignore")


def _modules(probe: Probe) -> list[str]:
    counts = Counter((pattern(name), probe.streams[name], probe.roles[name]) for name in probe.streams)
    rows = [("modules", "sees", "is", "count")]
    rows += [(name, stream, "" if role == "other" else role, str(count)) for (name, stream, role), count in counts.items()]
    width = max(len(row[0]) for row in rows)
    return [f"{name:<{width}}  {stream:<6}  {role:<5}  {count:>5}" for name, stream, role, count in rows]


def pattern(name: str) -> str:
    """A module's name with N for each number between dots."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "N", name)


def _proposal(probe: Probe) -> list[str]:
    stated = [(name, getattr(probe.proposal, name)) for name in KIND_FIELDS]
    lines = ["targets=Targets(", *(f'    {name}=r"{expression}",' for name, expression in stated if expression), "),", ""]
    for title, include_joint in (("slider", True), ("without joint", False)):
        expression = probe.proposal.slider(include_joint)
        lines.append(f"{title}: {len(probe.targets(include_joint))} modules, {expression or 'none'}")
    return lines

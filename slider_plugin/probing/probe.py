"""The probe itself: open, observe, trace, judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from slider_hooks import Targets
from slider_plugin.probing.drawing import Observed, observe
from slider_plugin.probing.expressions import Names
from slider_plugin.probing.opening import open_pipeline
from slider_plugin.probing.result import Probe, Role, Stream
from slider_plugin.probing.roles import Roles, first_layers, last_layers, roles
from slider_plugin.probing.streams import Seen, seen
from slider_plugin.targets import adaptable_modules

SLIDING: tuple[Role, ...] = ("self", "joint", "proj", "io", "time")


def probe(folder: Path) -> Probe:
    """Probe the pipeline of a folder; see `probe_folder`."""
    return probe_pipeline(open_pipeline(folder), str(folder))


def probe_pipeline(pipeline: Any, where: str) -> Probe:
    """Probe a loaded pipeline.

    Args:
        pipeline: in float32 on the processor.
        where: what it was loaded from, for the report.
    """
    observed = observe(pipeline)
    denoiser: nn.Module = pipeline.components[observed.component]
    return judged(denoiser, observed, type(pipeline).__name__, where)


def judged(denoiser: nn.Module, observed: Observed, pipeline_class: str, where: str) -> Probe:
    """What follows from the calls of a denoiser."""
    adaptable = list(adaptable_modules(denoiser))
    found = seen(denoiser, observed)
    judged = roles(found, observed, denoiser)
    streams: dict[str, Stream] = {name: found.streams.get(name, "unused") for name in adaptable}
    by_name: dict[str, Role] = {name: judged.by_name.get(name, "other") for name in adaptable}
    questions = found.unsure | judged.unsure
    return Probe(
        folder=where,
        pipeline_class=pipeline_class,
        denoiser=observed.component,
        denoiser_class=_class_name(denoiser),
        streams=streams,
        roles=by_name,
        proposal=_proposal(Names(denoiser, adaptable), streams, by_name, judged),
        unsure={name: questions[name] for name in adaptable if name in questions},
        notes=_notes(found, observed, by_name),
    )


def _class_name(denoiser: nn.Module) -> str:
    import diffusers

    kind = type(denoiser)
    return kind.__name__ if getattr(diffusers, kind.__name__, None) is kind else f"{kind.__module__}:{kind.__name__}"


def _proposal(names: Names, streams: dict[str, Stream], by_name: dict[str, Role], judged: Roles) -> Targets:
    def of(*wanted: Role) -> list[str]:
        return [name for name, role in by_name.items() if role in wanted]

    language = {name for name in by_name if name in judged.language and by_name[name] not in SLIDING}
    left_alone = language | set(of("cross"))
    idle = {name for name, role in by_name.items() if role == "other" and streams[name] in ("fixed", "unused")}
    return Targets(
        self_attention=names.expression(of("self")),
        joint_attention=names.expression(of("joint")),
        projections=names.expression(of("proj")),
        io=names.expression(of("io")),
        time=names.expression(of("time")),
        forbidden=names.covering(left_alone, lambda name: name in left_alone or name in idle),
        standard=names.expression(
            [name for name in of("self", "joint", "cross") if streams[name] in ("image", "joint", "text")]
        ),
    )


def _notes(found: Seen, observed: Observed, by_name: dict[str, Role]) -> tuple[str, ...]:
    notes = [f"drawn at {observed.request}", f"text: {found.how}"]
    for what, layers in (("first", first_layers(found, observed)), ("last", last_layers(found))):
        if other := sorted(layers - by_name.keys()):
            notes.append(f"the {what} layer is {', '.join(other)}, which no adapter can wrap")
        elif not layers:
            notes.append(f"no {what} layer was found")
    if not {"self", "joint"} & set(by_name.values()):
        notes.append("no attention of image tokens to image tokens was found")
    if "time" not in by_name.values():
        notes.append("no time embedding was found: the time goes straight into the blocks, or is shared with other things")
    return tuple(notes)

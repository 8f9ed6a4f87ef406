"""`slider targets FAMILY`: where a slider attaches on the published model, or on one in a folder. Loads no weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slider_hooks import Family, ResolvedTargets, TargetRequest
from slider_plugin.errors import UserError
from slider_plugin.lycoris_config import problems_of
from slider_plugin.preflight import has_pipeline_folders, meta_denoiser
from slider_plugin.reference import reference_denoiser
from slider_plugin.targets import DOCUMENTED, TargetPlan, match, resolve_targets, suffix_expression

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch.nn import Module

    from slider_plugin.family import LoadedFamily


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFacts:
    """What `--json` prints; the names are an interface."""

    family: str
    flavour: str | None
    model_class: str
    matched: int
    joint: int
    """Of these, modules that see text and image tokens in one sequence."""

    documented_list_matched: int
    """Modules that the specification's list for this family matches."""

    by_kind: dict[str, int]
    patterns: list[str]
    """Regular expressions over full module names, each matched as a whole."""

    dead: list[str]
    """Patterns that match nothing."""

    forbidden_matched: list[str]
    """Modules of cross-attention and text that the patterns reach; empty for a slider that can be trusted."""


def target_facts(
    family: LoadedFamily, model: Path | None = None, flavour: str | None = None, include_joint: bool = True
) -> TargetFacts:
    """The slider targets of a published version, or of the pipeline folder `model`.

    Raises:
        UserError: no such flavour or folder, a folder of another family, or targets that break the rule of sliders.
    """
    if model is not None and flavour is not None:
        raise UserError("--model and --flavour: give one of them; a folder is its own version")
    denoiser = _in_folder(family, model) if model is not None else reference_denoiser(family.facts, flavour)
    plan = resolve_targets(family, denoiser, TargetRequest(slider=True, include_joint=include_joint))
    return TargetFacts(
        family=family.facts.name,
        flavour=flavour if model is not None else flavour or family.facts.default_flavour,
        model_class=type(denoiser).__name__,
        matched=len(plan.modules),
        joint=plan.joint,
        documented_list_matched=documented_matches(family.facts, denoiser),
        by_kind=plan.by_kind,
        patterns=_patterns(family.facts, plan, include_joint),
        dead=list(plan.dead),
        forbidden_matched=list(plan.forbidden),
    )


def documented_matches(family: Family, denoiser: Module) -> int:
    """How many modules the specification's own list matches, by its suffix rule."""
    expression = suffix_expression(family.targets.documented or DOCUMENTED)
    return len(match(family, denoiser, ResolvedTargets(expression=expression, source="documented")).modules)


def _in_folder(family: LoadedFamily, model: Path) -> Module:
    from slider_plugin.loading import check_folder, model_folder

    folder = model_folder(family.facts, str(model))
    if folder is not None and has_pipeline_folders(family):
        check_folder(family.facts, folder)
    denoiser = meta_denoiser(family, str(model))
    if denoiser is None:
        raise UserError(f"{model} holds no {family.facts.denoiser}/config.json that the family's class could be built from")
    return denoiser


def _patterns(family: Family, plan: TargetPlan, include_joint: bool) -> list[str]:
    whole = plan.expression == family.targets.slider(include_joint)  # else the family's hook has answered something of its own
    return list(family.targets.by_kind(include_joint).values()) if whole else [plan.expression]


def lycoris_json(family: Family, algorithm: str, include_joint: bool = True) -> str:
    """A `lycoris_config.json` for the family's slider targets. Raises UserError for an algorithm that makes no slider."""
    from slider_plugin.adapters.presets import preset_for

    if problem := next(problems_of({"algo": algorithm}), None):
        raise UserError(f"--lycoris: {problem}")
    sizes = {"algo": algorithm, "multiplier": 1.0, "linear_dim": 4, "linear_alpha": 1.0}
    return json.dumps(sizes | {"apply_preset": preset_for(family, include_joint)}, indent=2)


def as_json(facts: TargetFacts) -> str:
    """The facts as one JSON object."""
    return json.dumps(asdict(facts), indent=2)


def render(facts: TargetFacts, limits: str) -> RenderableType:
    """The facts as a table for people."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows = {
        "family": facts.family + (f" ({facts.flavour})" if facts.flavour else ""),
        "model": facts.model_class,
        "matched": f"{facts.matched} modules, {facts.joint} of them joint (text and image tokens in one sequence)",
        "by kind": ", ".join(f"{count} {kind}" for kind, count in facts.by_kind.items()),
        "patterns": "\n".join(facts.patterns),
        "documented list": f"matches {facts.documented_list_matched} modules",
        "dead": _listing(facts.dead),
        "reach text": _listing(facts.forbidden_matched),
        "limits": limits,
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(value))
    return table


def _listing(names: Sequence[str]) -> str:
    return "\n".join(names)

"""Where the adapter attaches: from what a plugin answers to the modules of the real model, with everything that is wrong.

An answer is one regular expression over full module names, matched as a whole (ARCHITECTURES: several families cannot be
written as suffix lists). Slider targets are held to the rule they stand for: something matched, some attention matched,
nothing in cross-attention or a text-only branch. Explicit targets and the fallback get the same findings as warnings.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from slider_hooks import Family, ResolvedTargets, TargetRequest, Targets
from slider_plugin.errors import UserError

if TYPE_CHECKING:
    from torch.nn import Module

    from slider_plugin.family import LoadedFamily

DOCUMENTED: tuple[str, ...] = (
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
    "attn1.to_qkv", "to_qkv",
    "proj_in", "proj_out",
    "conv_in", "conv_out",
    "time_embedding.linear_1", "time_embedding.linear_2",
)  # fmt: skip
"""The specification's default slider targets, matched by suffix."""

LISTED_AT_MOST = 6  # module names in one message


def suffix_expression(entries: Sequence[str]) -> str:
    """PEFT's list rule as one expression: `name == entry or name.endswith("." + entry)` (peft tuners_utils.py:2337)."""
    return r"(?:.*\.)?(?:" + "|".join(re.escape(e) for e in entries) + ")"


def alternatives(expression: str) -> list[str]:
    """The alternatives of an expression at its top level, groups taken off if one group spans it all."""
    parts, depth, start, escaped, in_class = [], 0, 0, False, False
    for i, char in enumerate(expression):
        if escaped or char == "\\":
            escaped = not escaped
        elif in_class or char == "[":
            in_class = char != "]"
        elif char in "()":
            depth += 1 if char == "(" else -1
        elif char == "|" and depth == 0:
            parts.append(expression[start:i])
            start = i + 1
    return [*parts, expression[start:]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetPlan:
    """The modules that the adapter attaches to, and what was found on the way."""

    expression: str
    source: str
    modules: tuple[str, ...]
    parameters: int
    """Trainable parameters of a LoRA of rank 1 on these modules."""
    trainable: int | None = None
    """Trainable parameters of the adapter itself, where it is no LoRA."""
    by_kind: dict[str, int] = field(default_factory=dict)
    joint: int = 0
    dead: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def resolve_targets(
    family: LoadedFamily, denoiser: Module, request: TargetRequest, rank: int = 1, strict: bool = False
) -> TargetPlan:
    """Ask the plugin, match on the real model (the meta device will do) and check the rule of sliders.

    Raises:
        UserError: nothing matched anywhere, a slider target reaches cross-attention or text, no attention was matched, a
            target cannot carry an adapter; under `strict` any warning, too.
    """
    answer = family.resolve_lora_targets(denoiser, None, request)
    plan = match(family.facts, denoiser, answer, rank)
    if not plan.modules and answer.source in ("slider", "documented"):
        plan = _fallback(family, denoiser, request, plan, rank)
    if not plan.modules:
        raise UserError(_nothing_matched(family.facts, denoiser, plan))
    if plan.source in ("slider", "documented"):
        _assert_slider_rule(family.facts, plan)
    if strict and plan.warnings:
        raise UserError("targets, under --strict: " + "; ".join(plan.warnings))
    return plan


def resolve_on_controlnet(
    family: LoadedFamily, denoiser: Module, controlnet: Module, request: TargetRequest, rank: int = 1, strict: bool = False
) -> TargetPlan:
    """The same for a ControlNet. What it shares with the denoiser is the denoiser's, and is left out.

    Raises:
        UserError: nothing matched, or a slider target reaches cross-attention or text; under `strict` any warning, too.
    """
    answer = family.resolve_lora_targets(denoiser, controlnet, request)
    denoisers = {id(module) for module in denoiser.modules()}
    shared = {name for name, module in adaptable_modules(controlnet).items() if id(module) in denoisers}
    plan = match(family.facts, controlnet, answer, rank, without=shared)
    if not plan.modules:
        raise UserError(_nothing_matched(family.facts, controlnet, plan))
    if plan.source == "slider" and plan.forbidden:
        raise UserError(f"ControlNet targets of {family.facts.name} reach cross-attention or text: {listed(plan.forbidden)}")
    if strict and plan.warnings:
        raise UserError("targets, under --strict: " + "; ".join(plan.warnings))
    return plan


def with_layers(plan: TargetPlan, model: Module, layers: Collection[str], kind: str) -> TargetPlan:
    """The plan with further modules, counted as a kind of their own; its expression names them, too."""
    more = [name for name in layers if name not in plan.modules]
    if not more:
        return plan
    adaptable = adaptable_modules(model)
    modules = tuple(name for name in adaptable if name in {*plan.modules, *more})
    return replace(
        plan,
        expression="|".join([plan.expression, *map(re.escape, more)]),
        modules=modules,
        parameters=sum(_rank_one_parameters(adaptable[name]) for name in modules),
        by_kind={**plan.by_kind, kind: len(more)},
    )


def match(
    family: Family, denoiser: Module, answer: ResolvedTargets, rank: int = 1, without: Collection[str] = ()
) -> TargetPlan:
    """Match one answer on the model, `without` some modules, and do not judge it. Raises UserError if it is no expression."""
    pattern = _compile(answer.expression, family)
    adaptable = {name: module for name, module in adaptable_modules(denoiser).items() if name not in without}
    names = tuple(n for n in adaptable if pattern.fullmatch(n)) if answer.expression else ()
    forbidden = tuple(n for n in names if family.targets.forbidden and re.fullmatch(family.targets.forbidden, n))
    by_kind = kinds_of(family.targets, names)
    dead = tuple(a for a in _parts(answer, family.targets) if not any(re.fullmatch(a, n) for n in adaptable))
    _assert_rank_fits(denoiser, names, rank)
    plan = TargetPlan(
        expression=answer.expression,
        source=answer.source,
        modules=names,
        parameters=sum(_rank_one_parameters(adaptable[n]) for n in names),
        by_kind=by_kind,
        joint=by_kind.get("joint", 0),
        dead=tuple(_readable(a) for a in dead),
        forbidden=forbidden,
    )
    return _with_warnings(plan)


def adaptable_modules(denoiser: Module) -> dict[str, Module]:
    """The modules that a LoRA can wrap, by full name: Linear and convolutions (peft lora/model.py:556)."""
    from torch import nn

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {name: module for name, module in denoiser.named_modules() if isinstance(module, kinds)}


def _compile(expression: str, family: Family) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise UserError(f"the targets {expression!r} of {family.name} are not a regular expression: {error}") from error


def _parts(answer: ResolvedTargets, targets: Targets) -> list[str]:
    """The alternatives of an answer that are reported one by one when they match nothing."""
    if answer.source == "slider":
        parts = [a for kind in targets.by_kind().values() for a in alternatives(kind)]
        return [p for p in parts if p in answer.expression]
    prefix = r"(?:.*\.)?(?:"
    if answer.expression.startswith(prefix) and answer.expression.endswith(")"):
        return [f"{prefix}{entry})" for entry in alternatives(answer.expression[len(prefix) : -1])]
    return [a for a in alternatives(answer.expression) if a]


def _readable(alternative: str) -> str:
    """A dead alternative as the user wrote it."""
    prefix = r"(?:.*\.)?(?:"
    return alternative[len(prefix) : -1].replace("\\", "") if alternative.startswith(prefix) else alternative


def kinds_of(targets: Targets, names: Sequence[str]) -> dict[str, int]:
    """How many of the modules each kind of slider target matches; kinds that match none are left out."""
    counts = {k: sum(bool(re.fullmatch(e, n)) for n in names) for k, e in targets.by_kind().items()}
    return {kind: count for kind, count in counts.items() if count}


def _rank_one_parameters(module: Module) -> int:
    """Parameters of a rank-1 LoRA on a module: A is (r, in, *kernel), B is (out, r)."""
    weight: Any = module.weight
    return int(weight[0].numel()) + int(weight.shape[0])


def _assert_rank_fits(denoiser: Module, names: Sequence[str], rank: int) -> None:
    """PEFT needs the rank of a grouped convolution to be a multiple of its groups."""
    grouped = {n: int(getattr(denoiser.get_submodule(n), "groups", 1)) for n in names}
    for name, groups in grouped.items():
        if groups > 1 and rank > 1 and rank % groups:
            raise UserError(
                f"{name} is a convolution in {groups} groups, and lora_rank {rank} is not a multiple of that; "
                "leave it out of the targets"
            )


def _with_warnings(plan: TargetPlan) -> TargetPlan:
    warnings = []
    if plan.forbidden and plan.source in ("explicit", "standard"):
        warnings.append(
            f"the targets reach cross-attention or text ({listed(plan.forbidden)}): language will move with the slider"
        )
    if plan.dead and plan.source == "explicit":
        warnings.append(f"these targets name no module: {listed(plan.dead)}")
    return replace(plan, warnings=plan.warnings + tuple(warnings))


def listed(names: Sequence[str]) -> str:
    """A few names and how many more there are."""
    shown = ", ".join(names[:LISTED_AT_MOST])
    return shown if len(names) <= LISTED_AT_MOST else f"{shown} and {len(names) - LISTED_AT_MOST} more"


def _fallback(family: LoadedFamily, denoiser: Module, request: TargetRequest, failed: TargetPlan, rank: int) -> TargetPlan:
    """The specification's fallback to the standard LoRA targets, said aloud."""
    standard = TargetRequest(slider=False, explicit=None, adapter=request.adapter, include_joint=request.include_joint)
    plan = match(family.facts, denoiser, family.resolve_lora_targets(denoiser, None, standard), rank)
    line = (
        f"no slider target of {family.facts.name} matches this model ({listed(failed.dead)}); using its standard LoRA targets"
    )
    return replace(plan, warnings=(line, *plan.warnings))


def _nothing_matched(family: Family, denoiser: Module, plan: TargetPlan) -> str:
    import difflib

    names = list(adaptable_modules(denoiser))
    wanted = plan.dead[0] if plan.dead else plan.expression
    leaves = sorted({re.sub(r"\d+", "N", n) for n in names})
    near = difflib.get_close_matches(wanted, leaves, n=3, cutoff=0.3) or leaves[:3]
    return (
        f"the {plan.source} targets of {family.name} match no module of {type(denoiser).__name__}: "
        f"{listed(plan.dead) or 'there are none'}. "
        f"Nearest names here: {', '.join(near)}"
    )


def _assert_slider_rule(family: Family, plan: TargetPlan) -> None:
    if plan.forbidden:
        raise UserError(
            f"slider targets of {family.name} reach cross-attention or text-only modules: {listed(plan.forbidden)}. "
            "A slider must leave language alone; mend the family's expression or give explicit targets"
        )
    states_kinds = bool(family.targets.by_kind())
    attention = plan.by_kind.get("self", 0) + plan.by_kind.get("joint", 0)
    if not attention and (states_kinds or not any("attn" in n or "attention" in n for n in plan.modules)):
        raise UserError(
            f"slider targets of {family.name} match no attention module, only {listed(plan.modules)}: "
            "such a slider has next to no effect. Give explicit targets, or turn include_joint on"
        )

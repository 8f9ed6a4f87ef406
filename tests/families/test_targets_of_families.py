"""Targets on the published geometry of every family: against counts that were measured independently, on the real classes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from slider_plugin.family import LoadedFamily
from slider_plugin.loading import on_meta
from slider_plugin.reference import reference_denoiser, reference_targets
from slider_plugin.registry import Plugins
from slider_plugin.targets import DOCUMENTED, adaptable_modules, alternatives
from slider_plugin.targets_cmd import documented_matches

MEASURED: dict[str, dict[str, dict[str, int]]] = json.loads(Path(__file__).with_name("measured.json").read_text())
"""By family and flavour ("" is the default): modules matched, of these joint, without joint ones, by the documented list."""

CASES = [(family, flavour) for family, flavours in MEASURED.items() for flavour in flavours]


@cache
def family_of(name: str) -> LoadedFamily:
    return Plugins.discover().load(name)


@pytest.mark.parametrize(("name", "flavour"), CASES)
def test_counts_are_those_that_were_measured(name: str, flavour: str) -> None:
    family, expected = family_of(name), MEASURED[name][flavour]
    plan = reference_targets(family, flavour or None)
    assert len(plan.modules) == expected["matched"]
    assert plan.joint == expected["joint"]
    assert sum(plan.by_kind.values()) == expected["matched"], "a module is of two kinds, or of none"
    assert not plan.dead and not plan.forbidden
    assert documented_matches(family.facts, reference_denoiser(family.facts, flavour or None)) == expected["documented"]


@pytest.mark.parametrize("name", [n for n, flavours in MEASURED.items() if flavours[""]["joint"]])
def test_without_joint_modules(name: str) -> None:
    family, expected = family_of(name), MEASURED[name][""]
    if family.facts.targets.self_attention:
        assert len(reference_targets(family, include_joint=False).modules) == expected["strict"]
    else:
        with pytest.raises(Exception, match="match no attention module"):
            reference_targets(family, include_joint=False)


@pytest.mark.parametrize("name", MEASURED)
def test_standard_targets_exist_and_every_pattern_lives(name: str) -> None:
    import re

    family = family_of(name)
    targets, modules = family.facts.targets, adaptable_modules(reference_denoiser(family.facts))
    assert any(re.fullmatch(targets.standard, module) for module in modules), "the fallback would match nothing"
    dead = [a for a in alternatives(targets.forbidden) if not any(re.fullmatch(a, module) for module in modules)]
    assert len(dead) < len(alternatives(targets.forbidden)), f"nothing is forbidden: {dead}"
    assert targets.documented != DOCUMENTED, "the general list need not be repeated"


@pytest.mark.parametrize("name", MEASURED)
def test_controlnet_expressions_match_their_class(name: str) -> None:
    import re

    import diffusers

    facts = family_of(name).facts
    assert bool(facts.controlnet_class) == bool(facts.targets.controlnet)
    if not facts.controlnet_class:
        return
    controlnet: Any = on_meta(getattr(diffusers, facts.controlnet_class), {})
    modules = adaptable_modules(controlnet)
    dead = [a for a in alternatives(facts.targets.controlnet) if not any(re.fullmatch(a, module) for module in modules)]
    assert not dead
    matched = [module for module in modules if re.fullmatch(facts.targets.controlnet, module)]
    assert not [m for m in matched if re.search(r"add_[qkv]_proj|attn2|context|cond_embedding", m)]
    assert all(parameter.device == torch.device("meta") for parameter in controlnet.parameters())

"""Targets on the published geometry of every family: against counts that were measured independently, on the real classes."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from slider_hooks import TargetRequest
from slider_plugin.family import LoadedFamily
from slider_plugin.loading import on_meta
from slider_plugin.reference import reference_denoiser
from slider_plugin.registry import Plugins
from slider_plugin.targets import DOCUMENTED, TargetPlan, adaptable_modules, alternatives, resolve_targets
from slider_plugin.targets_cmd import documented_matches

MEASURED: dict[str, dict[str, dict[str, int]]] = json.loads(Path(__file__).with_name("measured.json").read_text())
"""By family and flavour ("" is the default): modules matched, of these joint, without joint ones, by the documented list."""

ALL_JOINT = {"omnigen"}  # one transformer for text and image, with no part for text alone

CONTROLNETS: dict[str, dict[str, Any]] = {
    "ZImageControlNetModel": {
        "control_layers_places": [0, 5, 10, 15, 20, 25],
        "control_refiner_layers_places": [0, 1],
        "control_in_dim": 33,
    }
}
"""Arguments of classes that have no defaults."""

CASES = [(family, flavour) for family, flavours in MEASURED.items() for flavour in flavours]


@cache
def family_of(name: str) -> LoadedFamily:
    return Plugins.discover().load(name)


@cache
def published(name: str, flavour: str = "") -> torch.nn.Module:
    return reference_denoiser(family_of(name).facts, flavour or None)


def targets(name: str, flavour: str = "", include_joint: bool = True) -> TargetPlan:
    return resolve_targets(family_of(name), published(name, flavour), TargetRequest(slider=True, include_joint=include_joint))


@pytest.mark.parametrize(("name", "flavour"), CASES)
def test_counts_are_those_that_were_measured(name: str, flavour: str) -> None:
    family, expected = family_of(name), MEASURED[name][flavour]
    plan = targets(name, flavour)
    assert len(plan.modules) == expected["matched"]
    assert plan.joint == expected["joint"]
    assert sum(plan.by_kind.values()) == expected["matched"], "a module is of two kinds, or of none"
    assert not plan.dead and not plan.forbidden
    assert documented_matches(family.facts, published(name, flavour)) == expected["documented"]


@pytest.mark.parametrize("name", [n for n, flavours in MEASURED.items() if flavours[""]["joint"]])
def test_without_joint_modules(name: str) -> None:
    family, expected = family_of(name), MEASURED[name][""]
    if family.facts.targets.self_attention:
        assert len(targets(name, include_joint=False).modules) == expected["strict"]
    else:
        with pytest.raises(Exception, match="match no attention module"):
            targets(name, include_joint=False)


@pytest.mark.parametrize("name", MEASURED)
def test_standard_targets_exist_and_every_pattern_lives(name: str) -> None:
    family = family_of(name)
    facts, modules = family.facts.targets, adaptable_modules(published(name))
    assert any(re.fullmatch(facts.standard, module) for module in modules), "the fallback would match nothing"
    if name in ALL_JOINT:
        assert not facts.forbidden
        return
    dead = [a for a in alternatives(facts.forbidden) if not any(re.fullmatch(a, module) for module in modules)]
    assert len(dead) < len(alternatives(facts.forbidden)), f"nothing is forbidden: {dead}"
    assert facts.documented != DOCUMENTED, "the general list need not be repeated"


@pytest.mark.parametrize("name", MEASURED)
def test_controlnet_expressions_match_their_class(name: str) -> None:
    import diffusers

    facts = family_of(name).facts
    assert bool(facts.controlnet_class) == bool(facts.targets.controlnet)
    if not facts.controlnet_class:
        return
    controlnet: Any = on_meta(getattr(diffusers, facts.controlnet_class), CONTROLNETS.get(facts.controlnet_class, {}))
    modules = adaptable_modules(controlnet)
    dead = [a for a in alternatives(facts.targets.controlnet) if not any(re.fullmatch(a, module) for module in modules)]
    assert not dead
    matched = [module for module in modules if re.fullmatch(facts.targets.controlnet, module)]
    assert not [m for m in matched if re.search(r"add_[qkv]_proj|attn2|context|cond_embedding", m)]
    assert all(parameter.device == torch.device("meta") for parameter in controlnet.parameters())

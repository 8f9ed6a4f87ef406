"""Make a network of lycoris-lora for a preset, and say what it would wrap.

lycoris-lora keeps its preset in class attributes, which the next network inherits: they are set whole before each network is
made and put back after it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slider_hooks import Family
from slider_plugin.adapters.presets import Translated, check_names, translate
from slider_plugin.lycoris_config import LycorisConfig
from slider_plugin.targets import TargetPlan, kinds_of

if TYPE_CHECKING:
    from lycoris import LycorisNetwork


def make_network(denoiser: nn.Module, config: LycorisConfig, translated: Translated) -> LycorisNetwork:
    """A network of lycoris-lora for a translated preset, not yet applied; the class's state is afterwards what it was."""
    import lycoris

    with _class_state(lycoris.LycorisNetwork), quiet():
        lycoris.LycorisNetwork.apply_preset(translated.preset)
        network: LycorisNetwork = lycoris.create_lycoris(denoiser, 1.0, warn_on_unmatched=False, **config.settings())
    return network


def plan_of(family: Family, denoiser: nn.Module, config: LycorisConfig) -> TargetPlan:
    """What a preset would wrap on a model, which may be on the meta device.

    Raises:
        UserError: nothing is wrapped, or text is reached.
    """
    translated = translate(family, denoiser, config)
    plain = LycorisConfig(algo="lora", linear_dim=1)  # `full` copies weights, which a meta device has not
    with torch.device("meta"):
        network = make_network(denoiser, plain, translated)
    by_identity = {id(module): name for name, module in denoiser.named_modules()}
    names = tuple(by_identity[id(lora.org_module[0])] for lora in network.loras)
    return TargetPlan(
        expression=json.dumps(config.apply_preset.model_dump(mode="json", exclude_defaults=True), sort_keys=True),
        source="preset",
        modules=names,
        parameters=sum(p.numel() for p in network.parameters()),
        trainable=_trainable(denoiser, config, translated, names),
        by_kind=kinds_of(family.targets, names),
        warnings=(*translated.notes, *check_names(family, denoiser, names, config)),
    )


def _trainable(denoiser: nn.Module, config: LycorisConfig, translated: Translated, names: Sequence[str]) -> int | None:
    """Trainable parameters; None where some layers are trained whole, and these have no values on the meta device."""
    modules = [denoiser.get_submodule(name) for name in names]
    own = [*config.apply_preset.module_algo_map.values(), *config.apply_preset.name_algo_map.values()]
    if config.algo == "full" and not own:
        return sum(p.numel() for module in modules for p in module.parameters())
    if "full" in (config.algo, *(settings.get("algo") for settings in own)):
        return None
    network = make_network(denoiser, config, translated)
    sizes: list[int] = [p.numel() for lora in network.loras for p in lora.parameters()]
    return sum(sizes)


@contextmanager
def _class_state(network: Any) -> Iterator[None]:
    names = [name for name in vars(network) if name.isupper()]
    before = {name: getattr(network, name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(network, name, value)


@contextmanager
def quiet() -> Iterator[None]:
    """Its log says what we say better; its errors still come through."""
    from lycoris.logging import logger

    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)

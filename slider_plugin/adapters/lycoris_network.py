"""An adapter of lycoris-lora inside the denoiser: LoKr, LoHa, full and others, with a scale that can be set, also to minus.

What an algorithm's strength does is not believed but measured on each kind of layer beforehand.

lycoris-lora has one multiplier for a whole network. A scale per sample is computed here, beside its own forward: the layer
without the network, and its change of weight on the same input, `W x + scale_B * (dW x)`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slider_hooks import Family
from slider_plugin.adapters.lycoris_build import make_network, quiet
from slider_plugin.adapters.lycoris_layer import (
    beside_each_other,
    change_of,
    dtype_of,
    input_shape,
    random_weights,
    rounding_of,
    unmirrored,
)
from slider_plugin.adapters.lycoris_tensors import factor_of, readable
from slider_plugin.adapters.presets import Translated, check_names, translate
from slider_plugin.adapters.samples import Scale, scaled_rows, scales_of_samples
from slider_plugin.errors import UserError
from slider_plugin.export import ExportReport, write_verified
from slider_plugin.lycoris_config import MIRROR, LycorisConfig

CONFIG = "slider.lycoris"
"""Metadata key under which an exported file keeps its configuration."""

MIRRORED = 1e-4
"""Relative to a layer's change: how far -1 may miss the opposite of +1, or 2 the double, in float32."""


class LycorisAdapter:
    """The trainable network. Its parameters are float32 whatever the base is."""

    def __init__(self, family: Family, denoiser: nn.Module, config: LycorisConfig, seed: int = 0) -> None:
        """Wrap the modules of the preset in a frozen denoiser; the new network changes nothing.

        Args:
            family: for its targets, where the preset is one that the specification documents.
            denoiser: changed in place.
            config: algorithm, sizes and preset.
            seed: of the first weights.

        Raises:
            UserError: nothing is wrapped, text is reached, or the algorithm does not mirror on one of the layers.
        """
        self.config = config
        translated = translate(family, denoiser, config)
        denoiser.requires_grad_(False)
        self._device = next(denoiser.parameters()).device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._network = make_network(denoiser, config, translated)
        names = {id(module): name for name, module in denoiser.named_modules()}
        self._layers = {names[id(lora.org_module[0])]: lora for lora in self._network.loras}
        self.modules = tuple(self._layers)
        self.warnings = (*translated.notes, *check_names(family, denoiser, self.modules, config))
        self._network.apply_to()
        self._network.to(self._device, torch.float32)
        self._network.requires_grad_(True)
        self._scales_B: Tensor | None = None
        for name, lora in self._layers.items():
            lora.org_module[0].forward = self._per_sample(name, lora)
        self._assert_mirrors()
        self.one_scale_only = self._why_one_scale_only()
        self._set(1.0)

    # --- strength ---------------------------------------------------------------------------------------------------

    @contextmanager
    def scaled(self, scale: Scale) -> Iterator[None]:
        """Run the network at `scale` inside, and at what it was before outside. Dropout is on only where gradients are.

        See `Adapter.scaled`.
        """
        before, training = self.scale, self._network.training
        self._set(scale)
        self._network.train(torch.is_grad_enabled())
        try:
            yield
        finally:
            self._network.train(training)
            self._set(before)

    def _set(self, scale: Scale) -> None:
        scales_B = scales_of_samples(scale)
        self.scale = scale
        self._scales_B = None if scales_B is None else (scales_B * self.config.multiplier).to(self._device)
        if isinstance(scale, (int, float)):
            self._network.set_multiplier(scale * self.config.multiplier)

    def _per_sample(self, name: str, lora: Any) -> Callable[..., Tensor]:
        """The forward of a wrapped layer: lycoris-lora's own, or `W x + scale_B * (dW x)` where there is a scale for each."""
        own: Callable[..., Tensor] = lora.forward

        def forward(x: Tensor, *arguments: Any, **named: Any) -> Tensor:
            if self._scales_B is None:
                return own(x, *arguments, **named)
            base, change = beside_each_other(lora, x, *arguments, **named)
            return base + scaled_rows(change, self._scales_B.to(x.device), name).to(base.dtype)

        return forward

    @torch.no_grad()
    def _why_one_scale_only(self) -> str:
        """Measure on one layer of each kind that a scale per sample does what the same scale does for all."""
        if self.config.dropout or self.config.rank_dropout or self.config.module_dropout:
            return "its dropout draws other numbers in one forward than in separate ones"
        for name in self._kinds().values():
            miss = self._missed_by_samples(self._layers[name])
            if miss > MIRRORED:
                algorithm = type(self._layers[name]).__name__
                return f"{algorithm} misses, at a scale per sample, what it does at one scale by {miss:.2g} of its change"
        return ""

    def _missed_by_samples(self, lora: Any) -> float:
        """How far a layer at +1 and -1 in one batch misses its answers at +1 and at -1, as a share of its change."""
        with random_weights(lora) as generator:
            value = torch.randn(2, *input_shape(lora)[1:], generator=generator).to(self._device)
            layer, answers = lora.org_module[0], []
            for scale in ((1.0, -1.0), 1.0, -1.0):
                self._set(scale)
                answers.append(layer(value.to(dtype_of(lora))).double())
        both, plus, minus = answers
        size = float((plus - minus).abs().max()) / 2
        miss = max(float((both[0] - plus[0]).abs().max()), float((both[1] - minus[1]).abs().max()))
        return max(0.0, miss / max(size, 1e-12) - rounding_of(dtype_of(lora), float(plus.abs().max()), size))

    def _kinds(self) -> dict[tuple[str, str], str]:
        """The name of one layer of each algorithm and kind of layer."""
        return {(type(lora).__name__, lora.module_type): name for name, lora in self._layers.items()}

    @torch.no_grad()
    def _assert_mirrors(self) -> None:
        """Measure one layer of each kind with random weights: 0 is the base, -1 the opposite of 1, 2 its double."""
        self._network.eval()
        for (algorithm, _), name in self._kinds().items():
            worst = unmirrored(self._layers[name])
            if worst > MIRRORED:
                raise UserError(
                    f"lycoris_config: {algorithm} cannot be used: {MIRROR}, and on {name} it misses that by {worst:.2g} of its "
                    "change; use lora or lokr"
                )

    # --- weights ----------------------------------------------------------------------------------------------------

    def prepare_for_compile(self) -> None:
        """Nothing: `torch_compile` refuses lycoris-lora, whose layers take the strength as a plain number."""

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names such as `conv_in.lokr_w1` and their parameters, by module."""
        return [(f"{name}.{part}", p) for name, lora in self._layers.items() for part, p in lora.named_parameters()]

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters."""
        return [parameter for _, parameter in self.named_parameters()]

    def facts(self) -> dict[str, str]:
        """Kind, rank and alpha, and the configuration itself, by which the file is read again."""
        written = json.dumps(self.config.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
        return {
            "slider.adapter": "lycoris",
            "slider.rank": str(self.config.linear_dim),
            "slider.alpha": f"{self.config.linear_alpha:g}",
            CONFIG: written,
        }

    def tensors(self) -> dict[str, Tensor]:
        """A copy of the trainable weights, float32 on the CPU."""
        return {name: p.detach().float().cpu().clone().contiguous() for name, p in self.named_parameters()}

    def load_tensors(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Copy a checkpoint's weights in. Raises UserError unless they are exactly this network's."""
        own = dict(self.named_parameters())
        _assert_same(tensors, {name: p.shape for name, p in own.items()}, where)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])

    def state(self) -> dict[str, Tensor]:
        """The file's tensors in lycoris-lora's names, with the multiplier folded in: strength 1 there is strength 1 here."""
        state = {name: value.detach().float().cpu().clone() for name, value in self._network.state_dict().items()}
        folded = {name: value * factor_of(name, self.config.multiplier) for name, value in state.items()}
        layers = [{n: v for n, v in folded.items() if n.split(".", 1)[0] == lora.lora_name} for lora in self._network.loras]
        pairs = zip(self._network.loras, layers, strict=True)
        return {name: value for lora, layer in pairs for name, value in readable(lora, layer).items()}

    def export(self, path: Path, prefix: str, metadata: Mapping[str, str], dtype: torch.dtype) -> ExportReport:
        """Write the network as lycoris-lora's own loader reads it; see `Adapter.export`."""
        del prefix  # lycoris-lora's keys say nothing about the component
        state = self.state()
        bad = [name for name, value in state.items() if not torch.isfinite(value).all()]
        if bad:
            raise UserError(f"{bad[0]} holds values that are not finite: the training has diverged; try a lower learning_rate")
        tensors = {name: value.to(dtype).contiguous() for name, value in state.items()}
        return write_verified(path, tensors, metadata, modules=len(self.modules), ranks=(self.config.linear_dim,))


class LycorisFile:
    """A finished file inside a denoiser, by lycoris-lora's own loader."""

    def __init__(
        self, denoiser: nn.Module, state: Mapping[str, Tensor], where: str, config: LycorisConfig | None = None
    ) -> None:
        """Attach it.

        Args:
            denoiser: changed in place.
            state: the file's tensors.
            where: the file, for messages.
            config: what the file was made with, needed for the one algorithm whose files the loader cannot read (IA3).

        Raises:
            UserError: a layer of the file is not in this model, or its shape is another.
        """
        import lycoris

        wanted = {name.split(".", 1)[0] for name in state}
        known = {f"lycoris_{name}".replace(".", "_"): name for name, _ in denoiser.named_modules()}
        if foreign := sorted(wanted - known.keys()):
            raise UserError(f"{where} does not fit this model: it has no layer {foreign[0]} (and {len(foreign) - 1} more)")
        self.modules = tuple(known[name] for name in sorted(wanted))
        device = next(denoiser.parameters()).device
        try:
            with quiet():
                if config is not None and config.algo == "ia3":
                    network = make_network(denoiser, config, _exactly(self.modules))
                    network.weights_sd = dict(state)  # which apply_to loads
                else:
                    network, _ = lycoris.create_lycoris_from_weights(1.0, None, denoiser, weights_sd=dict(state))
        except (RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{where} does not fit this model: {str(error).splitlines()[0]}") from error
        network.apply_to()
        network.to(device, torch.float32).requires_grad_(False).eval()
        self._network = network
        self._network.set_multiplier(0.0)

    def changes(self) -> dict[str, Tensor]:
        """The change of each layer's weight at strength 1, in the weight's shape."""
        by_name = dict(zip(sorted({lora.lora_name for lora in self._network.loras}), self.modules, strict=True))
        return {by_name[lora.lora_name]: change_of(lora)[0].detach() for lora in self._network.loras}

    @contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """Run the file at `scale` inside, and at what it was before outside."""
        before = self._network.multiplier
        self._network.set_multiplier(scale)
        try:
            yield
        finally:
            self._network.set_multiplier(before)


def _exactly(names: Sequence[str]) -> Translated:
    preset = LycorisConfig().apply_preset.model_dump() | {
        "target_module": [],
        "target_name": [f"{re.escape(name)}$" for name in names],
    }
    return Translated(preset)


def _assert_same(given: Mapping[str, Tensor], shapes: Mapping[str, Any], where: str) -> None:
    missing, extra = sorted(set(shapes) - set(given)), sorted(set(given) - set(shapes))
    wrong = sorted(name for name in set(shapes) & set(given) if given[name].shape != shapes[name])
    if missing or extra or wrong:
        first = f"{missing[0]} is missing" if missing else f"{extra[0]} has no place here" if extra else ""
        shape = f"{wrong[0]} is {tuple(given[wrong[0]].shape)}, this run's {tuple(shapes[wrong[0]])}" if wrong else ""
        raise UserError(f"{where}: {first or shape}; use the model and the lycoris_config that it was made with")

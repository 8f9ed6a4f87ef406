"""An adapter of lycoris-lora inside the denoiser: LoKr, LoHa, full and others, with a scale that can be set, also to minus.

lycoris-lora keeps its preset in class attributes, which the next network inherits: they are set whole before each network is
made and put back after it. What an algorithm's strength does is not believed but measured on each kind of layer beforehand.

lycoris-lora has one multiplier for a whole network. A scale per sample is computed here, beside its own forward: the layer
without the network, and its change of weight on the same input, `W x + scale_B * (dW x)`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slider_hooks import Family
from slider_plugin.adapters.presets import Translated, check_names, translate
from slider_plugin.adapters.samples import Scale, scaled_rows, scales_of_samples
from slider_plugin.errors import UserError
from slider_plugin.export import ExportReport, write_verified
from slider_plugin.lycoris_config import MIRROR, LycorisConfig
from slider_plugin.targets import TargetPlan, kinds_of

if TYPE_CHECKING:
    from lycoris import LycorisNetwork

CONFIG = "slider.lycoris"
"""Metadata key under which an exported file keeps its configuration."""

CARRYING = ("lora_up.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a", "diff", "diff_b", "a2.weight", "b2.weight", "weight")
"""The tensors of a file, by the ends of their names, in which each layer's change is linear while the others stay."""

MIRRORED = 1e-4
"""Relative to a layer's change: how far -1 may miss the opposite of +1, or 2 the double, in float32."""

STRENGTHS = (0.0, 1.0, -1.0, 2.0)


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
            base, change = _beside_each_other(lora, x, *arguments, **named)
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
        with _random_weights(lora) as generator:
            value = torch.randn(2, *_input_shape(lora)[1:], generator=generator).to(self._device)
            layer, answers = lora.org_module[0], []
            for scale in ((1.0, -1.0), 1.0, -1.0):
                self._set(scale)
                answers.append(layer(value.to(_dtype_of(lora))).double())
        both, plus, minus = answers
        size = float((plus - minus).abs().max()) / 2
        miss = max(float((both[0] - plus[0]).abs().max()), float((both[1] - minus[1]).abs().max()))
        return max(0.0, miss / max(size, 1e-12) - _rounding(_dtype_of(lora), float(plus.abs().max()), size))

    def _kinds(self) -> dict[tuple[str, str], str]:
        """The name of one layer of each algorithm and kind of layer."""
        return {(type(lora).__name__, lora.module_type): name for name, lora in self._layers.items()}

    @torch.no_grad()
    def _assert_mirrors(self) -> None:
        """Measure one layer of each kind with random weights: 0 is the base, -1 the opposite of 1, 2 its double."""
        self._network.eval()
        for (algorithm, _), name in self._kinds().items():
            worst = _unmirrored(self._layers[name])
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
        folded = {name: value * _share(name, self.config.multiplier) for name, value in state.items()}
        layers = [{n: v for n, v in folded.items() if n.split(".", 1)[0] == lora.lora_name} for lora in self._network.loras]
        pairs = zip(self._network.loras, layers, strict=True)
        return {name: value for lora, layer in pairs for name, value in _readable(lora, layer).items()}

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
            with _quiet():
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
        return {by_name[lora.lora_name]: _change_of(lora)[0].detach() for lora in self._network.loras}

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


# --- lycoris-lora -----------------------------------------------------------------------------------------------------


def make_network(denoiser: nn.Module, config: LycorisConfig, translated: Translated) -> LycorisNetwork:
    """A network of lycoris-lora for a translated preset, not yet applied; the class's state is afterwards what it was."""
    import lycoris

    with _class_state(lycoris.LycorisNetwork), _quiet():
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
def _quiet() -> Iterator[None]:
    """Its log says what we say better; its errors still come through."""
    from lycoris.logging import logger

    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


# --- Small helpers ----------------------------------------------------------------------------------------------------


def _beside_each_other(lora: Any, x: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """What a layer answers without its network, and what the network adds at strength 1."""
    weight, bias = _change_of(lora)
    change = lora.op(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), **lora.kw_dict)
    if not hasattr(lora.org_module[0], "weight"):  # `full` has taken it
        base_bias = None if lora.org_bias is None else lora.org_bias[0].to(x.device)
        return lora.op(x, lora.org_weight.to(x.device), base_bias, **lora.kw_dict), change
    return lora.org_forward(x, *arguments, **named), change


def _change_of(lora: Any) -> tuple[Tensor, Tensor | None]:
    """The change of weight and bias at strength 1, as the algorithm's own forward has it.

    `get_diff_weight` is that for all but LoHa and LoKr, where it scales by alpha / rank twice and leaves out the trained factor
    (lycoris-lora 4.1.3, loha.py:230, lokr.py:381, against their `forward`).
    """
    if type(lora).__name__ in ("LohaModule", "LokrModule"):
        return lora.get_weight(lora.shape) * lora.scalar, None
    weight, bias = lora.get_diff_weight(1.0, lora.shape, lora.device)
    return weight, bias


@contextmanager
def _random_weights(lora: Any) -> Iterator[torch.Generator]:
    """Weights that change something inside; what they were, bit for bit, outside. Gives the generator for more numbers."""
    parameters = list(lora.parameters())
    kept = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    try:
        yield generator
    finally:
        for parameter, old in zip(parameters, kept, strict=True):
            parameter.copy_(old)


def _dtype_of(lora: Any) -> torch.dtype:
    """Of the layer that is wrapped."""
    parameters = (*lora.org_module[0].parameters(), *lora.parameters())
    dtype: torch.dtype = parameters[0].dtype
    return dtype


def _rounding(dtype: torch.dtype, answer: float, change: float) -> float:
    """What a difference of answers may miss by rounding, as a share of the change."""
    return float(torch.finfo(dtype).eps / torch.finfo(torch.float32).eps) * 1e-5 * answer / max(change, 1e-12)


def _unmirrored(lora: Any) -> float:
    """How far a wrapped layer misses the mirror, as a share of its largest change; its weights are put back."""
    layer, answers, dtype, before = lora.org_module[0], {}, _dtype_of(lora), lora.multiplier
    with _random_weights(lora) as generator:
        value = torch.randn(_input_shape(lora), generator=generator).to(next(lora.parameters()).device)
        for strength in STRENGTHS:
            lora.multiplier = strength
            answers[strength] = layer(value.to(dtype)).double()
        lora.multiplier = before
    base = answers[0.0]
    plus, minus, double = (answers[strength] - base for strength in (1.0, -1.0, 2.0))
    size = max(float(plus.abs().max()), 1e-6 * float(base.abs().max()), 1e-12)
    rounding = _rounding(dtype, float(base.abs().max()), size)
    miss = max(float((plus + minus).abs().max()), float((double - 2 * plus).abs().max())) / size
    return max(0.0, miss - rounding)


def _input_shape(lora: Any) -> tuple[int, ...]:
    """A small input of a Linear or a convolution."""
    layer = lora.org_module[0]
    if lora.module_type == "linear":
        return (2, layer.in_features)
    return (1, layer.in_channels, *(2 * size + 1 for size in layer.kernel_size))


def _share(name: str, multiplier: float) -> float:
    """What one tensor of a file is multiplied by so that its layer's change is multiplied by `multiplier`."""
    return multiplier if name.split(".", 1)[1] in CARRYING else 1.0


def _readable(lora: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoKr layer as its own loader can read it: factors whole, where the loader would guess their shapes wrong.

    It counts a kernel's positions as input channels (lokr.py:270-320), and takes two low-rank factors for granted or none.
    """
    named = {name.split(".", 1)[1]: value for name, value in state.items()}
    is_kernel, both = len(lora.shape) > 2, "lokr_w1_a" in named and "lokr_w2" in named
    if ("lokr_w1" not in named and "lokr_w1_a" not in named) or not (is_kernel or both):
        return dict(state)
    first = named["lokr_w1"] if "lokr_w1" in named else named["lokr_w1_a"] @ named["lokr_w1_b"]
    low_rank = "lokr_w2" not in named
    second = _second_factor(lora, named, first) if low_rank else named["lokr_w2"]
    scale = lora.scale if low_rank or "lokr_w1_a" in named else 1.0  # two whole factors have none
    return {
        f"{lora.lora_name}.lokr_w1": first,
        f"{lora.lora_name}.lokr_w2": second * scale,
        f"{lora.lora_name}.alpha": torch.tensor(1.0),
    }


def _second_factor(lora: Any, named: Mapping[str, Tensor], first: Tensor) -> Tensor:
    """The second Kronecker factor `(out / a, in / b, *kernel)` from its low-rank parts."""
    if "lokr_t2" in named:
        return torch.einsum("ij...,ip,jr->pr...", named["lokr_t2"], named["lokr_w2_a"], named["lokr_w2_b"])
    shape = (lora.shape[0] // first.shape[0], lora.shape[1] // first.shape[1], *lora.shape[2:])
    return (named["lokr_w2_a"] @ named["lokr_w2_b"]).reshape(shape)


def _assert_same(given: Mapping[str, Tensor], shapes: Mapping[str, Any], where: str) -> None:
    missing, extra = sorted(set(shapes) - set(given)), sorted(set(given) - set(shapes))
    wrong = sorted(name for name in set(shapes) & set(given) if given[name].shape != shapes[name])
    if missing or extra or wrong:
        first = f"{missing[0]} is missing" if missing else f"{extra[0]} has no place here" if extra else ""
        shape = f"{wrong[0]} is {tuple(given[wrong[0]].shape)}, this run's {tuple(shapes[wrong[0]])}" if wrong else ""
        raise UserError(f"{where}: {first or shape}; use the model and the lycoris_config that it was made with")

"""A PEFT LoRA inside the denoiser, with the one thing a slider needs: a scale that can be set, also to minus.

`y = W x + scale * (alpha / rank) * B A x`, or with `sqrt(rank)`. Scale 0 is the base model bit for bit, and -s is the mirror of
+s, because the adapter's output is linear in the scale. (DoRA and BOFT are not, and are refused by the configuration.)

A scale per sample multiplies `A x`, which has rank channels and is the smallest tensor on the way: `y = W x + (alpha / rank) *
B (scale_B A x)`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slider_plugin.adapters.samples import Scale, scaled_rows, scales_of_samples
from slider_plugin.errors import UserError
from slider_plugin.export import ExportReport, export_diffusers

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

NAME = "slider"
"""The adapter's name in PEFT; any other adapter in the model (an assistant) is never touched."""


class LoraAdapter:
    """The trainable adapter. Its parameters are float32 whatever the base is."""

    def __init__(
        self,
        denoiser: torch.nn.Module,
        modules: Sequence[str],
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        seed: int = 0,
        rank_stabilised: bool = False,
        gaussian: bool = False,
    ) -> None:
        """Inject a LoRA into the named modules of a frozen denoiser; B is zero, so it starts as the identity.

        Args:
            denoiser: changed in place.
            modules: full names.
            rank: of A and B.
            alpha: the output is scaled by `alpha / rank`.
            dropout: of the input.
            seed: of A.
            rank_stabilised: scale by `alpha / sqrt(rank)` instead (arXiv 2312.03732).
            gaussian: A from a normal distribution with deviation `1 / rank` instead of Kaiming's uniform one.
        """
        from peft import LoraConfig, inject_adapter_in_model

        self.rank, self.alpha, self.seed, self.modules = rank, alpha, seed, tuple(modules)
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=_exactly(modules),
            init_lora_weights="gaussian" if gaussian else True,
            use_rslora=rank_stabilised,
        )
        denoiser.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            with warnings.catch_warnings():
                # PEFT on a layer of torchao that it could not merge; nothing is merged here
                warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass")
                inject_adapter_in_model(config, denoiser, adapter_name=NAME)
        self._layers = _layers(denoiser)
        self.one_scale_only = "lora_dropout draws other numbers in one forward than in separate ones" if dropout else ""
        self._scales: dict[torch.device, Tensor] = {}
        self._scaled = [(layer.scaling, layer.lora_A[NAME]) for layer in self._layers.values()]
        self._is_hooked = False
        self._factor = alpha / math.sqrt(rank) if rank_stabilised else alpha / rank
        for parameter in self.parameters():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        self._set(1.0)

    # --- strength ---------------------------------------------------------------------------------------------------

    @contextmanager
    def scaled(self, scale: Scale) -> Iterator[None]:
        """Run the adapter at `scale` inside, and at what it was before outside, whatever happens; see `Adapter.scaled`.

        The backward pass belongs inside: gradient checkpointing computes the forward a second time, and with another
        scale its gradients would be wrong without a word (measured: 16 %).
        """
        before = self.scale
        self._set(scale)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, scale: Scale) -> None:
        """Scales are tensors, one for each device: a Python float would cost torch.compile a recompilation for each value."""
        scales_B = scales_of_samples(scale)
        self.scale = scale
        common = scale * self._factor if isinstance(scale, (int, float)) else self._factor
        factors: dict[torch.device, Tensor] = {}
        for scaling, lora_A in self._scaled:
            device = lora_A.weight.device
            if device not in factors:
                factors[device] = torch.full((), common, device=device)  # made there: a copy would wait for the device
            scaling[NAME] = factors[device]
        self._scales = {} if scales_B is None else {device: scales_B.to(device) for device in factors}
        if self._scales:
            self._hook()

    def prepare_for_compile(self) -> None:
        """Hook the layers that a strength per sample needs: TorchDynamo has no guard for a hook that comes later."""
        self._hook()

    def _hook(self) -> None:
        """From the first scale per sample on: a hook on each layer takes 0.1 ms of a processor, also where it does nothing."""
        if not self._is_hooked:
            self._is_hooked = True
            for name, layer in self._layers.items():
                layer.lora_A[NAME].register_forward_hook(self._per_sample(name))

    def _per_sample(self, name: str) -> Callable[[torch.nn.Module, Any, Tensor], Tensor | None]:
        """A hook behind A: it multiplies the rows of each sample by its scale, where there is one for each."""

        def scale(module: torch.nn.Module, arguments: Any, output: Tensor) -> Tensor | None:
            if not self._scales:
                return None  # which leaves the output alone
            return scaled_rows(output, self._scales[output.device], name)

        return scale

    # --- weights ----------------------------------------------------------------------------------------------------

    def parameters(self) -> list[torch.nn.Parameter]:
        """The trainable parameters, in the order of the modules."""
        return [p for _, p in self.named_parameters()]

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Names such as `conv_in.lora_A` and their parameters, in the order of the modules."""
        return [
            (f"{name}.{part}", getattr(layer, part)[NAME].weight)
            for name, layer in self._layers.items()
            for part in ("lora_A", "lora_B")
        ]

    def facts(self) -> dict[str, str]:
        """Rank and alpha, for metadata."""
        return {"slider.rank": str(self.rank), "slider.alpha": f"{self.alpha:g}"}

    def tensors(self) -> dict[str, Tensor]:
        """A copy of the weights, float32 on the CPU, for a checkpoint."""
        return {f"{name}.{part}": value.contiguous() for name, parts in self.state().items() for part, value in parts.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Copy a checkpoint's weights in. Raises UserError unless they are exactly this adapter's."""
        modules: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, part = key.rsplit(".", 1)
            modules.setdefault(name, {})[part] = value
        self.load_state(modules, where)

    def export(self, path: Path, prefix: str, metadata: Mapping[str, str], dtype: torch.dtype) -> ExportReport:
        """Write the adapter as diffusers reads it; see `Adapter.export`."""
        return export_diffusers(self.state(), self.scalings(), prefix, metadata, path, dtype)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """A copy of the weights by module name: `lora_A` (rank, in, ...), `lora_B` (out, rank, ...), float32 on the CPU."""
        return {
            name: {part: getattr(layer, part)[NAME].weight.detach().float().cpu().clone() for part in ("lora_A", "lora_B")}
            for name, layer in self._layers.items()
        }

    def scalings(self) -> dict[str, float]:
        """What B A is multiplied by at scale 1, by module name: alpha / rank, or alpha / sqrt(rank)."""
        return dict.fromkeys(self._layers, self._factor)

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]], where: str) -> None:
        """Copy weights in. Raises UserError, naming `where`, unless modules and shapes are exactly this adapter's."""
        _assert_same_modules(state, self._layers, where)
        with torch.no_grad():
            for name, layer in self._layers.items():
                for part in ("lora_A", "lora_B"):
                    weight = getattr(layer, part)[NAME].weight
                    value = state[name][part]
                    if value.shape != weight.shape:
                        raise UserError(
                            f"{where}: {name}.{part} is {tuple(value.shape)}, this run's is {tuple(weight.shape)}; "
                            "use the lora_rank and the model that it was made with"
                        )
                    weight.copy_(value)

    def load_folded(self, state: Mapping[str, Mapping[str, Tensor]], where: str) -> None:
        """Copy weights of an exported file in, whose alpha is folded into B."""
        unfolded = {n: {"lora_A": p["lora_A"].float(), "lora_B": p["lora_B"].float() / self._factor} for n, p in state.items()}
        self.load_state(unfolded, where)


def _exactly(modules: Sequence[str]) -> str:
    """An expression for PEFT, which matches a string as a whole name and a list by suffix."""
    import re

    return "|".join(re.escape(name) for name in modules)


def _layers(denoiser: torch.nn.Module) -> dict[str, LoraLayer]:
    from peft.tuners.lora import LoraLayer

    found: dict[str, Any] = {}
    for name, module in denoiser.named_modules():
        if isinstance(module, LoraLayer) and NAME in module.lora_A:
            found[name] = module
    return found


def _assert_same_modules(state: Mapping[str, Any], layers: Mapping[str, Any], where: str) -> None:
    missing, extra = sorted(set(layers) - set(state)), sorted(set(state) - set(layers))
    if missing or extra:
        first = f"{missing[0]} is missing" if missing else f"{extra[0]} has no place here"
        raise UserError(
            f"{where}: it holds {len(state)} modules and this run has {len(layers)} ({first}); "
            "use the model and the targets that it was made with"
        )

"""For other trainers: a slider in a training loop that is not ours. `from slider_plugin import load_family, attach_slider`.

What it takes to turn a LoRA loop into a slider's: targets that leave language alone, a cycle over the signs, the adapter at the
draw's scale until after the backward pass, and a file whose strength means the same everywhere. `fixtures/host-example` in the
repository shows a loop before and after.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from slider_hooks import TargetRequest
from slider_plugin.adapters.peft_lora import LoraAdapter
from slider_plugin.adapters.samples import Scale
from slider_plugin.export import ExportReport, slider_metadata
from slider_plugin.export.metadata import for_programs
from slider_plugin.registry import Plugins
from slider_plugin.targets import TargetPlan, resolve_targets

if TYPE_CHECKING:
    from slider_plugin.family import LoadedFamily


def load_family(name: str) -> LoadedFamily:
    """A family plugin by its name or an alias, ready to be asked. Raises PluginError if there is none, or it is broken.

    Its methods are the hooks of the contract: `build_sampler`, `resolve_lora_targets`, `encode_prompts`, `predict`, ...
    """
    return Plugins.discover().load(name)


@dataclass(frozen=True, slots=True)
class Slider:
    """A trainable LoRA in somebody's denoiser, whose strength can be set, also to minus."""

    family: LoadedFamily
    targets: TargetPlan
    """Which modules, and what was found on the way (`warnings`)."""

    adapter: LoraAdapter

    def parameters(self) -> list[torch.nn.Parameter]:
        """What the optimizer gets: float32, on the denoiser's device."""
        return self.adapter.parameters()

    def scaled(self, scale: Scale) -> AbstractContextManager[None]:
        """Run the adapter at `scale` inside. The backward pass belongs inside too: gradient checkpointing needs it.

        Args:
            scale: one number, or one for each sample of the batch, where the denoiser keeps the rows of each sample together.
        """
        return self.adapter.scaled(scale)

    def save(
        self,
        path: Path,
        *,
        strengths: Iterable[float] = (),
        steps: int = 0,
        base_model: str = "",
        dtype: torch.dtype = torch.float32,
        metadata: Mapping[str, str] | None = None,
    ) -> ExportReport:
        """Write the slider as a diffusers file with alpha folded in, whole or not at all, and read it back.

        Args:
            path: the file; its folder is made.
            strengths: those that were trained, for the metadata.
            steps: optimizer steps, for the metadata.
            base_model: folder or hub id of the model, of which the last part is noted.
            dtype: of the tensors in the file.
            metadata: more strings for the file's header.

        Raises:
            UserError: a weight is not finite.
        """
        facts = self.family.facts
        header = slider_metadata(
            family=facts.name,
            flavour=None,
            plugin=self.family.distribution,
            plugin_version=self.family.version,
            targets=self.targets.expression,
            targets_source=self.targets.source,
            strengths=sorted(strengths),
            adapter=self.adapter.facts(),
            steps=steps,
            seed=self.adapter.seed,
            base_model=base_model or "unknown",
            objective="custom",
            extra=metadata,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        return self.adapter.export(path, facts.denoiser, for_programs(header, facts, path.stem), dtype)


def attach_slider(
    family: LoadedFamily,
    denoiser: torch.nn.Module,
    *,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    include_joint: bool = True,
    targets: Sequence[str] | str | None = None,
) -> Slider:
    """Inject a LoRA into the family's slider targets of a loaded denoiser, and freeze everything else in it.

    Args:
        family: what `load_family` gave.
        denoiser: UNet or transformer, on its device; it is changed in place.
        rank: of the LoRA.
        alpha: its output is scaled by `alpha / rank`; None is the rank.
        dropout: in front of the LoRA.
        seed: of its first weights.
        include_joint: also modules that see text and image tokens in one sequence.
        targets: your own targets instead, which always win: a list matches by suffix as in PEFT, a string the whole name.

    Raises:
        UserError: nothing matches, or a slider target reaches cross-attention or text.
    """
    explicit = targets if targets is None or isinstance(targets, str) else tuple(targets)
    request = TargetRequest(slider=True, explicit=explicit, include_joint=include_joint)
    plan = resolve_targets(family, denoiser, request, rank)
    device = next(denoiser.parameters()).device
    adapter = LoraAdapter(denoiser, plan.modules, rank=rank, alpha=alpha or float(rank), dropout=dropout, seed=seed)
    denoiser.to(device)
    return Slider(family, plan, adapter)

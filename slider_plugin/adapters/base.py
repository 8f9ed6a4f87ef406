"""What a trained adapter is to the rest of the host, whichever library makes it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from slider_plugin.adapters.samples import Scale
from slider_plugin.export import ExportReport


class Adapter(Protocol):
    """An adapter inside a denoiser, whose scale can be set, also to minus; 0 is the base model bit for bit."""

    modules: tuple[str, ...]
    """Full names of the modules that it wraps."""

    one_scale_only: str
    """Why the samples of a batch cannot be trained at a scale each, as in passes of their own; "" if they can."""

    def scaled(self, scale: Scale) -> AbstractContextManager[None]:
        """Run at `scale` inside, and at what it was before outside. The backward pass belongs inside.

        Args:
            scale: one number for all samples; or, unless `one_scale_only`, one for each, as a sequence or a tensor `(B,)`. A
                layer that sees rows that cannot be those of B samples then raises `NotPerSample`.
        """
        ...

    def prepare_for_compile(self) -> None:
        """Put all hooks into the layers before they are compiled: a compiled layer does not look for later ones."""
        ...

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The trainable parameters, float32, in an order that does not change."""
        ...

    def parameters(self) -> list[torch.nn.Parameter]:
        """The same without names."""
        ...

    def facts(self) -> dict[str, str]:
        """What metadata says of it: `rank`, `alpha`, and its kind where it is no plain LoRA."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """A copy of the trainable weights on the CPU, for a checkpoint."""
        ...

    def load_tensors(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Copy a checkpoint's weights in. Raises UserError, naming `where`, unless they are exactly this adapter's."""
        ...

    def export(self, path: Path, prefix: str, metadata: Mapping[str, str], dtype: torch.dtype) -> ExportReport:
        """Write the finished adapter, whole or not at all, and read it back.

        Args:
            path: the file.
            prefix: the pipeline component that it belongs to.
            metadata: strings for the file's header.
            dtype: of the tensors in the file.
        """
        ...

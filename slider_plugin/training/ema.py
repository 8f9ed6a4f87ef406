"""A moving average of the adapter's weights, and whose weights are drawn and exported.

After optimizer step n the average moves towards the weights by `1 - min(decay, n / (9 + n))`, and begins as those of the first
step: diffusers' EMAModel (diffusers/training_utils.py), after Polyak averaging with TensorFlow's warm-up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from slider_plugin.errors import UserError

Named = Sequence[tuple[str, torch.nn.Parameter]]


class Ema:
    """The average, float32 on the parameters' device."""

    def __init__(self, named: Named, decay: float) -> None:
        """Begin with the weights as they are.

        Args:
            named: the adapter's parameters, float32, and their names.
            decay: 0 to below 1; the share of the average that one step keeps, in the long run.
        """
        from diffusers.training_utils import EMAModel

        self._named = tuple(named)
        self._model = EMAModel(self._parameters(), decay=decay, foreach=True)

    def update(self) -> None:
        """Follow the weights after a step of the optimizer."""
        self._model.step(self._parameters())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the adapter has the average; outside, its trained weights, bit for bit."""
        with _brought_back(self._parameters()):
            self._model.copy_to(self._parameters())
            yield

    def tensors(self) -> dict[str, Tensor]:
        """A copy of the average on the CPU, by the parameters' names, for a checkpoint."""
        shadows = zip(self._named, self._model.shadow_params, strict=True)
        return {name: shadow.detach().cpu().clone().contiguous() for (name, _), shadow in shadows}

    @property
    def updates(self) -> int:
        """How many steps it has followed."""
        return int(self._model.optimization_step)

    def load(self, tensors: Mapping[str, Tensor], updates: int, where: str) -> None:
        """Go on from a checkpoint's average. Raises UserError, naming `where`, unless it is of these parameters."""
        wanted = {name: parameter.shape for name, parameter in self._named}
        if {name: tensor.shape for name, tensor in tensors.items()} != wanted:
            raise UserError(f"{where} holds the average of another adapter; resume with the configuration that wrote it")
        self._model.shadow_params = [tensors[name].to(p.device, p.dtype) for name, p in self._named]
        self._model.optimization_step = updates

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for _, parameter in self._named]


@contextmanager
def finished_weights(optimizer: torch.optim.Optimizer, ema: Ema | None) -> Iterator[None]:
    """Inside, the adapter has the weights that are drawn and exported: the average where one is kept; else those that train."""
    with ema.applied() if ema else _own_average(optimizer):
        yield


@contextmanager
def _own_average(optimizer: Any) -> Iterator[None]:
    """Inside, the parameters of a schedule-free optimizer are its average, which is what it learns; others have none.

    Outside they are the points where gradients are taken. Its own `eval` and `train` come back to them but for rounding.
    """
    if not hasattr(optimizer, "eval"):
        yield
        return
    with _brought_back([p for group in optimizer.param_groups for p in group["params"]]):
        optimizer.eval()
        try:
            yield
        finally:
            optimizer.train()


@contextmanager
def _brought_back(parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """After the block, the parameters are what they were before it, bit for bit."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)

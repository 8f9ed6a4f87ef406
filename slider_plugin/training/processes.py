"""Several processes that train one adapter: each takes a share of every batch, and one sum per optimizer step joins them.

Nothing is wrapped. Each process computes the gradient of its share, weighted by the samples in it, and the gradients of all are
added once per optimizer step, in one flat tensor. That is the gradient of the whole batch, so R processes do what one does with
a batch R times as large. DistributedDataParallel would begin to send while the backward pass still runs, which pays off with
the gradients of whole models; those of an adapter are few. In return nothing hangs between two steps: a process may
make more forwards than another, and one that fails ends the others instead of leaving them in half a backward pass.

The launchers are accelerate's and torchrun; communication is what accelerate chooses, NCCL between GPUs and gloo on processors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slider_plugin.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from slider_plugin.config import RunConfig

PATIENCE = timedelta(hours=24)
"""How long a process waits for the others, which may be drawing a validation; torch's own 10 or 30 minutes are too short."""


class Lost(UserError):
    """Another process of the run has ended."""


@dataclass(frozen=True, slots=True)
class Part:
    """Which samples of a batch a process trains on."""

    first: int
    count: int
    """At least 1: where there are fewer samples than processes, some compute one that counts nothing."""

    whole: int
    """Samples of the whole batch."""

    weight: float
    """What the mean over this part is worth in the mean over the whole batch, 0 to 1."""

    @property
    def places(self) -> slice:
        """Its samples among those of the whole batch."""
        return slice(self.first, self.first + self.count)


@dataclass(frozen=True, slots=True)
class Share:
    """What one process takes of every batch: a contiguous part, as even as it can be."""

    process: int = 0
    processes: int = 1

    def of(self, samples: int) -> Part:
        """Its part of a batch of so many samples."""
        first, after_last = (samples * place // self.processes for place in (self.process, self.process + 1))
        if first == after_last:
            return Part(min(first, samples - 1), 1, samples, 0.0)
        return Part(first, after_last - first, samples, (after_last - first) / samples)


class Processes:
    """The processes of a run. Every method but the properties is called by all of them, or it waits for ever."""

    def __init__(self, machine: Accelerator | None = None) -> None:
        """Those that accelerate knows of; without it, one."""
        self._machine = machine
        self.count = machine.num_processes if machine else 1
        self.index = machine.process_index if machine else 0

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes."""
        return self.index == 0

    @property
    def share(self) -> Share:
        """What this one takes of every batch."""
        return Share(self.index, self.count)

    def add_gradients(self, parameters: Sequence[torch.nn.Parameter], numbers_N: Tensor) -> Tensor:
        """Add up the gradients of all processes, in each of them, and some numbers beside them, in one message.

        A parameter that no process has a gradient for keeps none, so that the optimizer leaves it alone as it would in one
        process (experts that nothing was sent to).

        Args:
            parameters: float32, the same ones in the same order everywhere; their `grad` is replaced by the sum.
            numbers_N: float32, on the parameters' device.

        Returns:
            The sums of the numbers, `(N,)`.

        Raises:
            Lost: another process has ended.
        """
        if self.count == 1:
            return numbers_N
        present_P = numbers_N.new_tensor([float(parameter.grad is not None) for parameter in parameters])
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        total = self._sum(torch.cat([*(g.reshape(-1) for g in gradients), present_P, numbers_N]))
        *summed, present_P, numbers_N = total.split([*(p.numel() for p in parameters), len(parameters), len(numbers_N)])
        for parameter, gradient, present in zip(parameters, summed, present_P.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter) if present else None
        return numbers_N

    def any(self, mine: bool) -> bool:
        """Whether it is so in any process: a decision that all of them make alike. Raises Lost."""
        if self._machine is None or self.count == 1:
            return mine
        return float(self._sum(torch.tensor([float(mine)], device=self._machine.device))) > 0

    def wait(self) -> None:
        """Go on when all have come here. Raises Lost."""
        if self._machine is not None and self.count > 1:
            with _lost():
                self._machine.wait_for_everyone()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The block is run by the main process, then by the others. Raises Lost."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def assert_alike(self, facts: Mapping[str, object]) -> None:
        """Raise UserError, in every process, unless all have the same facts."""
        if self.count == 1:
            return
        from accelerate.utils import gather_object

        with _lost():
            gathered: list[Mapping[str, object]] = gather_object([dict(facts)])
        for process, theirs in enumerate(gathered):
            other = [name for name in facts if theirs[name] != gathered[0][name]]
            if other:
                raise UserError(
                    f"process {process} has another {other[0]} than process 0: all need the same configuration and the same "
                    "files, and one output_dir that all of them see"
                )

    def _sum(self, values: Tensor) -> Tensor:
        assert self._machine is not None
        with _lost():
            summed: Tensor = self._machine.reduce(values, "sum")
            return summed


@contextmanager
def _lost() -> Iterator[None]:
    """Say what it means when communication fails: torch's own message speaks of sockets."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise Lost(
            "another process of this run has ended or cannot be reached; what it said is above. Go on with "
            f"--resume_from_checkpoint latest ({str(error).splitlines()[0]})"
        ) from error


# --- Launching --------------------------------------------------------------------------------------------------------


def launched() -> int:
    """How many processes a launcher has started, before accelerate is asked."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_launch(config: RunConfig) -> list[str]:
    """What a launcher asks for that this version does not do, for this run or at all; one line each."""
    problems = []
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        problems.append("DeepSpeed: sliders were never tried with it; launch without, or with fsdp_version 2 for large models")
    if _flag("ACCELERATE_USE_MEGATRON_LM"):
        problems.append("Megatron-LM: it has models of its own; launch without, or with fsdp_version 2 for large models")
    return problems + (list(_without_fsdp(config)) if sharded() else [])


def _without_fsdp(config: RunConfig) -> Iterator[str]:
    """What FSDP is not done with."""
    if os.environ.get("FSDP_VERSION", "1") != "2":
        yield "FSDP 1: it cannot have frozen and trained weights in one layer; launch with fsdp_version 2"
    if _flag("FSDP_OFFLOAD_PARAMS"):
        yield "fsdp_offload_params: weights in the CPU's memory were never tried; set it to false"
    if _flag("FSDP_ACTIVATION_CHECKPOINTING"):
        yield "fsdp_activation_checkpointing: set gradient_checkpointing in the run's configuration instead"
    if config.lycoris is not None:
        yield "lora_type: under FSDP a plain LoRA is trained; write standard, or launch without FSDP"
    if config.has_controlnet:
        yield "controlnet: under FSDP the denoiser is trained alone; launch without FSDP"
    if config.signs_in_one_forward == "yes":
        yield "signs_in_one_forward: under FSDP all processes make the same number of forwards; write auto or no"
    if config.base_model_precision != "no_change":
        yield "base_model_precision: quantised weights are not sharded; write no_change, or launch without FSDP"
    if config.enable_group_offload:
        yield "enable_group_offload: FSDP has shares of the blocks on all GPUs; set it to false, or launch without FSDP"
    if config.torch_compile != "no":
        yield "torch_compile: it was never tried on a sharded denoiser; write no, or launch without FSDP"


def draws_here(processes: Processes) -> bool:
    """Whether this process draws images: the main one, and with FSDP all, since each holds a part of the denoiser."""
    return processes.is_main or sharded()


def sharded() -> bool:
    """Whether the launcher asks for FSDP."""
    return _flag("ACCELERATE_USE_FSDP")


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").strip().lower() in ("1", "true", "yes", "on")


def open_accelerator(**arguments: object) -> Accelerator:
    """Accelerate, with all the processes that were launched. Raises UserError if it finds another number.

    Args:
        arguments: for `Accelerator`.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    machine = Accelerator(
        cpu=not torch.accelerator.is_available(),  # or accelerate sees one process where torchrun has started two
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        **arguments,
    )
    machine.gradient_accumulation_steps = 1  # the loop's own: a launcher's would divide the gradient a second time
    if machine.num_processes != launched():
        raise UserError(
            f"{launched()} processes were launched and accelerate found {machine.num_processes}; launch with "
            "`accelerate launch` or torchrun, and unset WORLD_SIZE otherwise"
        )
    return machine


def check_one_process(command: str) -> None:
    """Raise UserError if a launcher has started a command several times over that one process runs."""
    if launched() > 1:
        raise UserError(f"slider {command}: {launched()} processes were launched, and one does it; start it without a launcher")

"""How much memory a training step will take, found without a weight: the step itself, run on tensors that have no values.

The models are built from the configurations of a folder under PyTorch's fake tensors, one image and the longest caption of each
bucket go through the family's own hooks, and then the trainer's own losses and backward run at the configured batch. What is
alive at each moment is counted by storages, as an allocator counts it (the method of torch.distributed._tools.mem_tracker,
which also wants to know in which module, and for that puts hooks where gradient checkpointing does not expect them). What a
kernel takes and gives back inside is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slider_hooks import Components, LoadRequest
from slider_plugin.adapters.attach import new_adapter
from slider_plugin.adapters.base import Adapter
from slider_plugin.config import RunConfig
from slider_plugin.data.encode import Batch, Encoded
from slider_plugin.errors import UserError
from slider_plugin.loading import without_weights
from slider_plugin.objectives import BUILT_IN
from slider_plugin.preflight import Preflight
from slider_plugin.training.loop import Trainer
from slider_plugin.training.noise import noise_process
from slider_plugin.training.optimizers import KINDS as KINDS_OF_OPTIMIZER
from slider_plugin.training.rehearsal import Rehearsal
from slider_plugin.training.times import Times

if TYPE_CHECKING:
    from slider_plugin.family import LoadedFamily

OWN = "slider-plugin"
"""The distribution whose loaders all build without weights, or say that they cannot."""


class Unpredictable(UserError):
    """This run's memory cannot be told beforehand."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes in use at the peak of a training step, as an allocator counts them."""

    weights: int
    """Of the frozen denoiser, buffers included."""

    adapter: int
    """Trainable parameters, their gradients, the optimizer's state and the moving average."""

    activations: int
    """All else: what the backward pass needs, and what comes and goes."""

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.adapter + self.activations


def predict_footprint(config: RunConfig, family: LoadedFamily, checked: Preflight, device: torch.device) -> Footprint:
    """The peak of a training step on `device`, which need not have the memory for it.

    Encoders and decoders are not in it: they are not in memory while training.

    Raises:
        Unpredictable: with the reason in one line.
    """
    if config.has_controlnet:
        raise Unpredictable("a ControlNet takes part")
    if config.base_model_precision != "no_change":
        raise Unpredictable("the frozen model is quantised")
    if config.enable_group_offload:
        raise Unpredictable("blocks come and go")
    if config.lycoris is not None:
        raise Unpredictable("LyCORIS measures its layers on real weights")
    if config.slider_objective not in BUILT_IN:
        raise Unpredictable(f"slider_objective {config.slider_objective} is an extension's, and may do anything")
    if checked.targets is None:
        raise Unpredictable("the model is no local diffusers folder")
    try:
        return _footprint(config, family, checked, device)
    except UserError as error:
        raise Unpredictable(str(error)) from error
    except Exception as error:  # of a model that reads values, which fake tensors have not; anything may come of it
        reason = (str(error).strip().splitlines() or [""])[0]
        raise Unpredictable(f"{family.facts.name} cannot be run without values ({type(error).__name__}: {reason})") from error


def _footprint(config: RunConfig, family: LoadedFamily, checked: Preflight, device: torch.device) -> Footprint:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    components = _components(config, family, checked.model, mode)
    adapter = _attach(config, family, components, checked, mode, device)
    with _KnownMasks(), torch.no_grad():
        rehearsal = Rehearsal(config, family, components, checked, device)
        data = rehearsal.data()
        cycle = rehearsal.cycle(data)
    trainer = _trainer(config, family, components, adapter, checked, data)
    together = config.signs_in_one_forward != "no" and not adapter.one_scale_only
    passes = [cycle] if together else [[batch] for batch in cycle]
    weights = _size(components.denoiser, {id(p) for p in adapter.parameters()})
    for parameter in adapter.parameters():  # as after the first pass of a step
        parameter.grad = torch.empty_like(parameter)
    activations = max(_peak(trainer, batches) for batches in passes)
    trained = sum(parameter.numel() for parameter in adapter.parameters())
    return Footprint(weights, trained * bytes_per_trained(config), activations)


def bytes_per_trained(config: RunConfig) -> int:
    """Of a trainable parameter: itself and its gradient in float32, the optimizer's state, the moving average."""
    return int(4 + 4 + KINDS_OF_OPTIMIZER[config.optimizer].state_bytes + (4 if config.use_ema else 0))


def _peak(trainer: Trainer, batches: list[Batch]) -> int:
    """Bytes that one forward and one backward over these batches add to what is there before, at most."""
    with _KnownMasks(), LiveBytes(_held(trainer, batches)) as live, trainer.adapter.scaled(trainer.scale(batches)):
        torch.stack(trainer.losses(batches)).sum().backward()
    return int(live.peak)


def _held(trainer: Trainer, batches: list[Batch]) -> Iterator[Tensor]:
    for parameter in trainer.components.denoiser.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    yield from trainer.components.denoiser.buffers()
    for batch in batches:
        yield batch.clean_BCHW
        for told in (*batch.conditioning, *trainer.data.prompts.values()):
            yield from told.values()


def _size(model: nn.Module, without: set[int]) -> int:
    """Bytes of a model's parameters and buffers, shared ones once."""
    tensors: dict[int, Tensor] = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in without}
    return sum(t.numel() * t.element_size() for t in tensors.values())


# --- A model without values -------------------------------------------------------------------------------------------


def _components(config: RunConfig, family: LoadedFamily, model: str, mode: FakeTensorMode) -> Components:
    if family.distribution != OWN and family.describe()["hooks"]["load_components"] != "default":
        raise Unpredictable(f"{family.facts.name} has a loader of its own")
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    request = LoadRequest(model=model, dtype=dtype, options=config.family_options)
    with without_weights(mode):
        components = family.load_components(request)
    if not all(isinstance(parameter, FakeTensor) for parameter in components.denoiser.parameters()):
        raise Unpredictable(f"{family.facts.name} has a loader of its own")
    components.denoiser.requires_grad_(False).eval()
    if config.gradient_checkpointing:
        components.denoiser.enable_gradient_checkpointing()
    return components


def _attach(
    config: RunConfig,
    family: LoadedFamily,
    components: Components,
    checked: Preflight,
    mode: FakeTensorMode,
    device: torch.device,
) -> Adapter:
    """The adapter, injected on the meta device: PEFT moves its layers, which PyTorch does not allow with fake tensors."""
    assert checked.targets is not None
    denoiser = components.denoiser
    _replace(denoiser, lambda tensor: torch.empty_like(tensor, device="meta"))
    adapter = new_adapter(config, family, components, checked.targets)
    with mode:
        _replace(denoiser, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
        for module in denoiser.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
    return adapter


def _replace(model: nn.Module, new: Callable[[Tensor], Tensor]) -> None:
    """Put `new(values)` in the place of each parameter; what was one parameter stays one."""
    held = list(model.parameters())  # so that no number comes up twice
    replaced: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                if id(old) not in replaced:
                    replaced[id(old)] = nn.Parameter(new(old.detach()), requires_grad=old.requires_grad)
                module._parameters[name] = replaced[id(old)]
    del held


class _KnownMasks(TorchDispatchMode):
    """Lets a mask that has values pick from a tensor that has none: prompts are cut to their length so."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index.Tensor and isinstance(args[0], FakeTensor):
            args = (args[0], [place for index in args[1] for place in _places(index)])
        return func(*args, **(kwargs or {}))


def _places(index: Tensor | None) -> Iterable[Tensor | None]:
    if index is None or isinstance(index, FakeTensor) or index.dtype != torch.bool:
        return (index,)
    places: tuple[Tensor, ...] = index.nonzero(as_tuple=True)
    return places


def _trainer(
    config: RunConfig, family: LoadedFamily, components: Components, adapter: Adapter, checked: Preflight, data: Encoded
) -> Trainer:
    """One that can tell losses, and has nothing that a step needs besides."""
    nothing: Any = None
    return Trainer(
        family=family,
        components=components,
        adapter=adapter,
        data=data,
        sampler=nothing,
        noise=noise_process(family.facts, components, Times.of(config)),
        objective=checked.objective,
        random_strength=config.random_strength,
        rollout_steps=1,  # each takes the same and leaves nothing
        rollout_guidance=config.text_rollout_guidance,
        accelerator=nothing,
        optimizer=nothing,
        schedule=nothing,
        seed=config.seed,
        cycle=checked.cycle,
        draws_per_step=checked.draws_per_step,
        max_grad_norm=config.max_grad_norm,
        bf16=config.mixed_precision == "bf16",
    )


# --- Counting ---------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that come to life inside, until they die; `peak` is the most at one time."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        """Begin at 0: what is `held` already does not count."""
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        for tensor in held:
            self._watch(tensor, counted=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._watch(leaf)
        return result

    def _watch(self, tensor: Tensor, counted: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counted and tensor.device.type != "meta" else 0

        def died(_: Any) -> None:
            self.live -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, died)
        self.live += size
        self.peak = max(self.peak, self.live)

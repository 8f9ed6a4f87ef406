"""The optimizers and the schedules of their learning rate, and what is wrong with a choice of them before anything is loaded.

AdamW (arXiv 1711.05101) is PyTorch's, its 8-bit kind (2110.02861) is that of bitsandbytes, Prodigy (2306.06101) that of
prodigyopt, schedule-free AdamW (2405.15682) that of schedulefree. The last three are imported only where they are asked for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from slider_plugin.config import RunConfig
from slider_plugin.errors import ConfigError
from slider_plugin.wording import shown

FUSED = ("cpu", "cuda", "mps", "xpu")
"""Devices for which PyTorch has AdamW as one kernel (torch/optim/adamw.py)."""

EIGHT_BIT_FROM = 4096
"""Elements from which bitsandbytes keeps a state in 8 bit (bitsandbytes/optim/optimizer.py, `min_8bit_size`)."""

Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Setting:
    """One of the optimizer's own settings in `optimizer_config`."""

    type: type[bool] | type[int] | type[float]
    least: float = 0.0
    below: float = float("inf")

    def read(self, value: Any) -> bool | int | float:
        """A value of this setting's type. Raises ValueError that says what it should be."""
        if self.type is bool:
            return _read_bool(value)
        words = {int: "a whole number", float: "a number"}[self.type]
        bounds = f" from {self.least:g}" + (f" to below {self.below:g}" if self.below < float("inf") else "")
        try:
            number = float("nan") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if not self.least <= number < self.below or (self.type is int and number != int(number)):
            raise ValueError(f"is not {words}{bounds}")
        return int(number) if self.type is int else number


def _read_bool(value: Any) -> bool:
    words = {"true": True, "false": False}
    if str(value).lower() not in words:
        raise ValueError("is neither true nor false")
    return words[str(value).lower()]


SHARE, ABOVE_0 = Setting(float, below=1.0), Setting(float, least=1e-30)
ADAM = {"beta1": SHARE, "beta2": SHARE, "eps": ABOVE_0, "weight_decay": Setting(float)}
"""What every optimizer here has; `adam_beta1` and the like give the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """An optimizer: where it comes from and what can be set."""

    package: str
    class_name: str
    extra: str = ""
    """The extra of our own distribution that installs it; "" where there is no need."""

    settings: dict[str, Setting]
    """By the name of the argument of its class, besides `ADAM`."""

    state_bytes: int
    """Of its state for each parameter, in round numbers."""


KINDS: dict[str, Kind] = {
    "adamw": Kind(package="torch", class_name="AdamW", settings={"amsgrad": Setting(bool)}, state_bytes=8),
    "adamw8bit": Kind(
        package="bitsandbytes",
        class_name="AdamW8bit",
        extra="quant",
        settings={"min_8bit_size": Setting(int)},
        state_bytes=2,
    ),
    "prodigy": Kind(
        package="prodigyopt",
        class_name="Prodigy",
        extra="optimizers",
        settings={
            "beta3": SHARE,
            "d0": ABOVE_0,
            "d_coef": ABOVE_0,
            "growth_rate": Setting(float, least=1.0),
            "use_bias_correction": Setting(bool),
            "safeguard_warmup": Setting(bool),
            "decouple": Setting(bool),
            "slice_p": Setting(int, least=1),
        },
        state_bytes=16,
    ),
    "adamw_schedulefree": Kind(
        package="schedulefree",
        class_name="AdamWScheduleFree",
        extra="optimizers",
        settings={"r": Setting(float), "weight_lr_power": Setting(float)},
        state_bytes=8,
    ),
}


# --- Beforehand -------------------------------------------------------------------------------------------------------


def check_optimizer(config: RunConfig) -> None:
    """Raise ConfigError with everything that is wrong with optimizer, schedule and average."""
    problems = list(_problems(config))
    if problems:
        raise ConfigError(problems)


def _problems(config: RunConfig) -> Iterator[str]:
    kind = KINDS[config.optimizer]
    if importlib.util.find_spec(kind.package) is None:
        yield (
            f"optimizer: {config.optimizer} needs {kind.package}, which is not installed; "
            f"pip install 'slider-plugin[{kind.extra}]', or write adamw"
        )
    elif config.optimizer == "adamw8bit":
        yield from _without_kernel(run_device())
    yield from _wrong_settings(config, kind)
    if config.optimizer == "adamw_schedulefree":
        if config.lr_scheduler not in ("constant", "constant_with_warmup"):
            yield (
                "lr_scheduler: adamw_schedulefree averages its weights instead of lowering the rate, and "
                f"{config.lr_scheduler} would lower it as well; write constant (lr_warmup_steps may stay)"
            )
        if config.use_ema:
            yield "use_ema: adamw_schedulefree draws and exports an average of its own; take use_ema out, or choose adamw"


def _wrong_settings(config: RunConfig, kind: Kind) -> Iterator[str]:
    known = ADAM | kind.settings
    for name, value in config.optimizer_config.items():
        if name not in known:
            yield f"optimizer_config: {config.optimizer} has no setting {name!r} here; it has {', '.join(known)}"
            continue
        try:
            known[name].read(value)
        except ValueError as error:
            yield f"optimizer_config: {name}: {shown(value)} {error}"


def optimizer_warnings(config: RunConfig) -> list[str]:
    """What a user of this optimizer would like to know."""
    if config.optimizer == "prodigy" and config.learning_rate < 0.1:
        return [
            f"prodigy finds the step size itself, and learning_rate {config.learning_rate:g} is a factor of it: next to "
            "nothing will be learnt; leave the key out, or write 1"
        ]
    return []


def run_device() -> torch.device:
    """The device that accelerate will choose, without starting it."""
    from accelerate.utils import parse_flag_from_env

    accelerator = torch.accelerator.current_accelerator()
    forced = parse_flag_from_env("ACCELERATE_USE_CPU")
    return torch.device("cpu") if accelerator is None or forced or not torch.accelerator.is_available() else accelerator


def _without_kernel(device: torch.device) -> Iterator[str]:
    """Whether bitsandbytes can make a step on this device is found by making one."""
    parameter = torch.nn.Parameter(torch.zeros(EIGHT_BIT_FROM, device=device))
    parameter.grad = torch.ones_like(parameter)
    try:
        import bitsandbytes

        bitsandbytes.optim.AdamW8bit([parameter], lr=1.0, weight_decay=0.0).step()
        moved = bool((parameter < 0).all())
        reason = "it leaves the weights where they are"
    except Exception as error:  # a missing library, operator or compiler, each of which has its own kind
        moved, reason = False, f"{type(error).__name__}: {error}".splitlines()[0]
    if not moved:
        yield f"optimizer: adamw8bit: bitsandbytes cannot make a step on {device.type} ({reason}); write adamw"


# --- Optimizers -------------------------------------------------------------------------------------------------------


def make_optimizer(config: RunConfig, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer over the adapter's parameters, ready to train."""
    own = settings_of(config)
    betas = (own.pop("beta1", config.adam_beta1), own.pop("beta2", config.adam_beta2))
    common = {"lr": config.learning_rate, "betas": betas, "eps": config.adam_epsilon, "weight_decay": config.adam_weight_decay}
    return MAKERS[config.optimizer](config, parameters, common | own)


def settings_of(config: RunConfig) -> dict[str, bool | int | float]:
    """`optimizer_config`, with its values in the types of the settings."""
    known = ADAM | KINDS[config.optimizer].settings
    return {name: known[name].read(value) for name, value in config.optimizer_config.items()}


def _adamw(config: RunConfig, parameters: Sequence[torch.nn.Parameter], settings: dict[str, Any]) -> torch.optim.Optimizer:
    fused = all(parameter.device.type in FUSED for parameter in parameters)
    return torch.optim.AdamW(parameters, fused=fused or None, **settings)


def _adamw8bit(config: RunConfig, parameters: Sequence[torch.nn.Parameter], settings: dict[str, Any]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, **settings)
    return optimizer


def _prodigy(config: RunConfig, parameters: Sequence[torch.nn.Parameter], settings: dict[str, Any]) -> torch.optim.Optimizer:
    """With `safeguard_warmup` wherever there is a warm-up, which its authors ask for, unless the user says otherwise."""
    from prodigyopt import Prodigy

    safe = {"safeguard_warmup": config.lr_warmup_steps > 0}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a line about weight decay, and our results are on that stream
        optimizer: torch.optim.Optimizer = Prodigy(parameters, **(safe | settings))
    return optimizer


def _schedulefree(
    config: RunConfig, parameters: Sequence[torch.nn.Parameter], settings: dict[str, Any]
) -> torch.optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    optimizer: Any = AdamWScheduleFree(parameters, warmup_steps=config.lr_warmup_steps, **settings)
    optimizer.train()
    return optimizer  # type: ignore[no-any-return]


MAKERS: dict[str, Callable[[RunConfig, Sequence[torch.nn.Parameter], dict[str, Any]], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "prodigy": _prodigy,
    "adamw_schedulefree": _schedulefree,
}


def present_rate(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate as the optimizer has it after a step: Prodigy's times its estimate d, schedule-free's with warm-up."""
    group = optimizer.param_groups[0]
    return float(group.get("scheduled_lr", group["lr"]) * group.get("d", 1.0))


# --- Schedules --------------------------------------------------------------------------------------------------------


def make_schedule(config: RunConfig, optimizer: torch.optim.Optimizer) -> Any:
    """The schedule of the learning rate: diffusers' (diffusers/optimization.py), and a warm-up in front of every one of them.

    Schedule-free AdamW has the warm-up in itself, and a constant rate from outside.
    """
    from diffusers.optimization import get_polynomial_decay_schedule_with_warmup, get_scheduler

    warmup = 0 if config.optimizer == "adamw_schedulefree" else config.lr_warmup_steps
    if config.lr_scheduler == "polynomial":
        return get_polynomial_decay_schedule_with_warmup(
            optimizer, warmup, config.max_train_steps, lr_end=config.lr_end, power=config.lr_power
        )
    name = "constant_with_warmup" if config.lr_scheduler == "constant" and warmup else config.lr_scheduler
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=config.max_train_steps,
        num_cycles=config.lr_num_cycles,
    )


# --- State ------------------------------------------------------------------------------------------------------------

Named = Sequence[tuple[str, torch.nn.Parameter]]


def optimizer_tensors(optimizer: torch.optim.Optimizer, named: Named) -> dict[str, torch.Tensor]:
    """The tensors of an optimizer's state, on the CPU, as `<parameter>//<name>`."""
    return {
        f"{name}//{key}": value.detach().cpu().clone().contiguous()
        for name, parameter in named
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }


def optimizer_numbers(optimizer: torch.optim.Optimizer, named: Named) -> dict[str, Any]:
    """The rest of the state, which JSON holds exactly: numbers of each parameter, and what each group has come to.

    The settings that a group was made with are not in it: they are the configuration's. What is left is what the optimizer
    moves: Prodigy's estimate d, the weights of the schedule-free average, counters.
    """
    made_with = {*inspect.signature(type(optimizer).__init__).parameters, "params", "initial_lr"}
    return {
        "class": type(optimizer).__name__,
        "groups": [{k: v for k, v in group.items() if k not in made_with} for group in optimizer.param_groups],
        "parameters": {
            f"{name}//{key}": value
            for name, parameter in named
            for key, value in optimizer.state.get(parameter, {}).items()
            if not isinstance(value, torch.Tensor)
        },
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, named: Named, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]
) -> None:
    """Put a saved state back, through the optimizer's own `load_state_dict`, which knows what belongs on which device."""
    state: dict[str, dict[str, Any]] = {}
    for place, value in {**tensors, **numbers["parameters"]}.items():
        name, key = place.split("//")
        state.setdefault(name, {})[key] = value
    written = optimizer.state_dict()
    names = {id(parameter): name for name, parameter in named}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    groups = [{**group, **saved} for group, saved in zip(written["param_groups"], numbers["groups"], strict=True)]
    optimizer.load_state_dict(
        {"state": {i: state[name] for i, name in enumerate(order) if name in state}, "param_groups": groups}
    )

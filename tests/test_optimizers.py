"""Optimizers, schedules and the moving average: that they are what their names say, and that a resumed run is the same run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slider_plugin import run, stages
from slider_plugin.config import RunConfig
from slider_plugin.configfile import read_config
from slider_plugin.errors import ConfigError, UserError
from slider_plugin.preflight import preflight
from slider_plugin.registry import Plugins
from slider_plugin.training import optimizers
from slider_plugin.training.checkpoint import Position, load_checkpoint, save_checkpoint
from slider_plugin.training.ema import Ema, finished_weights
from slider_plugin.training.loop import Trainer
from slider_plugin.training.optimizers import KINDS, make_optimizer, make_schedule, present_rate

Project = Callable[..., Path]
Named = list[tuple[str, torch.nn.Parameter]]


def config_of(**keys: Any) -> RunConfig:
    return RunConfig.model_validate({"model_family": "sd1", "learning_rate": 0.01, "max_train_steps": 20} | keys)


class Weights:
    """As much of an adapter as a checkpoint needs. One weight begins at zero, as B of a LoRA; one is large enough for 8 bit."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        drawn = {
            "a": torch.randn(64, 64, generator=generator),
            "b": torch.zeros(8, 16),
            "c": torch.randn(3, generator=generator),
        }
        self.named = [(name, torch.nn.Parameter(value)) for name, value in drawn.items()]

    def named_parameters(self) -> Named:
        return self.named

    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for _, parameter in self.named]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.named}

    def load_tensors(self, tensors: dict[str, torch.Tensor], where: str) -> None:
        with torch.no_grad():
            for name, parameter in self.named:
                parameter.copy_(tensors[name])


class Toy:
    """A run on a quadratic bowl, with the real optimizer, schedule and average."""

    def __init__(self, config: RunConfig) -> None:
        self.weights, self.step = Weights(), 0
        self.optimizer = make_optimizer(config, self.weights.parameters())
        self.schedule = make_schedule(config, self.optimizer)
        self.ema = Ema(self.weights.named, config.ema_decay) if config.use_ema else None

    def run(self, until: int) -> Toy:
        while self.step < until:
            generator = torch.Generator().manual_seed(self.step)
            for parameter in self.weights.parameters():
                aim = torch.randn(parameter.shape, generator=generator) + 1.0
                parameter.grad = parameter.detach() - aim
            self.optimizer.step()
            if self.ema:
                self.ema.update()
            self.schedule.step()
            self.step += 1
        return self

    def save(self, folder: Path) -> Path:
        position = Position(self.step, {}, self.schedule.state_dict())
        return save_checkpoint(folder, self.weights, self.optimizer, self.ema, position, {}, 3)  # type: ignore[arg-type]

    def resume(self, path: Path) -> Toy:
        position = load_checkpoint(path, self.weights, self.optimizer, self.ema)  # type: ignore[arg-type]
        self.schedule.load_state_dict(json.loads(json.dumps(position.schedule)))
        for group, rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        self.step = position.step
        return self

    def same(self, other: Toy) -> bool:
        ours, theirs = self.weights.tensors(), other.weights.tensors()
        return all(torch.equal(ours[name], theirs[name]) for name in ours)


RUNS: list[dict[str, Any]] = [
    {"optimizer": "adamw"},
    {"optimizer": "adamw", "optimizer_config": {"amsgrad": True}, "lr_scheduler": "cosine", "lr_warmup_steps": 5},
    {"optimizer": "adamw8bit"},
    {"optimizer": "prodigy", "learning_rate": 1.0},
    {"optimizer": "prodigy", "learning_rate": 1.0, "lr_warmup_steps": 8, "optimizer_config": "slice_p=3,decouple=false"},
    {"optimizer": "adamw_schedulefree"},
    {"optimizer": "adamw_schedulefree", "lr_warmup_steps": 8, "optimizer_config": {"r": 1.0}},
    {"optimizer": "adamw", "use_ema": True, "ema_decay": 0.9},
]  # fmt: skip


@pytest.mark.parametrize("keys", RUNS, ids=lambda keys: "-".join(map(str, keys.values())))
@pytest.mark.parametrize("after", [1, 6])
def test_a_resumed_optimizer_goes_on_bit_for_bit(keys: dict[str, Any], after: int, tmp_path: Path) -> None:
    """Numbers in groups, counters, 8-bit and scalar states: if any were lost, the weights would differ."""
    whole = Toy(config_of(**keys)).run(12)
    path = Toy(config_of(**keys)).run(after).save(tmp_path)
    resumed = Toy(config_of(**keys)).resume(path).run(12)
    assert resumed.same(whole)
    for ours, theirs in zip(whole.weights.parameters(), resumed.weights.parameters(), strict=True):  # kernels take no tensors
        types = [
            {key: type(value) for key, value in toy.optimizer.state[p].items()} for toy, p in ((whole, ours), (resumed, theirs))
        ]
        assert types[0] == types[1]
    if whole.ema and resumed.ema:
        pairs = zip(whole.ema.tensors().values(), resumed.ema.tensors().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}


def test_what_is_written_is_what_the_optimizer_moves(tmp_path: Path) -> None:
    """Settings are the configuration's: they are not in a checkpoint, and a resumed run has those that it is given."""
    path = Toy(config_of(optimizer="prodigy", learning_rate=1.0)).run(3).save(tmp_path)
    state = json.loads((path / "state.json").read_text())["optimizer"]
    assert set(state["groups"][0]) == {"d", "d_max", "d_numerator", "d_denom", "d_hat", "k"}
    assert state["parameters"] == {"a//step": 3, "b//step": 3, "c//step": 3}
    path = Toy(config_of(optimizer="adamw8bit")).run(3).save(tmp_path / "8")
    kept = load_file(path / "optimizer.safetensors")
    assert kept["a//state1"].dtype == torch.uint8 and kept["b//state1"].dtype == torch.float32
    changed = Toy(config_of(optimizer="adamw8bit", adam_weight_decay=0.5)).resume(path)
    assert changed.optimizer.param_groups[0]["weight_decay"] == 0.5


def test_another_optimizer_s_checkpoint_is_refused(tmp_path: Path) -> None:
    path = Toy(config_of()).run(1).save(tmp_path)
    with pytest.raises(UserError, match=r"written with AdamW, and this run has Prodigy.*init_lora"):
        Toy(config_of(optimizer="prodigy")).resume(path)
    with pytest.raises(UserError, match=r"use_ema: .*holds no moving average; take use_ema out"):
        Toy(config_of(use_ema=True)).resume(path)
    path = Toy(config_of(use_ema=True)).run(1).save(tmp_path / "ema")
    with pytest.raises(UserError, match=r"use_ema: .*holds a moving average; set use_ema to true"):
        Toy(config_of()).resume(path)


# --- Optimizers -------------------------------------------------------------------------------------------------------


def test_each_optimizer_is_the_library_s_own() -> None:
    import bitsandbytes
    import prodigyopt
    import schedulefree

    classes = {
        "adamw": torch.optim.AdamW, "adamw8bit": bitsandbytes.optim.AdamW8bit, "prodigy": prodigyopt.Prodigy,
        "adamw_schedulefree": schedulefree.AdamWScheduleFree,
    }  # fmt: skip
    for name, of in classes.items():
        made = make_optimizer(config_of(optimizer=name, adam_beta1=0.8, adam_weight_decay=0.3), Weights().parameters())
        assert type(made) is of and KINDS[name].class_name == of.__name__
        group = made.param_groups[0]
        assert (tuple(group["betas"]), group["weight_decay"], group["lr"]) == ((0.8, 0.999), 0.3, 0.01)


def test_every_setting_is_an_argument_of_its_class() -> None:
    import inspect

    for name in KINDS:
        made = make_optimizer(config_of(optimizer=name), Weights().parameters())
        arguments = inspect.signature(type(made).__init__).parameters
        assert set(KINDS[name].settings) <= set(arguments), name


def test_adamw_is_fused_and_follows_its_formula() -> None:
    """One step from moments of zero: `w - lr * (sign(g) + decay * w)`."""
    toy = Toy(config_of(adam_weight_decay=0.1, learning_rate=0.5, adam_epsilon=1e-12))
    assert toy.optimizer.param_groups[0]["fused"] is True
    before = toy.weights.tensors()["a"]
    toy.run(1)
    sign = torch.sign(toy.weights.parameters()[0].grad)  # type: ignore[arg-type]
    assert torch.allclose(toy.weights.tensors()["a"], before - 0.5 * (sign + 0.1 * before), atol=1e-5)


def test_settings_reach_the_optimizer_in_their_types(capsys: pytest.CaptureFixture[str]) -> None:
    text = "d_coef=2,use_bias_correction=true,slice_p=11,beta1=0.5,weight_decay=0.25"
    group = make_optimizer(config_of(optimizer="prodigy", optimizer_config=text), Weights().parameters()).param_groups[0]
    assert (group["d_coef"], group["use_bias_correction"], group["slice_p"]) == (2.0, True, 11)
    assert isinstance(group["slice_p"], int)
    assert (group["betas"], group["weight_decay"], group["safeguard_warmup"]) == ((0.5, 0.999), 0.25, False)
    assert capsys.readouterr().out == ""  # the library prints there, and results are on that stream
    warming = make_optimizer(config_of(optimizer="prodigy", lr_warmup_steps=5), Weights().parameters())
    assert warming.param_groups[0]["safeguard_warmup"] is True


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"optimizer_config": "d_coef=2"}, "optimizer_config: adamw has no setting 'd_coef' here; it has beta1, beta2, eps"),
        ({"optimizer": "prodigy", "optimizer_config": "d_coef=big"}, "optimizer_config: d_coef: 'big' is not a number"),
        ({"optimizer": "prodigy", "optimizer_config": "slice_p=1.5"}, "slice_p: '1.5' is not a whole number from 1"),
        ({"optimizer": "prodigy", "optimizer_config": "decouple=2"}, "decouple: '2' is neither true nor false"),
        ({"optimizer_config": {"beta1": 1}}, "beta1: 1 is not a number from 0 to below 1"),
        ({"optimizer": "adamw_schedulefree", "lr_scheduler": "cosine"}, "lr_scheduler: adamw_schedulefree averages"),
        ({"optimizer": "adamw_schedulefree", "use_ema": True}, "use_ema: adamw_schedulefree draws"),
    ],
)
def test_a_wrong_choice_is_found_beforehand(project: Project, keys: dict[str, Any], said: str) -> None:
    config = read_config(project("sd1", **keys), (), Plugins.discover().facts)[0]
    with pytest.raises(ConfigError) as caught:
        preflight(config, Plugins.discover().load("sd1"))
    assert said in str(caught.value) and len(caught.value.problems) == 1


def test_a_library_that_is_missing_or_has_no_kernel_is_found_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, extra in (("prodigy", "optimizers"), ("adamw_schedulefree", "optimizers"), ("adamw8bit", "quant")):
        optimizers.check_optimizer(config_of(optimizer=name))
        with monkeypatch.context() as context, pytest.raises(ConfigError, match=rf"optimizer: {name} needs .*\[{extra}\]"):
            context.setattr(optimizers.importlib.util, "find_spec", lambda name: None)
            optimizers.check_optimizer(config_of(optimizer=name))
    monkeypatch.setattr(optimizers, "run_device", lambda: torch.device("meta"))  # for which nobody has a kernel
    with pytest.raises(ConfigError, match=r"adamw8bit: bitsandbytes cannot make a step on meta \(.*\); write adamw"):
        optimizers.check_optimizer(config_of(optimizer="adamw8bit"))


def test_prodigy_s_learning_rate_is_a_factor() -> None:
    assert config_of(optimizer="prodigy", learning_rate=0.5).learning_rate == 0.5
    assert RunConfig(model_family="sd1", optimizer="prodigy").learning_rate == 1.0
    assert optimizers.optimizer_warnings(RunConfig(model_family="sd1", optimizer="prodigy")) == []
    assert "leave the key out" in optimizers.optimizer_warnings(config_of(optimizer="prodigy", learning_rate=1e-4))[0]
    toy = Toy(config_of(optimizer="prodigy", learning_rate=0.5)).run(5)
    assert present_rate(toy.optimizer) == 0.5 * toy.optimizer.param_groups[0]["d"] > 0


def test_the_finished_weights_of_schedule_free_are_its_average() -> None:
    """`y = (1 - beta) z + beta x` (arXiv 2405.15682, eq. 2): gradients are taken at y, and x is the slider."""
    toy = Toy(config_of(optimizer="adamw_schedulefree", adam_beta1=0.8)).run(7)
    trained = toy.weights.tensors()
    with finished_weights(toy.optimizer, None):
        average = toy.weights.tensors()
        assert toy.optimizer.param_groups[0]["train_mode"] is False
    for name, parameter in toy.weights.named:
        z, x = toy.optimizer.state[parameter]["z"], average[name]
        assert torch.allclose(0.2 * z + 0.8 * x, trained[name], atol=1e-6)
        assert not torch.allclose(x, trained[name], atol=1e-3)
    assert all(torch.equal(value, trained[name]) for name, value in toy.weights.tensors().items())  # bit for bit
    assert toy.optimizer.param_groups[0]["train_mode"] is True


# --- Schedules --------------------------------------------------------------------------------------------------------


def rates(**keys: Any) -> list[float]:
    toy = Toy(config_of(**keys))
    found = []
    for step in range(20):
        found.append(toy.optimizer.param_groups[0]["lr"] / 0.01)
        toy.run(step + 1)
    return found


CURVES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "constant_with_warmup": lambda t: 1.0,
    "linear": lambda t: 1 - t,
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    "cosine_with_restarts": lambda t: 0.5 * (1 + math.cos(math.pi * (3 * t % 1))),
    "polynomial": lambda t: 0.1 + 0.9 * (1 - t) ** 2,
}


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("warmup", [0, 5])
def test_every_schedule_warms_up_and_is_its_curve(name: str, warmup: int) -> None:
    found = rates(lr_scheduler=name, lr_warmup_steps=warmup, lr_num_cycles=3, lr_power=2, lr_end=1e-3)
    assert found[:warmup] == pytest.approx([step / 5 for step in range(warmup)])
    after = [CURVES[name]((step - warmup) / (20 - warmup)) for step in range(warmup, 20)]
    assert found[warmup:] == pytest.approx(after)


def test_schedule_free_warms_up_by_itself() -> None:
    assert rates(optimizer="adamw_schedulefree", lr_warmup_steps=5) == [1.0] * 20  # nothing from outside
    toy, own = Toy(config_of(optimizer="adamw_schedulefree", lr_warmup_steps=5)), []
    for step in range(8):
        own.append(present_rate(toy.run(step + 1).optimizer) / 0.01)
    assert own == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0])


# --- Moving average ---------------------------------------------------------------------------------------------------


def test_the_average_is_its_formula() -> None:
    """`e <- e + (1 - d)(w - e)` with `d = min(decay, n / (9 + n))` after step n, and d = 0 after the first."""
    toy = Toy(config_of(use_ema=True, ema_decay=0.4))
    expected = None
    for n in range(1, 12):
        weights = toy.run(n).weights.tensors()["a"]
        decay = 0.0 if n == 1 else min(0.4, n / (9 + n))
        expected = weights if expected is None else expected + (1 - decay) * (weights - expected)
    assert toy.ema is not None
    assert torch.allclose(toy.ema.tensors()["a"], expected, atol=1e-6)  # type: ignore[arg-type]
    trained = toy.weights.tensors()
    with finished_weights(toy.optimizer, toy.ema):
        assert torch.equal(toy.weights.tensors()["a"], toy.ema.tensors()["a"])
    assert all(torch.equal(value, trained[name]) for name, value in toy.weights.tensors().items())
    assert not torch.allclose(trained["a"], toy.ema.tensors()["a"], atol=1e-3)


def test_another_adapter_s_average_is_refused() -> None:
    ema = Ema(Weights().named, 0.9)
    with pytest.raises(UserError, match="here holds the average of another adapter"):
        ema.load({"a": torch.zeros(64, 64)}, 3, "here")


# --- Whole runs -------------------------------------------------------------------------------------------------------


@contextmanager
def stopped_after(steps: int) -> Iterator[None]:
    """Runs stop after that step, with a checkpoint, as if interrupted."""
    original = Trainer.run
    Trainer.run = lambda self, total, after: original(self, total, lambda report: after(report) or report.step == steps)  # type: ignore
    try:
        yield
    finally:
        Trainer.run = original  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "keys",
    [
        {"optimizer": "adamw8bit", "optimizer_config": "min_8bit_size=64"},
        {"optimizer": "prodigy", "optimizer_config": "d0=0.001"},
        {"optimizer": "adamw_schedulefree", "lr_warmup_steps": 2},
        {"use_ema": True, "ema_decay": 0.5},
    ],
    ids=["adamw8bit", "prodigy", "adamw_schedulefree", "ema"],
)
def test_a_run_trains_draws_and_resumes_to_the_same_file(
    project: Project, keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation on the way changes nothing, and what it draws is what is exported."""
    config = project(
        "sd1", max_train_steps=5, checkpoint_step_interval=2, validation_prompt="a circle", validation_num_inference_steps=1,
        validation_strengths=[], validation_step_interval=5, **keys,
    )  # fmt: skip
    drawn: list[dict[str, torch.Tensor]] = []
    draw = stages.draw

    def watching(config: Any, family: Any, components: Any, adapter: Any, *rest: Any) -> Any:
        drawn.append(adapter.tensors())
        return draw(config, family, components, adapter, *rest)

    monkeypatch.setattr(stages.results, "draw", watching)

    def train(folder: str, *flags: str) -> run.Outcome:
        flags = ("--output_dir", str(tmp_path / folder), *flags)
        return run.train(read_config(config, flags, Plugins.discover().facts)[0])

    whole = train("whole").adapter
    with stopped_after(3):
        assert not train("part", "--validation_step_interval", "1").finished
    resumed = train("part", "--resume_from_checkpoint", "latest").adapter
    assert whole and resumed and whole.read_bytes() == resumed.read_bytes()
    last = tmp_path / "whole" / "checkpoint-000005"
    trained = load_file(last / "adapter.safetensors")
    assert json.loads((last / "state.json").read_text())["ema_updates"] == (5 if "use_ema" in keys else None)
    other = keys.get("optimizer") == "adamw_schedulefree" or "use_ema" in keys
    assert any(not torch.equal(trained[name], drawn[0][name]) for name in trained) == other
    exported = sorted(round(float(t.abs().sum()), 3) for name, t in load_file(whole).items() if "lora_A" in name)
    assert exported == sorted(round(float(t.abs().sum()), 3) for name, t in drawn[0].items() if "lora_A" in name)


def test_the_doctor_of_a_resumed_run_knows_the_optimizer(project: Project, tmp_path: Path) -> None:
    """That a checkpoint is another optimizer's is known before a model is loaded."""
    config = project("sd1", max_train_steps=1)
    run.train(read_config(config, (), Plugins.discover().facts)[0])
    flags = ("--resume_from_checkpoint", "latest", "--optimizer", "prodigy", "--max_train_steps", "2")
    with pytest.raises(ConfigError, match='optimizer was "adamw" and is "prodigy"'):
        preflight(read_config(config, flags, Plugins.discover().facts)[0], Plugins.discover().load("sd1"))

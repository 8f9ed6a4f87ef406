"""Every way to a slider on every family's tiny pipeline: a LoRA, LoKr, `full`, one on a ControlNet, one beside an assistant.

`python tests/families/routes.py` tries them all and writes routes.json beside it, which the table in docs/families.md
is made from and which test_routes.py holds to what happens.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import lycoris
import torch
from lycoris.logging import logger as lycoris_log
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slider_hooks import Conditioning, UserError
from slider_plugin.adapters.attach import (
    attach_file,
    component_of,
    new_adapter,
    plan_on_controlnet,
    plan_targets,
    trained_model,
)
from slider_plugin.adapters.base import Adapter
from slider_plugin.adapters.frozen import attach_frozen, drawing_strengths
from slider_plugin.adapters.lycoris_network import LycorisAdapter
from slider_plugin.adapters.presets import preset_for
from slider_plugin.common.controlnet import check_controlnet
from slider_plugin.config import RunConfig
from slider_plugin.control import SHOWN, Control, encode_for_controlnet, zero_layers
from slider_plugin.family import LoadedFamily
from slider_plugin.lycoris_config import LycorisConfig
from slider_plugin.registry import Plugins
from slider_plugin.targets import adaptable_modules
from slider_plugin.testing.reload import Answers, answers
from slider_plugin.testing.rules import LINEAR, SCALES, bucket_loss, inputs_of, layers_mirror
from slider_plugin.testing.subject import PROMPTS, Subject, write_tiny
from slider_plugin.testing.tiny import redraw_zeros, seeded

ROUTES = ("lora", "lokr", "full", "controlnet", "assistant")
FIRST = ("sd1", "sdxl", "z_image", "flux", "sd3", "wan", "kandinsky5_image")
"""The families that every test run tries."""

FAMILIES = sorted(p.stem for p in Path(__file__).parents[2].joinpath("slider_plugin", "architectures").glob("[!_]*.py"))
OUTCOMES = Path(__file__).with_name("routes.json")
YES, NONE = "yes", "-"
NAME = "it"
"""Of the adapter in other readers."""

RANK = 2
SPREAD = 0.1  # standard deviation of what is added to the first weights
LEARNING_RATE = 1e-3
REREAD = 1e-5  # of the largest answer: how far another reader may be off, which sums in another order
EFFECT = 1e-3  # of the largest answer: what a slider changes at least, or else no reader is found wrong


def outcome(family: str, route: str, folder: Path) -> str:
    """Try one route on one family.

    Args:
        family: its name.
        route: one of `ROUTES`.
        folder: of its tiny pipeline.

    Returns:
        "yes"; "-" for a family without a ControlNet; or the line with which the project refuses the route.

    Raises:
        AssertionError: it is there, and something about it is wrong.
    """
    loaded = Plugins.discover().load(family)
    if route == "controlnet" and not loaded.facts.controlnet_class:
        return _without_controlnet(loaded)
    with tempfile.TemporaryDirectory() as room:
        for config in configurations(route, Subject.load(loaded, folder), Path(room)):
            try:
                attempt = Attempt.begin(config, Subject.load(loaded, folder))
            except UserError as refusal:
                return str(refusal)
            attempt.hold(lambda: Subject.load(loaded, folder), Path(room))
    return YES


def _without_controlnet(family: LoadedFamily) -> str:
    try:
        check_controlnet(family.facts, None)
    except UserError:
        return NONE
    raise AssertionError("a family without a ControlNet is not refused")


# --- What stands where ------------------------------------------------------------------------------------------------


def configurations(route: str, subject: Subject, room: Path) -> list[RunConfig]:
    """The runs that a route consists of; `room` is for the ControlNet or the assistant that they name."""
    family = subject.family.facts
    plain: dict[str, Any] = {"model_family": family.name, "slider_lora_target": True, "lora_rank": RANK}
    preset = preset_for(family)

    def lycoris_run(algo: str) -> dict[str, Any]:
        config = LycorisConfig(algo=algo, linear_dim=RANK, linear_alpha=1.0, apply_preset=preset)
        return {"model_family": family.name, "lora_type": "lycoris", "lycoris": config}

    if route == "lora":
        return [RunConfig(**plain)]
    if route in ("lokr", "full"):
        return [RunConfig(**lycoris_run(route))]
    if route == "controlnet":
        held = write_controlnet(subject, room / "controlnet")
        return [RunConfig(**plain, controlnet=True, controlnet_model_name_or_path=str(held))]
    assistant = write_assistant(subject, room / "assistant.safetensors")
    return [RunConfig(**run, assistant_lora_path=assistant) for run in (plain, lycoris_run("lokr"), lycoris_run("full"))]


def write_controlnet(subject: Subject, folder: Path) -> Path:
    """A ControlNet for a family's tiny pipeline as if it were trained: none of its layers is zero."""
    with seeded(5):
        redraw_zeros(fresh_controlnet(subject), std=0.5).save_pretrained(folder)
    return folder


def fresh_controlnet(subject: Subject) -> Any:
    if subject.family.facts.name != "z_image":
        return subject.family.load_controlnet(subject.components, None)
    # It shares most of itself with the denoiser, and is not made from it.
    own = subject.components.denoiser.config
    places = {"control_layers_places": [0, 1], "control_refiner_layers_places": [0], "control_in_dim": 5}
    sizes = {key: own[key] for key in ("dim", "n_refiner_layers", "n_heads", "n_kv_heads")}
    return diffusers.ZImageControlNetModel(**places, **sizes, add_control_noise_refiner="control_noise_refiner")


def write_assistant(subject: Subject, file: Path) -> Path:
    """A LoRA, as diffusers writes it, on every second slider target and on those standard LoRA targets that are none."""
    facts, generator, tensors = subject.family.facts, torch.Generator().manual_seed(1), {}
    modules = adaptable_modules(subject.denoiser)
    targets = [name for name in modules if re.fullmatch(facts.targets.slider(), name)]
    others = [name for name in modules if re.fullmatch(facts.targets.standard, name) and name not in targets]
    for name in (*targets[::2], *others):
        shape = modules[name].weight.shape  # type: ignore[union-attr]
        pair = {"lora_A": (RANK, *shape[1:]), "lora_B": (shape[0], RANK, *(1 for _ in shape[2:]))}
        for twin, size in pair.items():
            tensors[f"{facts.denoiser}.{name}.{twin}.weight"] = 0.2 * torch.randn(size, generator=generator)
    save_file(tensors, file)
    return file


class Steered(Subject):
    """A subject whose ControlNet sees a picture in every call."""

    def conditioning(self, prompts: Any = PROMPTS[:1]) -> list[Conditioning]:
        with torch.no_grad():
            (shown,) = encode_for_controlnet(self.family, self.components, self.media())
        return [{**sample, SHOWN: shown} for sample in super().conditioning(prompts)]


def beside(config: RunConfig, subject: Subject) -> Subject:
    """A freshly loaded subject with what a run has beside its slider: a ControlNet, or an assistant."""
    components = subject.components
    if config.controlnet:
        subject = Steered(subject.family, components, subject.size, subject.folder)
        components.controlnet = subject.family.load_controlnet(components, config.controlnet_model_name_or_path)
        components.controlnet.requires_grad_(False).eval()
        components.control = Control(subject.family, components, config.controlnet_conditioning_scale)
        assert not zero_layers(components.controlnet, subject.denoiser), "the ControlNet is not as if it were trained"
    names = list(subject.denoiser.state_dict())
    attach_frozen(config, subject.family.facts, subject.denoiser)
    assert list(subject.denoiser.state_dict()) == names, "the assistant would be saved with the model"
    return subject


def expected_modules(config: RunConfig, subject: Subject) -> tuple[set[str], set[str]]:
    """What the family's expression names on the model that the slider goes into, before it is there; and what is left out."""
    targets = subject.family.facts.targets
    modules = adaptable_modules(trained_model(config, subject.components))
    if config.controlnet:
        shared = {id(module) for module in subject.denoiser.modules()}
        named = {name for name, m in modules.items() if re.fullmatch(targets.controlnet, name) and id(m) not in shared}
        return named, set()
    named = {name for name in modules if re.fullmatch(targets.slider(), name)}
    if config.lycoris is None or config.lycoris.algo != "full" or not targets.weight_read:
        return named, set()
    read = {name for name in named if re.fullmatch(targets.weight_read, name)}
    return named - read, read


@torch.no_grad()
def answer(subject: Subject) -> Tensor:
    """The denoiser's, to the test media of two prompts."""
    return subject.predict(subject.latents(2), subject.conditioning(PROMPTS))


# --- What must hold ---------------------------------------------------------------------------------------------------


@dataclass
class Attempt:
    """A slider on a tiny pipeline, begun as a run begins it."""

    config: RunConfig
    subject: Subject
    bare: Tensor
    """The answer of the pipeline alone."""

    base: Tensor
    """The answer without the slider, with what stands beside it."""

    expected: set[str]
    adapter: Adapter

    @classmethod
    def begin(cls, config: RunConfig, alone: Subject) -> Attempt:
        """Attach. Raises UserError where the project refuses that."""
        bare = answer(alone)
        subject = beside(config, alone)
        base, (expected, left_out) = answer(subject), expected_modules(config, subject)
        family, components = subject.family, subject.components
        if config.controlnet:
            plan = plan_on_controlnet(config, family, components)
        else:
            plan = plan_targets(config, family, components.denoiser)
        assert bool(left_out) == any("leaves out" in line for line in plan.warnings), "what is left out is not said, or not so"
        return cls(config, subject, bare, base, expected, new_adapter(config, family, components, plan))

    @property
    def model(self) -> nn.Module:
        model: nn.Module = trained_model(self.config, self.subject.components)
        return model

    def hold(self, new: Callable[[], Subject], room: Path) -> None:
        """Everything that a slider must do. Raises AssertionError.

        Args:
            new: loads the pipeline anew.
            room: a folder for the slider's file.
        """
        self.wraps_what_the_expression_names()
        self.is_the_base_at_zero()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in self.adapter.parameters():
                parameter.add_(SPREAD * torch.randn(parameter.shape, generator=generator))
        self.every_module_learns_and_nothing_else()
        self.is_the_base_at_zero()
        if self.config.assistant_lora_path is not None:
            self.the_sign_does_not_reach_the_assistant(self.config.assistant_lora_path)
        layers_mirror(self.model, self.adapter, inputs_of(self.subject, self.model, self.adapter.modules))
        self.a_file_answers_the_same(new, room / "slider.safetensors")

    def wraps_what_the_expression_names(self) -> None:
        assert self.expected, "the expression names nothing"
        for found in (set(self.adapter.modules), wrapped_in(self.model, self.adapter)):
            missing, extra = sorted(self.expected - found), sorted(found - self.expected)
            assert not missing and not extra, f"not wrapped: {missing[:3]}; wrapped, and not named: {extra[:3]}"

    def is_the_base_at_zero(self) -> None:
        """Bit for bit; with the assistant's drawing strength, which is 0, the pipeline alone."""
        with self.adapter.scaled(0.0):
            assert torch.equal(answer(self.subject), self.base), "at scale 0 the model is not the base"
            with drawing_strengths(self.subject.denoiser):
                drawn = answer(self.subject)
        if self.config.assistant_lora_path is not None:
            assert not torch.equal(self.base, self.bare), "the assistant is not there"
            assert torch.equal(drawn, self.bare), "the assistant is not off in drawing"

    def every_module_learns_and_nothing_else(self) -> None:
        """A step of optimization at each sign; what it may not move is found by `is_the_base_at_zero`."""
        own = {id(parameter) for parameter in self.adapter.parameters()}
        optimizer = torch.optim.SGD(self.adapter.parameters(), lr=LEARNING_RATE)
        for scale in SCALES:
            with self.adapter.scaled(scale):
                bucket_loss(self.subject, positive=scale > 0).backward()
            still = [n for n, p in self.adapter.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
            assert not still, f"at {scale:+g} no gradient reaches {len(still)} parameters, such as {still[:3]}"
            models = (self.model, self.subject.denoiser)
            others = [n for m in models for n, p in m.named_parameters() if p.grad is not None and id(p) not in own]
            assert not others, f"at {scale:+g} a gradient reaches weights that are not the slider's: {others[:3]}"
            optimizer.step()
            optimizer.zero_grad()

    def the_sign_does_not_reach_the_assistant(self, file: Path) -> None:
        """For the same input each layer gets the same from the assistant at +1, 0 and -1: what its hook adds to the output."""
        facts, model = self.subject.family.facts, self.model
        names = {key.removeprefix(f"{facts.denoiser}.").rsplit(".", 2)[0] for key in load_file(file)}
        assert names & self.expected, "the assistant stands on no target of the slider"
        inputs = inputs_of(self.subject, model, names)
        assert names & self.expected <= set(inputs), "layers of the assistant are never called"
        for name, value in inputs.items():
            added = {}
            for scale in (0.0, *SCALES):
                with self.adapter.scaled(scale):
                    added[scale], size = added_by_hooks(model.get_submodule(name), value)
            assert added[0.0].abs().max() > EFFECT * size, f"{name}: the assistant adds next to nothing"
            for scale in SCALES:
                gap = float((added[scale] - added[0.0]).abs().max())
                assert gap <= LINEAR * size, f"{name}: at {scale:+g} the assistant adds something else than at 0, by {gap:.2g}"

    def a_file_answers_the_same(self, new: Callable[[], Subject], file: Path) -> None:
        """In the reader that its users have, and in our own, around the published pipeline without the assistant."""
        save_as(self.config, self.subject, self.adapter, file)
        with drawing_strengths(self.subject.denoiser):
            here = answers(self.subject, self.adapter)
        size = max(float(value.abs().max()) for value in here.values())
        for sign in ("+1", "-1"):
            effect = float((here[sign] - here["+0"]).abs().max())
            assert effect > EFFECT * size, f"at {sign} the slider changes next to nothing: {effect / size:.2g}"
        alone = self.config.model_copy(update={"assistant_lora_path": None})
        one, other = (beside(alone, new()) for _ in range(2))
        readers = {
            "its users' reader": read_elsewhere(alone, one, file, len(self.expected)),
            "our reader": answers(other, attach_file(file, other.family, other.components)),
        }
        for who, there in readers.items():
            for scale, value in here.items():
                gap = float((value - there[scale]).abs().max())
                assert gap <= REREAD * size, f"at {scale} {who} is off by {gap / size:.2g} of the largest answer"


def wrapped_in(model: nn.Module, adapter: Adapter) -> set[str]:
    """The layers that have the slider in them, found in the model and not in what the adapter says of itself."""
    if isinstance(adapter, LycorisAdapter):  # which replaces the method of the layer on the object
        return {name for name, module in model.named_modules() if "forward" in vars(module)}
    return {name for name, module in model.named_modules() if "slider" in getattr(module, "lora_A", ())}


@torch.no_grad()
def added_by_hooks(layer: nn.Module, value: Tensor) -> tuple[Tensor, float]:
    """What the forward hooks of a layer add to its output for an input, in float64, and the largest value of that output."""
    base: Any = getattr(layer, "base_layer", layer)  # inside the wrapper of PEFT
    seen: list[Tensor] = []

    def see(_: nn.Module, __: Any, output: Tensor) -> None:
        seen.append(output.double())

    handles = [base.register_forward_hook(see, prepend=first) for first in (True, False)]
    layer(value)
    for handle in handles:
        handle.remove()
    before, after = seen
    return after - before, max(float(before.abs().max()), float(after.abs().max()))


# --- Files in other readers -------------------------------------------------------------------------------------------


def save_as(config: RunConfig, subject: Subject, adapter: Adapter, file: Path) -> None:
    """Export as a run does."""
    metadata = {"slider.family": subject.family.facts.name, **adapter.facts()}
    adapter.export(file, component_of(config, subject.family), metadata, torch.float32)


def read_elsewhere(config: RunConfig, subject: Subject, file: Path, modules: int) -> Answers:
    """The answers of a freshly loaded pipeline with a file in it, by a loader that is not this project's."""
    facts, found = subject.family.facts, {}
    if config.lycoris is not None:
        set_strength = _by_lycoris(subject.denoiser, file, modules)
    elif config.controlnet:
        set_strength = _into(subject.components.controlnet, "controlnet", file, modules)
    elif hasattr(subject.components.pipeline, "load_lora_weights"):
        set_strength = _by_pipeline(subject, file, modules)
    else:
        set_strength = _into(subject.denoiser, facts.denoiser, file, modules)
    for scale in (-1.0, 0.0, 1.0):
        set_strength(scale)
        found[f"{scale:+g}"] = answer(subject)
    return found


def _by_lycoris(denoiser: nn.Module, file: Path, modules: int) -> Callable[[float], None]:
    lycoris_log.setLevel(logging.ERROR)
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(file), denoiser)
    assert len(network.loras) == modules, f"lycoris-lora finds {len(network.loras)} of {modules} modules in the file"
    network.apply_to()
    network.to(torch.float32).requires_grad_(False).eval()
    set_multiplier: Callable[[float], None] = network.set_multiplier
    return set_multiplier


def _by_pipeline(subject: Subject, file: Path, modules: int) -> Callable[[float], None]:
    """`load_lora_weights` of the pipeline."""
    pipeline = subject.components.pipeline
    pipeline.load_lora_weights(str(file), adapter_name=NAME)
    _assert_count(subject.denoiser, modules)
    return lambda strength: pipeline.set_adapters(NAME, strength)


def _into(model: Any, prefix: str, file: Path, modules: int) -> Callable[[float], None]:
    """`load_lora_adapter` of a diffusers model, or PEFT where its class has none."""
    if hasattr(model, "load_lora_adapter"):
        model.load_lora_adapter(str(file), prefix=prefix, adapter_name=NAME)
        _assert_count(model, modules)
        return lambda strength: model.set_adapters(NAME, strength)
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    state = {key.removeprefix(f"{prefix}."): value for key, value in load_file(file).items()}
    names = {key.rsplit(".", 2)[0] for key in state}
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names), model, adapter_name=NAME)
    unread = set_peft_model_state_dict(model, state, adapter_name=NAME).unexpected_keys
    assert not unread, f"PEFT does not know {unread[:3]}"
    _assert_count(model, modules)

    def set_strength(strength: float) -> None:
        for layer in _layers(model):
            layer.set_scale(NAME, strength)

    return set_strength


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if NAME in getattr(module, "lora_A", ())]


def _assert_count(model: nn.Module, modules: int) -> None:
    assert len(_layers(model)) == modules, f"the other reader put {len(_layers(model))} of {modules} modules into the model"


# --- The whole matrix -------------------------------------------------------------------------------------------------


def matrix(families: Iterable[str], room: Path) -> tuple[dict[str, dict[str, str]], list[str]]:
    """All routes of the families: outcomes, and the cells that failed."""
    outcomes: dict[str, dict[str, str]] = {}
    failed: list[str] = []
    for family in families:
        outcomes[family] = {}
        folder = write_tiny(Plugins.discover().facts(family), room / family)
        for route in ROUTES:
            began = time.perf_counter()
            try:
                outcomes[family][route] = outcome(family, route, folder)
            except Exception:
                failed.append(f"{family} {route}")
                traceback.print_exc()
            told = outcomes[family].get(route, "FAILED")
            print(f"{family} {route}: {told} ({time.perf_counter() - began:.1f} s)", flush=True)
    return outcomes, failed


def main(only: list[str]) -> int:
    """Try everything and write routes.json; with families named, try these and write nothing."""
    os.environ["SLIDER_PLUGIN_ALLOW"] = "slider-plugin"
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as room:
        outcomes, failed = matrix(only or FAMILIES, Path(room))
    print(f"{len(outcomes) * len(ROUTES)} cells, {len(failed)} failed, {time.perf_counter() - began:.0f} s")
    if failed:
        print("failed: " + ", ".join(failed))
        return 1
    if not only:
        OUTCOMES.write_text(json.dumps(outcomes, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

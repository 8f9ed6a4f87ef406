"""Each hook in a real run of a tiny pipeline: when it is called, with what, and that its answer is what the run goes on with.

The family is a third party's, installed as metadata in a temporary folder: Stable Diffusion 1 under another name, with the
hooks that a test gives it, and with wrappers around all hooks that note each call.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from site_packages import Site

from slider_hooks import hookspec, specs
from slider_plugin import family, run
from slider_plugin.configfile import read_config
from slider_plugin.data.sampler import CycleSampler
from slider_plugin.errors import PluginError
from slider_plugin.registry import Plugins

STEPS = 2
FAMILY = """
import dataclasses

import torch

from slider_hooks import *
from slider_plugin.architectures import sd1

CALLS = []
DEPTH = Option(name="told_depth", type=int, default=1, help="an option of this family alone")
FAMILY = dataclasses.replace(sd1.FAMILY, name="told", aliases=(), options=(DEPTH,))
"""
WRAPPER = """
@hookimpl(wrapper=True, specname="{hook}")
def watch_{hook}({arguments}):
    gradients = torch.is_grad_enabled()
    answer = yield
    CALLS.append(("{hook}", dict({named}), answer, gradients))
    return answer
"""
LISTENER = """
from slider_hooks import hookimpl

HEARD = []


@hookimpl
def observe(family, event, facts):
    HEARD.append((family.name, event, dict(facts)))
"""


JUDGE = """
from slider_hooks import hookimpl

ASKED, ANSWER = [], None


@hookimpl
def score_images(family, images, positive, negative):
    ASKED.append((family.name, positive, negative))
    return ANSWER or [image.getpixel((0, 0))[0] for image in images]
"""


@dataclass
class Call:
    hook: str
    asked: dict[str, Any]
    answer: Any
    gradients: bool


@dataclass
class Run:
    """A finished run and what it called, in order."""

    calls: list[Call]
    folder: Path
    plugin: Any

    def of(self, hook: str) -> list[Call]:
        return [call for call in self.calls if call.hook == hook]

    def one(self, hook: str) -> Call:
        (call,) = self.of(hook)
        return call

    def first(self, hook: str) -> int:
        return next(i for i, call in enumerate(self.calls) if call.hook == hook)

    def metrics(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def drawn(self) -> list[dict[str, Any]]:
        """The images of the validation, as its own list names them."""
        images: list[dict[str, Any]] = json.loads((self.images() / "prompts.json").read_text())["images"]
        return images

    def images(self) -> Path:
        return next((self.folder / "validation_images").glob("step_*"))


@pytest.fixture
def told(site: Site, project: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Train with a family that has these hooks; keyword arguments are keys of the configuration."""

    def train(code: str = "", steered: bool = False, **keys: Any) -> Run:
        site.module("told_family.py", FAMILY + "".join(map(wrapper, specs.HOOKS)) + inspect.cleandoc(code))
        site.install("dist-told", {"told": "told_family"})
        monkeypatch.setenv("SLIDER_PLUGIN_ALLOW", ",".join(p.name.split("-")[0] for p in site.folder.glob("*.dist-info")))
        importlib.invalidate_caches()
        settings = {
            "model_family": "told", "max_train_steps": STEPS, "signs_in_one_forward": "no", "validation_prompt": "a red circle",
            "validation_num_inference_steps": 1, "validation_strengths": [], "validation_adapter_strength": 0.7,
        }  # fmt: skip
        path = project("sd1", neutral=True, **settings | keys)
        if steered:
            add_conditioning_images(tmp_path)
        run.train(read_config(path, (), Plugins.discover().facts)[0])
        plugin = sys.modules["told_family"]
        return Run([Call(*call) for call in plugin.CALLS], tmp_path / "out", plugin)

    return train


def add_conditioning_images(project: Path) -> None:
    """For each image of a project one that is black on the left and white on the right, and differs from the others."""
    image = Image.new("RGB", (40, 40))
    image.paste((255, 255, 255), (20, 0, 40, 40))
    entries = json.loads((project / "buckets.json").read_text())
    for entry in entries:
        entry["conditioning_data_dir"] = f"{entry['instance_data_dir']}-shown"
        Path(entry["conditioning_data_dir"]).mkdir()
        for number, file in enumerate(sorted(Path(entry["instance_data_dir"]).glob("*.png"))):
            image.putpixel((0, 0), (number, len(entry["id"]), ord(entry["id"][0])))  # equal images are encoded once
            image.save(Path(entry["conditioning_data_dir"], file.name))
    (project / "buckets.json").write_text(json.dumps(entries))


def wrapper(hook: str) -> str:
    arguments = list(inspect.signature(getattr(specs, hook)).parameters)
    named = ", ".join(f"{name}={name}" for name in arguments)
    return WRAPPER.format(hook=hook, arguments=", ".join(arguments), named=named)


def test_every_hook_has_a_test() -> None:
    assert {f"test_hook_{hook}" for hook in specs.EVERY} <= set(globals())


def test_a_run_asks_every_hook_in_the_order_of_the_page_and_tells_each_the_facts(told: Callable[..., Run]) -> None:
    done = told()
    order, _ = orders_of_the_page()
    assert order == list(dict.fromkeys(call.hook for call in done.calls))
    assert all(call.asked["family"] is done.plugin.FAMILY for call in done.calls)


def test_a_run_with_a_controlnet_asks_every_hook(told: Callable[..., Run]) -> None:
    done = told(CONTROLNET, steered=True, **STEERED)
    _, order = orders_of_the_page()
    assert order == list(dict.fromkeys(call.hook for call in done.calls))
    assert set(order) == set(specs.HOOKS)


def orders_of_the_page() -> list[list[str]]:
    page = (Path(__file__).parents[1] / "hooks" / "README.md").read_text(encoding="utf-8")
    return [re.findall(r"`(\w+)`", order) for order in re.findall(r"in this order: ((?:`\w+`[,.;\s]+)+)", page)]


def test_hook_resolve_lora_targets(told: Callable[..., Run]) -> None:
    done = told(
        """
        @hookimpl
        def resolve_lora_targets(denoiser, request):
            first = next(name for name, _ in denoiser.named_modules() if name.endswith("attn1.to_q"))
            return ResolvedTargets(expression=first.replace(".", "[.]") + "|conv_in", source="slider")
        """
    )
    call = done.of("resolve_lora_targets")[0]
    request = call.asked["request"]
    assert (request.slider, request.explicit, request.adapter, request.include_joint) == (True, None, "lora", True)
    assert isinstance(call.asked["denoiser"], torch.nn.Module) and call.asked["controlnet"] is None
    assert done.first("resolve_lora_targets") < done.first("predict")
    trained = {name.partition(".lora_")[0] for name in load_file(done.folder / "slider.safetensors")}
    assert trained == {f"unet.{name.replace('[.]', '.')}" for name in call.answer.expression.split("|")}


def test_hook_build_objective(told: Callable[..., Run]) -> None:
    done = told(
        """
        class Still(Objective):
            def asks(self, question):
                return [question.ask]

            def target(self, question, frozen):
                return frozen[0]


        @hookimpl
        def build_objective(name, config):
            return Still() if name == "still" and config["objective_config"] == {"really": 1} else None
        """,
        slider_objective="still",
        objective_config={"really": 1},
    )
    call = done.one("build_objective")
    assert (call.asked["name"], call.asked["config"]["lora_rank"]) == ("still", 4)
    assert done.first("build_objective") < done.first("load_components")
    losses = {value for row in done.metrics() for key, value in row.items() if key.startswith("loss/")}
    assert losses == {0.0}, "an adapter that is to stay as it is has nothing to learn"


def test_hook_build_sampler(told: Callable[..., Run]) -> None:
    done = told(
        """
        class Last:
            "The last bucket of all, for ever, at a scale of its own."

            def __init__(self, bucket):
                self.bucket, self.position = bucket, 0

            def __iter__(self):
                return self

            def __next__(self):
                self.position += 1
                return Draw(
                    position=self.position - 1, epoch=0, bucket=self.bucket.name, index=0, scale=-0.25, neutral=False
                )

            def state_dict(self):
                return {"position": self.position}

            def load_state_dict(self, state):
                self.position = state["position"]


        @hookimpl
        def build_sampler(buckets):
            return Last(next(bucket for bucket in buckets if (bucket.strength or 0) < 0))
        """
    )
    asked = done.one("build_sampler").asked
    assert [(b.name, b.strength, b.samples, b.batches) for b in asked["buckets"]] == [
        ("more", 0.5, 4, 2), ("less", -0.5, 4, 2), ("plain", 0.0, 2, 1),
    ]  # fmt: skip
    assert (asked["seed"], asked["weighting"], asked["neutral_scale"]) == (1, "uniform", 0.5)
    assert done.first("encode_images") < done.first("build_sampler") < done.first("predict")
    losses = {key for row in done.metrics() for key in row if key.startswith("loss/")}
    assert losses == {"loss/negative"}
    state = json.loads((done.folder / f"checkpoint-{STEPS:06d}" / "state.json").read_text())
    assert f'"position": {3 * STEPS}' in json.dumps(state), "the sampler's own state is what a checkpoint keeps"


def test_hook_validation_prompt_scale(told: Callable[..., Run]) -> None:
    prompts = {"own": {"prompt": "a blue square", "adapter_strength": -1.2}, "other": "a green circle"}
    done = told(
        """
        @hookimpl
        def validation_prompt_scale(entry, global_strength):
            return 0.25 if entry.adapter_strength is None else entry.adapter_strength / 4
        """,
        prompts=[{"name": name, **({"prompt": p} if isinstance(p, str) else p)} for name, p in prompts.items()],
    )
    asked = [call.asked for call in done.of("validation_prompt_scale")]
    assert {a["entry"].name: a["entry"].adapter_strength for a in asked} == {"validation": None, "own": -1.2, "other": None}
    assert {a["global_strength"] for a in asked} == {0.7}
    drawn = {image["name"]: image["scale"] for image in done.drawn() if image["scale"]}
    assert drawn == {"validation": 0.25, "own": pytest.approx(-0.3), "other": 0.25}
    assert done.first("validation_prompt_scale") > max(i for i, call in enumerate(done.calls) if call.hook == "predict")


def test_hook_load_components(told: Callable[..., Run], tiny_folders: Callable[[str], Path]) -> None:
    done = told(
        """
        @hookimpl
        def load_components(request):
            from slider_plugin.loading import load_pipeline_components

            components = load_pipeline_components(FAMILY, request)
            with torch.no_grad():
                components.denoiser.conv_out.bias.fill_(30.0)
            return components
        """,
        told_depth=3,
        revision="main",
    )
    call = done.one("load_components")
    request = call.asked["request"]
    assert (request.model, request.dtype) == (str(tiny_folders("sd1")), torch.float32)
    assert (request.revision, request.variant, dict(request.options)) == ("main", None, {"told_depth": 3})
    later = [c.asked["components"] for c in done.calls if "components" in c.asked]
    assert later and all(components is call.answer for components in later), "one model for the whole run"
    assert done.metrics()[0]["loss/positive"] == pytest.approx(900, rel=0.1), "the model that is trained is the one it gave"


def test_hook_encode_prompts(told: Callable[..., Run]) -> None:
    done = told(
        """
        @hookimpl
        def encode_prompts(components, prompts):
            embeds, _ = components.pipeline.encode_prompt(list(prompts), components.denoiser.device, 1, False)
            return [{"prompt_embeds": e, "letters": torch.tensor([float(len(p))])} for e, p in zip(embeds, prompts)]
        """
    )
    prompts = {prompt for call in done.of("encode_prompts") for prompt in call.asked["prompts"]}
    assert {f"a photo of a circle {number}" for number in range(4)} <= prompts
    assert not any(call.gradients for call in done.of("encode_prompts"))
    letters = {float(c["letters"]) for call in done.of("predict") for c in call.asked["conditioning"]}
    assert letters == {float(len("a photo of a circle 0"))}, "what it gave is what predict gets"
    assert done.first("load_components") < done.first("encode_prompts") < done.first("predict")


def test_hook_encode_images(told: Callable[..., Run]) -> None:
    done = told(
        """
        @hookimpl
        def encode_images(images):
            return torch.zeros(len(images), 4, 4, 4)
        """
    )
    calls = done.of("encode_images")
    images = torch.cat([call.asked["images"] for call in calls])
    assert images.shape == (10, 3, 32, 32) and -1 <= images.min() < images.max() <= 1
    assert not any(call.gradients for call in calls)
    noisy = [call.asked["noisy"] for call in done.of("predict")]
    assert {tuple(tensor.shape) for tensor in noisy} == {(2, 4, 4, 4)}
    assert all(0 < float(tensor.std()) < 1.5 for tensor in noisy), "noise alone, as the latents were zero"


def test_hook_condition_on_images(told: Callable[..., Run]) -> None:
    done = told(
        """
        @hookimpl
        def condition_on_images(images):
            return [{"light": image.mean()[None]} for image in images]
        """
    )
    calls = done.of("condition_on_images")
    assert all(torch.equal(a.asked["images"], b.asked["images"]) for a, b in zip(calls, done.of("encode_images"), strict=True))
    assert not any(call.gradients for call in calls)
    given = sorted(round(float(item["light"]), 5) for call in calls for item in call.answer)
    got = [c for call in done.of("predict") for c in call.asked["conditioning"]]
    assert all({"light", "prompt_embeds"} <= set(c) for c in got), "beside what the prompt gave"
    assert {round(float(c["light"]), 5) for c in got} <= set(given)
    assert done.first("encode_images") < done.first("condition_on_images") < done.first("predict")


CONTROLNET = """
class Control(torch.nn.Module):
    dtype = torch.float32

    def forward(self, light):
        return light

@hookimpl
def load_controlnet(model):
    return Control()

@hookimpl
def encode_control(images):
    return images[:, :, :, -1].mean((1, 2))

@hookimpl
def control(components, shown, strength, call):
    middle = components.denoiser.config.block_out_channels[-1]
    light = components.controlnet(shown)[:, None, None, None] * strength
    return {"mid_block_additional_residual": light * torch.ones(1, middle, 1, 1)}
"""
STEERED = {"controlnet_model_name_or_path": "anyone/any", "controlnet_conditioning_scale": 0.25}


def test_hook_load_controlnet(told: Callable[..., Run]) -> None:
    done = told(CONTROLNET, steered=True, **STEERED)
    call = done.one("load_controlnet")
    assert call.asked["model"] == "anyone/any" and call.asked["components"] is done.one("load_components").answer
    assert call.asked["components"].controlnet is call.answer


def test_hook_encode_control(told: Callable[..., Run]) -> None:
    done = told(CONTROLNET, steered=True, **STEERED)
    calls = done.of("encode_control")
    images = torch.cat([call.asked["images"] for call in calls])
    assert images.shape == (11, 3, 32, 32), "ten of training, and one of the validation"
    assert all(call.asked["latents"].shape == (len(call.asked["images"]), 4, 8, 8) for call in calls)
    assert torch.equal(images[:, :, :, -1], torch.ones(11, 3, 32)) and not any(call.gradients for call in calls)


def test_hook_control(told: Callable[..., Run]) -> None:
    done = told(CONTROLNET, steered=True, **STEERED)
    calls = done.of("control")
    assert all(call.asked["strength"] == 0.25 for call in calls)
    assert all(torch.equal(call.asked["shown"], torch.ones(len(call.asked["call"]["sample"]))) for call in calls)
    predicted = len(done.of("predict"))
    assert len(calls) == predicted + 2, "and two images of the validation"
    assert {len(call.asked["shown"]) for call in calls[predicted:]} == {2}, "guidance calls with every sample twice"


def test_hook_predict(told: Callable[..., Run]) -> None:
    done = told(
        """
        @hookimpl
        def predict(components, noisy, time, conditioning):
            embeds = torch.stack([c["prompt_embeds"] for c in conditioning])
            return 0.0 * components.denoiser(noisy, time, encoder_hidden_states=embeds).sample + 100.0
        """
    )
    calls = done.of("predict")
    asked = done.one("build_sampler").asked
    sampler = CycleSampler(asked["buckets"], asked["seed"], asked["weighting"], asked["neutral_scale"])
    draws = list(itertools.islice(sampler, 3 * STEPS))
    gradients = [call.gradients for call in calls]
    assert gradients.count(True) == len(draws)
    assert gradients.count(False) == sum(draw.neutral for draw in draws) > 0, "the frozen model's answer on neutral images"
    for call in calls:
        assert call.asked["noisy"].shape == (2, 4, 8, 8) and len(call.asked["conditioning"]) == 2
        assert call.asked["time"].shape == (2,) and not call.asked["time"].is_floating_point()
        assert 0 <= int(call.asked["time"].min()) <= int(call.asked["time"].max()) < 1000
    for row in done.metrics():
        assert row["loss/positive"] == pytest.approx(10_000, rel=0.02) == row["loss/negative"]
        assert row.get("loss/neutral", 0.0) == 0.0


def test_hook_build_pipeline(told: Callable[..., Run]) -> None:
    done = told(
        """
        class Painter:
            "One colour for every prompt."

            def __call__(self, prompt, negative_prompt, height, width, num_inference_steps, guidance_scale, generator):
                from types import SimpleNamespace

                from PIL import Image

                return SimpleNamespace(images=[Image.new("RGB", (width, height), (200, 20, 40)) for _ in prompt])


        @hookimpl
        def build_pipeline():
            return Painter()
        """
    )
    assert done.of("build_pipeline")[-1].asked["components"] is done.one("load_components").answer
    images = [Image.open(done.images() / image["file"]) for image in done.drawn()]
    assert images and all(image.size == (32, 32) and image.getpixel((16, 16)) == (200, 20, 40) for image in images)


def test_hook_score_images(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a report asks, and that nonsense is refused; a whole report is in tests/report/test_command.py."""
    site.module("judge.py", JUDGE)
    site.install("dist-judge", {"judge": "judge"}, kind="extensions")
    monkeypatch.setenv("SLIDER_PLUGIN_ALLOW", "slider-plugin,dist-judge,dist_judge")
    loaded = Plugins.discover().load("sd1")
    images = [Image.new("RGB", (2, 2), (light, 0, 0)) for light in (10, 20)]
    assert loaded.has_scorer and loaded.score_images(images, "big", "small") == [10.0, 20.0]
    assert sys.modules["judge"].ASKED == [("sd1", "big", "small")]
    for answer, complaint in (([1.0], "gave 1 scores for 2 images"), ([1.0, float("inf")], "a score is a finite number")):
        monkeypatch.setattr(sys.modules["judge"], "ANSWER", answer)
        with pytest.raises(PluginError, match=complaint):
            loaded.score_images(images, "", "")


def test_hook_observe(site: Site, told: Callable[..., Run]) -> None:
    site.module("listener.py", LISTENER)
    site.install("dist-listener", {"listener": "listener"}, kind="extensions")
    done = told()
    heard = sys.modules["listener"].HEARD
    assert {name for name, _, _ in heard} == {"told"}
    assert [event for _, event, _ in heard] == ["loaded", *["step"] * STEPS, "checkpoint", "exported", "validation"]
    facts = {event: facts for _, event, facts in heard}
    assert facts["loaded"]["config"]["model_family"] == "told"
    assert set(facts["loaded"]["hooks"]) == set(specs.HOOKS)
    rows = [facts for _, event, facts in heard if event == "step"]
    assert [row["loss/positive"] for row in rows] == [row["loss/positive"] for row in done.metrics()]
    assert Path(facts["exported"]["path"]) == done.folder / "slider.safetensors"
    assert Path(facts["checkpoint"]["path"]) == done.folder / f"checkpoint-{STEPS:06d}"
    assert Path(facts["validation"]["path"]) == done.images()


def test_an_argument_that_is_to_go_warns_whoever_names_it(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """How a removal is announced: the next version's specs mark the argument, and old modules go on with a warning."""
    site.family("names", code="@hookimpl\ndef encode_images(family, images):\n    return images\n")
    site.family("does_not", code="@hookimpl\ndef encode_images(images):\n    return images\n")
    message = "encode_images: family goes in contract 2.0; it is in components"
    marker = hookspec(firstresult=True, warn_on_impl_args={"family": DeprecationWarning(message)})

    def encode_images(family: Any, components: Any, images: Any) -> None: ...

    following = SimpleNamespace(**{**vars(specs), "encode_images": marker(encode_images)})
    monkeypatch.setattr(family, "specs", following)
    with pytest.warns(DeprecationWarning, match=message):
        names = site.plugins().load("names")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        does_not = site.plugins().load("does_not")
    images = torch.zeros(1, 3, 8, 8)
    assert names.encode_images(SimpleNamespace(), images) is images is does_not.encode_images(SimpleNamespace(), images)

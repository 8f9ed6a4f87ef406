"""Sliders in a diffusers pipeline: what they draw is what diffusers draws, and outside their window it is the base."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from slider_plugin import SliderUse, UserError, use_sliders
from slider_plugin.export import export_diffusers
from slider_plugin.inference import places_of
from slider_plugin.pipelines import layers_of
from slider_plugin.registry import Plugins
from slider_plugin.testing.subject import Subject

STEPS = 5


@pytest.fixture
def pipeline(tiny_folders: Callable[[str], Path]) -> Callable[[str], Any]:
    def load(name: str = "sd1") -> Any:
        loaded = Subject.load(Plugins.discover().load(name), tiny_folders(name)).components.pipeline
        loaded.set_progress_bar_config(disable=True)
        return loaded

    return load


@pytest.fixture
def slider(tmp_path: Path, tiny_folders: Callable[[str], Path]) -> Callable[..., Path]:
    """A file of random weights on a few attention layers."""

    def write(family: str = "sd1", seed: int = 0, name: str = "slider", count: int = 4) -> Path:
        subject = Subject.load(Plugins.discover().load(family), tiny_folders(family))
        layers = {n: m for n, m in subject.components.denoiser.named_modules() if n.endswith(("to_q", "to_k", "to_v"))}
        generator = torch.Generator().manual_seed(seed)
        state = {}
        for module, layer in list(layers.items())[seed : seed + count]:
            out, inside = layer.weight.shape
            down, up = torch.randn(4, inside, generator=generator), torch.randn(out, 4, generator=generator)
            state[module] = {"lora_A": down, "lora_B": 0.3 * up}
        path = tmp_path / f"{name}.safetensors"
        export_diffusers(state, dict.fromkeys(state, 1.0), subject.family.facts.denoiser, {}, path, torch.float32)
        return path

    return write


def drawn(pipe: Any, **more: Any) -> Tensor:
    """Final latents of one image."""
    call: dict[str, Any] = {
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
        "height": 32,
        "width": 32,
        "output_type": "latent",
    }
    if type(pipe).__name__ == "ZImagePipeline":
        call |= {"height": 64, "width": 64}
    found = pipe("a red circle", generator=torch.Generator().manual_seed(3), **(call | more))
    latents: Tensor = found.images
    return latents


def trail(pipe: Any, **more: Any) -> list[Tensor]:
    """Latents after each step."""
    seen: list[Tensor] = []

    def keep(_: Any, index: int, time: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(values["latents"].clone())
        return values

    drawn(pipe, callback_on_step_end=keep, **more)
    return seen


FAMILIES = ["sd1", "sdxl", "flux", "sd3", "z_image"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strength", [1.5, -1.0])
def test_the_whole_window_is_diffusers_own_set_adapters(family: str, strength: float, pipeline: Any, slider: Any) -> None:
    file, own, plain = slider(family), pipeline(family), pipeline(family)
    base = drawn(plain)
    plain.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="x")
    plain.set_adapters("x", strength)
    with use_sliders(own, SliderUse(file, strength)):
        assert torch.equal(drawn(own), drawn(plain))
        assert torch.equal(drawn(own), drawn(plain)), "and so is a second image"
    assert not torch.equal(drawn(plain), base)
    assert torch.equal(drawn(own), base), "nothing stays behind"
    assert not any(layers_of(part, "slider_0") for part in own.components.values() if isinstance(part, torch.nn.Module))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "window", [{"end": 0.0}, {"start": 1.0}, {"start": 0.6, "end": 0.6}, {"start": 0.8, "end": 0.2}, {"strength": 0.0}]
)
def test_a_window_of_nothing_is_the_base_bit_for_bit(family: str, window: dict[str, float], pipeline: Any, slider: Any) -> None:
    pipe = pipeline(family)
    base = drawn(pipe)
    with use_sliders(pipe, SliderUse(slider(family), **window)):
        assert torch.equal(drawn(pipe), base)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_first_steps_are_the_base_s_and_the_later_ones_are_not(
    family: str, guidance: float, pipeline: Any, slider: Any
) -> None:
    """Also with guidance, for which a denoiser may be called twice in a step."""
    pipe = pipeline(family)
    base = trail(pipe, guidance_scale=guidance)
    with use_sliders(pipe, SliderUse(slider(family), 1.0, start=0.4)):
        late = trail(pipe, guidance_scale=guidance)
    assert [torch.equal(*pair) for pair in zip(base, late, strict=True)] == [True, True, False, False, False]


def test_a_window_that_ends_goes_on_as_the_base_would(pipeline: Any, slider: Any) -> None:
    pipe, file = pipeline(), slider()
    with use_sliders(pipe, SliderUse(file, 1.0)):
        whole = trail(pipe)
    with use_sliders(pipe, SliderUse(file, 1.0, end=0.4)):
        early = trail(pipe)
    assert [torch.equal(*pair) for pair in zip(whole, early, strict=True)] == [True, True, False, False, False]


SCHEDULERS = [
    "DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "PNDMScheduler", "LMSDiscreteScheduler",
    "DPMSolverSinglestepScheduler", "LCMScheduler", "DDPMScheduler",
]  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_time_decides_whichever_scheduler(name: str, pipeline: Any, slider: Any) -> None:
    """Each call of the denoiser below a time runs with the slider, and none above it, in whatever order a scheduler works."""
    if name.startswith("LMS"):
        pytest.importorskip("scipy")
    pipe, calls = pipeline(), []
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    kind = type(pipe.scheduler)
    file = slider()
    with use_sliders(pipe, SliderUse(file, 2.0, start=0.4)):

        def listen(model: Any, arguments: Any, named: Any) -> None:
            _, layer = next(iter(layers_of(model, "slider_0").items()))
            calls.append((float(arguments[1] if len(arguments) > 1 else named["timestep"]), layer.scaling["slider_0"]))

        listener = pipe.unet.register_forward_pre_hook(listen, with_kwargs=True)
        drawn(pipe)
        drawn(pipe)
        listener.remove()
        times = list(dict.fromkeys(float(time) for time in pipe.scheduler.timesteps))
    on = set(times[-(-len(times) * 4 // 10) :])
    assert len(calls) % 2 == 0 and calls[: len(calls) // 2] == calls[len(calls) // 2 :]
    assert {(time, scale) for time, scale in calls} == {(time, 2.0 if time in on else 0.0) for time, _ in calls}
    assert {scale for _, scale in calls} == {0.0, 2.0}
    assert type(pipe.scheduler) is kind


@pytest.mark.parametrize("family", ["cosmos1", "wan", "qwen_image", "lumina2"])
def test_the_window_is_the_same_share_in_every_pipeline(family: str, pipeline: Any, slider: Any) -> None:
    """Cosmos steps its scheduler twice at each time, Wan and Qwen call their denoiser twice, Lumina turns its time round."""
    pipe, file, calls = pipeline(family), slider(family), []
    more = {"num_frames": 5} if family in ("cosmos1", "wan") else {}
    guided = "true_cfg_scale" if family == "qwen_image" else "guidance_scale"

    def listen(model: Any, arguments: Any) -> None:
        calls.append(next(iter(layers_of(model, "slider_0").values())).scaling["slider_0"])

    with use_sliders(pipe, SliderUse(file, 1.0, start=0.4)), torch.no_grad():
        pipe.transformer.register_forward_pre_hook(listen)
        call = {"prompt": "a", "negative_prompt": "b", "num_inference_steps": 5, guided: 3.0, "output_type": "latent"}
        pipe(height=32, width=32, **call, **more)
    assert calls == [0.0] * 4 + [1.0] * 6


def test_an_image_to_image_pipeline_begins_in_the_middle_of_the_window(pipeline: Any, slider: Any) -> None:
    pipe = pipeline()
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    shown: dict[str, Any] = {"image": image, "strength": 0.6, "num_inference_steps": 10}

    def seen() -> list[Tensor]:
        found: list[Tensor] = []

        def keep(_: Any, index: int, time: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
            found.append(values["latents"].clone())
            return values

        other("a", generator=torch.Generator().manual_seed(1), output_type="latent", callback_on_step_end=keep, **shown)
        return found

    base = seen()  # steps 4 to 9 of 10
    with use_sliders(other, SliderUse(slider(), 1.0, start=0.6)):
        late = seen()
    assert [torch.equal(*pair) for pair in zip(base, late, strict=True)] == [True, True, False, False, False, False]


def test_several_sliders_each_in_its_window(pipeline: Any, slider: Any) -> None:
    pipe, first, second = pipeline(), slider(), slider(seed=1, name="second")
    with use_sliders(pipe, SliderUse(first, 1.0)):
        alone = trail(pipe)
    with use_sliders(pipe, SliderUse(first, 1.0), SliderUse(second, -1.0, start=0.6)):
        both = trail(pipe)
    assert [torch.equal(*pair) for pair in zip(alone, both, strict=True)] == [True, True, True, False, False]
    plain = pipeline()
    for name, file in (("a", first), ("b", second)):
        plain.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    plain.set_adapters(["a", "b"], [1.0, -1.0])
    with use_sliders(pipe, SliderUse(first, 1.0), SliderUse(second, -1.0)):
        assert torch.equal(drawn(pipe), drawn(plain))


def test_a_strength_may_change_between_images(pipeline: Any, slider: Any) -> None:
    pipe, use = pipeline(), SliderUse(slider(), 1.0)
    base = drawn(pipe)
    with use_sliders(pipe, use):
        plus = drawn(pipe)
        use.strength = 0.0
        assert torch.equal(drawn(pipe), base)
        use.strength = 1.0
        assert torch.equal(drawn(pipe), plus) and not torch.equal(plus, base)


def test_a_user_s_own_lora_stays_as_it_was(pipeline: Any, slider: Any) -> None:
    """Its layers are others than the slider's, in part; its strength is its own."""
    pipe, own, other = pipeline(), slider(seed=2, name="own"), slider()
    pipe.load_lora_weights(str(own.parent), weight_name=own.name, adapter_name="slider_0")  # a name that ours might have
    pipe.set_adapters("slider_0", 0.7)
    before = drawn(pipe)
    with use_sliders(pipe, SliderUse(other, 1.0)):
        both = drawn(pipe)
    assert torch.equal(drawn(pipe), before) and pipe.get_active_adapters() == ["slider_0"]
    plain = pipeline()
    plain.load_lora_weights(str(own.parent), weight_name=own.name, adapter_name="a")
    plain.load_lora_weights(str(other.parent), weight_name=other.name, adapter_name="b")
    plain.set_adapters(["a", "b"], [0.7, 1.0])
    assert torch.equal(both, drawn(plain)) and not torch.equal(both, before)


def test_nothing_stays_behind_when_drawing_fails(pipeline: Any, slider: Any) -> None:
    pipe = pipeline()
    base, kind, names = drawn(pipe), type(pipe.scheduler), [name for name, _ in pipe.unet.named_modules()]
    with pytest.raises(RuntimeError, match="stop"), use_sliders(pipe, SliderUse(slider(), 1.0)):
        drawn(pipe)
        raise RuntimeError("stop")
    assert torch.equal(drawn(pipe), base) and type(pipe.scheduler) is kind
    assert [name for name, _ in pipe.unet.named_modules()] == names and not pipe.unet._forward_pre_hooks


def test_a_copy_of_the_scheduler_steps_by_itself(pipeline: Any, slider: Any) -> None:
    """Pipelines that make two things at once, such as LTX-2, have a copy that steps as often as the scheduler itself."""
    pipe = pipeline()

    def step_a_copy(_: Any, index: int, time: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        copy.deepcopy(pipe.scheduler).step(torch.zeros(1, 4, 4, 4), time, torch.zeros(1, 4, 4, 4))
        return values

    with use_sliders(pipe, SliderUse(slider(), 1.0, start=0.6)):
        assert torch.equal(drawn(pipe), drawn(pipe, callback_on_step_end=step_a_copy))


def test_places_are_shares_of_different_times() -> None:
    assert places_of([9, 9, 5, 1]) == [0, 0, 1 / 3, 2 / 3]
    assert places_of([4, 3, 2, 1]) == [0, 0.25, 0.5, 0.75] and places_of([7]) == [0]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda file: SliderUse(file.with_name("none.safetensors")), "none.safetensors: there is no such file"),
        (lambda file: SliderUse(file, start=-0.1), "start -0.1 and end 1.0 are shares of the steps"),
        (lambda file: SliderUse(file, end=1.5), "are shares of the steps, from 0 to 1"),
    ],
)
def test_wrong_uses_are_named(make: Callable[[Path], SliderUse], said: str, pipeline: Any, slider: Any) -> None:
    with pytest.raises(UserError, match=said), use_sliders(pipeline(), make(slider())):
        raise AssertionError("not reached")


def test_files_of_another_model_or_kind_are_refused_and_leave_nothing(pipeline: Any, slider: Any, tmp_path: Path) -> None:
    pipe = pipeline()
    base, other = drawn(pipe), slider("flux", name="other")
    lycoris = tmp_path / "lycoris.safetensors"
    save_file({"lycoris_conv_in.lokr_w1": torch.ones(2, 2)}, lycoris)
    text = tmp_path / "text.safetensors"
    save_file({f"text_encoder.a.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}, text)
    refused = {
        other: "other.safetensors",
        lycoris: "is a LyCORIS file, which diffusers does not load",
        text: "of a text encoder",
    }
    for file, said in refused.items():
        with pytest.raises(UserError, match=said), use_sliders(pipe, SliderUse(slider(), 1.0), SliderUse(file)):
            raise AssertionError("not reached")
    assert torch.equal(drawn(pipe), base)
    with pytest.raises(UserError, match="has no scheduler"), use_sliders(torch.nn.Linear(1, 1), SliderUse(other)):
        raise AssertionError("not reached")

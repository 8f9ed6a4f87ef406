"""ControlNets: they steer as diffusers' own pipelines have them do, a slider trains beside one or on one, and files reload."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models import autoencoders
from diffusers.models.autoencoders import autoencoder_kl_qwenimage
from PIL import Image, ImageFilter
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from slider_plugin import run, stages
from slider_plugin.adapters.attach import plan_on_controlnet
from slider_plugin.adapters.peft_lora import LoraAdapter
from slider_plugin.cli import execute
from slider_plugin.config import RunConfig
from slider_plugin.configfile import read_config, to_json
from slider_plugin.control import Control, encode_for_controlnet, zero_layers
from slider_plugin.data.media import pixels
from slider_plugin.errors import ConfigError, UserError
from slider_plugin.family import LoadedFamily
from slider_plugin.preflight import preflight
from slider_plugin.registry import Plugins
from slider_plugin.targets import adaptable_modules
from slider_plugin.testing.subject import Subject
from slider_plugin.testing.tiny import redraw_zeros, seeded

Folders = Callable[[str], Path]
Project = Callable[..., Path]

PIPELINES = {
    "sd1": ("StableDiffusionControlNetPipeline", "image"),
    "sd2": ("StableDiffusionControlNetPipeline", "image"),
    "sdxl": ("StableDiffusionXLControlNetPipeline", "image"),
    "sd3": ("StableDiffusion3ControlNetPipeline", "control_image"),
    "flux": ("FluxControlNetPipeline", "control_image"),
    "qwen_image": ("QwenImageControlNetPipeline", "control_image"),
    "sana": ("SanaControlNetPipeline", "control_image"),
    "z_image": ("ZImageControlNetPipeline", "control_image"),
}
"""The published pipelines with a ControlNet, and what they call its image."""

FAMILIES = tuple(PIPELINES)


@pytest.fixture(scope="session")
def controlnets(tiny_folders: Folders) -> Folders:
    """Folder of a ControlNet for a family's tiny pipeline, whose layers are anything but zero."""

    def build(family: str) -> Path:
        folder = tiny_folders(family).parent / f"{family}_controlnet"
        if not folder.exists():
            with seeded(5):
                redraw_zeros(fresh(subject_of(family, tiny_folders)), std=0.5).save_pretrained(folder)
        return folder

    return build


def subject_of(family: str, tiny_folders: Folders) -> Subject:
    return Subject.load(Plugins.discover().load(family), tiny_folders(family))


def fresh(subject: Subject) -> Any:
    """A ControlNet as nobody has trained it."""
    if subject.family.facts.name == "z_image":  # which shares most of itself with the denoiser
        own = subject.components.denoiser.config
        places = {"control_layers_places": [0, 1], "control_refiner_layers_places": [0], "control_in_dim": 5}
        sizes = {key: own[key] for key in ("dim", "n_refiner_layers", "n_heads", "n_kv_heads")}
        return diffusers.ZImageControlNetModel(**places, **sizes, add_control_noise_refiner="control_noise_refiner")
    return subject.family.load_controlnet(subject.components, None)


def steered(family: str, tiny_folders: Folders, folder: Path | None) -> Subject:
    """A subject with a ControlNet on its denoiser."""
    subject = subject_of(family, tiny_folders)
    components = subject.components
    components.controlnet = subject.family.load_controlnet(components, str(folder) if folder else None)
    components.controlnet.requires_grad_(False).eval()
    components.control = Control(subject.family, components, 0.7)
    return subject


def picture(size: int) -> Image.Image:
    values = np.random.default_rng(3).integers(0, 255, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(values).filter(ImageFilter.GaussianBlur(2))


def shown(subject: Subject) -> Tensor:
    with torch.no_grad():
        return encode_for_controlnet(subject.family, subject.components, pixels(picture(subject.size)).unsqueeze(0))


# --- Steering ---------------------------------------------------------------------------------------------------------


def draw(pipeline: Any, subject: Subject, **more: Any) -> np.ndarray[Any, Any]:
    # Where guidance is a second call of the transformer, the published pipelines give it the residuals of the first.
    alone = "true_cfg_scale" in inspect.signature(pipeline).parameters
    pipeline.set_progress_bar_config(disable=True)
    images: np.ndarray[Any, Any] = pipeline(
        prompt="a red circle",
        negative_prompt=None if alone else "a blue square",
        height=subject.size,
        width=subject.size,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(4),
        output_type="np",
        **dict(subject.family.facts.call_kwargs),
        **more,
    ).images
    return images


@pytest.mark.parametrize("family", FAMILIES)
def test_steers_as_the_published_pipeline_does(
    family: str, tiny_folders: Folders, controlnets: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some published pipelines draw the control latents from the posterior, where training has always taken its mode.
    for posterior in (autoencoders.vae.DiagonalGaussianDistribution, autoencoder_kl_qwenimage.DiagonalGaussianDistribution):
        monkeypatch.setattr(posterior, "sample", lambda self, generator=None: self.mode())
    subject = steered(family, tiny_folders, controlnets(family))
    pipeline = subject.components.pipeline
    image = picture(subject.size)
    plain = draw(pipeline, subject)
    with subject.components.control.showing(shown(subject)):
        ours = draw(pipeline, subject)
    class_name, argument = PIPELINES[family]
    alone = subject_of(family, tiny_folders)
    controlnet = alone.family.load_controlnet(alone.components, str(controlnets(family)))
    published = getattr(diffusers, class_name)(**alone.components.pipeline.components, controlnet=controlnet)
    theirs = draw(published, alone, **{argument: image}, controlnet_conditioning_scale=0.7)
    scale = np.abs(theirs - plain).max()
    assert scale > 1e-3, "the ControlNet does nothing here"
    assert np.abs(ours - theirs).max() <= 1e-5 * scale
    assert np.array_equal(draw(pipeline, subject), plain)  # without an image, as if there were none


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_one_changes_nothing(family: str, tiny_folders: Folders, tmp_path: Path) -> None:
    folder = None
    if family == "z_image":
        fresh(subject_of(family, tiny_folders)).save_pretrained(folder := tmp_path / "fresh")
    subject = steered(family, tiny_folders, folder)
    assert zero_layers(subject.components.controlnet, subject.denoiser)
    noisy, text = subject.latents(2), subject.conditioning(("a red circle", "a red circle"))
    with torch.no_grad():
        image = shown(subject)[0]
        with_image = subject.predict(noisy, [{**c, "control": image} for c in text])
        subject.components.control = None
        assert torch.equal(with_image, subject.predict(noisy, text))


# --- Targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "fresh"])
def test_a_slider_on_it_reaches_its_targets_and_every_one_learns(
    family: str, trained: bool, tiny_folders: Folders, controlnets: Folders, tmp_path: Path
) -> None:
    folder = controlnets(family) if trained else None
    if not trained and family == "z_image":
        fresh(subject_of(family, tiny_folders)).save_pretrained(folder := tmp_path / "fresh")
    subject = steered(family, tiny_folders, folder)
    controlnet = subject.components.controlnet
    config = RunConfig(model_family=family, controlnet=True, slider_lora_target=True, lora_rank=2)
    plan = plan_on_controlnet(config, subject.family, subject.components)
    shared = {id(module) for module in subject.denoiser.modules()}
    assert not [name for name in plan.modules if id(controlnet.get_submodule(name)) in shared]
    zeros = zero_layers(controlnet, subject.denoiser)
    assert bool(zeros) is not trained
    assert set(zeros) <= set(plan.modules)
    adapter = LoraAdapter(controlnet, plan.modules, rank=2, alpha=2.0)
    noisy = subject.latents(2)
    text = [{**c, "control": shown(subject)[0]} for c in subject.conditioning(("a red circle", "a blue square"))]
    base = subject.predict(noisy, text).detach()
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    for _ in range(4):  # up to three layers behind one another begin at zero
        with adapter.scaled(1.0):
            (subject.predict(noisy, text) - noisy).square().mean().backward()
        optimizer.step()
    dead = {
        name
        for name, parameter in adapter.named_parameters()
        if name.endswith("lora_B") and (parameter.grad is None or not parameter.grad.any())
    }
    assert not dead
    with torch.no_grad(), adapter.scaled(0.0):
        assert torch.equal(subject.predict(noisy, text), base)
    with torch.no_grad(), adapter.scaled(1.0):
        assert not torch.equal(subject.predict(noisy, text), base)


def test_without_slider_targets_all_of_its_attention_is_trained(tiny_folders: Folders, controlnets: Folders) -> None:
    subject = steered("sd1", tiny_folders, controlnets("sd1"))
    plan = plan_on_controlnet(RunConfig(model_family="sd1", controlnet=True), subject.family, subject.components)
    attention = [n for n in adaptable_modules(subject.components.controlnet) if ".attn" in n]
    assert plan.source == "standard" and list(plan.modules) == attention


def test_explicit_targets_win(tiny_folders: Folders, controlnets: Folders) -> None:
    subject = steered("sd1", tiny_folders, controlnets("sd1"))
    config = RunConfig(model_family="sd1", controlnet=True, slider_lora_target=True, peft_lora_target_modules=("conv_in",))
    plan = plan_on_controlnet(config, subject.family, subject.components)
    assert set(plan.modules) == {"controlnet_cond_embedding.conv_in", "conv_in"}


def test_a_trained_one_may_be_demanded(tiny_folders: Folders) -> None:
    subject = steered("sd1", tiny_folders, None)
    config = RunConfig(model_family="sd1", controlnet=True, slider_lora_target=True, controlnet_zero_layers="refuse")
    with pytest.raises(UserError, match=r"layers of the ControlNet are zero .* not trained"):
        plan_on_controlnet(config, subject.family, subject.components)


# --- Runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def steered_project(project: Project, tmp_path: Path) -> Project:
    """A project whose buckets have conditioning images: the outlines of their images."""

    def write(family: str = "sd1", **keys: Any) -> Path:
        path = project(family, **keys)
        entries = json.loads((tmp_path / "buckets.json").read_text())
        for entry in entries:
            outlines = tmp_path / "outlines" / entry["id"]
            outlines.mkdir(parents=True)
            for image in Path(entry["instance_data_dir"]).glob("*.png"):
                with Image.open(image) as opened:
                    opened.convert("RGB").filter(ImageFilter.FIND_EDGES).save(outlines / image.name)
            entry["conditioning_data"] = f"{entry['id']}-outlines"
        sets = [
            {"id": e["conditioning_data"], "dataset_type": "conditioning", "conditioning_type": "controlnet",
             "instance_data_dir": str(tmp_path / "outlines" / e["id"])}
            for e in entries
        ]  # fmt: skip
        (tmp_path / "buckets.json").write_text(json.dumps([*entries, *sets]))
        return path

    return write


def config_of(path: Path) -> RunConfig:
    return read_config(path, family=lambda name: Plugins.discover().facts(name))[0]


PROMPT = {"validation_prompt": "a red circle", "validation_num_inference_steps": 2, "validation_strengths": [-1, 0, 1]}


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_a_slider_on_a_fresh_controlnet_trains_draws_and_reloads(
    family: str, steered_project: Project, tmp_path: Path, tiny_folders: Folders
) -> None:
    config = config_of(steered_project(family, controlnet=True, max_train_steps=3, **PROMPT))
    outcome = run.train(config)
    assert outcome.finished and outcome.adapter and outcome.images
    assert (outcome.images / "contact_sheet.png").exists()
    keys = load_file(outcome.adapter)
    assert keys and all(key.startswith("controlnet.") for key in keys)
    with safe_open(outcome.adapter, "pt") as file:
        assert json.loads(file.metadata()["slider.controlnet"])["trained"] is True
    # diffusers reads it: the same residuals as our own
    subject = subject_of(family, tiny_folders)
    controlnet = subject.family.load_controlnet(subject.components, str(tmp_path / "out" / "controlnet"))
    controlnet.load_lora_adapter(load_file(outcome.adapter), prefix="controlnet")
    wrapped = [n for n, m in controlnet.named_modules() if hasattr(m, "lora_A") and len(m.lora_A)]
    assert len(wrapped) == len(keys) // 2
    # and so does our own command
    folder = run.validate(config, outcome.adapter, tmp_path / "again")
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in outcome.images.iterdir())
    for image in folder.glob("*.png"):
        assert image.read_bytes() == (outcome.images / image.name).read_bytes()


def test_a_frozen_controlnet_holds_while_the_slider_trains_on_the_denoiser(
    steered_project: Project, controlnets: Folders, tmp_path: Path
) -> None:
    path = steered_project("sd1", controlnet_model_name_or_path=str(controlnets("sd1")), max_train_steps=3, **PROMPT)
    config = config_of(path)
    family = Plugins.discover().load("sd1")
    checked = preflight(config, family)
    machine = stages.open_machine(config)
    components = stages.load(config, family, checked, machine)
    before = {name: value.clone() for name, value in components.controlnet.state_dict().items()}
    targets = stages.find_targets(config, family, checked, components)
    adapter = stages.attach(config, family, components, targets, machine)
    assert not any(p.requires_grad for p in components.controlnet.parameters())
    data = stages.encode(config, family, components, checked, machine)
    sampler = family.build_sampler(data.infos(), config.seed)
    trainer = stages.build_trainer(config, family, components, adapter, data, sampler, checked, machine)
    stages.run(config, trainer, checked)
    after = components.controlnet.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert stages.export(config, trainer, targets, checked).exists()
    assert all(key.startswith("unet.") for key in load_file(tmp_path / "out" / "slider.safetensors"))


def test_the_images_of_a_batch_are_the_ones_that_are_shown(steered_project: Project, controlnets: Folders) -> None:
    """The loss of a batch is that of its own outlines: with the outlines of another batch it is another."""
    config = config_of(steered_project("sd1", controlnet_model_name_or_path=str(controlnets("sd1"))))
    family = Plugins.discover().load("sd1")
    checked = preflight(config, family)
    machine = stages.open_machine(config)
    components = stages.load(config, family, checked, machine)
    targets = stages.find_targets(config, family, checked, components)
    adapter = stages.attach(config, family, components, targets, machine)
    data = stages.encode(config, family, components, checked, machine)
    sampler = family.build_sampler(data.infos(), config.seed)
    batch = data.batch(next(sampler))
    for item, told in zip(batch.files, batch.conditioning, strict=True):
        bucket = next(b for b in checked.buckets if item.is_relative_to(b.config.instance_data_dir))
        twin = bucket.config.conditioning_data_dir / item.name
        with Image.open(twin) as image:
            expected = pixels(image.convert("RGB").resize((32, 32), Image.Resampling.LANCZOS))
        assert (told["control"] - (expected / 2 + 0.5)).abs().max() < 0.02
    del adapter


def gradients_of(config: RunConfig) -> dict[str, Tensor]:
    """The gradients of one batch at -0.5, of an adapter that is not zero."""
    family = Plugins.discover().load("sd1")
    checked = preflight(config, family)
    machine = stages.open_machine(config)
    components = stages.load(config, family, checked, machine)
    targets = stages.find_targets(config, family, checked, components)
    adapter = stages.attach(config, family, components, targets, machine)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.05, generator=generator)
    data = stages.encode(config, family, components, checked, machine)
    sampler = family.build_sampler(data.infos(), 1)
    trainer = stages.build_trainer(config, family, components, adapter, data, sampler, checked, machine)
    with adapter.scaled(-0.5):
        trainer.loss(data.batch(next(trainer.sampler))).backward()
    return {name: parameter.grad.clone() for name, parameter in adapter.named_parameters()}


def test_checkpointing_gives_the_same_gradients(steered_project: Project) -> None:
    config = config_of(steered_project("sd1", controlnet=True))
    plain = gradients_of(config)
    again = gradients_of(config.model_copy(update={"gradient_checkpointing": True}))
    largest = max(float(gradient.abs().max()) for gradient in plain.values())
    assert max(float((again[name] - gradient).abs().max()) for name, gradient in plain.items()) < 1e-5 * largest


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_both_signs_are_steered_in_one_forward(
    steered_project: Project, tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The layers of a ControlNet see each sample at its own strength, and with its own conditioning image."""
    config = config_of(steered_project(family, controlnet=True, max_train_steps=2, validation_disable=True))
    losses: dict[str, list[float]] = {}
    for way in ("no", "yes"):
        out = tmp_path / way
        run.train(config.model_copy(update={"signs_in_one_forward": way, "output_dir": out}))
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[way] = [row[key] for row in rows for key in ("loss/positive", "loss/negative", "grad_norm")]
    assert "the draws of a cycle share a forward" in capsys.readouterr().err
    assert losses["yes"] == pytest.approx(losses["no"], rel=1e-3)


# --- What is refused --------------------------------------------------------------------------------------------------


def problems_of(path: Path) -> str:
    config = config_of(path)
    with pytest.raises(ConfigError) as caught:
        preflight(config, Plugins.discover().load(config.model_family))
    return str(caught.value)


def test_conditioning_images_must_be_there_and_of_one_size(steered_project: Project, tmp_path: Path) -> None:
    path = steered_project("sd1", controlnet=True)
    (tmp_path / "outlines" / "more" / "1.png").unlink()
    Image.new("RGB", (24, 40)).save(tmp_path / "outlines" / "less" / "2.png")
    (tmp_path / "outlines" / "less" / "3.png").write_bytes(b"no image")
    told = problems_of(path)
    assert "1.png has no conditioning image" in told
    assert "2.png is 24x40, and its image 2.png is 40x40" in told
    assert "3.png: not a png" in told


def test_two_conditioning_images_of_one_name(steered_project: Project, tmp_path: Path) -> None:
    path = steered_project("sd1", controlnet=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "outlines" / "more" / "1.bmp")
    assert "has 2 conditioning images" in problems_of(path)


def test_a_bucket_without_conditioning_images(project: Project) -> None:
    assert "bucket 'more': conditioning_data_dir is needed" in problems_of(project("sd1", controlnet=True))


def test_conditioning_images_without_a_controlnet(steered_project: Project) -> None:
    assert "bucket 'more': it has conditioning images, and no ControlNet" in problems_of(steered_project("sd1"))


def test_a_family_without_a_controlnet(steered_project: Project) -> None:
    assert "controlnet: pixart has no ControlNet" in problems_of(steered_project("pixart", controlnet=True))


def test_the_controlnet_of_another_family(steered_project: Project, controlnets: Folders) -> None:
    path = steered_project("flux", controlnet_model_name_or_path=str(controlnets("sd3")))
    assert "holds a SD3ControlNetModel, and the ControlNet of flux is a FluxControlNetModel" in problems_of(path)


def test_the_controlnet_of_another_unet(steered_project: Project, controlnets: Folders, capsys: Any) -> None:
    path = steered_project("sd1", controlnet_model_name_or_path=str(controlnets("sdxl")))
    assert execute(["train", str(path)]) == 2
    assert "was made for another model: its" in capsys.readouterr().err


def test_an_untrained_one_holds_nothing(steered_project: Project, tiny_folders: Folders, tmp_path: Path, capsys: Any) -> None:
    fresh(subject_of("sd1", tiny_folders)).save_pretrained(tmp_path / "fresh")
    path = steered_project("sd1", controlnet_model_name_or_path=str(tmp_path / "fresh"))
    assert execute(["train", str(path)]) == 2
    assert "is not trained" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "told"),
    [("./nowhere", "./nowhere is no folder"), ("{tmp}", "holds no ControlNet"), ("{sd1}", "has no config.json")],
)
def test_a_folder_that_holds_none(
    model: str, told: str, steered_project: Project, tiny_folders: Folders, tmp_path: Path
) -> None:
    name = model.format(tmp=tmp_path, sd1=tiny_folders("sd1"))
    assert told in problems_of(steered_project("sd1", controlnet_model_name_or_path=name))


def test_lycoris_on_a_controlnet_is_refused(steered_project: Project) -> None:
    lycoris = {"algo": "lokr", "apply_preset": {"target_module": ["Attention"]}}
    path = steered_project("sd1", controlnet=True, lora_type="lycoris", lycoris=lycoris)
    assert "controlnet: on a ControlNet a plain LoRA is trained" in problems_of(path)


def test_a_flux_union_is_refused(tiny_folders: Folders, tmp_path: Path) -> None:
    subject = subject_of("flux", tiny_folders)
    own = {k: v for k, v in fresh(subject).config.items() if not k.startswith("_") and k != "out_channels"} | {"num_mode": 4}
    diffusers.FluxControlNetModel(**own).save_pretrained(tmp_path / "union")
    with pytest.raises(UserError, match="num_mode 4: it wants to be told a mode"):
        subject.family.load_controlnet(subject.components, str(tmp_path / "union"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"conditioning_data": "nobody"}, "no entry of dataset_type conditioning with the id 'nobody'"),
        ({"conditioning_data": ["a", "b"]}, "2 sets of conditioning images"),
    ],
)
def test_entries_that_do_not_fit(steered_project: Project, tmp_path: Path, change: dict[str, Any], told: str) -> None:
    path = steered_project("sd1", controlnet=True)
    entries = json.loads((tmp_path / "buckets.json").read_text())
    entries[0] |= change
    (tmp_path / "buckets.json").write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match=told):
        config_of(path)


def test_a_kind_of_conditioning_that_is_not_trained(steered_project: Project, tmp_path: Path) -> None:
    path = steered_project("sd1", controlnet=True)
    entries = json.loads((tmp_path / "buckets.json").read_text())
    entries[-1]["conditioning_type"] = "mask"
    (tmp_path / "buckets.json").write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match="conditioning_type: 'mask' is not trained here"):
        config_of(path)


def test_a_configuration_comes_back_from_its_own_json(steered_project: Project, tmp_path: Path) -> None:
    config = config_of(steered_project("sd1", controlnet=True, controlnet_conditioning_scale=0.5))
    (tmp_path / "again.json").write_text(json.dumps(to_json(config)))
    assert config_of(tmp_path / "again.json") == config
    assert config.buckets[0].conditioning_data_dir == (tmp_path / "outlines" / "more")


def test_conditioning_images_are_cached_by_themselves(
    steered_project: Project, controlnets: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another conditioning image, or another ControlNet, does not encode the images again, nor do images the former."""
    seen = {"encode_images": 0, "encode_control": 0}

    def counting(name: str) -> None:
        real = getattr(LoadedFamily, name)

        def count(self: LoadedFamily, components: Any, images: Tensor, *more: Any) -> Tensor:
            seen[name] += len(images)
            encoded: Tensor = real(self, components, images, *more)
            return encoded

        monkeypatch.setattr(LoadedFamily, name, count)

    for name in seen:
        counting(name)

    def encoded(*flags: str) -> tuple[int, int]:
        config = read_config(path, flags, Plugins.discover().facts)[0]
        family, machine = Plugins.discover().load("sd1"), stages.open_machine(config)
        checked = preflight(config, family)
        components = stages.load(config, family, checked, machine)
        stages.attach(config, family, components, stages.find_targets(config, family, checked, components), machine)
        stages.encode(config, family, components, checked, machine)
        control, latents = seen["encode_control"], seen["encode_images"] - seen["encode_control"]  # one of each for a control
        seen.update(dict.fromkeys(seen, 0))
        return latents, control

    path = steered_project("sd1", controlnet=True, seed=1)
    assert encoded() == (8, 8)
    assert encoded("--lora_rank", "2") == (0, 0)
    outline = tmp_path / "outlines" / "more" / "1.png"
    with Image.open(outline) as image:
        size = image.size
    Image.new("RGB", size, "white").save(outline)
    assert encoded() == (0, 1)
    assert encoded("--controlnet", "false", "--controlnet_model_name_or_path", str(controlnets("sd1"))) == (0, 8)

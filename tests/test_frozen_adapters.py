"""Frozen LoRAs beside the slider: assistants, LoRAs of the base, and a slider that goes on from a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trainers import trainer_of

from slider_hooks import LoadRequest
from slider_plugin import run, stages
from slider_plugin.adapters.attach import attach_file
from slider_plugin.adapters.base import Adapter
from slider_plugin.adapters.frozen import FrozenFile, FrozenLora, check_fits, drawing_strengths, read_frozen
from slider_plugin.adapters.lycoris_network import LycorisAdapter
from slider_plugin.adapters.peft_lora import LoraAdapter
from slider_plugin.cli import execute
from slider_plugin.configfile import read_config
from slider_plugin.errors import UserError
from slider_plugin.lycoris_config import LycorisConfig
from slider_plugin.registry import Plugins
from slider_plugin.testing.rules import attached
from slider_plugin.testing.subject import PROMPTS, Subject

Folders = Callable[[str], Path]
Project = Callable[..., Path]
FAMILIES = ("sd1", "z_image", "flux")
ROUTES = ("lora", "lokr", "full")


def subject_of(family: str, tiny_folders: Folders) -> Subject:
    return Subject.load(Plugins.discover().load(family), tiny_folders(family))


def layers_of(subject: Subject) -> list[str]:
    """Half of the slider's targets, and as many layers that it leaves alone."""
    targets = subject.targets().modules
    others = [
        name
        for name, module in subject.denoiser.named_modules()
        if type(module) in (nn.Linear, nn.Conv2d) and name not in targets and "emb" not in name
    ]
    return [*targets[::2], *others[:: max(1, len(others) // len(targets))]]


def write_lora(
    path: Path, subject: Subject, seed: int = 1, rank: int = 2, alpha: float | None = None, native: bool = False
) -> Path:
    """A LoRA with weights that are not zero, as diffusers writes it; or as ai-toolkit does, with alpha beside it."""
    generator = torch.Generator().manual_seed(seed)
    prefix = "diffusion_model" if native else subject.family.facts.denoiser
    names = ("lora_down", "lora_up") if native else ("lora_A", "lora_B")
    tensors = {}
    for name in layers_of(subject):
        shape = subject.denoiser.get_submodule(name).weight.shape
        pair = ((rank, *shape[1:]), (shape[0], rank, *(1 for _ in shape[2:])))
        for twin, size in zip(names, pair, strict=True):
            tensors[f"{prefix}.{name}.{twin}.weight"] = 0.2 * torch.randn(size, generator=generator)
        if alpha is not None:
            tensors[f"{prefix}.{name}.alpha"] = torch.tensor(alpha)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def add(subject: Subject, path: Path, strength: float = 1.0, drawing: float = 0.0) -> FrozenLora:
    factors = read_frozen(FrozenFile("it", path, strength, drawing), subject.family.facts.denoiser)
    check_fits(factors, subject.denoiser, "it")
    return FrozenLora(subject.denoiser, factors, strength, drawing)


def slider(subject: Subject, route: str) -> Adapter:
    """A slider of one of the routes, with weights that are not zero."""
    if route == "lora":
        return attached(subject, trained=True)
    preset = {"target_module": [], "target_name": [f"(?:{subject.family.facts.targets.slider()})$"]}
    config = LycorisConfig(algo=route, linear_dim=2, linear_alpha=1.0, apply_preset=preset)
    adapter = LycorisAdapter(subject.family.facts, subject.denoiser, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter


@torch.no_grad()
def answer(subject: Subject) -> Tensor:
    return subject.predict(subject.latents(2), subject.conditioning(PROMPTS))


# --- What is added ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_base_loras_answer_as_in_diffusers_bit_for_bit(family: str, tiny_folders: Folders, tmp_path: Path) -> None:
    """Two LoRAs with their weights: the published pipeline with them loaded, ours, and ours below a slider at 0."""
    files = [write_lora(tmp_path / f"{n}.safetensors", subject_of(family, tiny_folders), n, rank=n) for n in (2, 3)]
    weights = [0.75, -0.5]
    published = subject_of(family, tiny_folders)
    bare = answer(published)
    for file in files:
        published.components.pipeline.load_lora_weights(str(file), adapter_name=file.stem)
    published.components.pipeline.set_adapters([file.stem for file in files], weights)
    wanted = answer(published)

    ours = subject_of(family, tiny_folders)
    for file, weight in zip(files, weights, strict=True):
        add(ours, file, weight, weight)
    assert torch.equal(answer(ours), wanted) and not torch.equal(wanted, bare)
    adapter = slider(ours, "lora")
    with adapter.scaled(0.0):
        assert torch.equal(answer(ours), wanted)
    with drawing_strengths(ours.denoiser), adapter.scaled(0.0):
        assert torch.equal(answer(ours), wanted)
    with adapter.scaled(1.0):
        assert not torch.equal(answer(ours), wanted)


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_the_layout_of_the_training_adapter_for_z_image_turbo(
    alpha: float | None, tiny_folders: Folders, tmp_path: Path
) -> None:
    """`diffusion_model.layers.0.attention.to_q...`, with and without alpha: as diffusers' own converter reads it."""
    published, ours = subject_of("z_image", tiny_folders), subject_of("z_image", tiny_folders)
    file = write_lora(tmp_path / "adapter.safetensors", ours, native=True, alpha=alpha)
    published.components.pipeline.load_lora_weights(str(file), adapter_name="assistant")
    add(ours, file)
    assert torch.equal(answer(ours), answer(published))


def test_alpha_and_other_spellings(tiny_folders: Folders, tmp_path: Path) -> None:
    """`diffusion_model.X.lora_down` with alpha 1 at rank 2 is half of `transformer.X.lora_A`; so is diffusers' metadata."""
    answers = []
    for number, more in enumerate(({"native": True, "alpha": 1.0}, {}, {})):
        subject = subject_of("z_image", tiny_folders)
        file = write_lora(tmp_path / f"{number}.safetensors", subject, **more)
        if number == 1:
            stated = json.dumps({"transformer.r": 2, "transformer.lora_alpha": 1})
            save_file(load_file(file), file, {"lora_adapter_metadata": stated})
        add(subject, file, 1.0 if number < 2 else 0.5)
        answers.append(answer(subject))
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


def test_two_of_them_add_up(tiny_folders: Folders, tmp_path: Path) -> None:
    subject = subject_of("sd1", tiny_folders)
    first, second = (add(subject, write_lora(tmp_path / f"{n}.safetensors", subject, n)) for n in (1, 2))
    for name in first.modules:
        changes = changes_of(subject, name, {"a": (first, 0.0), "b": (second, 0.0)}, ("", "a", "b", "ab"))
        both = changes["ab"]
        assert torch.allclose(changes[""] + both, changes["a"] + changes["b"], atol=1e-5 * float(both.abs().max()))
        assert not torch.equal(changes["a"], changes[""]) and not torch.equal(changes["b"], changes[""])


def changes_of(
    subject: Subject, name: str, loras: dict[str, tuple[FrozenLora, float]], active: Sequence[str]
) -> dict[str, Tensor]:
    """A layer's output to random input with each group of LoRAs active."""
    layer: Any = subject.denoiser.get_submodule(name)
    value = torch.randn(input_shape(layer), generator=torch.Generator().manual_seed(9))
    found = {}
    for group in active:
        for letter, (lora, off) in loras.items():
            lora.strength = 1.0 if letter in group else off
        with torch.no_grad():
            found[group] = layer(value).double()
    return found


def input_shape(layer: Any) -> tuple[int, ...]:
    base = getattr(layer, "base_layer", layer)
    if isinstance(base, nn.Linear):
        return (3, base.in_features)
    return (2, base.in_channels, 5, 5)


# --- Beside a slider --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
def test_gradients_are_right_with_checkpointing_and_only_the_slider_has_any(
    route: str, tiny_folders: Folders, tmp_path: Path
) -> None:
    subject = subject_of("z_image", tiny_folders)
    add(subject, write_lora(tmp_path / "assistant.safetensors", subject))
    adapter = slider(subject, route)
    latents, text = subject.latents(2), subject.conditioning(PROMPTS)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            subject.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
            subject.denoiser.train()
        for parameter in adapter.parameters():
            parameter.grad = None
        with adapter.scaled(-0.5):
            subject.predict(latents, text).square().mean().backward()
        found.append([p.grad.clone() for p in adapter.parameters() if p.grad is not None])
    assert len(found[0]) == len(adapter.parameters())
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-8) for a, b in zip(*found, strict=True))
    own = {id(p) for p in adapter.parameters()}
    others = [p for p in subject.denoiser.parameters() if id(p) not in own]
    assert all(p.grad is None and not p.requires_grad for p in others)


def test_in_bfloat16_under_autocast(tiny_folders: Folders, tmp_path: Path) -> None:
    """As a base in bfloat16 with the assistant merged into it, up to that type's rounding."""
    facts, folder = Plugins.discover().load("z_image"), tiny_folders("z_image")
    subject = Subject.load(facts, folder)
    file = write_lora(tmp_path / "assistant.safetensors", subject)
    exact = answer(subject)
    add(subject, file)
    wanted = answer(subject)
    components = facts.load_components(LoadRequest(model=str(folder), dtype=torch.bfloat16))
    half = Subject(facts, components, subject.size, folder)
    add(half, file)
    adapter = slider(half, "lora")
    with torch.autocast("cpu", torch.bfloat16), adapter.scaled(0.0):
        got = half.predict(half.latents(2).float(), half.conditioning(PROMPTS)).float()
    effect = float((wanted - exact).norm())
    assert float((got.detach() - wanted).norm()) < 0.2 * effect


def test_strengths_come_back_after_drawing_whatever_happens(tiny_folders: Folders, tmp_path: Path) -> None:
    subject = subject_of("sd1", tiny_folders)
    bare = answer(subject)
    frozen = add(subject, write_lora(tmp_path / "assistant.safetensors", subject), strength=0.5)
    with_it = answer(subject)
    with pytest.raises(RuntimeError), drawing_strengths(subject.denoiser):
        assert torch.equal(answer(subject), bare)
        raise RuntimeError
    assert frozen.strength == 0.5 and torch.equal(answer(subject), with_it)


# --- Runs -------------------------------------------------------------------------------------------------------------


def train(config: Path, *flags: str) -> run.Outcome:
    return run.train(read_config(config, flags, Plugins.discover().facts)[0])


def lycoris(*entries: str) -> dict[str, Any]:
    """Keys of a LoKr run on modules with these endings."""
    preset = {"target_module": list(entries)}
    return {"lora_type": "lycoris", "lycoris": {"algo": "lokr", "linear_dim": 2, "linear_alpha": 1, "apply_preset": preset}}


@pytest.mark.parametrize(("family", "keys"), [("z_image", {}), ("sd1", lycoris("attn1.to_q", "conv_in"))])
def test_a_run_with_assistant_and_base_goes_on_exactly(
    family: str, keys: dict[str, Any], project: Project, tiny_folders: Folders, tmp_path: Path, capfd: Any
) -> None:
    subject = subject_of(family, tiny_folders)
    write_lora(tmp_path / "adapters" / "ostris.safetensors", subject, native=True, alpha=1.0)
    write_lora(tmp_path / "style.safetensors", subject, seed=2)
    config = project(
        family,
        neutral=True,
        max_train_steps=3,
        gradient_checkpointing=True,
        assistant_lora_path="adapters",
        assistant_lora_weight_name="ostris.safetensors",
        assistant_lora_strength=0.5,
        base_loras=[{"path": "style.safetensors", "weight": 0.25}],
        **keys,
    )
    assert execute(["doctor", str(config)]) == 0
    plan = " ".join(capfd.readouterr().out.split())
    assert "style.safetensors (base_loras): 0.25 in training, 0.25 in pictures" in plan
    assert "ostris.safetensors (assistant_lora_path): 0.5 in training, 0 in pictures" in plan
    whole = train(config, "--output_dir", str(tmp_path / "whole")).adapter
    said = " ".join(capfd.readouterr().err.split())
    count = len(layers_of(subject))
    assert f"base LoRA: style.safetensors, frozen on {count} modules at strength 0.25" in said
    assert f"assistant: ostris.safetensors, frozen on {count} modules at strength 0.5, 0 in validation" in said
    train(config, "--output_dir", str(tmp_path / "cut"), "--max_train_steps", "1")
    (tmp_path / "cut" / "slider.safetensors").unlink()
    resumed = train(config, "--output_dir", str(tmp_path / "cut"), "--resume_from_checkpoint", "latest").adapter
    without = train(config, "--output_dir", str(tmp_path / "bare"), "--disable_assistant_lora").adapter
    assert whole and resumed and without
    assert resumed.read_bytes() == whole.read_bytes(), "a resumed run ends elsewhere"
    with safe_open(whole, "pt") as opened, safe_open(without, "pt") as bare:
        assert list(opened.keys()) == list(bare.keys()), "the assistant changes what the slider wraps, or is saved"
        facts, others = opened.metadata(), bare.metadata()
        assert any(not torch.equal(opened.get_tensor(key), bare.get_tensor(key)) for key in opened.keys())  # noqa: SIM118
    assert json.loads(facts["slider.assistant"]) == {"name": "ostris", "strength": 0.5}
    assert json.loads(facts["slider.base_loras"]) == [{"name": "style", "weight": 0.25}]
    assert "slider.assistant" not in others and str(tmp_path) not in str(facts)
    checkpoint = load_file(tmp_path / "whole" / "checkpoint-000003" / "adapter.safetensors")
    assert checkpoint.keys() == load_file(tmp_path / "bare" / "checkpoint-000003" / "adapter.safetensors").keys()


def test_training_leaves_the_assistant_alone_and_preserves_base_plus_assistant(
    project: Project, tiny_folders: Folders, tmp_path: Path
) -> None:
    """After some steps scale 0 answers as before them; a fresh adapter has nothing to preserve, since both sides have it."""
    subject = subject_of("z_image", tiny_folders)
    file = write_lora(tmp_path / "assistant.safetensors", subject)
    trainer = trainer_of(project("z_image", neutral=True, assistant_lora_path=str(file)))
    live = Subject(trainer.family, trainer.components, subject.size, subject.folder)
    bare = answer(subject)
    add(subject, file)
    with_assistant = answer(subject)
    assert not torch.equal(with_assistant, bare)
    neutral = next(draw for draw in trainer.sampler if draw.neutral)
    with trainer.adapter.scaled(neutral.scale):
        assert float(trainer.loss(trainer.data.batch(neutral)).detach()) == 0.0
    with trainer.adapter.scaled(0.0):
        assert torch.equal(answer(live), with_assistant)
    for _ in range(3):
        trainer.optimizer_step()
    assert not torch.equal(answer(live), with_assistant)
    with trainer.adapter.scaled(0.0):
        assert torch.equal(answer(live), with_assistant)
        with drawing_strengths(live.denoiser):
            assert torch.equal(answer(live), bare)


def test_a_finished_run_exports_though_the_assistant_s_file_is_gone(
    project: Project, tiny_folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "adapter.v1"
    file = write_lora(folder / "it.safetensors", subject_of("sd1", tiny_folders))
    real = stages.run

    def losing(*arguments: Any) -> Any:
        file.unlink()
        return real(*arguments)

    monkeypatch.setattr(stages, "run", losing)
    slider_file = train(project("sd1", max_train_steps=1, assistant_lora_path=str(folder))).adapter
    assert slider_file
    with safe_open(slider_file, "pt") as opened:
        assert json.loads(opened.metadata()["slider.assistant"]) == {"name": "adapter.v1", "strength": 1.0}


def test_bf16_trains_beside_an_assistant(project: Project, tiny_folders: Folders, tmp_path: Path) -> None:
    file = write_lora(tmp_path / "assistant.safetensors", subject_of("z_image", tiny_folders))
    trainer = trainer_of(project("z_image", mixed_precision="bf16", assistant_lora_path=str(file)))
    before = trainer.adapter.tensors()
    for _ in range(2):
        trainer.optimizer_step()
    assert any(not torch.equal(before[name], value) for name, value in trainer.adapter.tensors().items())


def test_validation_draws_without_the_assistant_unless_asked_and_with_the_base(
    project: Project, tiny_folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The picture at strength 0, which is the model without the slider; in the run and in `slider validate`."""
    subject = subject_of("sd1", tiny_folders)
    file = str(write_lora(tmp_path / "assistant.safetensors", subject))
    config = project(
        "sd1", max_train_steps=1, validation_prompt="a circle", validation_num_inference_steps=2, validation_strengths=[1]
    )

    def pictures(name: str, *flags: str) -> tuple[bytes, bytes]:
        """At 0, drawn by the run and by the command."""
        out = tmp_path / name
        outcome = train(config, "--output_dir", str(out), *flags)
        assert outcome.images
        assert execute(["validate", str(config), "--output_dir", str(out), *flags]) == 0
        drawn = (next(folder.rglob("*_base.png")).read_bytes() for folder in (outcome.images, out / "validation"))
        one, other = drawn
        return one, other

    plain = pictures("plain")
    assert plain[0] == plain[1]
    assert pictures("with", "--assistant_lora_path", file) == plain
    on = pictures("on", "--assistant_lora_path", file, "--assistant_lora_inference_strength", "1")
    assert on[0] == on[1] != plain[0]
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"base_loras": [{"path": file}]}))
    capsys.readouterr()
    assert pictures("base") == on  # the same LoRA at the same strength, whichever key names it
    assert "was trained with" not in capsys.readouterr().err
    config.write_text(json.dumps(values))
    assert execute(["validate", str(config), "--output_dir", str(tmp_path / "base")]) == 0
    assert "was trained with the base LoRAs assistant at 1, and is drawn with none" in " ".join(capsys.readouterr().err.split())


# --- Going on from a file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [4, 2])
def test_a_run_starts_where_a_file_ended(alpha: int, project: Project, tmp_path: Path) -> None:
    config = project("z_image", max_train_steps=2)
    first = train(config, "--output_dir", str(tmp_path / "first")).adapter
    assert first
    trainer = trainer_of(config, "--init_lora", str(first), "--lora_alpha", str(alpha))
    live = Subject(trainer.family, trainer.components, 16, Path())
    read = Subject.load(trainer.family, Path(json.loads(config.read_text())["pretrained_model_name_or_path"]))
    latents, text = read.latents(2), read.conditioning(PROMPTS)
    ended = attach_file(first, read.family, read.components)
    for scale in (1.0, -0.5):
        with torch.no_grad(), ended.scaled(scale), trainer.adapter.scaled(scale):
            assert torch.equal(live.family.predict(live.components, latents, torch.tensor([0.3, 0.7]), text),
                               read.family.predict(read.components, latents, torch.tensor([0.3, 0.7]), text))  # fmt: skip
    assert isinstance(trainer.adapter, LoraAdapter)
    trainer.optimizer_step()
    trained = trainer.adapter.state()
    assert any(not torch.equal(trained[name]["lora_A"], parts["lora_A"]) for name, parts in ended.state().items())  # type: ignore[union-attr]


def test_a_checkpoint_wins_over_the_file_to_start_from(project: Project, tmp_path: Path) -> None:
    config = project("sd1", max_train_steps=2)
    first = train(config, "--output_dir", str(tmp_path / "first")).adapter
    flags = ["--init_lora", str(first)]
    whole = train(config, *flags, "--output_dir", str(tmp_path / "whole")).adapter
    train(config, *flags, "--output_dir", str(tmp_path / "cut"), "--max_train_steps", "1")
    (tmp_path / "cut" / "slider.safetensors").unlink()
    resumed = train(config, *flags, "--output_dir", str(tmp_path / "cut"), "--resume_from_checkpoint", "latest").adapter
    assert whole and resumed and whole.read_bytes() == resumed.read_bytes()


# --- Bad input --------------------------------------------------------------------------------------------------------


def refused(config: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What `slider train` says; nothing is loaded, and nothing written."""
    assert execute(["train", str(config), *flags]) == 2
    assert not (config.parent / "out").exists()
    said = " ".join(capsys.readouterr().err.split())
    assert "a problem in the configuration" in said
    return said


@pytest.fixture
def damaged(tiny_folders: Folders, tmp_path: Path) -> Callable[[str], Path]:
    """Files for Z-Image, each with something wrong."""

    def make(what: str) -> Path:
        subject = subject_of("flux" if what == "another family" else "z_image", tiny_folders)
        path = write_lora(tmp_path / f"{what}.safetensors", subject)
        tensors, metadata = load_file(path), {}
        first = next(key for key in tensors if ".lora_A." in key)
        name = first.removesuffix(".lora_A.weight")
        if what == "shape":
            tensors[first] = torch.randn(2, 5)
        elif what == "not finite":
            tensors[first][0, 0] = torch.nan
        elif what == "incomplete":
            del tensors[first]
        elif what == "text encoder":
            tensors["text_encoder.layers.0.q.lora_A.weight"] = torch.randn(2, 5)
        elif what == "kohya":
            tensors = {f"lora_unet_{key.split('.', 1)[1].replace('.', '_')}": value for key, value in tensors.items()}
        elif what == "dora":
            tensors[f"{name}.lora_magnitude_vector.weight"] = torch.ones(4)
        elif what == "two prefixes":
            tensors["diffusion_model.a.lora_A.weight"] = torch.ones(1, 2)
        elif what == "alpha twice":
            tensors[f"{name}.alpha"], metadata = torch.tensor(1.0), {"lora_adapter_metadata": '{"transformer.lora_alpha": 1}'}
        elif what == "alpha pattern":
            metadata = {"lora_adapter_metadata": '{"transformer.lora_alpha": 2, "transformer.alpha_pattern": {"a": 1}}'}
        elif what == "8 bits":
            tensors = {key: value.to(torch.float8_e4m3fn) for key, value in tensors.items()}
        elif what == "whole numbers":
            tensors[first] = tensors[first].to(torch.int32)
        elif what == "norm":
            tensors["transformer.layers.0.attention_norm1.lora_A.weight"] = torch.ones(1, 32)
            tensors["transformer.layers.0.attention_norm1.lora_B.weight"] = torch.ones(32, 1)
        save_file(tensors, path, metadata)
        if what == "no safetensors":
            path.write_text("a text")
        return path

    return make


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("another family", "does not fit ZImageTransformer2DModel: "),
        ("shape", "it holds (2, 5) and "),
        ("not finite", "holds values that are not finite"),
        ("incomplete", "has no lora_A; the file is incomplete"),
        ("text encoder", "belongs to a text encoder"),
        ("kohya", "is a key of the kohya or LyCORIS format, which is not read"),
        ("dora", "belongs to DoRA"),
        ("two prefixes", "it holds layers of diffusion_model and of transformer"),
        ("alpha twice", "it states alpha in its tensors and in its metadata"),
        ("alpha pattern", "its metadata has alpha_pattern"),
        ("8 bits", "convert it to bfloat16"),
        ("whole numbers", "has dtype int32"),
        ("norm", "a LoRA belongs to a Linear or a convolution"),
        ("no safetensors", "not a safetensors file"),
    ],
)
@pytest.mark.parametrize("key", ["assistant_lora_path", "base_loras"])
def test_a_file_that_cannot_be_used_is_told_before_loading(
    key: str, what: str, said: str, project: Project, damaged: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = damaged(what)
    config = project("z_image", **{key: str(path) if key == "assistant_lora_path" else [{"path": str(path)}]})
    message = refused(config, capsys)
    assert said in message and f"{key}: " in message and path.name in message


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"assistant_lora_path": "none.safetensors"}, "assistant_lora_path: there is no file or folder none.safetensors"),
        ({"assistant_lora_path": "org/adapter"}, "assistant_lora_path: there is no file or folder org/adapter; nothing is"),
        ({"assistant_lora_path": "data"}, "holds no safetensors files; name one of its files in assistant_lora_weight_name"),
        ({"assistant_lora_path": "data", "assistant_lora_weight_name": "x.safetensors"}, "holds no file x.safetensors"),
        ({"assistant_lora_weight_name": "x.safetensors"}, "assistant_lora_weight_name: there is no assistant"),
        ({"assistant_lora_strength": 0.5}, "assistant_lora_strength: there is no assistant"),
        ({"assistant_lora_inference_strength": 1}, "assistant_lora_inference_strength: there is no assistant"),
        (
            {"assistant_lora_path": "config.json", "assistant_lora_weight_name": "x.safetensors"},
            "assistant_lora_weight_name: assistant_lora_path names the file config.json already",
        ),
        ({"assistant_lora_strength": "nan"}, "assistant_lora_strength: 'nan' is not a finite number"),
        ({"base_loras": [{"path": "none.safetensors"}]}, "base_loras: there is no file none.safetensors"),
        ({"base_loras": [{"weight": 1}]}, "base_loras, entry 1: path: it is missing"),
        ({"base_loras": [{"path": "a", "wieght": 1}]}, "base_loras, entry 1: wieght: no such key; did you mean weight?"),
        ({"base_loras": [{"path": "a", "weight": "much"}]}, "base_loras, entry 1: weight: 'much' is not a number"),
        ({"base_loras": ["a"]}, "base_loras, entry 1: it must be an object of path and weight, not a text"),
        ({"base_loras": {"path": "a"}}, "base_loras: it must be a list of path and weight, not an object"),
        ({"init_lora": "none.safetensors"}, "init_lora: there is no file none.safetensors"),
    ],
)
def test_keys_that_cannot_be_meant(
    keys: dict[str, Any], said: str, project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(project("z_image", **keys), capsys)


def test_base_loras_are_no_flag_and_a_disabled_assistant_is_not_looked_for(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    config = project("sd1", assistant_lora_path="nowhere.safetensors", disable_assistant_lora=True)
    assert execute(["doctor", str(config)]) == 0
    assert "--base_loras: only a file can hold it" in refused(config, capsys, "--base_loras", "[]")


def test_files_that_a_run_cannot_start_from(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = project("z_image", max_train_steps=1)
    file = train(config, "--output_dir", str(tmp_path / "first")).adapter
    assert file
    capsys.readouterr()

    def said(*flags: str) -> str:
        return refused(config, capsys, "--init_lora", str(file), *flags)

    assert f"init_lora: lora_rank is 8, and {file} has rank 4; set lora_rank to it" in said("--lora_rank", "8")
    assert "has no place here); use the model and the targets" in said("--include_joint", "false")
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | lycoris("layers.0.attention.to_q")))
    assert "init_lora: only a plain LoRA starts from a file" in said()
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(file), file, metadata | {"slider.family": "flux"})
    config.write_text(json.dumps(values))
    assert "is a slider of flux, and model_family is z_image" in said()
    save_file({"lycoris_a.lokr_w1": torch.ones(1)}, file)
    assert "only diffusers keys are read" in said()


def test_a_layer_that_a_lora_cannot_stand_behind_is_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict(
        {"depth": nn.Conv2d(4, 4, 3, groups=4), "wide": nn.Conv2d(4, 4, 3, dilation=2), "heads": nn.MultiheadAttention(4, 2)}
    )
    kernel = {"lora_A": torch.ones(1, 4, 3, 3), "lora_B": torch.ones(4, 1, 1, 1)}
    plain = {"lora_A": torch.ones(1, 4), "lora_B": torch.ones(4, 1)}
    for name, twins, said in (
        ("depth", kernel, "grouped, dilated or wrapping convolution"),
        ("wide", kernel, "grouped, dilated or wrapping convolution"),
        ("heads.out_proj", plain, "nn.MultiheadAttention, which never calls it"),
    ):
        path = tmp_path / "it.safetensors"
        save_file({f"transformer.{name}.{twin}.weight": value for twin, value in twins.items()}, path)
        factors = read_frozen(FrozenFile("assistant_lora_path", path, 1.0, 0.0), "transformer")
        with pytest.raises(UserError, match=said):
            check_fits(factors, model, "assistant_lora_path: it")

"""What must hold for every family: each rule takes a `Subject`, raises AssertionError with a reason, and returns nothing.

`RULES` names them all; a test runs each over a family's tiny pipeline::

    @pytest.mark.parametrize("rule", RULES)
    def test_my_family(rule, tmp_path):
        RULES[rule](Subject.load(Plugins.discover().load("my_family"), tiny_folder))
"""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from slider_hooks import Diffusion, Flow, PromptEntry, TargetRequest
from slider_plugin.adapters.base import Adapter
from slider_plugin.adapters.peft_lora import LoraAdapter
from slider_plugin.objectives.losses import learning_loss
from slider_plugin.targets import resolve_targets
from slider_plugin.testing import oracle, probe, reload, sameness
from slider_plugin.testing.subject import PROMPTS, Subject
from slider_plugin.training.noise import noise_process
from slider_plugin.validation.render import DrawSettings, render

RANK = 2
SCALES = (1.0, -1.0)
LINEAR = 1e-5  # relative, in float32
SAME = 1e-4  # standard deviations of the answer
LANDED = 1e-3  # standard deviations of the clean latents
LOST = 0.1  # the same, where the sign or the time is wrong
ONE_BIT = 0.05  # images are rounded to 8 bits
SLOPE_STEPS = (3e-3, 1e-2)  # along the gradient of one module: short for bent losses, long for rounded ones
SLOPE = 0.01  # relative; a right gradient is nearer at one of the two, HiDream's cut one is off by up to 0.028 at both
SMALL_SLOPE = 0.05  # relative to the gradient of all modules
FARTHEST = 5.0  # standard deviations that no number of a test's noise lies from zero


def targets_are_found(subject: Subject) -> None:
    """The slider targets match on the model, attention among them and nothing forbidden; so do the standard ones."""
    plan = subject.targets()
    assert plan.source in ("slider", "documented"), f"no slider target matches; {plan.source} targets are taken instead"
    request = TargetRequest(slider=False)
    standard = resolve_targets(subject.family, subject.denoiser, request)
    assert standard.modules, "no standard target matches"


def every_target_learns_and_nothing_else_moves(subject: Subject) -> None:
    """Two optimizer steps with +s and -s: each factor of each target gets a gradient, and no other weight changes."""
    adapter = attached(subject)
    own = {id(p) for p in adapter.parameters()}
    frozen = {n: p.detach().clone() for n, p in subject.denoiser.named_parameters() if id(p) not in own}
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    grads: dict[str, float] = {}
    for _ in range(2):  # the first moves B away from zero, without which A has no gradient
        for scale in SCALES:
            with adapter.scaled(scale):
                bucket_loss(subject, positive=scale > 0).backward()
        grads = {n: 0.0 if p.grad is None else float(p.grad.abs().sum()) for n, p in adapter.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    still = [name for name, size in grads.items() if not size > 0]
    assert not still, f"no gradient reaches {len(still)} of {len(grads)} factors, such as {still[:3]}"
    moved = [n for n, p in subject.denoiser.named_parameters() if n in frozen and not torch.equal(p, frozen[n])]
    assert not moved, f"training moved weights that are not the adapter's: {moved[:3]}"


def gradients_are_those_of_the_loss(subject: Subject) -> None:
    """Module by module along its gradient: the slope that it promises is the slope that is measured.

    A model may cut its graph somewhere without a word: HiDream's experts run without gradients in evaluation mode, and training
    then follows a wrong direction with a falling loss. What lies before the cut has the wrong gradient.
    """
    adapter = attached(subject, trained=True)
    bucket_loss(subject, positive=True).backward()
    grads = {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}
    whole = _norm(grads.values())
    for name, parameter in adapter.named_parameters():
        promised = _norm([grads[name]]) if name in grads else 0.0
        if not name.endswith("lora_B") or promised < SMALL_SLOPE * whole:
            continue  # too flat to be measured in float32
        slopes = [_slope(subject, parameter, grads[name] / promised, step) for step in SLOPE_STEPS]
        measured = min(slopes, key=lambda slope: abs(slope - promised))
        assert abs(promised - measured) <= SLOPE * promised, (
            f"{name}: the gradient promises a slope of {promised:.4g}, and {measured:.4g} is measured: the graph is cut"
        )


@torch.no_grad()
def _slope(subject: Subject, parameter: Tensor, direction: Tensor, length: float) -> float:
    """The loss's slope along a direction of length 1, by central differences."""
    start, losses = parameter.clone(), []
    for step in (length, -length):
        parameter.copy_(start + step * direction)
        losses.append(float(bucket_loss(subject, positive=True).double()))
    parameter.copy_(start)
    return (losses[0] - losses[1]) / (2 * length)


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float((t.double() ** 2).sum()) for t in tensors))


def scale_zero_is_the_base_model(subject: Subject) -> None:
    """Bit for bit, with an adapter that does something at other scales."""
    latents, text = subject.latents(2), subject.conditioning(PROMPTS)
    with torch.no_grad():
        base = subject.predict(latents, text)
        adapter = attached(subject, trained=True)
        with adapter.scaled(0.0):
            at_zero = subject.predict(latents, text)
        with adapter.scaled(1.0):
            at_one = subject.predict(latents, text)
    assert torch.isfinite(base).all(), "the tiny model's answer is not finite"
    assert torch.equal(base, at_zero), f"at scale 0 the model differs from the base by {_gap(base, at_zero)}"
    assert not torch.equal(base, at_one), "at scale 1 the adapter changes nothing"


def minus_mirrors_plus(subject: Subject) -> None:
    """Per wrapped layer, on the input that it really gets: its change at -1 is minus the one at +1."""
    adapter = attached(subject, trained=True)
    layers_mirror(subject.denoiser, adapter, inputs_of(subject, subject.denoiser, adapter.modules))


@torch.no_grad()
def layers_mirror(model: torch.nn.Module, adapter: Adapter, inputs: Mapping[str, Tensor]) -> None:
    """Raise AssertionError unless each layer that an adapter wraps has an input, and changes at -1 by minus its change at +1.

    Args:
        model: that the adapter is in.
        adapter: with weights that are not zero.
        inputs: what `inputs_of` gives for its modules.
    """
    assert set(inputs) == set(adapter.modules), f"never called: {sorted(set(adapter.modules) - set(inputs))[:3]}"
    for name, value in inputs.items():
        layer = model.get_submodule(name)
        answers: dict[float, Tensor] = {}
        for scale in (0.0, *SCALES):
            with adapter.scaled(scale):
                answers[scale] = layer(value).double()
        plus, minus = answers[1.0] - answers[0.0], answers[-1.0] - answers[0.0]
        size = answers[0.0].abs().max().clamp_min(plus.abs().max())
        assert plus.abs().max() > 0, f"{name}: the adapter changes nothing"
        assert (plus + minus).abs().max() <= LINEAR * size, f"{name}: -1 misses the mirror of +1 by {_gap(plus, -minus)}"


def no_target_sees_text_alone(subject: Subject) -> None:
    """By measured shapes: slider targets see the image, or the time; attention that sees text as well is declared joint.

    (The last layer of some denoisers runs over text tokens, too, and their output is then thrown away.)
    """
    seen = probe.streams(subject)
    plan = subject.targets()
    text = [n for n in plan.modules if seen[n] == "text"]
    assert not text, f"slider targets see text alone: {text[:3]}"
    unused = [n for n in plan.modules if seen[n] == "unused"]
    assert not unused, f"slider targets are never called: {unused[:3]}"
    for kind, stream in (("self", "image"), ("joint", "joint")):
        expression = subject.family.facts.targets.by_kind().get(kind, "")
        wrong = [f"{n} sees {seen[n]}" for n in plan.modules if re.fullmatch(expression, n) and seen[n] != stream]
        assert not wrong, f"{len(wrong)} targets of kind {kind} do not see {stream} tokens: {wrong[:3]}"


def the_published_sampler_lands_on_the_clean_latents(subject: Subject) -> None:
    """With a denoiser that is never wrong; and it misses when our sign or our time is the other way round."""
    tolerance = ONE_BIT if oracle.in_pixels(subject) else LANDED
    tolerance += FARTHEST * oracle.left_over(subject.components.scheduler)
    distance = oracle.miss(subject)
    assert distance <= tolerance, f"the pipeline lands {distance:.3g} standard deviations from the clean latents"
    for what, wrong in wrong_conventions(subject).items():
        assert oracle.miss(subject, wrong) > LOST, f"nothing notices a wrong {what}"


def wrong_conventions(subject: Subject) -> dict[str, Flow | Diffusion]:
    """The family's noise process with its sign turned, and with its time running backwards."""
    noise = subject.family.facts.noise
    if isinstance(noise, Flow):
        right = noise.time
        return {
            "sign": dataclasses.replace(noise, sign=-noise.sign),
            "time": dataclasses.replace(noise, time=lambda sigma_B: right(1.0 - sigma_B)),
        }
    wrong: dict[str, Flow | Diffusion] = {"sign": dataclasses.replace(noise, sign=-noise.sign)}
    predicts_v = subject.components.prediction == "v_prediction"
    wrong["prediction"] = dataclasses.replace(noise, prediction="epsilon" if predicts_v else "v_prediction")
    if (alpha_bar := noise.alpha_bar) is not None:
        wrong["time"] = dataclasses.replace(noise, alpha_bar=lambda r_B: alpha_bar(1.0 - r_B))
    return wrong


def training_asks_what_the_pipeline_asks(subject: Subject) -> None:
    """The same latents, time and prompt: the denoiser's answer in training is the one in the published pipeline."""
    distance = sameness.gap(subject)
    assert distance <= SAME, f"the answers in training and in the pipeline differ by {distance:.3g} standard deviations"


def validation_draws_at_three_scales(subject: Subject) -> None:
    """Through the real pipeline; scale 0 is the base image, the others differ from it."""
    adapter = attached(subject, trained=True)
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "first.png"
        if oracle.begins_with_an_image(subject.family.build_pipeline(subject.components)):
            subject.first_image().save(image)
        drawn = render(
            subject.family,
            subject.components,
            adapter,
            [PromptEntry(name="one", prompt=PROMPTS[0])],
            folder=Path(folder),
            step=1,
            seeds=[1],
            strengths=[-1.0, 0.0, 1.0],
            global_strength=1.0,
            settings=DrawSettings(
                width=subject.size,
                height=subject.size,
                steps=2,
                guidance_scale=subject.family.facts.guidance_scale,
                image=str(image) if image.exists() else None,
                num_frames=subject.media().shape[2] if "video" in subject.family.facts.modalities else 1,
                extra=subject.family.facts.call_kwargs,
            ),
        )
        pictures = {shot.scale: path.read_bytes() for shot, path in drawn.images.items()}
        assert drawn.contact_sheet and drawn.contact_sheet.is_file()
    assert set(pictures) == {-1.0, 0.0, 1.0}
    assert len(set(pictures.values())) == 3, "images at -1, 0 and +1 are the same"


def a_saved_slider_answers_the_same_in_a_new_process(subject: Subject) -> None:
    """Written, read by a process that shares nothing with this one, at three scales: bit for bit."""
    adapter = attached(subject, trained=True)
    here = reload.answers(subject, adapter)
    with tempfile.TemporaryDirectory() as folder:
        name, room = subject.family.facts.name, Path(folder)
        file = reload.save(subject, adapter, room / "slider.safetensors")
        compare_answers(here, reload.answers_elsewhere({name: (subject.folder, file)}, room)[name])


def compare_answers(here: reload.Answers, there: reload.Answers) -> None:
    """Raise AssertionError unless two processes answered the same, and +1 and -1 did not."""
    for scale, answer in here.items():
        assert torch.equal(answer, there[scale]), f"at {scale} the answers differ by {_gap(answer, there[scale])}"
    assert not torch.equal(here["+1"], here["-1"]), "the answers at +1 and -1 are the same"


RULES: dict[str, Callable[[Subject], None]] = {
    rule.__name__: rule
    for rule in (
        targets_are_found,
        every_target_learns_and_nothing_else_moves,
        gradients_are_those_of_the_loss,
        scale_zero_is_the_base_model,
        minus_mirrors_plus,
        no_target_sees_text_alone,
        the_published_sampler_lands_on_the_clean_latents,
        training_asks_what_the_pipeline_asks,
        validation_draws_at_three_scales,
        a_saved_slider_answers_the_same_in_a_new_process,
    )
}


def attached(subject: Subject, trained: bool = False) -> LoraAdapter:
    """A LoRA on the slider targets; `trained` gives it weights that are not zero."""
    adapter = LoraAdapter(subject.denoiser, subject.targets().modules, rank=RANK, alpha=float(RANK))
    if trained:
        generator = torch.Generator().manual_seed(5)
        for parameter in adapter.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return adapter


def bucket_loss(subject: Subject, positive: bool) -> Tensor:
    """The bucket loss on two samples, whose noise differs by the sign."""
    process = noise_process(subject.family.facts, subject.components)
    clean = subject.latents(2)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(13 if positive else 17))
    time_B = process.at(0.6, 2)
    text = subject.conditioning(PROMPTS)

    noisy = process.add_noise(clean, noise, time_B)
    prediction = process.output(subject.predict_at(noisy, process.told(time_B), text))
    return learning_loss(prediction, process.target(clean, noise, time_B))


def inputs_of(subject: Subject, model: torch.nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The first input of each named layer of a model in one call of the denoiser; layers that are never called have none."""
    inputs: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, name=name: inputs.__setitem__(name, arguments[0].detach().clone())
        )
        for name in names
    ]
    with torch.no_grad():
        subject.predict(subject.latents(2), subject.conditioning(PROMPTS))
    for handle in handles:
        handle.remove()
    return inputs


def _gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())

"""Both signs in one forward: the same gradient as in passes of their own, and never where a model mixes its samples up."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from slider_hooks import Draw, Family, Flow
from slider_plugin import run
from slider_plugin.adapters.base import Adapter
from slider_plugin.adapters.lycoris_network import LycorisAdapter
from slider_plugin.adapters.peft_lora import LoraAdapter
from slider_plugin.adapters.samples import NotPerSample, scaled_rows
from slider_plugin.configfile import read_config
from slider_plugin.data.encode import Batch
from slider_plugin.errors import ConfigError, UserError
from slider_plugin.lycoris_config import LycorisConfig
from slider_plugin.registry import Plugins
from slider_plugin.testing.subject import PROMPTS, Subject
from slider_plugin.training.loop import Trainer
from slider_plugin.training.noise import FlowProcess, noise_process
from slider_plugin.training.pairing import Pairing, kind_of, why_not

Folders = Callable[[str], Path]
Project = Callable[..., Path]

ALGORITHMS = ("lora", "loha", "lokr", "full", "glora", "ia3", "diag-oft")
SAME_GRADIENT = 1e-6  # of its norm, in float32
SAME_ANSWER = 1e-5  # of a layer's change, in float32


# --- A strength per sample, layer by layer ----------------------------------------------------------------------------


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear 2": (lambda: nn.Linear(8, 6), (8,)),
    "linear 3": (lambda: nn.Linear(8, 6), (5, 8)),
    "linear 4": (lambda: nn.Linear(8, 6), (3, 5, 8)),
    "linear 5": (lambda: nn.Linear(8, 6), (2, 3, 5, 8)),
    "conv 1": (lambda: nn.Conv1d(4, 6, 3, padding=1), (4, 7)),
    "conv 2": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 5, 5)),
    "conv 2 pointwise": (lambda: nn.Conv2d(4, 6, 1), (4, 5, 5)),
    "conv 2 stride": (lambda: nn.Conv2d(4, 6, 3, stride=2), (4, 7, 7)),
    "conv 3": (lambda: nn.Conv3d(4, 6, 3, padding=1), (4, 3, 5, 5)),
}
FACTS = Family(name="layer", title="Layer", denoiser="unet", denoiser_class="Holder", noise=Flow())
SCALES = (0.7, -0.7, 0.0)


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.layer(x)
        return answer


def holder(kind: str) -> Holder:
    torch.manual_seed(3)
    return Holder(LAYERS[kind][0]()).eval()


def adapted(model: nn.Module, algorithm: str, modules: Sequence[str] = ("layer",), size: float = 0.2) -> Adapter:
    """An adapter of PEFT, or of lycoris-lora, with weights that change something."""
    if algorithm == "peft":
        adapter: Adapter = LoraAdapter(model, modules, rank=2, alpha=3.0)
    else:
        preset = {"target_module": [], "target_name": [f"{name}$" for name in modules]}
        config = LycorisConfig(
            algo=algorithm, linear_dim=2, multiplier=1.0 if algorithm == "diag-oft" else 1.5, apply_preset=preset
        )
        adapter = LycorisAdapter(FACTS, model, config)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    return adapter


@pytest.mark.parametrize("algorithm", ["peft", *ALGORITHMS])
@pytest.mark.parametrize("kind", LAYERS)
def test_each_sample_runs_at_its_own_scale(kind: str, algorithm: str) -> None:
    """Against one scale for all: the answers, and the gradients of every weight and of the input."""
    model = holder(kind)
    x = torch.randn(len(SCALES), *LAYERS[kind][1], generator=torch.Generator().manual_seed(1), requires_grad=True)
    with torch.no_grad():
        base = model(x)
    adapter = adapted(model, algorithm)
    assert adapter.one_scale_only == ""
    inputs = [x, *adapter.parameters()]
    with adapter.scaled(SCALES):
        together = model(x)
        gradients = torch.autograd.grad(together.square().sum(), inputs)
    sums = [torch.zeros_like(value) for value in inputs]
    for i, scale in enumerate(SCALES):
        with adapter.scaled(scale):
            alone = model(x[i : i + 1])
            for total, part in zip(sums, torch.autograd.grad(alone.square().sum(), inputs), strict=True):
                total += part
        size = (alone - base[i]).abs().max().clamp_min(0.1)
        assert (together[i] - alone[0]).abs().max() <= SAME_ANSWER * size
        assert scale == 0.0 or (alone - base[i]).abs().max() > 1e-2
    assert torch.equal(together[2], base[2]), "scale 0 is the base bit for bit"
    assert (together[0] - base[0]).abs().max() > 1e-2
    for got, wanted in zip(gradients, sums, strict=True):
        assert (got - wanted).norm() <= SAME_ANSWER * wanted.norm().clamp_min(1e-3)


@pytest.mark.parametrize("algorithm", ["peft", "lokr"])
def test_minus_mirrors_plus_within_a_batch(algorithm: str) -> None:
    model = holder("linear 3")
    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1)).expand(2, 5, 8)
    with torch.no_grad():
        base, adapter = model(x), adapted(model, algorithm)
        with adapter.scaled(torch.tensor([0.5, -0.5])):
            plus, minus = model(x) - base
    assert plus.abs().max() > 1e-2 and (plus + minus).abs().max() <= 1e-6 * base.abs().max()


@pytest.mark.parametrize("algorithm", ["peft", "lokr", "loha"])
def test_in_bfloat16_a_sample_s_scale_is_rounded_no_more_than_one_for_all(algorithm: str) -> None:
    model = holder("linear 3").to(torch.bfloat16)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        adapter = adapted(model, algorithm)
        with adapter.scaled((0.3, -0.3)):
            together = model(x)
        for i, scale in enumerate((0.3, -0.3)):
            with adapter.scaled(scale):
                alone = model(x)[i]
            assert together.dtype == alone.dtype == torch.bfloat16
            assert (together[i] - alone).abs().max() <= 2**-6 * alone.abs().max()


def test_rows_are_rounded_once_and_keep_their_type() -> None:
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    rows = scaled_rows(values, torch.tensor([0.3, -0.3]), "layer")
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, (values.double() * torch.tensor([0.3, 0.3, -0.3, -0.3])[:, None]).to(torch.bfloat16))


@pytest.mark.parametrize("algorithm", ["peft", "lokr"])
def test_rows_of_a_sample_lie_one_behind_another(algorithm: str) -> None:
    """Frames folded into the batch: `(B * F, ...)`; a number of rows that B samples cannot have is refused, with the layer."""
    model = holder("linear 3")
    adapter = adapted(model, algorithm)
    x = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with adapter.scaled((1.0, -1.0)):
            together = model(x)
            with pytest.raises(NotPerSample, match="layer sees 5 rows for 2 samples"):
                model(x[:5])
        for rows, scale in ((slice(0, 3), 1.0), (slice(3, 6), -1.0)):
            with adapter.scaled(scale):
                assert torch.allclose(model(x[rows]), together[rows], atol=1e-6)


@pytest.mark.parametrize("algorithm", ["peft", "lokr"])
def test_the_scale_is_put_back(algorithm: str) -> None:
    model = holder("linear 3")
    adapter, x = adapted(model, algorithm), torch.randn(3, 5, 8)
    with torch.no_grad():
        before = model(x)
        with adapter.scaled((1.0, -1.0, 0.0)), adapter.scaled(0.5), adapter.scaled((0.0, 1.0, 2.0)):
            pass
        assert torch.equal(model(x), before)
        with pytest.raises(ValueError, match="one for each sample"), adapter.scaled(torch.zeros(2, 2)):
            pass
        assert torch.equal(model(x), before)


def test_dropout_is_left_to_separate_passes() -> None:
    assert "lora_dropout" in LoraAdapter(holder("linear 3"), ["layer"], rank=2, alpha=2.0, dropout=0.1).one_scale_only
    preset: dict[str, Any] = {"target_module": [], "target_name": ["layer$"]}
    for kind in ("dropout", "rank_dropout", "module_dropout"):
        config = LycorisConfig(**{"algo": "lokr", "linear_dim": 2, "apply_preset": preset, kind: 0.1})
        assert "dropout" in LycorisAdapter(FACTS, holder("linear 3"), config).one_scale_only


def test_an_algorithm_that_misses_at_a_scale_per_sample_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lycoris-lora calls the change of LoKr is its change times alpha / rank once more."""
    monkeypatch.setattr(
        "slider_plugin.adapters.lycoris_layer.change_of", lambda lora: lora.get_diff_weight(1.0, lora.shape, lora.device)
    )
    preset: dict[str, Any] = {"target_module": [], "target_name": ["layer$"]}
    config = LycorisConfig(algo="loha", linear_dim=2, linear_alpha=1.0, apply_preset=preset)
    assert "LohaModule misses" in LycorisAdapter(FACTS, holder("linear 3"), config).one_scale_only


# --- A trainer on a tiny model ----------------------------------------------------------------------------------------


class Keeping(torch.optim.SGD):
    """Moves nothing, and keeps the gradients that it was given."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.given = [p.grad.clone() for group in self.param_groups for p in group["params"]]


@dataclass
class Data:
    """Batches by bucket, whatever the draw's index."""

    batches: dict[str, Batch]

    def batch(self, draw: Draw) -> Batch:
        return replace(self.batches[draw.bucket], draw=draw)


class Cycle:
    """Draws in turn, one bucket for each scale; None is neutral at +1 and -1 in turn."""

    def __init__(self, scales: dict[str, float | None]) -> None:
        self.scales, self.position = scales, 0

    def __iter__(self) -> Iterator[Draw]:
        return self

    def __next__(self) -> Draw:
        position = self.position
        self.position += 1
        bucket, scale = list(self.scales.items())[position % len(self.scales)]
        turn = 1.0 if position // len(self.scales) % 2 == 0 else -1.0
        return Draw(position=position, epoch=0, bucket=bucket, index=0, scale=scale or turn, neutral=scale is None)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: Any) -> None:
        self.position = state["position"]


SIGNS: dict[str, float | None] = {"more": 0.5, "less": -0.5, "plain": None}


def batch_of(subject: Subject, seed: int, prompts: Sequence[str] = PROMPTS, wider: int = 1) -> Batch:
    shape = subject.latents(len(prompts), wider).shape
    clean = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    texts = zip(subject.conditioning(prompts), subject.told(clean), strict=True)
    draw = Draw(position=0, epoch=0, bucket="", index=0, scale=1.0, neutral=False)
    return Batch(draw, clean, tuple({**text, **told} for text, told in texts), tuple(Path(str(i)) for i in range(len(prompts))))


def trainer_of(
    subject: Subject, algorithm: str = "peft", signs: dict[str, float | None] = SIGNS, bf16: bool = False, **batches: Batch
) -> Trainer:
    """A trainer on a tiny model, with an adapter that has learnt something; a step leaves the gradients in its optimizer."""
    data = {name: batch_of(subject, seed) for seed, name in enumerate(signs)} | batches
    if bf16:
        subject.denoiser.to(torch.bfloat16)
    adapter = adapted(subject.denoiser, algorithm, subject.targets().modules, size=0.1)
    optimizer = Keeping(adapter.parameters(), lr=1.0)
    return Trainer(
        family=subject.family,
        components=subject.components,
        adapter=adapter,
        data=Data(data),  # type: ignore[arg-type]
        sampler=Cycle(signs),
        noise=noise_process(subject.family.facts, subject.components),
        accelerator=Accelerator(cpu=True),
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        seed=1,
        cycle=len(signs),
        draws_per_step=2 * len(signs),
        max_grad_norm=0.0,
        bf16=bf16,
    )


@pytest.fixture
def subject(tiny_folders: Folders) -> Callable[[str], Subject]:
    return lambda name: Subject.load(Plugins.discover().load(name), tiny_folders(name))


def step(trainer: Trainer, on: bool, insist: bool = False) -> tuple[list[Tensor], list[float], int]:
    """Gradients, losses in the order of the draws, and how often the denoiser was asked with a gradient, in one step."""
    trainer.pairing = Pairing(on, insist, trainer.family.facts.name)
    trainer.sampler.load_state_dict({"position": 0})
    family, asked = trainer.family, [0]

    class Counting:
        facts = family.facts

        def predict(self, *arguments: Any) -> Tensor:
            asked[0] += torch.is_grad_enabled()
            return family.predict(*arguments)

    if on:
        trainer.check_pairing()
    trainer.family = Counting()  # type: ignore[assignment]
    try:
        report = trainer.optimizer_step()
    finally:
        trainer.family = family
    assert [r.draw.position for r in report.draws] == list(range(trainer.draws_per_step))
    return trainer.optimizer.given, [float(r.loss) for r in report.draws], asked[0]  # type: ignore[attr-defined]


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if "signs_in_one_forward" in line]


def assert_same(got: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> None:
    both = torch.cat([g.flatten() for g in got]).double(), torch.cat([w.flatten() for w in wanted]).double()
    assert both[1].norm() > 0
    assert (both[0] - both[1]).norm() <= tolerance * both[1].norm()


@pytest.mark.parametrize("algorithm", ["peft", "lokr", "loha"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["sd1", "z_image", "flux", "wan"])
def test_the_gradient_is_that_of_separate_passes(
    subject: Callable[[str], Subject], family: str, checkpointing: bool, algorithm: str
) -> None:
    """Two cycles of +, - and neutral: two forwards with a gradient instead of six; Wan with five frames."""
    tiny = subject(family)
    trainer = trainer_of(tiny, algorithm)
    if checkpointing:
        tiny.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    apart, losses_apart, calls_apart = step(trainer, on=False)
    together, losses, calls = step(trainer, on=True)
    assert (calls_apart, calls) == (6, 2)
    assert losses == pytest.approx(losses_apart, rel=1e-5)
    assert_same(together, apart, SAME_GRADIENT)


class Double(Trainer):
    """In float64, where the order of sums is no matter."""

    def predict(self, noisy_BCHW: Tensor, time_B: Tensor, conditioning: Any) -> Tensor:
        told_B, told = self.noise.told(time_B), [{n: _double(v) for n, v in c.items()} for c in conditioning]
        answer = self.family.predict(self.components, noisy_BCHW.double(), _double(told_B), told)
        return self.noise.output(answer)


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


@pytest.mark.parametrize("algorithm", ["peft", "lokr"])
@pytest.mark.parametrize("family", ["sd1", "z_image", "flux", "wan"])
def test_what_differs_is_rounding(subject: Callable[[str], Subject], family: str, algorithm: str) -> None:
    tiny = subject(family)
    plain = trainer_of(tiny, algorithm)
    trainer = Double(**{name: getattr(plain, name) for name in Trainer.__slots__})  # type: ignore[arg-type]
    tiny.denoiser.double()
    for parameter in trainer.adapter.parameters():
        parameter.data = parameter.data.double()
    apart, *_ = step(trainer, on=False)
    together, *_, calls = step(trainer, on=True)
    assert calls == 2
    assert_same(together, apart, 1e-12)


def test_the_backward_pass_of_a_checkpointed_model_needs_the_scales(subject: Callable[[str], Subject]) -> None:
    """The recomputed forward reads them again: outside of `scaled` the gradient would be another one."""
    tiny = subject("sd1")
    trainer = trainer_of(tiny)
    tiny.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    wanted = step(trainer, on=True)[0]
    seen: list[Any] = []
    backward = trainer.accelerator.backward

    def early(loss: Tensor) -> None:
        seen.append(trainer.adapter.scale)  # type: ignore[attr-defined]
        with trainer.adapter.scaled([1.0] * 6):
            backward(loss)

    trainer.accelerator.backward = early  # type: ignore[method-assign]
    got = step(trainer, on=True)[0]
    assert seen == [[0.5, 0.5, -0.5, -0.5, 1.0, 1.0], [0.5, 0.5, -0.5, -0.5, -1.0, -1.0]]
    with pytest.raises(AssertionError):
        assert_same(got, wanted, 1e-2)


@pytest.mark.parametrize("algorithm", ["peft", "lokr"])
def test_in_bfloat16_the_gradient_is_the_same_up_to_rounding(subject: Callable[[str], Subject], algorithm: str) -> None:
    trainer = trainer_of(subject("sd1"), algorithm, bf16=True)
    apart, *_ = step(trainer, on=False)
    together, *_, calls = step(trainer, on=True)
    assert calls == 2 and all(gradient.dtype == torch.float32 for gradient in together)
    assert_same(together, apart, 0.05)


def test_draws_of_another_shape_keep_a_forward_of_their_own(subject: Callable[[str], Subject]) -> None:
    tiny = subject("sd1")
    trainer = trainer_of(tiny, less=batch_of(tiny, 1, wider=2))
    apart, *_ = step(trainer, on=False)
    together, _, calls = step(trainer, on=True)
    assert calls == 4  # positive with neutral, negative alone; twice
    assert_same(together, apart, SAME_GRADIENT)


def test_prompts_of_different_length_share_a_forward_only_where_the_model_masks_them(subject: Callable[[str], Subject]) -> None:
    """Kandinsky calls its denoiser for each length; Sana pads, and says where."""
    for family, wanted in (("sana", 2), ("kandinsky5_image", 4)):
        tiny = subject(family)
        batches = {
            "more": batch_of(tiny, 0, PROMPTS[:1]),
            "less": batch_of(tiny, 1, PROMPTS[1:]),
            "plain": batch_of(tiny, 2, PROMPTS[:1]),
        }
        trainer = trainer_of(tiny, **batches)
        apart, *_ = step(trainer, on=False)
        together, _, calls = step(trainer, on=True)
        assert calls == wanted and trainer.pairing.on, family
        assert_same(together, apart, 1e-5)


def test_a_family_that_takes_one_sample_a_call_falls_back(
    subject: Callable[[str], Subject], capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = subject("minimax_h3")
    trainer = trainer_of(tiny, **{name: batch_of(tiny, 0, PROMPTS[:1] * 2) for name in SIGNS})
    apart, *_ = step(trainer, on=False)
    again, _, calls = step(trainer, on=True)
    assert calls == 6 and not trainer.pairing.on
    assert all(torch.equal(a, b) for a, b in zip(again, apart, strict=True))
    (line,) = said(capsys)
    assert line.startswith("signs_in_one_forward: minimax_h3: proj_in sees") and "a forward of its own" in line
    with pytest.raises(UserError, match="minimax_h3 cannot: proj_in sees"):
        step(trainer, on=True, insist=True)


# --- The check --------------------------------------------------------------------------------------------------------


class Video(nn.Module):
    """Frames `(B, C, F)` through a layer, with text `(B, T, C)`; each way to do it wrong is a flag."""

    def __init__(self, frame_major: bool = False, unmasked: bool = False, one_time: bool = False, heed: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj, self.out, self.text = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.frame_major, self.unmasked, self.one_time, self.heed = frame_major, unmasked, one_time, heed

    def forward(self, noisy: Tensor, time: Tensor, told: Sequence[Any]) -> Tensor:
        B, C, F = noisy.shape
        order = (2, 0, 1) if self.frame_major else (0, 2, 1)
        rows = self.proj(noisy.permute(order).reshape(B * F, C)).relu()
        frames_BFC = rows.reshape(F, B, C).transpose(0, 1) if self.frame_major else rows.reshape(B, F, C)
        text_BTC = nn.utils.rnn.pad_sequence([c["text"] for c in told], batch_first=True)
        mask_BT = nn.utils.rnn.pad_sequence([c["mask"] for c in told], batch_first=True).to(text_BTC)
        if self.unmasked:  # cut to the longest text of the batch, whose padding then counts
            longest = int(mask_BT.sum(1).max())
            text_BC = self.text(text_BTC[:, :longest]).mean(1)
        else:
            text_BC = (self.text(text_BTC) * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True)
        time_B = time[:1].expand(B) if self.one_time else time
        return self.out(frames_BFC + self.heed * text_BC[:, None] + time_B[:, None, None].to(frames_BFC)).transpose(1, 2)


def video_batches(frames: int, tokens: tuple[int, int], fixed: bool) -> list[Batch]:
    """Two draws whose texts have so many tokens; `fixed` keeps all in 6, and says in a mask which count."""
    draw = Draw(position=0, epoch=0, bucket="", index=0, scale=1.0, neutral=False)
    generator, batches = torch.Generator().manual_seed(2), []
    for count in tokens:
        length = 6 if fixed else count
        text = torch.randn(length, 8, generator=generator)
        mask = (torch.arange(length) < count).long()
        clean = torch.randn(1, 8, frames, generator=generator)
        batches.append(Batch(draw, clean, ({"text": text * mask[:, None], "mask": mask},), (Path("x"),)))
    return batches


def verdict(model: Video, batches: Sequence[Batch], bf16: bool = False) -> str:
    adapter = LoraAdapter(model.to(torch.bfloat16 if bf16 else torch.float32), ["proj", "out"], rank=2, alpha=2.0)

    def predict(noisy: Tensor, time: Tensor, told: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            answer: Tensor = model(noisy, time, told)
        return answer

    before, state = adapter.state(), torch.get_rng_state()
    reason = why_not(predict, adapter, FlowProcess(Flow(), 1.0), batches, bf16)
    after = adapter.state()
    assert all(torch.equal(before[n][p], after[n][p]) for n in before for p in before[n]), "its weights are its own again"
    assert torch.equal(torch.get_rng_state(), state) and adapter.scale == 1.0
    return reason


@pytest.mark.parametrize("bf16", [False, True])
def test_the_check_passes_a_model_that_keeps_its_samples_apart(bf16: bool) -> None:
    for fixed in (False, True):
        assert verdict(Video(), video_batches(4, (3, 6), fixed), bf16) == ""


@pytest.mark.parametrize("bf16", [False, True])
def test_the_check_finds_frames_that_are_folded_first(bf16: bool) -> None:
    assert "strength of one sample reaches another" in verdict(Video(frame_major=True), video_batches(4, (4, 4), False), bf16)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
def test_the_check_finds_padding_that_counts(fixed: bool, bf16: bool) -> None:
    assert "not answered as it is alone" in verdict(Video(unmasked=True), video_batches(4, (3, 6), fixed), bf16)


@pytest.mark.parametrize("fixed", [False, True])
def test_padding_is_found_where_the_text_has_little_effect(fixed: bool) -> None:
    """Far less than the adapter: a difference counts beside what the text does."""
    batches = video_batches(4, (3, 6), fixed)
    assert verdict(Video(heed=3e-4), batches) == ""
    assert "not answered as it is alone" in verdict(Video(unmasked=True, heed=3e-4), batches)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_check_finds_one_time_for_all(bf16: bool) -> None:
    assert "not answered as it is alone" in verdict(Video(one_time=True), video_batches(4, (4, 4), False), bf16)


def test_a_shape_is_checked_when_it_first_comes_up() -> None:
    """One frame cannot be folded wrongly, four can: a run over images and videos stops pairing at the first video."""
    pairing, asked = Pairing(on=True, family="f"), []

    def check(batches: Sequence[Batch]) -> str:
        asked.append(batches[0].clean_BCHW.shape[-1])
        return verdict(Video(frame_major=True), batches)

    images, videos = video_batches(1, (4, 4), False), video_batches(4, (4, 4), False)
    assert [len(group) for group in pairing.groups(images, check)] == [2]
    assert [len(group) for group in pairing.groups(images, check)] == [2]
    assert [len(group) for group in pairing.groups(videos, check)] == [1, 1]
    assert [len(group) for group in pairing.groups(images, check)] == [1, 1]
    assert asked == [1, 4] and not pairing.on


def test_what_cannot_be_put_into_one_tensor_is_no_kind() -> None:
    first, second = video_batches(4, (3, 6), False)
    kind = kind_of([first, second])
    assert kind is not None and not kind.alike
    assert kind_of([first, video_batches(2, (3, 3), False)[0]]) is None
    more = replace(second, conditioning=({**second.conditioning[0], "first_frame": torch.zeros(1)},))
    assert kind_of([first, more]) is None


FAMILIES = sorted(p.stem for p in Path(__file__).parents[1].joinpath("slider_plugin", "architectures").glob("[!_]*.py"))
APART = {
    "cosmos3": "strength of one sample reaches another",  # one call for each sample, whose rows are its tokens
    "ernie": "final_linear sees",  # tokens first, samples second
    "minimax_h3": "proj_in sees 1 rows for 2 samples",  # one call for each sample
}
"""Families whose draws never share a forward."""
BY_LENGTH = ("ace_step", "kandinsky5_image", "kandinsky5_video", "omnigen")
"""Families that call their denoiser once for each length of text."""


@pytest.mark.parametrize("family", FAMILIES)
def test_which_families_answer_each_sample_at_its_own_scale(subject: Callable[[str], Subject], family: str) -> None:
    trainer = trainer_of(subject(family), signs={"more": 1.0, "less": -1.0})
    first, second = (batch_of(subject(family), seed, PROMPTS[:1]) for seed in (0, 1))
    other = batch_of(subject(family), 1, PROMPTS[1:])
    reason = why_not(trainer.predict, trainer.adapter, trainer.noise, [first, second], bf16=False)
    assert (APART[family] in reason) if family in APART else reason == ""
    if family not in APART:
        different = why_not(trainer.predict, trainer.adapter, trainer.noise, [first, other], bf16=False)
        assert ("sees 1 rows for 2 samples" in different) if family in BY_LENGTH else different == ""


# --- Memory -----------------------------------------------------------------------------------------------------------


class Forgetful:
    """A denoiser's `predict` that runs out of memory on more samples than fit: in the forward, or late in the backward."""

    def __init__(self, family: Any, fits: int, backward: bool) -> None:
        self.family, self.facts, self.fits, self.backward, self.failed = family, family.facts, fits, backward, 0

    def predict(self, components: Any, noisy: Tensor, time: Tensor, told: Any) -> Tensor:
        answer = self.family.predict(components, noisy, time, told)
        if len(noisy) <= self.fits or not torch.is_grad_enabled():
            return answer
        self.failed += 1
        if not self.backward:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        first = next(p for p in components.denoiser.parameters() if p.requires_grad)
        first.register_hook(self._fail) if self.failed == 1 else None
        return answer

    def _fail(self, gradient: Tensor) -> Tensor:
        if self.failed == 1:
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return gradient


@pytest.mark.parametrize("backward", [False, True])
def test_a_step_that_does_not_fit_is_done_again_exactly(
    subject: Callable[[str], Subject], backward: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where some gradients are there already."""
    trainer = trainer_of(subject("sd1"))
    wanted, losses, _ = step(trainer, on=False)
    trainer.pairing = Pairing(True, family="sd1")
    trainer.sampler.load_state_dict({"position": 0})
    forgetful = trainer.family = Forgetful(trainer.family, fits=2, backward=backward)  # type: ignore[assignment]
    report = trainer.optimizer_step()
    assert forgetful.failed and not trainer.pairing.on
    assert all(torch.equal(a, b) for a, b in zip(trainer.optimizer.given, wanted, strict=True))  # type: ignore[attr-defined]
    assert [float(r.loss) for r in report.draws] == losses
    failed = forgetful.failed
    trainer.optimizer_step()
    assert forgetful.failed == failed, "the rest of the run keeps to separate passes"
    (line,) = said(capsys)
    assert line.startswith("signs_in_one_forward: sd1: both signs do not fit into memory together (step 2)")


def test_a_user_who_insists_is_told_about_memory(subject: Callable[[str], Subject]) -> None:
    trainer = trainer_of(subject("sd1"))
    trainer.pairing = Pairing(True, True, "sd1")
    trainer.family = Forgetful(trainer.family, fits=2, backward=False)  # type: ignore[assignment]
    with pytest.raises(UserError, match="sd1 cannot: both signs do not fit into memory together"):
        trainer.optimizer_step()


def test_a_check_that_does_not_fit_is_no_failure(subject: Callable[[str], Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(subject("sd1"))
    trainer.pairing = Pairing(True, family="sd1")

    def broken(*arguments: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(Trainer, "predict", broken)
    before = [parameter.clone() for parameter in trainer.adapter.parameters()]
    trainer.check_pairing()
    assert not trainer.pairing.on
    assert all(torch.equal(a, b) for a, b in zip(trainer.adapter.parameters(), before, strict=True))


def test_any_other_failure_stays_one(subject: Callable[[str], Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(subject("sd1"))
    trainer.pairing = Pairing(True, family="sd1")

    def broken(*arguments: Any) -> Tensor:
        raise RuntimeError("a shape does not fit")

    monkeypatch.setattr(type(trainer), "predict", broken)
    with pytest.raises(RuntimeError, match="a shape does not fit"):
        trainer.optimizer_step()


# --- A whole run ------------------------------------------------------------------------------------------------------


def train(config: Path, *flags: str) -> run.Outcome:
    return run.train(read_config(config, flags, Plugins.discover().facts)[0])


def losses_of(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [value for row in rows for name, value in row.items() if name.startswith("loss/")]


def test_a_run_with_both_signs_in_one_forward_learns_the_same(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Same noise, times and captions; `auto` does so wherever the model allows it."""
    config = project("sd1", neutral=True, validation_disable=True, caption_dropout_probability=0.3)
    yes = train(config, "--output_dir", str(tmp_path / "yes"), "--signs_in_one_forward", "yes").adapter
    assert "the draws of a cycle share a forward" in capsys.readouterr().err
    no = train(config, "--output_dir", str(tmp_path / "no"), "--signs_in_one_forward", "no").adapter
    assert "the draws of a cycle share a forward" not in capsys.readouterr().err
    auto = train(config, "--output_dir", str(tmp_path / "auto")).adapter
    assert "the draws of a cycle share a forward" in capsys.readouterr().err
    assert yes and no and auto and yes.read_bytes() == auto.read_bytes() != no.read_bytes()
    assert losses_of(tmp_path / "yes") == pytest.approx(losses_of(tmp_path / "no"), rel=1e-3)


def test_a_run_that_goes_on_does_as_it_did(project: Project, tmp_path: Path) -> None:
    """What a checkpoint says is taken where the choice is left to us: the weights end bit for bit the same."""
    config = project("sd1", neutral=True, validation_disable=True, max_train_steps=4, checkpoint_step_interval=2)
    whole = train(config, "--output_dir", str(tmp_path / "whole"), "--signs_in_one_forward", "yes").adapter
    apart = train(config, "--output_dir", str(tmp_path / "apart"), "--signs_in_one_forward", "no").adapter
    early = ["--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-000002")]
    resumed = train(config, "--output_dir", str(tmp_path / "on"), *early).adapter
    assert whole and apart and resumed and whole.read_bytes() == resumed.read_bytes()
    assert whole.read_bytes() != apart.read_bytes()
    state = json.loads((tmp_path / "on" / "checkpoint-000004" / "state.json").read_text())
    assert state["facts"]["signs_in_one_forward"] is True


def test_whoever_insists_on_what_cannot_be_is_told_why(project: Project) -> None:
    with pytest.raises(UserError, match="sd1 cannot: lora_dropout draws other numbers"):
        train(project("sd1", signs_in_one_forward="yes", lora_dropout=0.1))


def test_the_key_takes_what_yaml_makes_of_yes(project: Project) -> None:
    config = project("sd1")
    written = json.loads(config.read_text())
    for value, meant in ((True, "yes"), (False, "no"), ("no", "no"), ("auto", "auto")):
        config.write_text(json.dumps(written | {"signs_in_one_forward": value}))
        assert read_config(config, (), Plugins.discover().facts)[0].signs_in_one_forward == meant
    with pytest.raises(ConfigError, match="signs_in_one_forward"):
        read_config(config, ["--signs_in_one_forward", "maybe"], Plugins.discover().facts)


# --- The benchmark ----------------------------------------------------------------------------------------------------


def test_the_benchmark_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also its published part, on a small SDXL on the processor, as that part otherwise needs a GPU."""
    path = Path(__file__).parent / "benchmarks" / "pairing.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_pairing", path)
    assert spec and spec.loader
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, benchmark)
    spec.loader.exec_module(benchmark)
    (row,) = benchmark.main(["--families", "sd1", "--no-middle", "--repeats", "1", "--json"])
    assert json.loads(capsys.readouterr().out) == [row] and row["check"] == "passes" and row["ratio"] > 0
    small = {"block_out_channels": (32, 64, 64), "transformer_layers_per_block": 1, "attention_head_dim": (2, 4, 4)}
    made = benchmark.random_unet("sdxl", 64, 2, torch.device("cpu"), bf16=True, checkpointing=True, **small)
    assert benchmark.measure("sdxl", made, 1)["check"] == "passes"

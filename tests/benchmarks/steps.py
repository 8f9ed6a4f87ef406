"""The trainer's step against a bare loop: the same model, LoRA, batches, noise and optimizer, in plain torch and PEFT.

    python -m tests.benchmarks.steps

The trainer is the one that `slider train` builds, reads its batches from a warm cache and writes its metrics. The bare loop
has all batches in memory and writes nothing. Both take one + and one - sample, forward and backward each, clip and step; and
since both compute the same, their losses must agree in every step, or nothing was measured.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slider_hooks import Conditioning, LoadRequest
from slider_plugin.adapters.peft_lora import NAME, LoraAdapter
from slider_plugin.config import RunConfig
from slider_plugin.configfile import read_config
from slider_plugin.registry import Plugins
from slider_plugin.training.loop import Trainer
from slider_plugin.training.seeds import generator
from slider_plugin.training.watch import Metrics

from .models import TINY, middle_pipeline, tiny_pipeline, trainer_of, write_run
from .timing import Row, in_turn, ratio, show

AGREE = 1e-4
"""How far the losses of a step may be apart."""

Forward = Callable[[Any, Tensor, Tensor, Sequence[Conditioning]], Tensor]


# --- What the four models are asked, as their diffusers pipelines ask ---------------------------------------------------


def unet(model: Any, noisy_BCHW: Tensor, time_B: Tensor, told: Sequence[Conditioning]) -> Tensor:
    text_BTD = torch.stack([c["prompt_embeds"] for c in told])
    return model(noisy_BCHW, time_B, encoder_hidden_states=text_BTD, return_dict=False)[0]  # type: ignore[no-any-return]


def sdxl(model: Any, noisy_BCHW: Tensor, time_B: Tensor, told: Sequence[Conditioning]) -> Tensor:
    B, _, h, w = noisy_BCHW.shape
    text_BTD, pooled_BP = (torch.stack([c[name] for c in told]) for name in ("prompt_embeds", "pooled"))
    size_B6 = torch.tensor([[8 * h, 8 * w, 0, 0, 8 * h, 8 * w]] * B, device=noisy_BCHW.device)
    added = {"text_embeds": pooled_BP, "time_ids": size_B6}
    answer = model(noisy_BCHW, time_B, encoder_hidden_states=text_BTD, added_cond_kwargs=added, return_dict=False)
    return answer[0]  # type: ignore[no-any-return]


def z_image(model: Any, noisy_BCHW: Tensor, sigma_B: Tensor, told: Sequence[Conditioning]) -> Tensor:
    text = [c["prompt_embeds"] for c in told]
    return -torch.stack(model(list(noisy_BCHW.unsqueeze(2)), 1.0 - sigma_B, text, return_dict=False)[0]).squeeze(2)


def flux(model: Any, noisy_BCHW: Tensor, sigma_B: Tensor, told: Sequence[Conditioning]) -> Tensor:
    B, C, h, w = noisy_BCHW.shape
    text_BTD = torch.stack([c["prompt_embeds"] for c in told])
    tokens_BND = noisy_BCHW.reshape(B, C, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, 4 * C)
    rows, columns = torch.meshgrid(torch.arange(h // 2.0), torch.arange(w // 2.0), indexing="ij")
    places_N3 = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(text_BTD)
    answer_BND = model(
        hidden_states=tokens_BND,
        timestep=sigma_B,
        guidance=torch.ones_like(sigma_B) if model.config.guidance_embeds else None,
        pooled_projections=torch.stack([c["pooled"] for c in told]),
        encoder_hidden_states=text_BTD,
        txt_ids=text_BTD.new_zeros(text_BTD.shape[1], 3),
        img_ids=places_N3,
        return_dict=False,
    )[0]
    return answer_BND.reshape(B, h // 2, w // 2, C, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(B, C, h, w)  # type: ignore[no-any-return]


def wan(model: Any, noisy_BCFHW: Tensor, sigma_B: Tensor, told: Sequence[Conditioning]) -> Tensor:
    text_BTD = torch.stack([c["prompt_embeds"] for c in told])
    return model(noisy_BCFHW, 1000.0 * sigma_B, text_BTD, return_dict=False)[0]  # type: ignore[no-any-return]


FORWARDS: dict[str, Forward] = {"sd1": unet, "sdxl": sdxl, "z_image": z_image, "flux": flux, "wan": wan}


# --- The bare loop ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """One draw, in memory."""

    scale: float
    clean_BCHW: Tensor
    told: tuple[Conditioning, ...]


class BareLoop:
    """A LoRA loop as one writes it by hand."""

    def __init__(self, model: Any, forward: Forward, alphas_N: Tensor | None, shift: float, seed: int, twin: Trainer) -> None:
        """With the trainer's LoRA and optimizer over again.

        Args:
            model: a frozen denoiser of its own; or the trainer's, for one too large to be there twice, with its LoRA.
            forward: how it is called.
            alphas_N: `alphas_cumprod` of an epsilon model; None for a flow.
            shift: of a flow's times.
            seed: of the noise.
            twin: the trainer that it is compared with, before its first step.
        """
        from peft import LoraConfig, inject_adapter_in_model

        theirs = twin.adapter
        assert isinstance(theirs, LoraAdapter)
        exactly = "|".join(re.escape(name) for name in theirs.modules)  # a list would match endings of names
        self.name = NAME if model is twin.components.denoiser else "bare"
        if model is not twin.components.denoiser:
            model.requires_grad_(False)
            exactly = "|".join(re.escape(name) for name in theirs.modules)  # a list would match endings of names
            inject_adapter_in_model(
                LoraConfig(r=theirs.rank, lora_alpha=theirs.alpha, target_modules=exactly), model, self.name
            )
        self.model, self.bf16 = model, twin.bf16
        self.layers = {name: module for name, module in model.named_modules() if name in theirs.modules}
        with torch.no_grad():
            for name, parts in theirs.state().items():
                for part, value in parts.items():
                    getattr(self.layers[name], part)[self.name].weight.copy_(value)
        self.forward, self.alphas_N, self.shift, self.seed = forward, alphas_N, shift, seed
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        settings = {key: twin.optimizer.defaults[key] for key in ("lr", "betas", "eps", "weight_decay", "fused")}
        self.optimizer = torch.optim.AdamW(self.parameters, **settings)
        self.max_grad_norm, self.steps = twin.max_grad_norm, 0

    def step(self, samples: Sequence[Sample]) -> float:
        """One optimizer step over a + and a - draw, which share noise and time; the mean loss."""
        losses = []
        for sample in samples:
            loss = self.loss(sample)
            (loss / len(samples)).backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return float(torch.stack(losses).mean())

    def loss(self, sample: Sample) -> Tensor:
        clean_BCHW, device = sample.clean_BCHW, sample.clean_BCHW.device
        for layer in self.layers.values():
            layer.scaling[self.name] = sample.scale
        noise_BCHW = torch.randn(clean_BCHW.shape, generator=generator(self.seed, "noise", self.steps)).to(device)
        times, each = generator(self.seed, "time", self.steps), (-1, *(1,) * (clean_BCHW.ndim - 1))
        if self.alphas_N is None:
            u_B = torch.rand(len(clean_BCHW), generator=times).to(device)
            time_B = self.shift * u_B / (1.0 + (self.shift - 1.0) * u_B)
            sigma_B1 = time_B.reshape(each)
            noisy_BCHW, target_BCHW = (1.0 - sigma_B1) * clean_BCHW + sigma_B1 * noise_BCHW, noise_BCHW - clean_BCHW
        else:
            time_B = torch.randint(len(self.alphas_N), (len(clean_BCHW),), generator=times)
            alpha_B1 = self.alphas_N[time_B].to(device).reshape(each)
            noisy_BCHW, target_BCHW = alpha_B1.sqrt() * clean_BCHW + (1.0 - alpha_B1).sqrt() * noise_BCHW, noise_BCHW
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            answer_BCHW = self.forward(self.model, noisy_BCHW, time_B.to(device), sample.told)
        return torch.nn.functional.mse_loss(answer_BCHW.float(), target_BCHW)


def bare_twin(trainer: Trainer, denoiser: Any, forward: Forward) -> BareLoop:
    """A bare loop that computes what a trainer does."""
    alphas_N = getattr(trainer.noise, "alphas_cumprod_N", None)
    return BareLoop(denoiser, forward, alphas_N, getattr(trainer.noise, "shift", 1.0), trainer.seed, trainer)


def samples_of(trainer: Trainer, steps: int) -> list[list[Sample]]:
    """What the trainer's next steps train on. Its sampler stays where it is."""
    before = trainer.sampler.state_dict()
    draws = [[next(trainer.sampler) for _ in range(trainer.draws_per_step)] for _ in range(steps)]
    trainer.sampler.load_state_dict(before)
    batches = [[trainer.data.batch(draw) for draw in step] for step in draws]
    return [[Sample(b.draw.scale, b.clean_BCHW.clone(), b.conditioning) for b in step] for step in batches]


# --- Measuring --------------------------------------------------------------------------------------------------------


def trainer_and_twin(config: Path) -> tuple[Trainer, BareLoop, RunConfig]:
    """Both, each on a model of its own."""
    trainer, family, checked = trainer_of(config)
    loaded = family.load_components(LoadRequest(model=checked.model, dtype=torch.float32, options=trainer.components.options))
    bare = bare_twin(trainer, loaded.denoiser.eval(), FORWARDS[family.facts.name])
    return trainer, bare, read_config(config, (), Plugins.discover().facts)[0]


def measure(what: str, config: Path, repeats: int) -> Row:
    """One row: the step of both, in turn."""
    trainer, bare, parsed = trainer_and_twin(config)
    steps = iter(samples_of(trainer, repeats + 2))
    losses: dict[str, list[float]] = {"ours": [], "bare": []}
    parsed.output_dir.mkdir(parents=True, exist_ok=True)
    with Metrics(parsed, 0, trainer.accelerator) as metrics:

        def ours() -> None:
            report = trainer.optimizer_step()
            metrics.write(report)
            metrics.note(report)
            losses["ours"].append(sum(report.losses().values()) / 2)

        def theirs() -> None:
            losses["bare"].append(bare.step(next(steps)))

        times = in_turn({"ours": ours, "bare": theirs}, repeats)
    return {
        "model": what,
        "bare step, ms": round(1e3 * times["bare"].median, 1),
        "our step, ms": round(1e3 * times["ours"].median, 1),
        "ratio (quartiles)": str(ratio(times["ours"].wall, times["bare"].wall)),
        "overhead, ms": round(
            1e3 * statistics.median(a - b for a, b in zip(times["ours"].wall, times["bare"].wall, strict=True)), 1
        ),
        "ratio of processor time": str(ratio(times["ours"].cpu, times["bare"].cpu)),
        "losses apart": f"{apart(losses['ours'], losses['bare']):.0e}",
    }


def apart(ours: Sequence[float], bare: Sequence[float]) -> float:
    """The largest relative difference of their losses. Raises AssertionError if that is no rounding."""
    most = max(abs(a - b) / b for a, b in zip(ours, bare, strict=True))
    assert most < AGREE, f"the bare loop computes something else: losses are {most:.2g} apart"
    return most


def rows(root: Path, families: Sequence[str] = TINY, middle: bool = True, repeats: int = 30) -> list[Row]:
    """One for each tiny model, and for the middle-sized one."""
    found = []
    for name in families:
        side = Plugins.discover().facts(name).tiny_size
        config = write_run(name, tiny_pipeline(name, root), root / f"{name}-run", side)
        found.append(measure(f"`{name}` tiny", config, repeats))
    if middle:
        config = write_run("sd1", middle_pipeline(root), root / "middle-run", 128)
        found.append(measure("`sd1`, 38 million, 128 px", config, max(2, repeats // 2)))
    return found


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", default=list(TINY), choices=TINY, help="tiny models to time")
    parser.add_argument("--no-middle", action="store_true", help="leave out the middle-sized UNet")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        found = rows(Path(name), given.families, not given.no_middle, given.repeats)
    show(found, given.json)
    return found


if __name__ == "__main__":
    main()

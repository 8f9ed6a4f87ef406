"""How much faster is a + and a - draw in one forward than in two passes? The trainer's own step, both ways in turn.

    python -m tests.benchmarks.pairing                        # tiny models, and a middle-sized UNet
    python -m tests.benchmarks.pairing --published 256        # on a GPU: SDXL as published, random weights, bf16

A ratio above 1 says that one forward is faster. Medians of repetitions that are interleaved, with their quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator

from slider_hooks import Components, Conditioning, Draw, TargetRequest
from slider_plugin.adapters.peft_lora import LoraAdapter
from slider_plugin.data.encode import Batch
from slider_plugin.family import LoadedFamily
from slider_plugin.loading import denoiser_class_of, on_meta
from slider_plugin.registry import Plugins
from slider_plugin.targets import resolve_targets
from slider_plugin.testing.subject import PROMPTS, Subject, write_tiny
from slider_plugin.training.loop import Trainer
from slider_plugin.training.noise import noise_process
from slider_plugin.training.pairing import Pairing

TINY = ("sd1", "z_image", "flux", "wan")
MIDDLE = {"block_out_channels": (64, 128, 256, 256)}
"""A Stable Diffusion with a fifth of the channels, 38 million parameters; 256 pixels."""


class PlusMinus:
    """Draws at +1 and -1 in turn."""

    position = 0

    def __iter__(self) -> Iterator[Draw]:
        return self

    def __next__(self) -> Draw:
        self.position += 1
        scale = 1.0 if self.position % 2 else -1.0
        return Draw(position=self.position - 1, epoch=0, bucket="", index=0, scale=scale, neutral=False)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]


@dataclass
class Data:
    """The same samples in every draw."""

    sample: Batch

    def batch(self, draw: Draw) -> Batch:
        return replace(self.sample, draw=draw)


def trainer(
    family: LoadedFamily, components: Components, clean: torch.Tensor, told: Sequence[Conditioning], bf16: bool
) -> Trainer:
    """The trainer of a run on these samples, with a LoRA of rank 16 on the slider targets."""
    device = clean.device
    plan = resolve_targets(family, components.denoiser, TargetRequest(slider=True))
    adapter = LoraAdapter(components.denoiser, plan.modules, rank=16, alpha=16.0)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-5)
    first = PlusMinus().__next__()
    return Trainer(
        family=family,
        components=components,
        adapter=adapter,
        data=Data(Batch(first, clean, tuple(told), (Path("sample"),) * len(clean))),  # type: ignore[arg-type]
        sampler=PlusMinus(),
        noise=noise_process(family.facts, components),
        accelerator=Accelerator(cpu=device.type == "cpu"),
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        seed=0,
        cycle=2,
        draws_per_step=2,
        max_grad_norm=1.0,
        bf16=bf16,
    )


def tiny(name: str, folder: Path, batch: int) -> Trainer:
    """A family's tiny pipeline, on the processor."""
    family = Plugins.discover().load(name)
    subject = Subject.load(family, write_tiny(family.facts, folder / name))
    clean = subject.latents(batch)
    told = [
        {**text, **image} for text, image in zip(subject.conditioning(PROMPTS[:1] * batch), subject.told(clean), strict=True)
    ]
    return trainer(family, subject.components, clean, told, bf16=False)


def random_unet(
    name: str, pixels: int, batch: int, device: torch.device, bf16: bool, checkpointing: bool = False, **changes: Any
) -> Trainer:
    """The published UNet of sd1 or sdxl, with `changes`, on random weights."""
    from diffusers import DDPMScheduler

    family = Plugins.discover().load(name)
    config = {**family.facts.reference, **changes}
    denoiser = (
        on_meta(denoiser_class_of(family.facts), config).to_empty(device=device).to(torch.bfloat16 if bf16 else torch.float32)
    )
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for weight in denoiser.parameters():
            weight.normal_(0.0, 1.0 / max(weight[0].numel(), 1) ** 0.5, generator=generator)
    denoiser.eval().requires_grad_(False)
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    components = Components(
        denoiser=denoiser, pipeline=SimpleNamespace(vae_scale_factor=8), scheduler=scheduler, prediction="epsilon"
    )
    told = {"prompt_embeds": torch.randn(77, denoiser.config.cross_attention_dim), "pooled": torch.randn(1280)}
    on_device = {key: value.to(device) for key, value in told.items()}
    clean = torch.randn(batch, 4, pixels // 8, pixels // 8).to(device)
    return trainer(family, components, clean, [on_device] * batch, bf16)


def seconds(step: Callable[[], Any], device: torch.device) -> float:
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def measure(what: str, made: Trainer, repeats: int) -> dict[str, Any]:
    """Both ways in turn; and whether the check at a run's start lets them share a forward."""
    device = made.data.sample.clean_BCHW.device  # type: ignore[attr-defined]
    times: dict[bool, list[float]] = {False: [], True: []}
    peak: dict[bool, int] = {}
    made.pairing = Pairing(on=True, family=what)
    made.check_pairing()
    passed = made.pairing.on
    for repeat in range(repeats + 2):  # the first two warm up
        for on in (False, True):
            made.pairing.on = on and passed
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            taken = seconds(made.optimizer_step, device)
            if repeat >= 2:
                times[on].append(taken)
            if device.type == "cuda":
                peak[on] = torch.cuda.max_memory_allocated(device)
    ratios = [apart / together for apart, together in zip(times[False], times[True], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return {
        "model": what,
        "two passes, ms": round(1e3 * statistics.median(times[False]), 1),
        "one forward, ms": round(1e3 * statistics.median(times[True]), 1),
        "ratio": round(statistics.median(ratios), 2),
        "quartiles": f"{low:.2f} to {high:.2f}",
        "check": "passes" if passed else "falls back",
        **({"peak, GB": f"{peak[False] / 1e9:.1f}, {peak[True] / 1e9:.1f}"} if peak else {}),
    }


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", default=list(TINY), help="tiny models to time")
    parser.add_argument("--no-middle", action="store_true", help="leave out the middle-sized UNet")
    parser.add_argument("--published", type=int, metavar="SIZE", help="SDXL as published at so many pixels, on a GPU, alone")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in --published")
    parser.add_argument("--batch", type=int, default=1, help="samples in a draw")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    rows = []
    if given.published:
        if not torch.cuda.is_available():
            parser.error("--published needs a GPU")
        device = torch.device("cuda")
        made = random_unet("sdxl", given.published, given.batch, device, bf16=True, checkpointing=given.checkpointing)
        rows.append(measure(f"sdxl, {given.published} px, {torch.cuda.get_device_name(device)}", made, given.repeats))
    else:
        with tempfile.TemporaryDirectory() as folder:
            rows += [measure(f"{n} tiny", tiny(n, Path(folder), given.batch), given.repeats) for n in given.families]
        if not given.no_middle:
            made = random_unet("sd1", 256, given.batch, torch.device("cpu"), bf16=False, **MIDDLE)
            count = sum(p.numel() for p in made.components.denoiser.parameters()) / 1e6
            rows.append(measure(f"sd1 UNet, {count:.0f} M, 256 px", made, max(2, given.repeats // 3)))
    if given.json:
        print(json.dumps(rows, indent=1))
    else:
        for row in rows:
            print("  ".join(f"{name} {value}" if name != "model" else f"{value:28}" for name, value in row.items()))
    return rows


if __name__ == "__main__":
    main()

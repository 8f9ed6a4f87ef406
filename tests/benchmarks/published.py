"""SDXL, Flux.1 and Z-Image at their published sizes on a GPU, on random weights: step time, memory, share of the ceiling.

    python -m tests.benchmarks.published                 # one H100 or larger; bf16, rank 16, 1024 px
    python -m tests.benchmarks.published --small         # the same code on tiny configs, on the processor

Each model is timed with and without gradient checkpointing and compiled blocks. The bare loop has the trainer's own model and
LoRA, since two models would not fit. The ceiling is a product of large bf16 matrices, measured on the same device; the share
of it is the floating point operations of a step, as torch.utils.flop_counter counts them, by the time of a step.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from slider_hooks import Components
from slider_plugin.loading import denoiser_class_of, on_meta
from slider_plugin.registry import Plugins
from slider_plugin.training.loop import Trainer

from .pairing import trainer
from .steps import FORWARDS, BareLoop, Sample, bare_twin
from .timing import CPU, Row, in_turn, ratio, seconds, show

MODELS = ("sdxl", "flux", "z_image")
SMALL: dict[str, dict[str, Any]] = {
    "sdxl": {"block_out_channels": (32, 64, 64), "transformer_layers_per_block": 1, "attention_head_dim": (2, 4, 4)},
    "flux": {
        "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6),
    },
    "z_image": {
        "in_channels": 16, "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16,
        "axes_dims": [4, 6, 6],
    },
}  # fmt: skip
TOKENS = {"sdxl": 77, "flux": 512, "z_image": 128}
"""Of a prompt."""


def random_trainer(name: str, pixels: int, device: torch.device, checkpointing: bool, small: bool) -> Trainer:
    """A trainer of a slider of rank 16 on a model of random weights, built on the meta device and drawn where it runs."""
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    family = Plugins.discover().load(name)
    dtype = torch.float32 if small else torch.bfloat16  # a processor may take minutes for convolutions in bf16
    config = {**family.facts.reference, **(SMALL[name] if small else {})}
    denoiser = on_meta(denoiser_class_of(family.facts), config).to(dtype).to_empty(device=device)
    with torch.no_grad():
        for weight in (*denoiser.parameters(), *denoiser.buffers()):
            if weight.is_floating_point():
                weight.normal_(0.0, max(weight[0].numel() if weight.ndim else 1, 1) ** -0.5)
    denoiser.eval().requires_grad_(False)
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    is_unet = family.facts.denoiser == "unet"
    told = {key: value.to(device, dtype) for key, value in random_text(name, denoiser.config).items()}
    components = Components(
        denoiser=denoiser,
        pipeline=SimpleNamespace(vae_scale_factor=8),
        scheduler=DDPMScheduler(beta_schedule="scaled_linear") if is_unet else FlowMatchEulerDiscreteScheduler(),
        prediction="epsilon" if is_unet else "flow",
        options={option.name: option.default for option in family.facts.options},
    )
    channels = denoiser.config.in_channels // (4 if name == "flux" else 1)  # Flux counts those of 2x2 latents
    clean_BCHW = torch.randn(1, channels, pixels // 8, pixels // 8, device=device)
    return trainer(family, components, clean_BCHW, [told], bf16=not small)


def random_text(name: str, config: Any) -> dict[str, torch.Tensor]:
    """What a prompt is told as, in each model's own sizes."""
    if name == "sdxl":
        return {"prompt_embeds": torch.randn(TOKENS[name], config.cross_attention_dim), "pooled": torch.randn(1280)}
    if name == "flux":
        size, pooled = config.joint_attention_dim, config.pooled_projection_dim
        return {"prompt_embeds": torch.randn(TOKENS[name], size), "pooled": torch.randn(pooled)}
    return {"prompt_embeds": torch.randn(TOKENS[name], config.cap_feat_dim)}


def matmul_ceiling(device: torch.device, side: int) -> float:
    """Floating point operations per second of a product of square bf16 matrices; the best of several."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / min(seconds(lambda: a @ b, device)[0] for _ in range(10))


def operations(bare: BareLoop, samples: Sequence[Sample]) -> int:
    """Floating point operations of one step, forward, backward and what checkpointing does again."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        bare.step(samples)
    return int(counter.get_total_flops())


def measure(
    name: str, pixels: int, device: torch.device, checkpointing: bool, compiled: bool, small: bool, repeats: int
) -> Row:
    """One row; the trainer and the bare loop in turn."""
    made = random_trainer(name, pixels, device, checkpointing, small)
    bare = bare_twin(made, made.components.denoiser, FORWARDS[name])
    batch = made.data.sample  # type: ignore[attr-defined]
    samples = [Sample(scale, batch.clean_BCHW, batch.conditioning) for scale in (1.0, -1.0)]
    flops = operations(bare, samples)
    if compiled:
        made.components.denoiser.compile_repeated_blocks()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    times = in_turn({"ours": made.optimizer_step, "bare": lambda: bare.step(samples)}, repeats, device=device)
    step = times["ours"].median
    return {
        "model": f"`{name}`, {pixels} px",
        "checkpointing": "yes" if checkpointing else "no",
        "compiled": "yes" if compiled else "no",
        "step, ms": round(1e3 * step, 1),
        "over bare (quartiles)": str(ratio(times["ours"].wall, times["bare"].wall)),
        "samples/s": round(len(samples) / step, 2),
        "peak, GB": round(torch.cuda.max_memory_allocated(device) / 1e9, 1) if on_gpu else "",
        "share of the ceiling": f"{flops / step / matmul_ceiling(device, 256 if small else 8192):.2f}",
    }


def rows(models: Sequence[str], small: bool, repeats: int, pixels: int, compiled: Sequence[bool] = (False, True)) -> list[Row]:
    """Each model with and without checkpointing and compiling; what does not fit into memory says so."""
    device, found = CPU if small else torch.device("cuda"), []
    for name in models:
        for checkpointing in (False, True):
            for compile_it in compiled:
                try:
                    found.append(measure(name, pixels, device, checkpointing, compile_it, small, repeats))
                except torch.OutOfMemoryError:
                    told = ["no", "yes"]
                    found.append(
                        {"model": f"`{name}`, {pixels} px", "checkpointing": told[checkpointing], "compiled": told[compile_it]}
                        | {"step, ms": "out of memory"}
                    )
                torch.compiler.reset()
    return sorted(found, key=len, reverse=True)  # the header is that of a whole row


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--small", action="store_true", help="tiny configs on the processor")
    parser.add_argument("--no-compile", action="store_true", help="leave out compiled blocks")
    parser.add_argument("--pixels", type=int, help="side of the images; 1024, and 64 with --small")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    if not given.small and not torch.cuda.is_available():
        parser.error("published sizes need a GPU that PyTorch can use; --small runs the same code on the processor")
    compiled = (False,) if given.no_compile else (False, True)
    found = rows(given.models, given.small, given.repeats, given.pixels or (64 if given.small else 1024), compiled)
    show(found, given.json)
    return found


if __name__ == "__main__":
    main()

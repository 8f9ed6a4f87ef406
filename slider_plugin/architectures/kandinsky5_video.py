"""Kandinsky 5 Video: the transformer of Kandinsky 5 Image, made smaller, over the latents of HunyuanVideo's autoencoder.

Next to the noisy latents it takes latents to start from and their mask, both zero in text to video:
diffusers pipelines/kandinsky5/pipeline_kandinsky.py:209-225, 647-661, 834-915, 963.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slider_hooks import Components, Conditioning, Family, Flavour, Flow, hookimpl
from slider_plugin.common.kandinsky5 import TARGETS, encode_each, tiny_parts, velocity

if TYPE_CHECKING:
    from torch import Tensor

HUB = "kandinskylab/Kandinsky-5.0-T2V-Lite-{}-5s-Diffusers"
DOCS = "diffusers docs: api/pipelines/kandinsky5_video.md"


def tiny(folder: Path) -> None:
    """Write a random pipeline of real classes: 4x4 latents, 8 tokens in two latent frames."""
    from diffusers import Kandinsky5T2VPipeline

    from slider_plugin.testing.tiny import hunyuan_video_autoencoder, seeded

    with seeded(0):
        parts = tiny_parts(in_visual_dim=4, out_visual_dim=4, visual_cond=True)
        Kandinsky5T2VPipeline(vae=hunyuan_video_autoencoder(latent_channels=4), **parts).save_pretrained(folder)


FAMILY = Family(
    name="kandinsky5_video",
    title="Kandinsky 5 Video",
    denoiser="transformer",
    denoiser_class="Kandinsky5Transformer3DModel",
    pipeline_class="Kandinsky5T2VPipeline",
    noise=Flow(),
    targets=TARGETS,
    reference={
        "in_visual_dim": 16,
        "out_visual_dim": 16,
        "model_dim": 1792,
        "ff_dim": 7168,
        "num_visual_blocks": 32,
        "visual_cond": True,
    },
    expects={
        "visual_cond": (True,),  # False is the image model
        "attention_type": ("regular", "flash", None),  # "nabla" is sparse
    },
    modalities=("image", "video"),
    guidance_scale=5.0,
    flavours={
        "lite-sft": Flavour(model=HUB.format("sft"), source=DOCS),
        "lite-pretrain": Flavour(model=HUB.format("pretrain"), source=DOCS),
        "lite-nocfg": Flavour(model=HUB.format("nocfg"), source=DOCS),
        "lite-distilled": Flavour(model=HUB.format("distilled16steps"), source=DOCS),
    },
    default_flavour="lite-sft",
    aliases=("kandinsky5-video",),
    tiny=tiny,
    limits="models with sparse attention (10 s, Pro) are refused; loading needs torchvision, for the processor of Qwen2.5-VL",
)


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """Tokens `(T, D)`, as many as the prompt has, and a pooled embedding `(P,)`."""
    return encode_each(components.pipeline, prompts, components.denoiser.device)


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """Positions in rows and columns are scaled by what the pipeline takes for pictures of this size in pixels."""
    height, width = (n * components.pipeline.vae_scale_factor_spatial for n in noisy.shape[-2:])
    small = 480 <= height <= 854 and 480 <= width <= 854
    scale = 2.0 if small else 3.16
    return velocity(components.denoiser, noisy, time, conditioning, scale_factor=(1.0, scale, scale))

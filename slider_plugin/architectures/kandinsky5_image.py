"""Kandinsky 5 Image: a transformer for flow matching, conditioned on Qwen2.5-VL by cross-attention and on pooled CLIP.

Its latents have their channels last, and the pipeline decodes them by the scaling factor alone, without the autoencoder's
shift: diffusers pipelines/kandinsky5/pipeline_kandinsky_t2i.py:628-756, 785-806.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slider_hooks import Components, Conditioning, Family, Flavour, Flow, hookimpl
from slider_plugin.common.kandinsky5 import TARGETS, encode_each, tiny_parts, velocity

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DOCS = "diffusers pipelines/kandinsky5/pipeline_kandinsky_t2i.py, example"


def tiny(folder: Path) -> None:
    """Write a random pipeline of real classes: 4x4 latents, 4 tokens."""
    from diffusers import Kandinsky5T2IPipeline

    from slider_plugin.testing.tiny import autoencoder, seeded

    with seeded(0):
        parts = tiny_parts(in_visual_dim=4, out_visual_dim=4)
        Kandinsky5T2IPipeline(vae=autoencoder(latent_channels=4, blocks=4), **parts).save_pretrained(folder)


FAMILY = Family(
    name="kandinsky5_image",
    title="Kandinsky 5 Image",
    denoiser="transformer",
    denoiser_class="Kandinsky5Transformer3DModel",
    pipeline_class="Kandinsky5T2IPipeline",
    noise=Flow(),
    targets=TARGETS,
    reference={
        "in_visual_dim": 16,
        "out_visual_dim": 16,
        "model_dim": 2560,
        "ff_dim": 10240,
        "num_visual_blocks": 50,
        "patch_size": (1, 2, 2),
    },
    expects={"visual_cond": (False, None)},  # True is the editing model, or the video model
    guidance_scale=3.5,
    flavours={
        "lite-sft": Flavour(model="kandinskylab/Kandinsky-5.0-T2I-Lite-sft-Diffusers", source=DOCS),
        "lite-pretrain": Flavour(model="kandinskylab/Kandinsky-5.0-T2I-Lite-pretrain-Diffusers", source=DOCS),
    },
    default_flavour="lite-sft",
    aliases=("kandinsky5-image",),
    tiny=tiny,
    limits="the published models load only where torchvision is installed, which the processor of Qwen2.5-VL needs",
)


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """Tokens `(T, D)`, as many as the prompt has, and a pooled embedding `(P,)`."""
    return encode_each(components.pipeline, prompts, components.denoiser.device)


@hookimpl
def encode_images(components: Components, images: Tensor) -> Tensor:
    """The mode of the autoencoder's posterior times its scaling factor; `shift_factor` is not used."""
    vae = components.pipeline.vae
    latents_BChw: Tensor = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor
    return latents_BChw


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """An image is a video of one frame."""
    one_frame = noisy.unsqueeze(2)
    return velocity(components.denoiser, one_frame, time, conditioning, scale_factor=(1.0, 1.0, 1.0)).squeeze(2)


@hookimpl
def build_pipeline(components: Components) -> Any:
    """The pipeline, drawing in the size that is asked for; by itself it takes the nearest of seven around 1024x1024."""
    from types import SimpleNamespace

    from diffusers import Kandinsky5T2IPipeline

    class Drawing(Kandinsky5T2IPipeline):
        def __call__(
            self,
            prompt: list[str],
            height: int,
            width: int,
            num_inference_steps: int,
            guidance_scale: float,
            generator: list[torch.Generator],
            negative_prompt: list[str] | None = None,
        ) -> Any:
            self.resolutions = [(width, height)]
            drawn = super().__call__(
                prompt, negative_prompt, height, width, num_inference_steps, guidance_scale, generator=generator
            )
            return SimpleNamespace(images=drawn.image)

    return Drawing(**components.pipeline.components)

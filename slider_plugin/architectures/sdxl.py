"""Stable Diffusion XL: a UNet that predicts noise (or v), told the tokens of CLIP-L and CLIP-G, a pooled prompt and a size.

Conventions: diffusers pipelines/stable_diffusion_xl/pipeline_stable_diffusion_xl.py:731-747,1100-1245,
examples/text_to_image/train_text_to_image_lora_sdxl.py:1113-1174.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slider_hooks import Components, Conditioning, Diffusion, Family, Flavour, hookimpl
from slider_plugin.common.unet import KOHYA, TARGETS, control, encode_control, load_controlnet

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FAMILY", "control", "encode_control", "load_controlnet"]  # the ControlNet's hooks are those of every such UNet


def tiny(folder: Path) -> None:
    """Write a random pipeline: real classes, two real tokenizers, 8x8 latents."""
    from diffusers import StableDiffusionXLPipeline

    from slider_plugin.testing import tiny as parts

    with parts.seeded(0):
        text_encoder, tokenizer = parts.clip(hidden_size=16)
        text_encoder_2, tokenizer_2 = parts.clip(hidden_size=16, projection=True)
        StableDiffusionXLPipeline(
            vae=parts.autoencoder(latent_channels=4, shift_factor=None),
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=parts.redraw_zeros(parts.sdxl_unet()),
            scheduler=parts.ddim(),
        ).save_pretrained(folder)


FAMILY = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    denoiser="unet",
    denoiser_class="UNet2DConditionModel",
    pipeline_class="StableDiffusionXLPipeline",
    noise=Diffusion(),
    targets=TARGETS,
    controlnet_class="ControlNetModel",
    reference={
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
    },
    expects={
        "in_channels": (4,),  # 8 wants an image, 9 a mask
        "addition_embed_type": ("text_time",),
        "encoder_hid_dim_type": (None,),  # "text_proj" is Kolors
        "cross_attention_dim": (2048, 32),  # 32 in tests; 1280 is the refiner
        "projection_class_embeddings_input_dim": (2816, 64),  # 64 in tests; 2560 is the refiner, told five numbers
        "time_cond_proj_dim": (None,),  # told a guidance scale: latent consistency models
    },
    guidance_scale=5.0,
    flavours={
        "base-1.0": Flavour(
            model="stabilityai/stable-diffusion-xl-base-1.0",
            source="diffusers pipelines/stable_diffusion_xl/pipeline_stable_diffusion_xl.py",
        ),
        "turbo": Flavour(
            model="stabilityai/sdxl-turbo",
            source="diffusers docs: api/pipelines/stable_diffusion/sdxl_turbo.md",
            reference={"sample_size": 64},
        ),
    },
    default_flavour="base-1.0",
    layouts={"kohya": KOHYA, "comfyui": KOHYA},
    file_metadata={"ss_base_model_version": "sdxl_base_v1-0", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"},
    aliases=("stable_diffusion_xl",),
    tiny=tiny,
)


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """The tokens of both encoders side by side, `(T, D)`, and the pooled embedding of the second, `(P,)`."""
    from slider_plugin.common.sdxl import tokens_and_pooled

    return tokens_and_pooled(components, prompts)


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """The UNet is told the size of the image as well."""
    from slider_plugin.common.sdxl import predict_at_size

    return predict_at_size(components, noisy, time, conditioning)

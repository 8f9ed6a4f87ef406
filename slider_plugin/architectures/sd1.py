"""Stable Diffusion 1.x: a UNet that predicts noise (or v), conditioned on CLIP-L by cross-attention.

Conventions: diffusers examples/text_to_image/train_text_to_image_lora.py:867-902.
"""

from __future__ import annotations

from pathlib import Path

from slider_hooks import Diffusion, Family, Flavour
from slider_plugin.common.unet import KOHYA, TARGETS, control, encode_control, load_controlnet

__all__ = ["FAMILY", "control", "encode_control", "load_controlnet"]  # the ControlNet's hooks are those of every such UNet


def tiny(folder: Path) -> None:
    """Write a random pipeline of a few hundred kilobytes: real classes, real tokenizer, 8x8 latents."""
    from diffusers import StableDiffusionPipeline

    from slider_plugin.testing import tiny as parts

    with parts.seeded(0):
        text_encoder, tokenizer = parts.clip(hidden_size=24)
        unet = parts.unet()
        pipeline = StableDiffusionPipeline(
            vae=parts.autoencoder(latent_channels=4, shift_factor=None),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=parts.redraw_zeros(unet),
            scheduler=parts.ddim(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)


FAMILY = Family(
    name="sd1",
    title="Stable Diffusion 1.x",
    denoiser="unet",
    denoiser_class="UNet2DConditionModel",
    pipeline_class="StableDiffusionPipeline",
    # The checker is no part of training, and loading it would cost more than the autoencoder does.
    load_kwargs={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    noise=Diffusion(),
    targets=TARGETS,
    controlnet_class="ControlNetModel",
    expects={
        "in_channels": (4, 16),  # 16 with an autoencoder of 16 channels; 9 is an inpainting model
        "addition_embed_type": (None,),  # "text_time" is SDXL
        "encoder_hid_dim_type": (None,),
        "only_cross_attention": (False, None),  # attn1 would attend to text
    },
    guidance_scale=7.5,
    reference={"sample_size": 64, "cross_attention_dim": 768},
    flavours={
        "1.5": Flavour(
            model="stable-diffusion-v1-5/stable-diffusion-v1-5",
            source="diffusers docs: api/pipelines/stable_diffusion/overview.md",
        )
    },
    default_flavour="1.5",
    layouts={"kohya": KOHYA, "comfyui": KOHYA},
    file_metadata={"ss_base_model_version": "sd_v1", "modelspec.architecture": "stable-diffusion-v1/lora"},
    aliases=("sd1x", "sd15", "sd1.5"),
    tiny=tiny,
)

"""Stable Diffusion 2.x: the UNet of 1.x with linear projections, conditioned on OpenCLIP-H by cross-attention.

The 768 pixel versions predict v, the base versions noise: diffusers examples/text_to_image/train_text_to_image_lora.py:894-902
reads which from the scheduler, and so does this family.
"""

from __future__ import annotations

from pathlib import Path

from slider_hooks import Diffusion, Family, Flavour
from slider_plugin.common.unet import KOHYA, TARGETS, control, encode_control, load_controlnet

__all__ = ["FAMILY", "control", "encode_control", "load_controlnet"]  # the ControlNet's hooks are those of every such UNet


def tiny(folder: Path) -> None:
    """Write a random pipeline that predicts v: real classes, real tokenizer, 8x8 latents."""
    from diffusers import StableDiffusionPipeline

    from slider_plugin.testing import tiny as parts

    with parts.seeded(0):
        text_encoder, tokenizer = parts.clip(hidden_size=24)
        StableDiffusionPipeline(
            vae=parts.autoencoder(latent_channels=4, shift_factor=None),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=parts.redraw_zeros(parts.unet(use_linear_projection=True)),
            scheduler=parts.ddim(prediction_type="v_prediction"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)


FAMILY = Family(
    name="sd2",
    title="Stable Diffusion 2.x",
    denoiser="unet",
    denoiser_class="UNet2DConditionModel",
    pipeline_class="StableDiffusionPipeline",
    load_kwargs={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    noise=Diffusion(),
    targets=TARGETS,
    controlnet_class="ControlNetModel",
    reference={
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    expects={
        "in_channels": (4,),  # 5 wants depth, 7 a small image, 9 a mask
        "class_embed_type": (None,),  # unCLIP wants an image embedding, too
        "addition_embed_type": (None,),  # "text_time" is SDXL
        "encoder_hid_dim_type": (None,),
        "only_cross_attention": (False, None),  # attn1 would attend to text
    },
    guidance_scale=7.5,
    flavours={
        "2.1": Flavour(model="stabilityai/stable-diffusion-2-1", source="diffusers pipelines/pipeline_utils.py"),
        "2.1-base": Flavour(
            model="stabilityai/stable-diffusion-2-1-base",
            source="diffusers pipelines/deprecated/controlnet_xs/pipeline_controlnet_xs.py",
            reference={"sample_size": 64},
        ),
    },
    default_flavour="2.1",
    layouts={"kohya": KOHYA, "comfyui": KOHYA},
    file_metadata={"ss_base_model_version": "sd_v2"},
    aliases=("sd2x", "sd20", "sd21", "sd2.0", "sd2.1"),
    tiny=tiny,
)

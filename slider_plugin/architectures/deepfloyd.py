"""DeepFloyd IF, stage I: a UNet that predicts noise in pixels, conditioned on T5 by keys and values added to self-attention.

It answers twice as many channels as it takes, the noise and then the variance that its sampler learned to use:
diffusers pipelines/deepfloyd_if/pipeline_if.py:704-735.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slider_hooks import Components, Conditioning, Diffusion, Family, Flavour, Targets, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

WITHOUT_CHECKS = {"safety_checker": None, "feature_extractor": None, "watermarker": None, "requires_safety_checker": False}


def tiny(folder: Path) -> None:
    """Write a random pipeline: real classes, real tokenizer, images of 16x16 pixels, 77 tokens."""
    from diffusers import DDPMScheduler, IFPipeline

    from slider_plugin.testing import tiny as parts

    with parts.seeded(0):
        text_encoder, tokenizer = parts.t5(hidden_size=24)
        unet = parts.unet(
            sample_size=16,
            in_channels=3,
            out_channels=6,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            cross_attention_dim=32,
            cross_attention_norm="group_norm",
            encoder_hid_dim=24,
            encoder_hid_dim_type="text_proj",
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            act_fn="gelu",
            resnet_time_scale_shift="scale_shift",
        )
        scheduler = DDPMScheduler(
            beta_schedule="squaredcos_cap_v2",
            variance_type="learned_range",
            thresholding=True,
            dynamic_thresholding_ratio=0.95,
            sample_max_value=1.5,
            timestep_spacing="trailing",
        )
        IFPipeline(
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=parts.redraw_zeros(unet),
            scheduler=scheduler,
            **WITHOUT_CHECKS,
        ).save_pretrained(folder)


FAMILY = Family(
    name="deepfloyd",
    title="DeepFloyd IF, stage I",
    denoiser="unet",
    denoiser_class="UNet2DConditionModel",
    pipeline_class="IFPipeline",
    load_kwargs=WITHOUT_CHECKS,
    call_kwargs={"clean_caption": False},  # as in `encode_prompt`: training and drawing read the same text
    noise=Diffusion(),
    targets=Targets(
        self_attention=r".*attentions\.\d+\.(to_q|to_k|to_v|to_out\.0)",
        io=r"conv_in|conv_out",
        time=r"time_embedding\.linear_[12]",
        forbidden=r".*\.add_[kv]_proj|add_embedding\..*|encoder_hid_proj",
        standard=r".*attentions\.\d+\.(to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj)",
    ),
    reference={
        "sample_size": 64,
        "in_channels": 3,
        "out_channels": 6,
        "layers_per_block": 3,
        "block_out_channels": (704, 1408, 2112, 2816),
        "down_block_types": ("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
        "attention_head_dim": 64,
        "cross_attention_dim": 2816,
        "cross_attention_norm": "group_norm",
        "encoder_hid_dim": 4096,
        "encoder_hid_dim_type": "text_proj",
        "addition_embed_type": "text",
        "act_fn": "gelu",
        "resnet_time_scale_shift": "scale_shift",
    },
    expects={
        "in_channels": (3,),  # 6 is stage II, which is also told a small image
        "class_embed_type": (None,),  # "timestep" is stage II, too
        "addition_embed_type": ("text",),
        "only_cross_attention": (False, None),  # there would be no self-attention
    },
    guidance_scale=7.0,
    flavours={
        "i-xl": Flavour(model="DeepFloyd/IF-I-XL-v1.0", source="diffusers pipelines/deepfloyd_if/pipeline_if.py"),
    },
    default_flavour="i-xl",
    aliases=("deepfloyd_if",),
    tiny_size=16,
    tiny=tiny,
)


@hookimpl
def encode_images(images: Tensor) -> Tensor:
    """There is no autoencoder: the pixels `(B, 3, H, W)` themselves."""
    return images


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """The noise, without the variance that comes after it."""
    from slider_plugin.common.conditioning import stacked

    embeds_BTD = stacked(conditioning, "prompt_embeds")
    output: Tensor = components.denoiser(noisy, time, encoder_hidden_states=embeds_BTD, return_dict=False)[0]
    return output.chunk(2, dim=1)[0]

"""Wan 2.1 and 2.2, text to video: a transformer for flow matching, conditioned on UMT5 by cross-attention.

Wan 2.2 A14B has two such transformers, one for strong noise and one for weak; a run trains one of them.
Conventions: diffusers pipelines/wan/pipeline_wan.py:554-641, 664-673.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from slider_hooks import Components, Conditioning, Family, Flavour, Flow, LoadRequest, Option, Targets, UserError, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

EXPERT = Option(
    name="wan_expert",
    type=str,
    default="high",
    choices=("high", "low"),
    help="which of Wan 2.2 A14B's two denoisers is trained: that for strong noise (layout) or for weak (detail)",
)
DOCS = "diffusers docs: api/pipelines/wan.md"


def tiny(folder: Path) -> None:
    """Write a random pipeline of real classes: 4x4 latents, 8 tokens in two latent frames."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    from slider_plugin.testing import tiny as parts

    with parts.seeded(0):
        text_encoder, tokenizer = parts.t5(hidden_size=16, kind="umt5")
        transformer = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=16,
            freq_dim=32,
            ffn_dim=48,
            num_layers=2,
            rope_max_seq_len=32,
        )
        WanPipeline(
            vae=AutoencoderKLWan(base_dim=4, num_res_blocks=1),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=parts.redraw_zeros(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        ).save_pretrained(folder)


FAMILY = Family(
    name="wan",
    title="Wan",
    denoiser="transformer",
    denoiser_class="WanTransformer3DModel",
    pipeline_class="WanPipeline",
    noise=Flow(),
    targets=Targets(
        self_attention=r"blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)",
        io=r"patch_embedding|proj_out",
        time=r"condition_embedder\.time_embedder\.linear_[12]",
        forbidden=r"blocks\.\d+\.attn2\..+|condition_embedder\.(text|image)_embedder\..+",
        standard=r"blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
    ),
    expects={"in_channels": (16, 48)},  # 48 is Wan 2.2 TI2V; image-to-video has 36: noise, mask and condition
    modalities=("image", "video"),
    guidance_scale=5.0,
    flavours={
        "wan-14b": Flavour(model="Wan-AI/Wan2.1-T2V-14B-Diffusers", source=DOCS),
        "wan-1.3b": Flavour(
            model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            source=DOCS,
            reference={"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        ),
        "wan-i2v": Flavour(reference={"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}),  # targets only
        "wan-2.2-14b": Flavour(model="Wan-AI/Wan2.2-T2V-A14B-Diffusers", source=DOCS),
        "wan-2.2-5b": Flavour(
            model="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            source=DOCS,
            reference={"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
        ),
    },
    default_flavour="wan-14b",
    options=(EXPERT,),
    aliases=("wan2.1", "wan2.2"),
    tiny=tiny,
    limits="text to video only: image-to-video models are refused, since their first frame reaches no training step",
)


@hookimpl
def load_components(family: Family, request: LoadRequest) -> Components:
    """The pipeline, with one of its denoisers to be trained and, in Wan 2.2 A14B, the other one beside it for drawing."""
    from slider_plugin.loading import load_pipeline_components

    components = load_pipeline_components(family, request)
    low = request.options[EXPERT.name] == "low"
    boundary = components.pipeline.config.boundary_ratio
    if boundary is None:
        if low:
            raise UserError(f"{EXPERT.name}: {request.model} has one denoiser for all noise; leave the key out")
        return components
    if low:
        return replace(components, denoiser=components.pipeline.transformer_2, time_range=(0.0, boundary))
    return replace(components, time_range=(boundary, 1.0))


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """UMT5's tokens `(512, D)`, zeros behind the text: the model sees them all, unmasked."""
    from slider_plugin.common.conditioning import per_prompt

    embeds_BTD, _ = components.pipeline.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, max_sequence_length=512, device=components.denoiser.device
    )
    return per_prompt(prompt_embeds=embeds_BTD)


@hookimpl
def encode_images(components: Components, images: Tensor) -> Tensor:
    """`(B, 3, F, H, W)` to `(B, C, f, h, w)`, normalised by the statistics of each channel."""
    from slider_plugin.common.latents import normalised_by_channel

    return normalised_by_channel(components.pipeline.vae, images)

"""Wan 2.1 and 2.2, text and image to video: a transformer for flow matching, conditioned on UMT5 by cross-attention.

Wan 2.2 A14B has two such transformers, one for strong noise and one for weak; a run trains one of them. Image-to-video models
see the first frame beside the noise, in 20 channels of their own, and those of Wan 2.1 through CLIP as well.
Conventions: diffusers pipelines/wan/pipeline_wan.py:554-641, 664-673; pipeline_wan_i2v.py:429-487, 703-712.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slider_hooks import (
    Components,
    Conditioning,
    Family,
    Flavour,
    Flow,
    Layout,
    LoadRequest,
    Option,
    Targets,
    UserError,
    hookimpl,
)

if TYPE_CHECKING:
    from torch import Tensor

NATIVE = Layout(
    prefix="diffusion_model.",
    names=(
        (r"(blocks\.\d+)\.attn1\.to_([qkv])", r"\1.self_attn.\2"),
        (r"(blocks\.\d+)\.attn1\.to_out\.0", r"\1.self_attn.o"),
        (r"(blocks\.\d+)\.attn2\.to_([qkv])", r"\1.cross_attn.\2"),
        (r"(blocks\.\d+)\.attn2\.to_out\.0", r"\1.cross_attn.o"),
        (r"(blocks\.\d+)\.attn2\.add_([kv])_proj", r"\1.cross_attn.\2_img"),
        (r"(blocks\.\d+)\.ffn\.net\.0\.proj", r"\1.ffn.0"),
        (r"(blocks\.\d+)\.ffn\.net\.2", r"\1.ffn.2"),
        (r"condition_embedder\.(time|text)_embedder\.linear_1", r"\1_embedding.0"),
        (r"condition_embedder\.(time|text)_embedder\.linear_2", r"\1_embedding.2"),
        (r"condition_embedder\.time_proj", "time_projection.1"),
        (r"proj_out", "head.head"),
    ),
    left_out=r"patch_embedding",  # diffusers' reader of these names raises on it
    programs="ComfyUI",
)
"""The names of the original model, which ComfyUI knows alone (diffusers loaders/lora_conversion_utils.py:1840-2079)."""

EXPERT = Option(
    name="wan_expert",
    type=str,
    default="high",
    choices=("high", "low"),
    help="which of Wan 2.2 A14B's two denoisers is trained: that for strong noise (layout) or for weak (detail)",
)
MASK = 4  # channels of the mask: one for each of the frames that share a latent frame
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
        weight_read=r"condition_embedder\.time_embedder\.linear_[12]",
        forbidden=r"blocks\.\d+\.attn2\..+|condition_embedder\.(text|image)_embedder\..+",
        standard=r"blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
    ),
    expects={
        "in_channels": (16, 36, 48),  # 36 is image to video: noise, mask and first frame; 48 is Wan 2.2 TI2V
        "pos_embed_seq_len": (None,),  # first-and-last-frame models have one
    },
    modalities=("image", "video"),
    guidance_scale=5.0,
    flavours={
        "wan-14b": Flavour(model="Wan-AI/Wan2.1-T2V-14B-Diffusers", source=DOCS),
        "wan-1.3b": Flavour(
            model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            source=DOCS,
            reference={"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        ),
        "wan-i2v": Flavour(
            model="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
            source=DOCS,
            reference={"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
        ),
        "wan-2.2-14b": Flavour(model="Wan-AI/Wan2.2-T2V-A14B-Diffusers", source=DOCS),
        "wan-2.2-i2v": Flavour(model="Wan-AI/Wan2.2-I2V-A14B-Diffusers", source=DOCS, reference={"in_channels": 36}),
        "wan-2.2-5b": Flavour(
            model="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            source=DOCS,
            reference={"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
        ),
    },
    default_flavour="wan-14b",
    options=(EXPERT,),
    layouts={"comfyui": NATIVE},
    aliases=("wan2.1", "wan2.2"),
    tiny=tiny,
    limits="models of first and last frame, control, speech and animation are refused",
)


@hookimpl
def load_components(family: Family, request: LoadRequest) -> Components:
    """The pipeline, with one of its denoisers to be trained and, in Wan 2.2 A14B, the other one beside it for drawing."""
    from slider_plugin.loading import load_pipeline_components

    components = load_pipeline_components(family, request, pipeline_class="DiffusionPipeline")  # as its folder names it
    _check(components.denoiser.config, request.model)
    low = request.options[EXPERT.name] == "low"
    boundary = components.pipeline.config.boundary_ratio
    if boundary is None:
        if low:
            raise UserError(f"{EXPERT.name}: {request.model} has one denoiser for all noise; leave the key out")
        return components
    if low:
        return replace(components, denoiser=components.pipeline.transformer_2, time_range=(0.0, boundary))
    return replace(components, time_range=(boundary, 1.0))


def _check(config: Mapping[str, Any], model: str) -> None:
    beside_the_noise = config["in_channels"] - config["out_channels"]
    if beside_the_noise not in (0, MASK + config["out_channels"]):
        raise UserError(
            f"{model} takes {beside_the_noise} channels beside its noise: a control model, which family wan cannot train; "
            "use a text-to-video or image-to-video model"
        )
    if beside_the_noise and find_spec("ftfy") is None:  # WanImageToVideoPipeline calls it without asking
        raise UserError("Wan's image-to-video pipeline mends its prompts with ftfy, which is not installed: pip install ftfy")


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


@hookimpl
def condition_on_images(components: Components, images: Tensor) -> Sequence[Conditioning] | None:
    """The first frame of `(B, 3, F, H, W)`: its mask, its latents with grey behind it, `(4 + C, f, h, w)`, and CLIP's view."""
    import torch

    from slider_plugin.common.latents import normalised_by_channel

    pipeline, config = components.pipeline, components.denoiser.config
    if config.in_channels == config.out_channels:
        return None
    if images.shape[2] == 1:
        raise UserError("an image-to-video model is given the first frame, and learns nothing from one image; use videos")
    first_B3HW = images[:, :, 0]
    condition_BCfhw = normalised_by_channel(pipeline.vae, torch.cat([images[:, :, :1], torch.zeros_like(images[:, :, 1:])], 2))
    mask_B4fhw = torch.zeros_like(condition_BCfhw[:, :1]).repeat(1, MASK, 1, 1, 1)
    mask_B4fhw[:, :, 0] = 1.0
    told = [{"first_frame": frame} for frame in torch.cat([mask_B4fhw, condition_BCfhw], dim=1)]
    if config.image_dim is None:
        return told
    embeds_BTD = pipeline.encode_image(_pictures(first_B3HW), device=components.denoiser.device)
    return [{**one, "image_embeds": embeds_TD} for one, embeds_TD in zip(told, embeds_BTD, strict=True)]


def _pictures(images_B3HW: Tensor) -> list[Any]:
    """PIL images of -1..1, which is what CLIP's processor is given when the pipeline draws."""
    from diffusers.image_processor import VaeImageProcessor

    pictures: list[Any] = VaeImageProcessor().postprocess(images_B3HW.float(), output_type="pil")
    return pictures


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """With the first frame beside the noise, where the model was made for one."""
    import torch

    from slider_plugin.common.conditioning import stacked

    if "first_frame" in conditioning[0]:
        noisy = torch.cat([noisy, stacked(conditioning, "first_frame")], dim=1)
    answer: Tensor = components.denoiser(
        hidden_states=noisy,
        timestep=time,
        encoder_hidden_states=stacked(conditioning, "prompt_embeds"),
        encoder_hidden_states_image=stacked(conditioning, "image_embeds") if "image_embeds" in conditioning[0] else None,
        return_dict=False,
    )[0]
    return answer

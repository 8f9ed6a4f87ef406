"""Stable Diffusion 3 and 3.5: a transformer for flow matching, conditioned on two CLIP encoders and T5.

In 3.5-medium the first blocks have a second attention, `attn2`, in which image tokens see each other alone. Conventions:
diffusers pipelines/stable_diffusion_3/pipeline_stable_diffusion_3.py:1062-1112,
examples/dreambooth/train_dreambooth_lora_sd3.py:1775-1821.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slider_hooks import Components, Conditioning, Family, Flavour, Flow, Layout, Targets, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

HUB_IDS = "diffusers loaders/single_file_utils.py:198-206"


def tiny(folder: Path) -> None:
    """Write a random pipeline of real classes: 8x8 latents, 16 tokens, one block with dual attention as in 3.5-medium."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    from slider_plugin.testing import tiny as parts

    with parts.seeded(0):
        text_encoder, tokenizer = parts.clip(hidden_size=8, projection=True)
        text_encoder_2, tokenizer_2 = parts.clip(hidden_size=16, projection=True)
        text_encoder_3, tokenizer_3 = parts.t5(hidden_size=32)
        transformer = SD3Transformer2DModel(
            sample_size=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=24,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
        StableDiffusion3Pipeline(
            vae=parts.autoencoder(latent_channels=16),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
            transformer=parts.redraw_zeros(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        ).save_pretrained(folder)


FAMILY = Family(
    name="sd3",
    title="Stable Diffusion 3",
    denoiser="transformer",
    denoiser_class="SD3Transformer2DModel",
    pipeline_class="StableDiffusion3Pipeline",
    noise=Flow(),
    targets=Targets(
        self_attention=r"transformer_blocks\.\d+\.attn2?\.(to_q|to_k|to_v|to_out\.0)",
        io=r"pos_embed\.proj|proj_out",
        time=r"time_text_embed\.timestep_embedder\.linear_[12]",
        forbidden=r"context_embedder|time_text_embed\.text_embedder\..+|.*\.(add_[qkv]_proj|to_add_out)|.*_context\..+",
        standard=r"transformer_blocks\.\d+\.attn2?\.(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out)",
        controlnet=r"transformer_blocks\.\d+\.attn2?\.(to_q|to_k|to_v|to_out\.0)|pos_embed\.proj"
        r"|time_text_embed\.timestep_embedder\.linear_[12]",
    ),
    controlnet_class="SD3ControlNetModel",
    reference={
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 192,
    },
    expects={"in_channels": (16,)},
    guidance_scale=7.0,
    flavours={
        "sd3-medium": Flavour(model="stabilityai/stable-diffusion-3-medium-diffusers", source=HUB_IDS),
        "sd3.5-medium": Flavour(
            model="stabilityai/stable-diffusion-3.5-medium",
            source=HUB_IDS,
            reference={"pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
        ),
        "sd3.5-large": Flavour(
            model="stabilityai/stable-diffusion-3.5-large",
            source=HUB_IDS,
            reference={
                "num_layers": 38,
                "num_attention_heads": 38,
                "caption_projection_dim": 2432,
                "qk_norm": "rms_norm",
            },
        ),
    },
    default_flavour="sd3-medium",
    layouts={"comfyui": Layout(prefix="transformer.", programs="ComfyUI", reads_diffusers=True)},
    file_metadata={"ss_base_model_version": "sd3"},
    aliases=("sd3.5", "sd35", "stable_diffusion_3"),
    tiny=tiny,
)


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """Tokens `(T, D)`, those of both CLIPs side by side and T5's behind them, and CLIP's pooled embeddings `(P,)`."""
    from slider_plugin.common.conditioning import per_prompt

    embeds_BTD, _, pooled_BP, _ = components.pipeline.encode_prompt(
        list(prompts), None, None, device=components.denoiser.device, do_classifier_free_guidance=False
    )
    return per_prompt(prompt_embeds=embeds_BTD, pooled=pooled_BP)


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """Latents go in and come out unpacked."""
    from slider_plugin.common.conditioning import stacked

    output: Tensor = components.denoiser(
        hidden_states=noisy,
        timestep=time,
        encoder_hidden_states=stacked(conditioning, "prompt_embeds"),
        pooled_projections=stacked(conditioning, "pooled"),
        return_dict=False,
    )[0]
    return output


@hookimpl
def load_controlnet(family: Family, components: Components, model: str | None) -> Any:
    """A fresh one copies the first half of the blocks."""
    from diffusers import SD3ControlNetModel

    from slider_plugin.common.controlnet import in_dtype, load_trained, refuse_config

    if model:
        controlnet = load_trained(family, components, model)
        refuse_config(controlnet, {"extra_conditioning_channels": "it is one for inpainting, which wants a mask, too"})
        if controlnet.pos_embed is None:  # of 3.5-large, whose latents the denoiser embeds first
            refuse_config(controlnet, {"num_layers": "it has no embedding of its own; such ControlNets are not supported"})
        return controlnet
    transformer = components.denoiser  # its class's from_transformer would write into the transformer's frozen configuration
    layers = max(1, transformer.config.num_layers // 2)
    dual = tuple(layer for layer in transformer.config.dual_attention_layers if layer < layers)
    config = dict(transformer.config) | {"num_layers": layers, "extra_conditioning_channels": 0, "dual_attention_layers": dual}
    controlnet = SD3ControlNetModel.from_config(config)
    for part in ("pos_embed", "time_text_embed", "context_embedder", "transformer_blocks"):
        getattr(controlnet, part).load_state_dict(getattr(transformer, part).state_dict(), strict=part != "transformer_blocks")
    return in_dtype(controlnet, transformer.dtype)


@hookimpl
def encode_control(components: Components, latents: Tensor) -> Tensor:
    """Latents; without the shift for ControlNets that are told no pooled prompt (pipeline_..._3_controlnet.py:1057)."""
    if not components.controlnet.config.force_zeros_for_pooled_projection:
        return latents
    vae = components.pipeline.vae.config
    return latents + vae.shift_factor * vae.scaling_factor  # type: ignore[no-any-return]


@hookimpl
def control(components: Components, shown: Tensor, strength: float, call: Mapping[str, Any]) -> Mapping[str, Any]:
    """One residual for some blocks each."""
    from slider_plugin.common.controlnet import call_controlnet

    pooled_BP = call["pooled_projections"]
    zeros = components.controlnet.config.force_zeros_for_pooled_projection
    told = {"pooled_projections": pooled_BP.new_zeros(pooled_BP.shape) if zeros else pooled_BP}
    return {"block_controlnet_hidden_states": call_controlnet(components, shown, strength, call, **told)[0]}

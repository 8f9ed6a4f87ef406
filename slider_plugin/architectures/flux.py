"""Flux.1 dev and schnell: a transformer of double and single blocks for flow matching, conditioned on T5 and CLIP.

Conventions: diffusers pipelines/flux/pipeline_flux.py:905-1000, examples/dreambooth/train_dreambooth_lora_flux.py:1748-1820.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
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
    sigma_as_is,
)

if TYPE_CHECKING:
    from torch import Tensor

GUIDANCE = Option(
    name="flux_guidance_value",
    type=float,
    default=None,
    help="distilled guidance that the transformer is told while training, 1 unless given; schnell takes none",
)


def tiny(folder: Path) -> None:
    """Write a random pipeline of real classes: 8x8 latents, 16 tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    from slider_plugin.testing import tiny as parts

    with parts.seeded(0):
        text_encoder, tokenizer = parts.clip(hidden_size=16)
        text_encoder_2, tokenizer_2 = parts.t5(hidden_size=32)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        )
        FluxPipeline(
            vae=parts.autoencoder(latent_channels=4),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=parts.redraw_zeros(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        ).save_pretrained(folder)


FAMILY = Family(
    name="flux",
    title="Flux.1",
    denoiser="transformer",
    denoiser_class="FluxTransformer2DModel",
    pipeline_class="FluxPipeline",
    noise=Flow(time=sigma_as_is),
    targets=Targets(
        self_attention=r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",
        joint_attention=r"single_transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v)",
        io=r"x_embedder|proj_out",
        time=r"time_text_embed\.timestep_embedder\.linear_[12]",
        forbidden=r"context_embedder|time_text_embed\.text_embedder\..+|.*\.(add_[qkv]_proj|to_add_out)|.*ff_context\..+",
        standard=r"(single_)?transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",
        documented=("to_q", "to_k", "to_v", "to_out.0", "to_qkv"),
        controlnet=r"(single_)?transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)|x_embedder"
        r"|time_text_embed\.timestep_embedder\.linear_[12]",
    ),
    controlnet_class="FluxControlNetModel",
    reference={"guidance_embeds": True},
    expects={"in_channels": (64, 16)},  # 16 in tests; fill and control models have more than 64
    guidance_scale=3.5,
    flavours={
        "dev": Flavour(model="black-forest-labs/FLUX.1-dev", source="diffusers docs: api/pipelines/flux.md"),
        "schnell": Flavour(
            model="black-forest-labs/FLUX.1-schnell",
            source="diffusers docs: api/pipelines/flux.md",
            reference={"guidance_embeds": False},
        ),
    },
    default_flavour="dev",
    options=(GUIDANCE,),
    layouts={"comfyui": Layout(prefix="transformer.", programs="ComfyUI", reads_diffusers=True)},
    file_metadata={"ss_base_model_version": "flux1"},
    aliases=("flux1", "flux.1"),
    tiny=tiny,
)


@hookimpl(wrapper=True)
def load_components(request: LoadRequest) -> Generator[None, Components, Components]:
    """Refuse a guidance for a model that takes none, rather than train without it."""
    components = yield
    if request.options[GUIDANCE.name] is not None and not components.denoiser.config.guidance_embeds:
        raise UserError(f"{GUIDANCE.name}: {request.model} takes no guidance (schnell does not); take the key out")
    return components


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """T5's tokens `(T, D)` and CLIP's pooled embedding `(P,)`."""
    from slider_plugin.common.conditioning import per_prompt

    embeds_BTD, pooled_BP, _ = components.pipeline.encode_prompt(list(prompts), device=components.denoiser.device)
    return per_prompt(prompt_embeds=embeds_BTD, pooled=pooled_BP)


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """Tokens are 2x2 squares of latents; dev is also told a guidance scale."""
    import torch

    from slider_plugin.common.conditioning import stacked
    from slider_plugin.common.packing import grid_ids, pack_2x2, unpack_2x2

    h, w = noisy.shape[-2:]
    embeds_BTD = stacked(conditioning, "prompt_embeds")
    guided = components.denoiser.config.guidance_embeds
    guidance_B = torch.full_like(time, components.options[GUIDANCE.name] or 1.0) if guided else None
    tokens_BND = components.denoiser(
        hidden_states=pack_2x2(noisy),
        timestep=time,
        guidance=guidance_B,
        pooled_projections=stacked(conditioning, "pooled"),
        encoder_hidden_states=embeds_BTD,
        txt_ids=embeds_BTD.new_zeros(embeds_BTD.shape[1], 3),
        img_ids=grid_ids(h // 2, w // 2, like=embeds_BTD),
        return_dict=False,
    )[0]
    return unpack_2x2(tokens_BND, h, w)


@hookimpl
def load_controlnet(family: Family, components: Components, model: str | None) -> Any:
    """A fresh one has the published numbers of blocks, 4 and 10, or all there are."""
    from slider_plugin.common.controlnet import fresh_from_transformer, load_trained, refuse_config

    if model:
        controlnet = load_trained(family, components, model)
        refuse_config(controlnet, {"num_mode": "it wants to be told a mode, and no key says which; use one of a single mode"})
        return controlnet
    own = components.denoiser.config
    return fresh_from_transformer(
        family,
        components,
        num_layers=min(4, own.num_layers),
        num_single_layers=min(10, own.num_single_layers),
        attention_head_dim=own.attention_head_dim,
        num_attention_heads=own.num_attention_heads,
    )


@hookimpl
def encode_control(components: Components, images: Tensor, latents: Tensor) -> Tensor:
    """Tokens of latents; pixels for a ControlNet that brings the image down itself."""
    from slider_plugin.common.packing import pack_2x2

    return pack_2x2(latents) if components.controlnet.input_hint_block is None else images


@hookimpl
def control(components: Components, shown: Tensor, strength: float, call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Residuals of the double and of the single blocks. A ControlNet may be told the guidance where the model is not, too."""
    from slider_plugin.common.controlnet import call_controlnet

    told = components.controlnet.config.guidance_embeds
    guidance_B = call["guidance"] if call.get("guidance") is not None else call["timestep"].new_ones(len(call["timestep"]))
    double, single = call_controlnet(components, shown, strength, call, guidance=guidance_B if told else None)
    return {"controlnet_block_samples": double, "controlnet_single_block_samples": single}

"""Flux.2 dev and klein: double and single blocks for flow matching, conditioned on three hidden layers of a language model.

Conventions: diffusers pipelines/flux2/pipeline_flux2.py:608-617, 920-1010 and pipeline_flux2_klein.py:820-900,
examples/dreambooth/train_dreambooth_lora_flux2.py:1859-1910. Latents are 2x2 squares as channels. The single blocks multiply
queries, keys, values and the MLP's input at once, and so does their output: attention alone cannot be had there.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slider_hooks import (
    Components,
    Conditioning,
    Family,
    Flavour,
    Flow,
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
    name="flux2_guidance_value",
    type=float,
    default=None,
    help="distilled guidance that the transformer is told while training, 1 unless given; klein takes none",
)


def tiny(folder: Path) -> None:
    """Write a random klein pipeline of real classes: 32x32 pixels are 4x4 latents of 16 channels."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from slider_plugin.testing import tiny as parts

    with parts.seeded(0):
        tokenizer = parts.qwen_tokenizer()
        # The pipeline takes hidden layers 9, 18 and 27.
        sizes = parts.decoder_sizes(8, len(tokenizer)) | {"num_hidden_layers": 28}
        transformer = Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        )
        Flux2KleinPipeline(
            vae=parts.flux2_autoencoder(latent_channels=4),
            text_encoder=Qwen3ForCausalLM(Qwen3Config(**sizes)),
            tokenizer=tokenizer,
            transformer=parts.redraw_zeros(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        ).save_pretrained(folder)


FAMILY = Family(
    name="flux2",
    title="Flux.2",
    denoiser="transformer",
    denoiser_class="Flux2Transformer2DModel",
    noise=Flow(time=sigma_as_is),
    targets=Targets(
        self_attention=r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",
        joint_attention=r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)",
        io=r"x_embedder|proj_out",
        time=r"time_guidance_embed\.timestep_embedder\.linear_[12]",
        forbidden=r"context_embedder|double_stream_modulation_txt\..+|.*\.(add_[qkv]_proj|to_add_out)|.*ff_context\..+",
        standard=r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)",
        documented=("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_qkv_mlp_proj"),
    ),
    expects={"in_channels": (128, 16)},  # 16 in tests
    guidance_scale=4.0,
    flavours={
        "dev": Flavour(
            model="black-forest-labs/FLUX.2-dev", source="diffusers pipelines/flux2/pipeline_flux2.py:50, an example"
        ),
        "flux2-klein-4b": Flavour(
            model="black-forest-labs/FLUX.2-klein-4B",
            source="the model's own page, huggingface.co/black-forest-labs/FLUX.2-klein-4B",
            reference={
                "num_layers": 5,
                "num_single_layers": 20,
                "num_attention_heads": 24,
                "joint_attention_dim": 7680,
                "guidance_embeds": False,
            },
        ),
        "flux2-klein-base-9b": Flavour(
            model="black-forest-labs/FLUX.2-klein-base-9B",
            source="diffusers pipelines/flux2/pipeline_flux2_klein.py:50, an example",
            reference={
                "num_single_layers": 24,
                "num_attention_heads": 32,
                "joint_attention_dim": 12288,
                "guidance_embeds": False,
            },
        ),
    },
    default_flavour="dev",
    options=(GUIDANCE,),
    aliases=("flux.2", "flux2_klein"),
    tiny=tiny,
    limits="dev reads its prompts with a processor that needs torchvision; klein does not",
)


@hookimpl(wrapper=True)
def load_components(request: LoadRequest) -> Generator[None, Components, Components]:
    """Say what dev's processor needs, and refuse a guidance for a model that takes none."""
    from importlib.util import find_spec

    try:
        components = yield
    except UserError as error:
        if "pixtral" in str(error) and find_spec("torchvision") is None:  # diffusers names the processor, not what it lacks
            raise UserError(
                "Flux.2 dev reads its prompts with PixtralProcessor, which needs torchvision: install it"
            ) from error
        raise
    if request.options[GUIDANCE.name] is not None and not components.denoiser.config.guidance_embeds:
        raise UserError(f"{GUIDANCE.name}: {request.model} takes no guidance (klein does not); take the key out")
    return components


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """Three hidden layers of Mistral (dev) or Qwen3 (klein) side by side, `(T, D)`, with padding, which is not masked."""
    embeds_BTD, _ = components.pipeline.encode_prompt(list(prompts), device=components.denoiser.device)
    return [{"prompt_embeds": embeds_TD} for embeds_TD in embeds_BTD]


@hookimpl
def encode_images(components: Components, images: Tensor) -> Tensor:
    """2x2 squares as channels, normalised by the batch norm's statistics: `(B, 4C, h, w)`."""
    from slider_plugin.common.latents import normalised_squares

    vae = components.pipeline.vae
    return normalised_squares(vae, images, vae.config.batch_norm_eps)


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """Each latent is a token. Positions are image, row, column and text token, one of which counts for each kind."""
    import torch

    from slider_plugin.common.conditioning import stacked

    h, w = noisy.shape[-2:]
    embeds_BTD = stacked(conditioning, "prompt_embeds")
    zero, rows, columns, tokens = (torch.arange(n, device=noisy.device) for n in (1, h, w, embeds_BTD.shape[1]))
    guided = components.denoiser.config.guidance_embeds
    guidance_B = torch.full_like(time, components.options[GUIDANCE.name] or 1.0) if guided else None
    tokens_BND = components.denoiser(
        hidden_states=noisy.flatten(2).transpose(1, 2),
        timestep=time,
        guidance=guidance_B,
        encoder_hidden_states=embeds_BTD,
        txt_ids=torch.cartesian_prod(zero, zero, zero, tokens),
        img_ids=torch.cartesian_prod(zero, rows, columns, zero),
        return_dict=False,
    )[0]
    output: Tensor = tokens_BND.transpose(1, 2).reshape(noisy.shape)
    return output

"""Chroma: Flux's double and single blocks, conditioned on T5 alone, with all modulation drawn from one small network.

Conventions: diffusers pipelines/chroma/pipeline_chroma.py:545-562, 787-866. The mask over text and image is a float tensor,
which attention adds to its scores: padding counts for less, and still counts (huggingface/diffusers issue 12116), so prompts
keep it here, and training sees what the pipeline draws with.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slider_hooks import Components, Conditioning, Family, Flavour, Flow, Targets, hookimpl, sigma_as_is

if TYPE_CHECKING:
    from torch import Tensor


def tiny(folder: Path) -> None:
    """Write a random pipeline of real classes: 8x8 latents, 16 tokens."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    from slider_plugin.testing.tiny import autoencoder, redraw_zeros, seeded, t5

    with seeded(0):
        text_encoder, tokenizer = t5(hidden_size=32)
        transformer = ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        )
        ChromaPipeline(
            vae=autoencoder(latent_channels=4),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=redraw_zeros(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        ).save_pretrained(folder)


FAMILY = Family(
    name="chroma",
    title="Chroma",
    denoiser="transformer",
    denoiser_class="ChromaTransformer2DModel",
    pipeline_class="ChromaPipeline",
    noise=Flow(time=sigma_as_is),
    targets=Targets(
        self_attention=r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",
        joint_attention=r"single_transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v)",
        io=r"x_embedder|proj_out",  # the time enters through `distilled_guidance_layer`, which modulates text as well
        forbidden=r"context_embedder|.*\.(add_[qkv]_proj|to_add_out)|.*ff_context\..+",
        standard=r"(single_)?transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",
        documented=("to_q", "to_k", "to_v", "to_out.0", "to_qkv"),
    ),
    expects={"in_channels": (64, 16)},  # 16 in tests
    guidance_scale=5.0,
    flavours={
        "1-hd": Flavour(model="lodestones/Chroma1-HD", source="diffusers pipelines/chroma/pipeline_chroma.py:55, an example")
    },
    default_flavour="1-hd",
    aliases=("chroma1",),
    tiny=tiny,
)


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """T5's tokens `(T, D)` with their padding, and the mask `(T,)` that keeps the text and the first token behind it."""
    from slider_plugin.common.conditioning import per_prompt

    embeds_BTD, _, mask_BT, *_ = components.pipeline.encode_prompt(
        list(prompts), device=components.denoiser.device, do_classifier_free_guidance=False
    )
    return per_prompt(prompt_embeds=embeds_BTD, mask=mask_BT)


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """Tokens are 2x2 squares of latents; the mask goes over the text and then all of the image."""
    import torch

    from slider_plugin.common.conditioning import stacked
    from slider_plugin.common.packing import grid_ids, pack_2x2, unpack_2x2

    h, w = noisy.shape[-2:]
    embeds_BTD, mask_BT = stacked(conditioning, "prompt_embeds"), stacked(conditioning, "mask")
    image_BND = pack_2x2(noisy)
    tokens_BND = components.denoiser(
        hidden_states=image_BND,
        timestep=time,
        encoder_hidden_states=embeds_BTD,
        txt_ids=embeds_BTD.new_zeros(embeds_BTD.shape[1], 3),
        img_ids=grid_ids(h // 2, w // 2, like=embeds_BTD),
        attention_mask=torch.cat([mask_BT, mask_BT.new_ones(image_BND.shape[:2])], dim=1),
        return_dict=False,
    )[0]
    return unpack_2x2(tokens_BND, h, w)

"""AuraFlow: a transformer of joint and single blocks for flow matching, conditioned on Pile-T5.

Conventions: diffusers pipelines/aura_flow/pipeline_aura_flow.py:615-665. Prompts are padded to 256 tokens with zeros and
without a mask, and 8 learned tokens go before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slider_hooks import Components, Conditioning, Family, Flavour, Flow, Layout, Targets, hookimpl, sigma_as_is

if TYPE_CHECKING:
    from torch import Tensor


def tiny(folder: Path) -> None:
    """Write a random pipeline of real classes: 8x8 latents, 16 tokens."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    from slider_plugin.testing.tiny import autoencoder, redraw_zeros, seeded, t5

    with seeded(0):
        text_encoder, tokenizer = t5(hidden_size=32, kind="umt5")
        transformer = AuraFlowTransformer2DModel(
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pos_embed_max_size=64,
        )
        AuraFlowPipeline(
            vae=autoencoder(latent_channels=4, shift_factor=None),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=redraw_zeros(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        ).save_pretrained(folder)


FAMILY = Family(
    name="auraflow",
    title="AuraFlow",
    denoiser="transformer",
    denoiser_class="AuraFlowTransformer2DModel",
    pipeline_class="AuraFlowPipeline",
    noise=Flow(time=sigma_as_is),
    targets=Targets(
        self_attention=r"joint_transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",
        joint_attention=r"single_transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",
        io=r"pos_embed\.proj|proj_out",
        time=r"time_step_proj\.linear_[12]",
        forbidden=r"context_embedder|.*\.(add_[qkv]_proj|to_add_out)|.*_context\..+",
        standard=r"(joint|single)_transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out)",
        documented=("to_q", "to_k", "to_v", "to_out.0", "to_qkv"),
    ),
    expects={"in_channels": (4,)},
    guidance_scale=3.5,
    flavours={
        "0.1": Flavour(
            model="fal/AuraFlow",
            source="diffusers pipelines/aura_flow/pipeline_aura_flow.py:54, an example",
            reference={"pos_embed_max_size": 4096},
        ),
        "0.3": Flavour(model="fal/AuraFlow-v0.3", source="diffusers loaders/single_file_utils.py:213"),
    },
    default_flavour="0.3",
    layouts={"comfyui": Layout(prefix="transformer.", programs="ComfyUI", reads_diffusers=True)},
    aliases=("aura_flow",),
    tiny=tiny,
)


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """Latents go in and come out unpacked."""
    from slider_plugin.common.conditioning import stacked

    output: Tensor = components.denoiser(
        noisy, encoder_hidden_states=stacked(conditioning, "prompt_embeds"), timestep=time, return_dict=False
    )[0]
    return output

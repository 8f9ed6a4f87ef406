"""Lumina Image 2.0: a single-stream transformer for flow matching, conditioned on Gemma 2.

Its output is the negated velocity and its time runs from 0 (noise) to 1 (image):
diffusers pipelines/lumina2/pipeline_lumina2.py:670-708, examples/dreambooth/train_dreambooth_lora_lumina2.py:1392-1417.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slider_hooks import Components, Conditioning, Family, Flavour, Flow, Targets, hookimpl, one_minus_sigma

if TYPE_CHECKING:
    from torch import Tensor


def tiny(folder: Path) -> None:
    """Write a random pipeline of real classes: 8x8 latents, 16 tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    from slider_plugin.testing.tiny import autoencoder, gemma2, redraw_zeros, seeded

    with seeded(0):
        text_encoder, tokenizer = gemma2(hidden_size=32)
        transformer = Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=48,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=2,
            axes_dim_rope=(8, 4, 4),
            axes_lens=(300, 64, 64),
            cap_feat_dim=32,
        )
        Lumina2Pipeline(
            vae=autoencoder(latent_channels=4, blocks=4),  # the pipeline counts on an eighth of the side
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=redraw_zeros(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        ).save_pretrained(folder)


FAMILY = Family(
    name="lumina2",
    title="Lumina Image 2.0",
    denoiser="transformer",
    denoiser_class="Lumina2Transformer2DModel",
    pipeline_class="Lumina2Pipeline",
    noise=Flow(sign=-1, time=one_minus_sigma),
    targets=Targets(
        self_attention=r"noise_refiner\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",
        joint_attention=r"layers\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",
        io=r"x_embedder|norm_out\.linear_2",
        time=r"time_caption_embed\.timestep_embedder\.linear_[12]",
        forbidden=r"context_refiner\..*|time_caption_embed\.caption_embedder\..*",
        standard=r"(noise_refiner|layers)\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",
    ),
    reference={"cap_feat_dim": 2304},
    guidance_scale=4.0,
    flavours={
        "2.0": Flavour(
            model="Alpha-VLLM/Lumina-Image-2.0", source="diffusers pipelines/lumina2/pipeline_lumina2.py:52, an example"
        )
    },
    default_flavour="2.0",
    aliases=("lumina_2", "lumina_image_2"),
    tiny_size=64,
    tiny=tiny,
)


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """The last but one hidden state of Gemma 2, `(T, D)`, without padding; a system prompt goes before all but ""."""
    from slider_plugin.common.conditioning import prompts_or_negative

    return prompts_or_negative(prompts, components.pipeline.encode_prompt(list(prompts), device=components.denoiser.device))


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """Padding behind the shorter prompts is masked, and no image token sees it."""
    from slider_plugin.common.conditioning import padded

    embeds_BTD, mask_BT = padded(conditioning, "prompt_embeds")
    output: Tensor = components.denoiser(
        noisy, time, encoder_hidden_states=embeds_BTD, encoder_attention_mask=mask_BT, return_dict=False
    )[0]
    return output

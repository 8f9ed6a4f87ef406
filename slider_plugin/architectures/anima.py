"""Anima: the transformer of Cosmos Predict2, conditioned by cross-attention on Qwen3 through tokens of T5.

Its sampler is that of plain flow matching, without Cosmos' preconditioning: diffusers modular_pipelines/anima/denoise.py:43-50,
before_denoise.py (text conditioning, latents), decoders.py (normalisation by channel).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slider_hooks import Components, Conditioning, Family, Flavour, Flow, LoadRequest, hookimpl, sigma_as_is
from slider_plugin.common.cosmos import TARGETS

if TYPE_CHECKING:
    from torch import Tensor


def tiny(folder: Path) -> None:
    """Write a random modular pipeline of real classes: 4x4 latents, 4 tokens."""
    from diffusers import (
        AnimaModularPipeline,
        AnimaTextConditioner,
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
    )

    from slider_plugin.testing import tiny as parts

    with parts.seeded(0):
        text_encoder, tokenizer = parts.qwen3(hidden_size=32)
        _, t5_tokenizer = parts.t5(hidden_size=16)
        pipeline = AnimaModularPipeline()
        pipeline.update_components(
            vae=AutoencoderKLQwenImage(base_dim=4, num_res_blocks=1),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            t5_tokenizer=t5_tokenizer,
            text_conditioner=AnimaTextConditioner(
                source_dim=32,
                target_dim=16,
                model_dim=16,
                num_layers=1,
                num_attention_heads=2,
                target_vocab_size=len(t5_tokenizer),
            ),
            transformer=parts.cosmos(rope_scale=(1.0, 4.0, 4.0), extra_pos_embed_type=None),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    pipeline.save_pretrained(str(folder), overwrite_modular_index=True)


FAMILY = Family(
    name="anima",
    title="Anima",
    denoiser="transformer",
    denoiser_class="CosmosTransformer3DModel",
    pipeline_class="AnimaModularPipeline",
    noise=Flow(time=sigma_as_is),
    targets=TARGETS,
    expects={  # as for Cosmos Predict2, text to image, from which it was trained
        "in_channels": (16,),
        "extra_pos_embed_type": (None,),
        "use_crossattn_projection": (False, None),
    },
    reference={"num_attention_heads": 16, "extra_pos_embed_type": None, "rope_scale": (1.0, 4.0, 4.0)},
    guidance_scale=4.0,
    flavours={
        "base": Flavour(model="circlestone-labs/Anima-Base-v1.0-Diffusers", source="diffusers docs: api/pipelines/anima.md")
    },
    default_flavour="base",
    tiny=tiny,
    limits="published models need torchvision",
)


@hookimpl
def load_components(family: Family, request: LoadRequest) -> Components:
    """The modular pipeline, unless this machine lacks what its denoiser calls."""
    from slider_plugin.common.cosmos import load_checked
    from slider_plugin.common.modular import load_modular_components

    return load_checked(family, request, load_modular_components)


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """Tokens of T5 that have looked at Qwen3's hidden states, `(T, D)`, zeros behind the text up to 512."""
    from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep

    from slider_plugin.common.conditioning import per_prompt

    encoded = AnimaTextEncoderStep.encode_prompt(
        components.pipeline, list(prompts), prepare_unconditional_embeds=False, device=components.denoiser.device
    )
    embeds_BTD = components.pipeline.text_conditioner(
        source_hidden_states=encoded["qwen_prompt_embeds"],
        target_input_ids=encoded["t5_input_ids"],
        target_attention_mask=encoded["t5_attention_mask"],
        source_attention_mask=encoded["qwen_attention_mask"],
    )
    return per_prompt(prompt_embeds=embeds_BTD)


@hookimpl
def encode_images(components: Components, images: Tensor) -> Tensor:
    """`(B, 3, H, W)` to `(B, C, 1, h, w)`, one frame, normalised by the statistics of each channel."""
    from slider_plugin.common.latents import normalised_by_channel

    return normalised_by_channel(components.pipeline.vae, images.unsqueeze(2))


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """The model sees the zeros behind the text, too."""
    from slider_plugin.common.conditioning import stacked
    from slider_plugin.common.cosmos import answer

    return answer(components.denoiser, noisy, time, stacked(conditioning, "prompt_embeds"))


@hookimpl
def build_pipeline(components: Components) -> Any:
    """The modular pipeline with the call of a plain one."""
    from slider_plugin.common.modular import GuidedCall

    return GuidedCall(components.pipeline)

"""HunyuanVideo: a transformer of double and single blocks for flow matching, conditioned on Llama's tokens and pooled CLIP.

The transformer is told a guidance scale, times 1000, and its `context_embedder` is a small transformer over text alone:
diffusers pipelines/hunyuan_video/pipeline_hunyuan_video.py:199-345, 638-705, 726.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slider_hooks import Components, Conditioning, Family, Flavour, Flow, Option, Targets, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

GUIDANCE = Option(
    name="hunyuan_video_guidance_value",
    type=float,
    default=1.0,
    help="the distilled guidance that the transformer is told while training",
)


def tiny(folder: Path) -> None:
    """Write a random pipeline of real classes: 4x4 latents, 8 tokens in two latent frames."""
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

    from slider_plugin.testing import tiny as parts

    with parts.seeded(0):
        text_encoder, tokenizer = _llama(hidden_size=32)
        text_encoder_2, tokenizer_2 = parts.clip(hidden_size=16, length=77)
        transformer = HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=32,
            pooled_projection_dim=16,
            rope_axes_dim=(4, 6, 6),
        )
        HunyuanVideoPipeline(
            vae=parts.hunyuan_video_autoencoder(latent_channels=4),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=parts.redraw_zeros(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        ).save_pretrained(folder)


def _llama(hidden_size: int) -> tuple[Any, Any]:
    """A Llama encoder, and a tokenizer that knows the words of the pipeline's instruction.

    The pipeline cuts off the first 95 tokens and what comes after 351: the instruction must have something in between.
    """
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from transformers import LlamaConfig, LlamaModel, LlamaTokenizer

    from slider_plugin.testing.tiny import WORDS, corpus, decoder_sizes

    words = corpus((DEFAULT_PROMPT_TEMPLATE["template"], *WORDS))
    tokenizer: Any = LlamaTokenizer().train_new_from_iterator(words, vocab_size=200)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "right"  # the second is what is saved
    return LlamaModel(LlamaConfig(**decoder_sizes(hidden_size, len(tokenizer)))), tokenizer


FAMILY = Family(
    name="hunyuan_video",
    title="HunyuanVideo",
    denoiser="transformer",
    denoiser_class="HunyuanVideoTransformer3DModel",
    pipeline_class="HunyuanVideoPipeline",
    noise=Flow(),
    targets=Targets(
        self_attention=r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",
        joint_attention=r"single_transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v)",
        io=r"x_embedder\.proj|proj_out",
        time=r"time_text_embed\.timestep_embedder\.linear_[12]",
        forbidden=r"context_embedder\..+|time_text_embed\.text_embedder\..+"
        r"|.*\.(add_[qkv]_proj|to_add_out)|.*\.(ff_context|norm1_context)\..+",
        standard=r"(single_)?transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",
    ),
    expects={"image_condition_type": (None,), "in_channels": (16, 4)},  # 4 in tests; image to video has 33, or a type
    modalities=("image", "video"),
    guidance_scale=6.0,
    flavours={
        "t2v": Flavour(
            model="hunyuanvideo-community/HunyuanVideo",
            source="diffusers pipelines/hunyuan_video/pipeline_hunyuan_video.py, example",
        )
    },
    default_flavour="t2v",
    options=(GUIDANCE,),
    aliases=("hunyuan-video",),
    tiny=tiny,
    limits="text to video only: image-to-video models are refused",
)


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """Llama's tokens `(T, D)` without their padding, which is masked everywhere, and CLIP's pooled embedding `(P,)`."""
    from slider_plugin.common.conditioning import without_padding

    pipeline = components.pipeline
    embeds_BTD, pooled_BP, mask_BT = pipeline.encode_prompt(list(prompts), device=components.denoiser.device)
    texts = without_padding(embeds_BTD, mask_BT)
    return [{"prompt_embeds": text_TD, "pooled": pooled_P} for text_TD, pooled_P in zip(texts, pooled_BP, strict=True)]


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """Guidance has the scale of the time, 0..1000."""
    import torch

    from slider_plugin.common.conditioning import padded, stacked

    embeds_BTD, mask_BT = padded(conditioning, "prompt_embeds")
    velocity_BCfhw: Tensor = components.denoiser(
        hidden_states=noisy,
        timestep=time,
        encoder_hidden_states=embeds_BTD,
        encoder_attention_mask=mask_BT,
        pooled_projections=stacked(conditioning, "pooled"),
        guidance=torch.full_like(time, 1000.0 * components.options[GUIDANCE.name]),
        return_dict=False,
    )[0]
    return velocity_BCfhw

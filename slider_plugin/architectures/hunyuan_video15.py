"""HunyuanVideo 1.5, text to video: a transformer of double blocks for flow matching, conditioned on Qwen2.5-VL and ByT5.

Next to the noisy latents it takes latents to start from and their mask, and tokens of a first image: zero in text to video.
ByT5 reads what the prompt has in quotation marks, to be written into the picture:
diffusers pipelines/hunyuan_video1_5/pipeline_hunyuan_video1_5.py:508-523, 700-807, 825.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slider_hooks import Components, Conditioning, Family, Flavour, Flow, LoadRequest, Targets, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def tiny(folder: Path) -> None:
    """Write a random pipeline of real classes: 4x4 latents, 32 tokens in two latent frames."""
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        ClassifierFreeGuidance,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideo15Pipeline,
        HunyuanVideo15Transformer3DModel,
    )
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    from slider_plugin.testing import tiny as parts

    with parts.seeded(0):
        qwen, tokenizer = parts.qwen2_5_vl(hidden_size=32)
        byt5 = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
        transformer = HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=32,
            text_embed_2_dim=16,
            image_embed_dim=8,
            rope_axes_dim=(4, 6, 6),
            task_type="t2v",
        )
        autoencoder = AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, spatial_compression_ratio=8
        )
        HunyuanVideo15Pipeline(
            text_encoder=qwen.model.language_model,
            tokenizer=tokenizer,
            transformer=parts.redraw_zeros(transformer),
            vae=autoencoder,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            text_encoder_2=T5EncoderModel(byt5),
            tokenizer_2=ByT5Tokenizer(),
            guider=ClassifierFreeGuidance(guidance_scale=6.0),
        ).save_pretrained(folder)


FAMILY = Family(
    name="hunyuan_video15",
    title="HunyuanVideo 1.5",
    denoiser="transformer",
    denoiser_class="HunyuanVideo15Transformer3DModel",
    pipeline_class="HunyuanVideo15Pipeline",
    noise=Flow(),
    targets=Targets(
        self_attention=r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",
        io=r"x_embedder\.proj|proj_out",
        time=r"time_embed\.timestep_embedder\.linear_[12]",
        forbidden=r"context_embedder(_2)?\..+|.*\.(add_[qkv]_proj|to_add_out)|.*\.(ff_context|norm1_context)\..+",
        standard=r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",
    ),
    reference={"task_type": "t2v"},
    expects={"task_type": ("t2v",), "use_meanflow": (False, None)},  # meanflow is told a second time
    modalities=("image", "video"),
    guidance_scale=6.0,
    flavours={
        "480p": Flavour(
            model="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
            source="diffusers docs: api/pipelines/hunyuan_video15.md",
        )
    },
    default_flavour="480p",
    aliases=("hunyuanvideo", "hunyuanvideo-1.5"),  # the first is SimpleTuner's name for 1.5
    tiny=tiny,
    limits="text to video only: image-to-video and step-distilled models are refused",
)


@hookimpl
def load_components(family: Family, request: LoadRequest) -> Components:
    """The pipeline, its autoencoder taking one video at a time: it cannot take more at once (attention mask in diffusers)."""
    from slider_plugin.loading import load_pipeline_components

    components = load_pipeline_components(family, request)
    components.pipeline.vae.enable_slicing()
    return components


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """Qwen's tokens `(T, D)` without their padding, which is masked everywhere; ByT5's `(256, E)` and their mask `(256,)`."""
    from slider_plugin.common.conditioning import per_prompt, without_padding

    embeds_BTD, mask_BT, glyphs_BGE, glyph_mask_BG = components.pipeline.encode_prompt(
        list(prompts), batch_size=len(prompts), device=components.denoiser.device
    )
    rest = per_prompt(glyph_embeds=glyphs_BGE, glyph_mask=glyph_mask_BG)
    texts = without_padding(embeds_BTD, mask_BT)
    return [{"prompt_embeds": text_TD, **others} for text_TD, others in zip(texts, rest, strict=True)]


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """Channels are the noisy latents, as many zeros for latents to start from, and one of zeros for their mask."""
    import torch

    from slider_plugin.common.conditioning import padded, stacked

    B, C = noisy.shape[:2]
    embeds_BTD, mask_BT = padded(conditioning, "prompt_embeds")
    # The model masks all image tokens if they are zero: one says as much as the pipeline's 729.
    no_image = embeds_BTD.new_zeros(B, 1, components.denoiser.config.image_embed_dim)
    velocity_BCfhw: Tensor = components.denoiser(
        hidden_states=torch.cat([noisy, noisy.new_zeros(B, C + 1, *noisy.shape[2:])], dim=1),
        timestep=time,
        encoder_hidden_states=embeds_BTD,
        encoder_attention_mask=mask_BT,
        encoder_hidden_states_2=stacked(conditioning, "glyph_embeds"),
        encoder_attention_mask_2=stacked(conditioning, "glyph_mask"),
        image_embeds=no_image,
        return_dict=False,
    )[0]
    return velocity_BCfhw


@hookimpl
def build_pipeline(components: Components) -> Any:
    """The pipeline with a guidance scale in its call, which by itself it takes from its guider alone."""
    from diffusers import HunyuanVideo15Pipeline

    class Drawing(HunyuanVideo15Pipeline):
        def __call__(
            self,
            prompt: list[str],
            height: int,
            width: int,
            num_frames: int,
            num_inference_steps: int,
            guidance_scale: float,
            generator: list[torch.Generator],
            negative_prompt: list[str] | None = None,
        ) -> Any:
            self.guider = self.components["guider"].new(guidance_scale=guidance_scale)
            return super().__call__(
                prompt, negative_prompt, height, width, num_frames, num_inference_steps, generator=generator
            )

    return Drawing(**components.pipeline.components)

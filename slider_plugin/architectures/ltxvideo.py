"""LTX-Video 0.9: a video transformer for flow matching, conditioned on T5 by cross-attention.

Its autoencoder's statistics are buffers, and its tokens are single latents: diffusers pipelines/ltx/pipeline_ltx.py:420-471,
749-830. A decoder that is conditioned on time decodes at time 0, the pipeline's default: without new noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slider_hooks import Components, Conditioning, Family, Flavour, Flow, Targets, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

FRAME_RATE = 25  # in which positions in time are counted


def tiny(folder: Path) -> None:
    """Write a random pipeline of real classes: 5x32x32 pixels are 2x4x4 latents."""
    from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel

    from slider_plugin.testing.tiny import redraw_zeros, seeded, t5

    with seeded(0):
        text_encoder, tokenizer = t5(hidden_size=32)
        vae = AutoencoderKLLTXVideo(
            latent_channels=4,
            block_out_channels=(8, 8),
            down_block_types=("LTXVideoDownBlock3D",) * 2,
            decoder_block_out_channels=(8, 8),
            layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            spatio_temporal_scaling=(True, True),
            decoder_spatio_temporal_scaling=(True, True),
            decoder_inject_noise=(False,) * 3,
            downsample_type=("conv",) * 2,
            upsample_residual=(False,) * 2,
            upsample_factor=(1,) * 2,
            timestep_conditioning=True,
            patch_size=2,
            scaling_factor=0.5,
        )
        vae.latents_mean.normal_()
        vae.latents_std.uniform_(0.5, 2.0)
        transformer = LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            cross_attention_dim=24,
            num_layers=2,
            caption_channels=32,
        )
        LTXPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
            ),
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=redraw_zeros(transformer),
        ).save_pretrained(folder)


FAMILY = Family(
    name="ltxvideo",
    title="LTX-Video",
    denoiser="transformer",
    denoiser_class="LTXVideoTransformer3DModel",
    pipeline_class="LTXPipeline",
    noise=Flow(),
    targets=Targets(
        self_attention=r"transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)",
        io=r"proj_in|proj_out",
        time=r"time_embed\.emb\.timestep_embedder\.linear_[12]",
        forbidden=r"transformer_blocks\.\d+\.attn2\..+|caption_projection\..+",
        standard=r"transformer_blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
    ),
    expects={"patch_size": (1,), "patch_size_t": (1,)},
    modalities=("image", "video"),
    call_kwargs={"frame_rate": FRAME_RATE},
    guidance_scale=3.0,
    flavours={
        "0.9": Flavour(model="Lightricks/LTX-Video", source="diffusers pipelines/ltx/pipeline_ltx.py:50"),
        "0.9.1": Flavour(model="diffusers/LTX-Video-0.9.1", source="diffusers loaders/single_file_utils.py:223"),
    },
    default_flavour="0.9",
    aliases=("ltx_video", "ltx"),
    limits="LTX-Video 0.9.5 and later count their frames otherwise (LTXConditionPipeline)",
    tiny=tiny,
)


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """T5's tokens `(T, D)`, padded to the same length, and their mask `(T,)`."""
    from slider_plugin.common.conditioning import per_prompt

    embeds_BTD, mask_BT, _, _ = components.pipeline.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, device=components.denoiser.device
    )
    return per_prompt(prompt_embeds=embeds_BTD, mask=mask_BT)


@hookimpl
def encode_images(components: Components, images: Tensor) -> Tensor:
    """Frames `(B, 3, F, H, W)` to latents `(B, C, f, h, w)`, by channel `(z - latents_mean) * scaling_factor / latents_std`."""
    from slider_plugin.common.latents import normalised_by_buffers

    return normalised_by_buffers(components.pipeline.vae, images)


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """Tokens are latents, frame by frame and row by row; positions in time are seconds."""
    from slider_plugin.common.conditioning import stacked

    f, h, w = noisy.shape[2:]
    pipeline = components.pipeline
    space = pipeline.vae_spatial_compression_ratio
    tokens_BNC = components.denoiser(
        hidden_states=noisy.flatten(2).transpose(1, 2),
        encoder_hidden_states=stacked(conditioning, "prompt_embeds"),
        timestep=time,
        encoder_attention_mask=stacked(conditioning, "mask"),
        num_frames=f,
        height=h,
        width=w,
        rope_interpolation_scale=(pipeline.vae_temporal_compression_ratio / FRAME_RATE, space, space),
        return_dict=False,
    )[0]
    velocity: Tensor = tokens_BNC.transpose(1, 2).unflatten(2, (f, h, w))
    return velocity

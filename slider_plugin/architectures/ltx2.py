"""LTX-2: a transformer of two streams, video and sound, for flow matching, conditioned on Gemma 3 through text connectors.

A slider trains the video stream. The forward pass wants a sound stream as well: it gets one silent token, and the model's own
switch `isolate_modalities` keeps the two apart, so that no made-up sound gets into what is learned; its answer is thrown
away. (Lightricks' trainer leaves the sound stream out likewise: ltx-trainer, strategy text_to_video without `with_audio`.)
Validation draws with both streams joined, as ever. Conventions: diffusers pipelines/ltx2/pipeline_ltx2.py:1251, 1380-1440.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slider_hooks import Components, Conditioning, Family, Flavour, Flow, Targets, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

FRAME_RATE = 24.0  # in which positions in time are counted


def tiny(folder: Path) -> None:
    """Write a random pipeline of real classes: 5x32x32 pixels are 2x4x4 latents."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LTX2Pipeline, LTX2VideoTransformer3DModel

    from slider_plugin.testing.tiny import redraw_zeros, seeded

    with seeded(0):
        transformer = LTX2VideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            vae_scale_factors=(4, 8, 8),
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=4,
            audio_cross_attention_dim=8,
            num_layers=2,
            caption_channels=16,
        )
        LTX2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
            ),
            transformer=redraw_zeros(transformer),
            **_tiny_autoencoders(),
            **_tiny_text_parts(),
        ).save_pretrained(folder)


def _tiny_autoencoders() -> dict[str, Any]:
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("LTX2VideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=True,
        decoder_spatio_temporal_scaling=True,
        decoder_inject_noise=False,
        downsample_type=("spatiotemporal",) * 2,
        upsample_type=("spatiotemporal",) * 2,
        upsample_residual=False,
        upsample_factor=(1, 1),
        patch_size=2,
        scaling_factor=0.5,
    )
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2.0)
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=8,
        upsample_kernel_sizes=[4],
        upsample_factors=[2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1]],
    )
    return {"vae": vae, "audio_vae": audio_vae, "vocoder": vocoder}


def _tiny_text_parts() -> dict[str, Any]:
    """Gemma's hidden states, four of them, and the connectors of both streams."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GemmaTokenizer

    from slider_plugin.testing.tiny import decoder_sizes, trained_tokenizer

    tokenizer = trained_tokenizer(GemmaTokenizer)
    text = decoder_sizes(16, len(tokenizer)) | {"max_position_embeddings": 1024, "query_pre_attn_scalar": 16}
    sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
    heads = {
        f"{stream}_connector_{what}": value
        for stream in ("video", "audio")
        for what, value in {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}.items()
    }
    return {
        "text_encoder": Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=sight | {"patch_size": 4})),
        "tokenizer": tokenizer,
        "connectors": LTX2TextConnectors(caption_channels=16, text_proj_in_factor=4, **heads),
    }


FAMILY = Family(
    name="ltx2",
    title="LTX-2",
    denoiser="transformer",
    denoiser_class="LTX2VideoTransformer3DModel",
    pipeline_class="LTX2Pipeline",
    noise=Flow(),
    targets=Targets(
        self_attention=r"transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)",
        io=r"proj_in|proj_out",
        time=r"time_embed\.emb\.timestep_embedder\.linear_[12]",
        forbidden=r"(.*\.)?(audio|av_cross_attn|video_to_audio)_.+|.*\.attn2\..+|(caption_projection|prompt_adaln)\..+",
        standard=r"transformer_blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
    ),
    expects={"patch_size": (1,), "patch_size_t": (1,)},
    modalities=("image", "video"),
    call_kwargs={"frame_rate": FRAME_RATE},
    guidance_scale=3.0,
    flavours={"2.0": Flavour(model="Lightricks/LTX-2", source="diffusers pipelines/ltx2/pipeline_ltx2.py:77")},
    default_flavour="2.0",
    aliases=("ltxvideo2", "ltx_2"),
    limits="trains the video stream; sound is drawn in validation, but neither trained nor kept",
    tiny=tiny,
)


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """What the connectors make of all of Gemma's hidden states for the video stream, `(T, D)`, and its mask `(T,)`.

    One prompt at a time: before the connectors it is 49 hidden states for each of 1024 tokens.
    """
    pipeline = components.pipeline
    found = []
    for prompt in prompts:
        hidden_1TD, mask_1T, _, _ = pipeline.encode_prompt(
            [prompt], do_classifier_free_guidance=False, device=components.denoiser.device
        )
        video_1TD, _, mask_1T = pipeline.connectors(hidden_1TD, mask_1T, padding_side=pipeline.tokenizer.padding_side)
        found.append({"prompt_embeds": video_1TD[0], "mask": mask_1T[0]})
    return found


@hookimpl
def encode_images(components: Components, images: Tensor) -> Tensor:
    """Frames `(B, 3, F, H, W)` to latents `(B, C, f, h, w)`, by channel `(z - latents_mean) * scaling_factor / latents_std`."""
    from slider_plugin.common.latents import normalised_by_buffers

    return normalised_by_buffers(components.pipeline.vae, images)


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """Tokens are latents, frame by frame and row by row; the sound stream is silent and apart."""
    from slider_plugin.common.conditioning import stacked

    B, _, f, h, w = noisy.shape
    config = components.denoiser.config
    text_width = config.caption_channels if config.use_prompt_embeddings else config.audio_cross_attention_dim
    tokens_BNC = components.denoiser(
        hidden_states=noisy.flatten(2).transpose(1, 2),
        audio_hidden_states=noisy.new_zeros(B, 1, config.audio_in_channels),
        encoder_hidden_states=stacked(conditioning, "prompt_embeds"),
        audio_encoder_hidden_states=noisy.new_zeros(B, 1, text_width),
        timestep=time,
        sigma=time,
        encoder_attention_mask=stacked(conditioning, "mask"),
        num_frames=f,
        height=h,
        width=w,
        fps=FRAME_RATE,
        audio_num_frames=1,
        isolate_modalities=True,
        return_dict=False,
    )[0]
    velocity: Tensor = tokens_BNC.transpose(1, 2).unflatten(2, (f, h, w))
    return velocity

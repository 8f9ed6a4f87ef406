"""MiniMax H3, text to video: one sequence of text, sound and video for flow matching, conditioned on Qwen3-VL.

It predicts `x0 - noise` and its time runs from 0 (noise) to 1 (video): diffusers schedulers/scheduling_minimax_h3.py:18-40. All
samples of a call share one layout and one time. Training leaves the rows of sound out, as none is known; drawing has them, and
their sound is thrown away. Conventions: modular_pipelines/minimax_h3/ before_denoise.py:44-73, 269-375, 1197-1237,
encoders.py:30-99, decoders.py:174-190. Guidance is distilled into the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slider_hooks import Components, Conditioning, Family, Flavour, Flow, LoadRequest, Targets, hookimpl, one_minus_sigma

if TYPE_CHECKING:
    from torch import Tensor


class TextOnly:
    """Stands where the pipeline asks Qwen3-VL's processor, which needs torchvision, what kind each token is."""

    def create_mm_token_type_ids(self, rows: list[list[int]]) -> list[list[int]]:
        """0 is text (diffusers modular_pipelines/minimax_h3/encoders.py:43-47)."""
        return [[0] * len(row) for row in rows]


def text_to_video(model: str | None = None, revision: str | None = None) -> Any:
    """The pipeline for text alone, without its parts: videos of any length, without sound."""
    from diffusers import MiniMaxH3Blocks, MiniMaxH3ModularPipeline

    class TextToVideo(MiniMaxH3ModularPipeline):
        @property
        def min_duration(self) -> float:
            """Published are 5 seconds; a slider may be looked at in a few frames, as it was trained."""
            return 0.0

    blocks = MiniMaxH3Blocks().get_workflow("t2va")
    blocks.sub_blocks.pop("decode.audio")
    return TextToVideo(blocks=blocks, pretrained_model_name_or_path=model, revision=revision)


def tiny(folder: Path) -> None:
    """Write a random modular pipeline of real classes: 4x4 latents, 4 tokens in each of 7 latent frames."""
    from diffusers import AutoencoderKLMiniMaxH3, MiniMaxH3Scheduler, MiniMaxH3Transformer3DModel
    from transformers import Qwen3VLForConditionalGeneration

    from slider_plugin.testing import tiny as parts

    with parts.seeded(0):
        tokenizer = parts.qwen_tokenizer()
        text = parts.qwen3_vl_config(8, layers=51, vocab_size=len(tokenizer))  # the last but one is used
        transformer = MiniMaxH3Transformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            ffn_dim=32,
            text_dim=8,
            freq_dim=16,
            time_embed_hidden_dim=16,
            time_embed_dim=16,
            rope_freq_dim=2,
        )
        vae = AutoencoderKLMiniMaxH3(
            block_out_channels=(8,) * 6,
            layers_per_block=1,
            spatial_downsample_factors=(2, 2, 2, 1, 1, 1),
            norm_num_groups=2,
            decoder_num_layers=1,
            decoder_num_attention_heads=2,
            decoder_attention_head_dim=16,
            decoder_num_register_tokens=1,
            decoder_ffn_mult=1,
            latents_mean=(0.5,) * 24,
            latents_std=(2.0,) * 24,
        )
        pipeline = text_to_video()
        pipeline.update_components(
            text_encoder=Qwen3VLForConditionalGeneration(text),
            tokenizer=tokenizer,
            transformer=parts.redraw_zeros(transformer),
            vae=vae,
            scheduler=MiniMaxH3Scheduler(shift=12.0),
            audio_scheduler=MiniMaxH3Scheduler(shift=3.0),
        )
    pipeline.save_pretrained(str(folder), overwrite_modular_index=True)


FAMILY = Family(
    name="minimax_h3",
    title="MiniMax H3",
    denoiser="transformer",
    denoiser_class="MiniMaxH3Transformer3DModel",
    pipeline_class="MiniMaxH3ModularPipeline",
    noise=Flow(sign=-1, time=one_minus_sigma),
    targets=Targets(
        joint_attention=r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",
        io=r"proj_in|proj_out",
        time=r"time_embedder\.linear_[12]",
        weight_read=r"time_embedder\.linear_[12]|proj_in|proj_out",
        forbidden=r"context_embedder|token_refiner\..+|audio_proj_(in|out)",
        standard=r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",
    ),
    modalities=("image", "video"),
    guidance_scale=1.0,
    flavours={
        "h3": Flavour(model="MiniMaxAI/MiniMax-H3", source="diffusers source: modular_pipelines/minimax_h3/modular_pipeline.py")
    },
    default_flavour="h3",
    aliases=("minimaxh3",),
    tiny_frames=22,  # its autoencoder decodes no fewer
    tiny=tiny,
    limits="text to video only: sound, keyframes and references are neither trained nor drawn",
)


@hookimpl
def load_components(family: Family, request: LoadRequest) -> Components:
    """The parts that text to video needs."""
    from slider_plugin.common.modular import load_modular_components

    def build() -> Any:
        pipeline = text_to_video(request.model, request.revision)
        pipeline.update_components(processor=TextOnly())
        return pipeline

    return load_modular_components(family, request, build)


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """Hidden state 50 of Qwen3-VL, `(T, D)`, of the prompt alone; where that is empty, of a space."""
    from diffusers.modular_pipelines.minimax_h3.encoders import get_qwen3vl_prompt_embeds

    pipeline = components.pipeline

    def embeds_TD(prompt: str) -> Tensor:
        embeds_1TD: Tensor = get_qwen3vl_prompt_embeds(
            pipeline.text_encoder,
            pipeline.processor,
            pipeline.tokenizer(prompt or " ", add_special_tokens=False)["input_ids"],
            text_encoder_layer=pipeline.text_encoder_layer,
            device=components.denoiser.device,
            dtype=pipeline.text_encoder.dtype,
        )
        return embeds_1TD[0]

    return [{"prompt_embeds": embeds_TD(prompt)} for prompt in prompts]


@hookimpl
def encode_images(components: Components, images: Tensor) -> Tensor:
    """`(B, 3, F, H, W)` to `(B, C, f, h, w)`, 17n + 5 frames to 5n + 2; pixels go in normalised as ImageNet's."""
    from slider_plugin.common.latents import normalised_by_channel

    pipeline = components.pipeline
    mean, std = (images.new_tensor(by_color).view(1, 3, 1, 1, 1) for by_color in (pipeline.pixel_mean, pipeline.pixel_std))
    return normalised_by_channel(pipeline.vae, (images / 2 + 0.5 - mean) / std)


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """One call for each sample, as the times and the lengths of texts differ."""
    import torch

    rows = zip(noisy.split(1), time, conditioning, strict=True)
    return torch.cat([_answer(components, noisy_1Cfhw, t, c["prompt_embeds"]) for noisy_1Cfhw, t, c in rows])


def _answer(components: Components, noisy_1Cfhw: Tensor, time: Tensor, embeds_TD: Tensor) -> Tensor:
    import torch
    from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep, patchify_video_latents

    pipeline, denoiser, device = components.pipeline, components.denoiser, noisy_1Cfhw.device
    positions_S3, tags_S, *indices, _, _ = MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        torch.full((len(embeds_TD),), pipeline.text_tag),
        *noisy_1Cfhw.shape[2:],
        num_audio_latents=0,
        patch_size=pipeline.patch_size,
        audio_channels=pipeline.audio_channels,
        audio_tag=pipeline.audio_tag,
        video_tag=pipeline.video_tag,
    )
    video_V, sound_0, text_T = (index.to(device) for index in indices)
    rows_VD = denoiser(
        hidden_states=patchify_video_latents(noisy_1Cfhw, pipeline.patch_size)[None],
        audio_hidden_states=noisy_1Cfhw.new_zeros(1, 0, denoiser.config.audio_in_channels),
        encoder_hidden_states=embeds_TD[None],
        timestep=time[None],
        timestep_indices=torch.zeros_like(tags_S, device=device),
        token_tags=tags_S.to(device),
        position_ids=positions_S3.float().to(device),
        video_indices=video_V,
        audio_indices=sound_0,
        text_indices=text_T,
        return_dict=False,
    )[0][0]
    return _unpatchified(rows_VD, noisy_1Cfhw.shape, pipeline.patch_size)


def _unpatchified(rows_VD: Tensor, shape: Sequence[int], patch: tuple[int, int, int]) -> Tensor:
    """Rows of `(t, h, w)` patches, channels outermost, back to `(1, C, f, h, w)`."""
    _, C, f, h, w = shape
    t, p, q = patch
    patches = rows_VD.reshape(f // t, h // p, w // q, C, t, p, q).permute(3, 0, 4, 1, 5, 2, 6)
    return patches.reshape(1, C, f, h, w)


@hookimpl
def build_pipeline(components: Components) -> Any:
    """The modular pipeline, which draws one prompt at a time, called for each."""
    from types import SimpleNamespace

    from slider_plugin.common.modular import ModularCall

    class OneByOne(ModularCall):
        def __call__(
            self, prompt: list[str], generator: list[Any], height: int, width: int, num_frames: int, num_inference_steps: int
        ) -> Any:
            shortest = self.pipeline.vae_frames_per_chunk + self.pipeline.vae_latents_per_chunk  # that the autoencoder decodes
            shape = {"height": height, "width": width, "num_frames": max(num_frames, shortest)}
            drawn = [
                self.pipeline(prompt=p or " ", generator=g, num_inference_steps=num_inference_steps, **shape)
                for p, g in zip(prompt, generator, strict=True)
            ]
            return SimpleNamespace(frames=[one.videos[0] for one in drawn])

    return OneByOne(components.pipeline)

"""Sana-Video: a transformer with linear self-attention for flow matching over video, conditioned on Gemma 2.

Conventions: diffusers pipelines/sana_video/pipeline_sana_video.py:930-957, 994-1008.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slider_hooks import Components, Conditioning, Family, Flavour, Flow, Targets, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


def tiny(folder: Path) -> None:
    """Write a random pipeline of real classes: 4x4 latents, 4 tokens in each of two latent frames."""
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        SanaVideoPipeline,
        SanaVideoTransformer3DModel,
    )

    from slider_plugin.testing.tiny import gemma2, redraw_zeros, seeded

    with seeded(0):
        text_encoder, tokenizer = gemma2(hidden_size=32)
        transformer = SanaVideoTransformer3DModel(
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=12,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=32,
            rope_max_seq_len=32,
        )
        SanaVideoPipeline(
            vae=AutoencoderKLWan(base_dim=4, num_res_blocks=1),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=redraw_zeros(transformer),
            # The other published scheduler, DPM-Solver, rounds the time to whole steps.
            scheduler=FlowMatchEulerDiscreteScheduler(shift=8.0),
        ).save_pretrained(folder)


FAMILY = Family(
    name="sana_video",
    title="Sana-Video",
    denoiser="transformer",
    denoiser_class="SanaVideoTransformer3DModel",
    pipeline_class="SanaVideoPipeline",
    # Published with DPM-Solver, which calls it `flow_shift` (scripts/convert_sana_video_to_diffusers.py).
    noise=Flow(shift=8.0),
    targets=Targets(
        self_attention=r"transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)",
        io=r"patch_embedding|proj_out",
        time=r"time_embed\.emb\.timestep_embedder\.linear_[12]",
        forbidden=r".*\.attn2\..*|caption_projection\..*",
        standard=r"transformer_blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
    ),
    expects={
        "in_channels": (16,),  # the 720p model has the autoencoder of LTX-2 and 128 channels
        "guidance_embeds": (False, None),
    },
    modalities=("video",),
    call_kwargs={"use_resolution_binning": False},  # draw at the very size that is asked for
    guidance_scale=6.0,
    flavours={
        "2b-480p": Flavour(
            model="Efficient-Large-Model/SANA-Video_2B_480p_diffusers", source="diffusers docs: api/pipelines/sana_video.md"
        )
    },
    default_flavour="2b-480p",
    aliases=("sanavideo",),
    limits="480p alone: the 720p model, with the autoencoder of LTX-2, is refused",
    tiny=tiny,
)


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """The last hidden state of Gemma 2, `(T, D)`, without padding; an instruction goes before all but ""."""
    from slider_plugin.common.conditioning import after_instruction

    return after_instruction(components.pipeline, prompts, components.denoiser.device)


@hookimpl
def encode_images(components: Components, images: Tensor) -> Tensor:
    """`(B, 3, F, H, W)` to `(B, C, f, h, w)`, normalised by channel."""
    from slider_plugin.common.latents import normalised_by_channel

    return normalised_by_channel(components.pipeline.vae, images)


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """Padding behind the shorter prompts is masked."""
    from slider_plugin.common.conditioning import padded

    embeds_BTD, mask_BT = padded(conditioning, "prompt_embeds")
    output: Tensor = components.denoiser(
        noisy, timestep=time, encoder_hidden_states=embeds_BTD, encoder_attention_mask=mask_BT, return_dict=False
    )[0]
    return output


@hookimpl
def build_pipeline(components: Components) -> Any:
    """The pipeline, with the number of frames under the name that other pipelines give it."""
    from diffusers import SanaVideoPipeline

    class WithNumFrames(SanaVideoPipeline):
        def __call__(self, num_frames: int, **arguments: Any) -> Any:
            return super().__call__(frames=num_frames, **arguments)

    return WithNumFrames(**components.pipeline.components)

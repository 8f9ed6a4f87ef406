"""ACE-Step 1.5: a transformer over one-dimensional sound latents for flow matching, conditioned on tags, lyrics and timbre.

Its time is sigma as is, given twice (`timestep_r`); nothing marks padding for its cross-attention; around the noise it sees
the latents of silence and a mask of ones, since nothing is kept: diffusers pipelines/ace_step/pipeline_ace_step.py:1028-1228.
A caption may carry lyrics behind a line `[lyrics]`; without one there are none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from slider_hooks import (
    Components,
    Conditioning,
    Family,
    Flavour,
    Flow,
    LoadRequest,
    Option,
    Targets,
    hookimpl,
    sigma_as_is,
)

if TYPE_CHECKING:
    from torch import Tensor

SECONDS = Option(
    name="ace_step_seconds",
    type=float,
    default=30.0,
    help="how long the sounds are: the model is told so in every prompt, and validation draws sounds of this length",
)
LANGUAGE = Option(name="ace_step_language", type=str, default="en", help="language of the lyrics, as a code: en, de, zh, ...")
LYRICS = re.compile(r"^[ \t]*\[lyrics\][ \t]*$", re.MULTILINE | re.IGNORECASE)
REFERENCE_SECONDS = 30  # of sound that the timbre encoder hears; silence where no reference is given
XL = {"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "encoder_hidden_size": 2048}


def tiny(folder: Path) -> None:
    """Write a random pipeline of real classes: 16 samples in a second, four of them in a latent, 30 seconds."""
    import torch
    from diffusers import (
        AceStepConditionEncoder,
        AceStepPipeline,
        AceStepTransformer1DModel,
        AutoencoderOobleck,
        FlowMatchEulerDiscreteScheduler,
    )

    from slider_plugin.testing.tiny import qwen3, redraw_zeros, seeded

    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16}
    with seeded(0):
        text_encoder, tokenizer = qwen3(hidden_size=32)
        condition_encoder = AceStepConditionEncoder(
            hidden_size=32,
            intermediate_size=64,
            text_hidden_dim=32,
            timbre_hidden_dim=8,
            num_lyric_encoder_hidden_layers=2,
            num_timbre_encoder_hidden_layers=2,
            **heads,
        )
        torch.nn.init.normal_(condition_encoder.silence_latent)
        transformer = AceStepTransformer1DModel(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            in_channels=24,
            audio_acoustic_hidden_dim=8,
            model_version="base",
            **heads,
        )
        AceStepPipeline(
            vae=AutoencoderOobleck(
                encoder_hidden_size=16,
                downsampling_ratios=[2, 2],
                channel_multiples=[1, 2],
                decoder_channels=8,
                decoder_input_channels=8,
                sampling_rate=16,
            ),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=redraw_zeros(transformer),
            condition_encoder=condition_encoder,
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
        ).save_pretrained(folder)


FAMILY = Family(
    name="ace_step",
    title="ACE-Step 1.5",
    denoiser="transformer",
    denoiser_class="AceStepTransformer1DModel",
    pipeline_class="AceStepPipeline",
    noise=Flow(time=sigma_as_is, shift=3.0),  # the scheduler says 1: the pipeline shifts by itself, by 3
    targets=Targets(
        self_attention=r"layers\.\d+\.self_attn\.(to_q|to_k|to_v|to_out\.0)",
        io=r"proj_in_conv",  # proj_out_conv is transposed, and no adapter can wrap it
        time=r"time_embed(_r)?\.linear_[12]",
        forbidden=r"layers\.\d+\.cross_attn\..+|condition_embedder",
        standard=r"layers\.\d+\.(self|cross)_attn\.(to_q|to_k|to_v|to_out\.0)",
    ),
    modalities=("audio",),
    guidance_scale=7.0,  # adaptive projected guidance; the pipeline ignores it for turbo models
    flavours={
        "xl-turbo": Flavour(
            model="ACE-Step/acestep-v15-xl-turbo-diffusers",
            source="diffusers pipelines/ace_step/pipeline_ace_step.py:89",
            reference=XL,
        ),
        "xl-base": Flavour(
            model="ACE-Step/acestep-v15-xl-base-diffusers",
            source="its model card on the hub: the official repository in the format of diffusers",
            reference=XL,
        ),
    },
    options=(SECONDS, LANGUAGE),
    aliases=("acestep", "ace_step_1.5"),
    limits="text to music alone: no cover, repainting or reference sound; ACE-Step 1 is not in diffusers",
    tiny_size=480,
    tiny=tiny,
)


def tags_and_lyrics(caption: str) -> tuple[str, str]:
    """What a caption says before and behind its first line `[lyrics]`."""
    tags, *rest = LYRICS.split(caption, maxsplit=1)
    return tags.strip(), rest[0].strip() if rest else ""


@hookimpl
def load_components(family: Family, request: LoadRequest) -> Components:
    """Keep the latents of silence, which `predict` needs and the condition encoder holds: `(1, T, C)`."""
    from slider_plugin.loading import load_pipeline_components

    components = load_pipeline_components(family, request)
    components.extras["silence_1TC"] = components.pipeline.condition_encoder.silence_latent.clone()
    return components


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """Lyrics, timbre and tags as one sequence `(T, D)`; encoded one by one, so that nothing is padded."""
    return [{"prompt_embeds": _encoded(components, prompt)} for prompt in prompts]


def _encoded(components: Components, caption: str) -> Tensor:
    """`(T, D)`. Nothing at all is the embedding that guidance uses, which is one token however often it is repeated."""
    import math

    import torch

    pipeline, encoder = components.pipeline, components.pipeline.condition_encoder
    if not caption.strip() and not pipeline.is_turbo:
        return encoder.null_condition_emb[0]  # type: ignore[no-any-return]
    tags, lyrics = tags_and_lyrics(caption)
    device = components.denoiser.device
    text_1TD, text_mask_1T, lyrics_1LD, lyrics_mask_1L = pipeline.encode_prompt(
        [tags],
        [lyrics],
        device,
        vocal_language=components.options[LANGUAGE.name],
        audio_duration=components.options[SECONDS.name],
    )
    frames = math.ceil(REFERENCE_SECONDS * pipeline.latents_per_second)
    embeds_1TD, _ = encoder(
        text_hidden_states=text_1TD,
        text_attention_mask=text_mask_1T,
        lyric_hidden_states=lyrics_1LD,
        lyric_attention_mask=lyrics_mask_1L,
        refer_audio_acoustic_hidden_states_packed=components.extras["silence_1TC"][:, :frames].to(lyrics_1LD),
        refer_audio_order_mask=torch.zeros(1, dtype=torch.long, device=device),
    )
    return embeds_1TD[0]  # type: ignore[no-any-return]


@hookimpl
def encode_images(components: Components, images: Tensor) -> Tensor:
    """Samples `(B, channels, N)` to the mode of the autoencoder, time first as the transformer takes it: `(B, T, C)`."""
    from slider_plugin.loading import posterior_mode

    return posterior_mode(components.pipeline.vae.encode(images)).transpose(1, 2)  # type: ignore[no-any-return]


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """`(B, T, C)`; prompts of different lengths go in one after the other, since padding would be attended to."""
    import torch

    if len({len(c["prompt_embeds"]) for c in conditioning}) > 1:
        each = zip(noisy.split(1), time.split(1), conditioning, strict=True)
        return torch.cat([predict(components, noisy_1TC, time_1, [c]) for noisy_1TC, time_1, c in each])
    velocity_BTC: Tensor = components.denoiser(
        hidden_states=noisy,
        timestep=time,
        timestep_r=time,
        encoder_hidden_states=torch.stack([c["prompt_embeds"] for c in conditioning]),
        context_latents=_context(components, noisy),
        return_dict=False,
    )[0]
    return velocity_BTC


def _context(components: Components, noisy_BTC: Tensor) -> Tensor:
    """Silence as long as the noisy latents, and a mask that lets everything be generated: `(B, T, 2C)`."""
    import torch

    length, silence_1TC = noisy_BTC.shape[1], components.extras["silence_1TC"]
    repeats = -(-length // silence_1TC.shape[1])
    silence_BTC = silence_1TC.repeat(1, repeats, 1)[:, :length].to(noisy_BTC).expand_as(noisy_BTC)
    return torch.cat([silence_BTC, torch.ones_like(silence_BTC)], dim=-1)


@dataclass
class CaptionPipeline:
    """`AceStepPipeline` for captions that may carry lyrics, and for sounds of the length of the option.

    It draws one sound after the other: in a batch the padding of shorter prompts would be attended to.
    """

    pipeline: Any
    seconds: float
    language: str

    def __call__(
        self, prompt: Sequence[str], num_inference_steps: int, guidance_scale: float, generator: Sequence[Any]
    ) -> SimpleNamespace:
        import torch

        sounds = []
        for caption, own_generator in zip(prompt, generator, strict=True):
            tags, lyrics = tags_and_lyrics(caption)
            drawn = self.pipeline(
                prompt=[tags],
                lyrics=[lyrics],
                audio_duration=self.seconds,
                vocal_language=self.language,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=own_generator,
            )
            sounds.append(drawn.audios)
        return SimpleNamespace(audios=torch.cat(sounds))

    def __getattr__(self, name: str) -> Any:
        """Everything else is the pipeline's: its autoencoder, sampling rate, progress bar."""
        return getattr(self.pipeline, name)

    @property
    def scheduler(self) -> Any:
        return self.pipeline.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self.pipeline.scheduler = scheduler


@hookimpl
def build_pipeline(components: Components) -> CaptionPipeline:
    """The pipeline with the call of the host."""
    options = components.options
    return CaptionPipeline(components.pipeline, options[SECONDS.name], options[LANGUAGE.name])

"""Cosmos 1 text to world: the denoiser of Cosmos Predict2 before it turned to flow matching, for videos.

It is preconditioned as in EDM (arXiv 2206.00364, table 1): it sees `x / sqrt(s^2 + d^2)` of `x = d * z + s * noise`, where
d = 0.5 and z are latents of variance 1, and is told `ln(s) / 4`. With cumulative alpha `d^2 / (s^2 + d^2)` this is
`sqrt(alpha) * z + sqrt(1 - alpha) * noise`, and its answer is that of v-prediction with its sign turned, since
`d^2 / (s^2 + d^2) * x + s * d / sqrt(s^2 + d^2) * answer = d * z` (diffusers scheduling_edm_euler.py:191-245).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slider_hooks import Components, Conditioning, Diffusion, Family, Flavour, LoadRequest, UserError, hookimpl
from slider_plugin.common.cosmos import TARGETS, NoChecks

if TYPE_CHECKING:
    from torch import Tensor

DATA = 0.5  # d: standard deviation of the latents in the pipeline
MEAN, SPREAD, LEAST, MOST = 0.0, 1.0, 0.0002, 80.0  # of ln(s), and of s (cosmos-predict1: model_v2w_action.py, EDMSDE)
FPS = 30  # of the pipeline's call
EXAMPLE = "diffusers source: pipelines/cosmos/pipeline_cosmos_text2world.py"


def log_noise(r_B: Tensor) -> Tensor:
    """ln(s), normally distributed where r is drawn evenly from 0..1 (arXiv 2206.00364, table 1, noise distribution)."""
    import torch

    normal_B: Tensor = MEAN + SPREAD * torch.special.ndtri(r_B)
    return normal_B.clamp(math.log(LEAST), math.log(MOST))


def alpha_bar(r_B: Tensor) -> Tensor:
    """`d^2 / (s^2 + d^2)`."""
    squares_B = (2.0 * log_noise(r_B)).exp()
    return DATA**2 / (squares_B + DATA**2)


def told(r_B: Tensor) -> Tensor:
    """`ln(s) / 4`."""
    return log_noise(r_B) / 4.0


def tiny(folder: Path) -> None:
    """Write a random pipeline of real classes: 4x4 latents in two latent frames, 8 tokens."""
    from diffusers import AutoencoderKLCosmos, CosmosTextToWorldPipeline, EDMEulerScheduler

    from slider_plugin.testing import tiny as parts

    with parts.seeded(0):
        text_encoder, tokenizer = parts.t5(hidden_size=16)
        CosmosTextToWorldPipeline(
            vae=AutoencoderKLCosmos(
                encoder_block_out_channels=(8, 8, 8, 8),
                decode_block_out_channels=(8, 8, 8, 8),
                attention_resolutions=(),
                resolution=32,
                num_layers=1,
            ),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=parts.cosmos(max_size=(8, 16, 16)),
            scheduler=EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=DATA),
            safety_checker=NoChecks(),
        ).save_pretrained(folder)


FAMILY = Family(
    name="cosmos1",
    title="Cosmos 1",
    denoiser="transformer",
    denoiser_class="CosmosTransformer3DModel",
    reference={"num_attention_heads": 32, "extra_pos_embed_type": "learnable", "rope_scale": (2.0, 1.0, 1.0)},
    pipeline_class="CosmosTextToWorldPipeline",
    load_kwargs={"safety_checker": NoChecks()},
    call_kwargs={"fps": FPS},
    noise=Diffusion(prediction="v_prediction", sign=-1, alpha_bar=alpha_bar, time=told),
    targets=TARGETS,
    expects={
        "in_channels": (16,),  # video-to-world models have 17: noise and the mask of given frames
        "extra_pos_embed_type": ("learnable",),  # None is Cosmos Predict2
    },
    modalities=("image", "video"),
    guidance_scale=7.0,
    flavours={
        "7b": Flavour(model="nvidia/Cosmos-1.0-Diffusion-7B-Text2World", source=EXAMPLE),
        "14b": Flavour(reference={"num_attention_heads": 40, "num_layers": 36}),
    },
    default_flavour="7b",
    aliases=("cosmos-1",),
    tiny=tiny,
    tiny_frames=9,
    limits="text to world only: video-to-world models are refused; published models need torchvision",
)


@hookimpl
def load_components(family: Family, request: LoadRequest) -> Components:
    """The pipeline, unless this machine lacks what its denoiser calls, or it works at another variance of the latents."""
    from slider_plugin.common.cosmos import load_checked
    from slider_plugin.loading import load_pipeline_components

    components = load_checked(family, request, load_pipeline_components)
    data = components.scheduler.config.get("sigma_data")
    if data != DATA:
        raise UserError(f"{request.model}: its scheduler's sigma_data is {data}, and {family.name} trains models of {DATA}")
    return components


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """T5's 512 tokens, zeros behind the text."""
    from slider_plugin.common.conditioning import per_prompt

    embeds_BTD, _ = components.pipeline.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, device=components.denoiser.device
    )
    return per_prompt(prompt_embeds=embeds_BTD)


@hookimpl
def encode_images(components: Components, images: Tensor) -> Tensor:
    """`(B, 3, F, H, W)` to `(B, C, f, h, w)`, of variance 1: statistics of each channel and latent frame."""
    from slider_plugin.common.latents import normalised_by_channel

    return normalised_by_channel(components.pipeline.vae, images)


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """The model sees the tokens behind the text as well."""
    from slider_plugin.common.conditioning import stacked
    from slider_plugin.common.cosmos import answer

    return answer(components.denoiser, noisy, time, stacked(conditioning, "prompt_embeds"), fps=FPS)

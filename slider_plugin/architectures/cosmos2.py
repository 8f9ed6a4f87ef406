"""Cosmos Predict2, text to image: a transformer for flow matching, conditioned on T5 by cross-attention.

Its pipeline draws in the variance-exploding convention, `x = x0 + s * noise`. What the denoiser sees is `x / (1 + s)`, which is
our noisy latents at `sigma = s / (1 + s)`: it is told this sigma, and what comes back is our velocity, since
`(1 - sigma) * x - sigma * (noise - x0) = x0` (diffusers pipelines/cosmos/pipeline_cosmos2_text2image.py:593-625).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slider_hooks import Components, Conditioning, Family, Flavour, Flow, LoadRequest, hookimpl, sigma_as_is
from slider_plugin.common.cosmos import TARGETS, NoChecks

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = "diffusers source: pipelines/cosmos/pipeline_cosmos2_text2image.py"


def tiny(folder: Path) -> None:
    """Write a random pipeline of real classes: 4x4 latents, 4 tokens."""
    from diffusers import (
        AutoencoderKLWan,
        Cosmos2TextToImagePipeline,
        FlowMatchEulerDiscreteScheduler,
    )

    from slider_plugin.testing import tiny as parts

    with parts.seeded(0):
        text_encoder, tokenizer = parts.t5(hidden_size=16)
        Cosmos2TextToImagePipeline(
            vae=AutoencoderKLWan(base_dim=4, num_res_blocks=1),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=parts.cosmos(rope_scale=(1.0, 4.0, 4.0), extra_pos_embed_type=None),
            scheduler=FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
            safety_checker=NoChecks(),
        ).save_pretrained(folder)


FAMILY = Family(
    name="cosmos2",
    title="Cosmos Predict2",
    denoiser="transformer",
    denoiser_class="CosmosTransformer3DModel",
    pipeline_class="Cosmos2TextToImagePipeline",
    load_kwargs={"safety_checker": NoChecks()},
    noise=Flow(time=sigma_as_is),
    targets=TARGETS,  # diffusers' CosmosControlNetModel is one of Cosmos 2.5
    expects={
        "in_channels": (16,),  # video models have 17: noise and the mask of given frames
        "extra_pos_embed_type": (None,),  # "learnable" is family cosmos1, which is no flow model
        "use_crossattn_projection": (False, None),  # Cosmos 2.5
    },
    reference={"num_attention_heads": 16, "extra_pos_embed_type": None, "rope_scale": (1.0, 4.0, 4.0)},
    guidance_scale=7.0,
    flavours={
        "2b": Flavour(model="nvidia/Cosmos-Predict2-2B-Text2Image", source=EXAMPLE),
        "14b": Flavour(
            model="nvidia/Cosmos-Predict2-14B-Text2Image",
            source=EXAMPLE,
            reference={"num_attention_heads": 40, "num_layers": 36},
        ),
        "cosmos1": Flavour(  # its targets; family cosmos1 trains it
            reference={"num_attention_heads": 32, "extra_pos_embed_type": "learnable", "rope_scale": (2.0, 1.0, 1.0)}
        ),
    },
    default_flavour="2b",
    aliases=("cosmos", "cosmos2image", "cosmos-predict2"),
    tiny=tiny,
    limits="text to image only: video models and Cosmos 2.5 are refused; published models need torchvision",
)


@hookimpl
def load_components(family: Family, request: LoadRequest) -> Components:
    """The pipeline, unless this machine lacks what its denoiser calls."""
    from slider_plugin.common.cosmos import load_checked
    from slider_plugin.loading import load_pipeline_components

    return load_checked(family, request, load_pipeline_components)


@hookimpl
def encode_images(components: Components, images: Tensor) -> Tensor:
    """`(B, 3, H, W)` to `(B, C, 1, h, w)`, one frame, normalised by the statistics of each channel."""
    from slider_plugin.common.latents import normalised_by_channel

    return normalised_by_channel(components.pipeline.vae, images.unsqueeze(2))


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """T5 gives 512 tokens, zeros behind the text, and the model sees them all."""
    from slider_plugin.common.conditioning import stacked
    from slider_plugin.common.cosmos import answer

    return answer(components.denoiser, noisy, time, stacked(conditioning, "prompt_embeds"))

"""PixArt Sigma: a transformer that predicts noise and its variance, conditioned on T5 by cross-attention.

Conventions: diffusers pipelines/pixart_alpha/pipeline_pixart_sigma.py:833-879.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slider_hooks import Components, Conditioning, Diffusion, Family, Flavour, Layout, Targets, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


def tiny(folder: Path) -> None:
    """Write a random pipeline of real classes: 8x8 latents, 16 tokens."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    from slider_plugin.testing.tiny import autoencoder, redraw_zeros, seeded, t5

    with seeded(0):
        text_encoder, tokenizer = t5(hidden_size=32)
        transformer = PixArtTransformer2DModel(
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=32,
            sample_size=8,
            use_additional_conditions=False,
        )
        PixArtSigmaPipeline(
            vae=autoencoder(latent_channels=4, shift_factor=None),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=redraw_zeros(transformer),
            scheduler=DPMSolverMultistepScheduler(),
        ).save_pretrained(folder)


FAMILY = Family(
    name="pixart",
    title="PixArt Sigma",
    denoiser="transformer",
    denoiser_class="PixArtTransformer2DModel",
    pipeline_class="PixArtSigmaPipeline",
    # Validation draws what training saw: the captions as they are, in the size that is asked for.
    call_kwargs={"clean_caption": False, "use_resolution_binning": False},
    noise=Diffusion(),
    targets=Targets(
        self_attention=r"transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)",
        io=r"pos_embed\.proj|proj_out",
        time=r"adaln_single\.emb\.timestep_embedder\.linear_[12]",
        forbidden=r".*\.attn2\..+|caption_projection\..+",
        standard=r"transformer_blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
    ),
    reference={"caption_channels": 4096, "sample_size": 128, "use_additional_conditions": False},
    expects={
        "in_channels": (4,),
        "_class_name": ("PixArtTransformer2DModel", "Transformer2DModel"),  # the second is what published folders say
        "use_additional_conditions": (False, None),  # PixArt Alpha is told sizes as well
    },
    guidance_scale=4.5,
    flavours={
        "1024": Flavour(
            model="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
            source="diffusers pipelines/pixart_alpha/pipeline_pixart_sigma.py:114, an example",
        ),
        "512": Flavour(
            model="PixArt-alpha/PixArt-Sigma-XL-2-512-MS",
            source="diffusers pipelines/pixart_alpha/pipeline_pixart_sigma.py:112, an example",
            reference={"sample_size": 64},
        ),
    },
    default_flavour="1024",
    layouts={"comfyui": Layout(prefix="transformer.", programs="ComfyUI", reads_diffusers=True)},
    aliases=("pixart_sigma",),
    tiny=tiny,
)


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """T5's tokens `(T, D)`, without padding: prompts differ in length."""
    from slider_plugin.common.conditioning import without_padding

    embeds_BTD, mask_BT, _, _ = components.pipeline.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, device=components.denoiser.device
    )
    return [{"prompt_embeds": embeds_TD} for embeds_TD in without_padding(embeds_BTD, mask_BT)]


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """The noise `(B, C, h, w)`: the first half of the channels; the variance behind it is for samplers that ask."""
    from slider_plugin.common.conditioning import padded

    embeds_BTD, mask_BT = padded(conditioning, "prompt_embeds")
    output: Tensor = components.denoiser(
        noisy,
        encoder_hidden_states=embeds_BTD,
        encoder_attention_mask=mask_BT,
        timestep=time,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    return output[:, : noisy.shape[1]]

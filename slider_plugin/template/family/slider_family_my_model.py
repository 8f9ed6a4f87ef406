"""My Model, a family of slider-plugin.

A transformer for flow matching in a diffusers pipeline folder, conditioned on two CLIP encoders and T5. This family works as it
stands, on diffusers' Stable Diffusion 3 classes; the comments say what to replace for your own model.

torch and diffusers are imported inside the functions, because this file is read before any model is loaded.

Shapes: B batch, C channels, h and w latent rows and columns, T text tokens, D and P features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slider_hooks import Components, Conditioning, Family, Flow, Targets, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


def tiny(folder: Path) -> None:
    """Write a random pipeline of real classes in miniature: 16x16 latents for 64x64 pixels, about a megabyte.

    The tests of this package and the example train on it. Replace the classes by yours, with the smallest sizes that they
    take; `slider_plugin.testing.tiny` has text encoders, tokenizers and autoencoders.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    from slider_plugin.testing import tiny as parts

    with parts.seeded(0):
        text_encoder, tokenizer = parts.clip(hidden_size=8, projection=True)
        text_encoder_2, tokenizer_2 = parts.clip(hidden_size=16, projection=True)
        text_encoder_3, tokenizer_3 = parts.t5(hidden_size=32)
        transformer = SD3Transformer2DModel(
            sample_size=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=24,
            pos_embed_max_size=16,
        )
        StableDiffusion3Pipeline(
            vae=parts.autoencoder(latent_channels=16),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
            # A fresh model's gates are zero and would hide what lies behind them.
            transformer=parts.redraw_zeros(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        ).save_pretrained(folder)


FAMILY = Family(
    # Equal to the entry point in pyproject.toml; it is `model_family` in a configuration.
    name="my_model",
    title="My Model",
    denoiser="transformer",  # the pipeline component that is trained
    denoiser_class="SD3Transformer2DModel",  # `_class_name` in its config.json, or "package.module:Class"
    pipeline_class="StableDiffusion3Pipeline",  # leave it out to take the class that the folder names
    # Flow matching: the model answers noise - image, and is told sigma on the scale 0..1000. A model that answers the negative
    # states sign=-1, one that is told sigma itself time=sigma_as_is. A model that predicts noise or v states Diffusion().
    noise=Flow(),
    # Regular expressions over whole module names; `slider targets --probe FOLDER` proposes them.
    targets=Targets(
        self_attention=r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",  # image tokens alone go through these
        io=r"pos_embed\.proj|proj_out",
        time=r"time_text_embed\.timestep_embedder\.linear_[12]",
        # Whatever sees text alone: a slider target that matches is an error.
        forbidden=r"context_embedder|time_text_embed\.text_embedder\..+|.*\.(add_[qkv]_proj|to_add_out)|.*_context\..+",
        standard=r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out)",
    ),
    # The published model as arguments of its class, for `slider targets`: built without memory or download.
    reference={"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
    expects={"in_channels": (16,)},  # values of the denoiser's config.json that this family trains; others are refused
    guidance_scale=7.0,  # of validation images
    tiny=tiny,
    tiny_size=64,
)


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """Tokens `(T, D)` and a pooled embedding `(P,)` for each prompt.

    The default keeps the first result of the pipeline's `encode_prompt` as `prompt_embeds`. This model wants the pooled one
    too; a model that masks its padding keeps its tokens without it (`slider_plugin.common.conditioning.without_padding`).
    """
    from slider_plugin.common.conditioning import per_prompt

    embeds_BTD, _, pooled_BP, _ = components.pipeline.encode_prompt(
        list(prompts), None, None, device=components.denoiser.device, do_classifier_free_guidance=False
    )
    return per_prompt(prompt_embeds=embeds_BTD, pooled=pooled_BP)


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """The denoiser's answer `(B, C, h, w)`, called as the published pipeline calls it.

    The default calls `denoiser(noisy, time, encoder_hidden_states=...)`, which is enough for a UNet and many transformers. A
    model that takes tokens packs and unpacks them here (`slider_plugin.common.packing`).
    """
    from slider_plugin.common.conditioning import stacked

    output: Tensor = components.denoiser(
        hidden_states=noisy,
        timestep=time,
        encoder_hidden_states=stacked(conditioning, "prompt_embeds"),
        pooled_projections=stacked(conditioning, "pooled"),
        return_dict=False,
    )[0]
    return output


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Write the tiny model of this family, for a first training.")
    parser.add_argument("folder", type=Path)
    tiny(parser.parse_args().folder)

"""LongCat-Image: Flux's double and single blocks for flow matching, conditioned on Qwen2.5-VL.

Conventions: diffusers pipelines/longcat_image/pipeline_longcat_image.py:270-410, 545-640. The pipeline can have its prompts
rewritten by its text encoder first; a slider's captions are meant as they are, so that part is neither loaded nor called.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slider_hooks import Components, Conditioning, Family, Flavour, Flow, Targets, hookimpl, sigma_as_is

if TYPE_CHECKING:
    from torch import Tensor

HUB_IDS = "diffusers docs: api/pipelines/longcat_image.md"


def tiny(folder: Path) -> None:
    """Write a random pipeline of real classes: 8x8 latents, 16 tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LongCatImagePipeline, LongCatImageTransformer2DModel

    from slider_plugin.testing.tiny import autoencoder, qwen2_5_vl, redraw_zeros, seeded

    with seeded(0):
        text_encoder, tokenizer = qwen2_5_vl(hidden_size=32)
        transformer = LongCatImageTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=[4, 4, 8],
        )
        LongCatImagePipeline(
            vae=autoencoder(latent_channels=16),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_processor=None,
            transformer=redraw_zeros(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        ).save_pretrained(folder)


FAMILY = Family(
    name="longcat_image",
    title="LongCat-Image",
    denoiser="transformer",
    denoiser_class="LongCatImageTransformer2DModel",
    pipeline_class="LongCatImagePipeline",
    load_kwargs={"text_processor": None},
    call_kwargs={"enable_prompt_rewrite": False},
    noise=Flow(time=sigma_as_is),
    targets=Targets(
        self_attention=r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",
        joint_attention=r"single_transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v)",
        io=r"x_embedder|proj_out",
        time=r"time_embed\.timestep_embedder\.linear_[12]",
        forbidden=r"context_embedder|.*\.(add_[qkv]_proj|to_add_out)|.*_context\..+",
        standard=r"(single_)?transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",
    ),
    reference={"num_layers": 10, "num_single_layers": 20},
    expects={"in_channels": (64,)},
    guidance_scale=4.5,
    flavours={
        "final": Flavour(model="meituan-longcat/LongCat-Image", source=HUB_IDS),
        "dev": Flavour(model="meituan-longcat/LongCat-Image-Dev", source=HUB_IDS),
    },
    default_flavour="final",
    tiny=tiny,
)


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """The last hidden state of Qwen2.5-VL, `(T, D)`: 512 tokens with their padding, which the denoiser sees as well."""
    embeds_BTD, _ = components.pipeline.encode_prompt(list(prompts))
    return [{"prompt_embeds": embeds_TD} for embeds_TD in embeds_BTD]


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """Tokens are 2x2 squares of latents; text lies on the diagonal of positions, the image begins at its end."""
    import torch

    from slider_plugin.common.conditioning import stacked
    from slider_plugin.common.packing import grid_ids, pack_2x2, unpack_2x2

    h, w = noisy.shape[-2:]
    embeds_BTD = stacked(conditioning, "prompt_embeds")
    T = embeds_BTD.shape[1]
    # Positions beyond 256 need more digits than half precision has.
    axes_3 = torch.tensor([0.0, 1.0, 1.0], device=noisy.device)
    tokens_BND = components.denoiser(
        hidden_states=pack_2x2(noisy),
        timestep=time,
        encoder_hidden_states=embeds_BTD,
        txt_ids=torch.arange(T, device=noisy.device)[:, None] * axes_3,
        img_ids=grid_ids(h // 2, w // 2, like=axes_3) + axes_3.new_tensor([1, T, T]),
        return_dict=False,
    )[0]
    return unpack_2x2(tokens_BND, h, w)


@hookimpl
def build_pipeline(components: Components) -> Any:
    """The same pipeline with a negative prompt for each prompt: by itself it would encode one for all of a batch."""
    from diffusers import LongCatImagePipeline

    class Drawing(LongCatImagePipeline):
        @functools.wraps(LongCatImagePipeline.__call__)
        def __call__(self, **arguments: Any) -> Any:
            return super().__call__(**{"negative_prompt": [""] * len(arguments["prompt"]), **arguments})

    return Drawing(**components.pipeline.components)

"""Krea 2: a single-stream transformer for flow matching, conditioned on twelve hidden states of Qwen3-VL for every token.

Conventions: diffusers pipelines/krea2/pipeline_krea2.py:240-262, 600-711. Its guidance counts from 0, one less than usual. Raw
is the model to train on; Turbo is distilled, and draws with guidance 0 (diffusers examples/dreambooth/README_krea2.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slider_hooks import Components, Conditioning, Family, Flavour, Flow, Layout, Targets, hookimpl, sigma_as_is

if TYPE_CHECKING:
    from torch import Tensor

README = "diffusers examples/dreambooth/README_krea2.md"


def tiny(folder: Path) -> None:
    """Write a random pipeline of real classes: 8x8 latents, 16 tokens, three hidden states."""
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel

    from slider_plugin.testing.tiny import qwen_tokenizer, redraw_zeros, seeded

    with seeded(0):
        tokenizer = qwen_tokenizer()
        transformer = Krea2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=32,
            timestep_embed_dim=16,
            text_hidden_dim=16,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=16,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 2, 2),
        )
        Krea2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
            vae=AutoencoderKLQwenImage(
                base_dim=4,
                z_dim=4,
                dim_mult=[1, 1, 1],
                num_res_blocks=1,
                temperal_downsample=[False, True],
                latents_mean=[0.5, -0.5, 0.25, 0.0],
                latents_std=[2.0, 1.5, 0.5, 1.0],
            ),
            text_encoder=_tiny_text_encoder(len(tokenizer)),
            tokenizer=tokenizer,
            transformer=redraw_zeros(transformer),
            text_encoder_select_layers=(1, 2, 3),
        ).save_pretrained(folder)


def _tiny_text_encoder(vocab_size: int) -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLModel

    from slider_plugin.testing.tiny import decoder_sizes

    positions = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    text = decoder_sizes(16, vocab_size) | {"max_position_embeddings": 1024, "rope_parameters": positions}
    sight: dict[str, Any] = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    sight |= {"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=sight))


FAMILY = Family(
    name="krea2",
    title="Krea 2",
    denoiser="transformer",
    denoiser_class="Krea2Transformer2DModel",
    pipeline_class="Krea2Pipeline",
    noise=Flow(time=sigma_as_is),
    targets=Targets(
        joint_attention=r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_gate|to_out\.0)",
        io=r"img_in|final_layer\.linear",
        time=r"time_embed\.linear_[12]",
        forbidden=r"text_fusion\..+|txt_in\..+",
        standard=r".*\.attn\.(to_q|to_k|to_v|to_gate|to_out\.0)",
    ),
    guidance_scale=4.5,
    flavours={
        "raw": Flavour(model="krea/Krea-2-Raw", source=README),
        "turbo": Flavour(model="krea/Krea-2-Turbo", source=README),
    },
    default_flavour="raw",
    layouts={"comfyui": Layout(prefix="transformer.", programs="ComfyUI", reads_diffusers=True)},
    aliases=("krea_2",),
    tiny=tiny,
)


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """Hidden states `(T, layers, D)` without padding, which the model masks and gives no position of its own."""
    from slider_plugin.common.conditioning import without_padding

    embeds_BTLD, mask_BT = components.pipeline.encode_prompt(list(prompts), device=components.denoiser.device)
    return [{"prompt_embeds": embeds_TLD} for embeds_TLD in without_padding(embeds_BTLD, mask_BT)]


@hookimpl
def encode_images(components: Components, images: Tensor) -> Tensor:
    """Images `(B, 3, H, W)` as videos of one frame to latents `(B, C, h, w)`, normalised by channel."""
    from slider_plugin.common.latents import normalised_by_channel

    return normalised_by_channel(components.pipeline.vae, images.unsqueeze(2)).squeeze(2)


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """Tokens are 2x2 squares of latents; all text is at position 0."""
    import torch

    from slider_plugin.common.conditioning import padded
    from slider_plugin.common.packing import grid_ids, pack_2x2, unpack_2x2

    h, w = noisy.shape[-2:]
    embeds_BTLD, mask_BT = padded(conditioning, "prompt_embeds")
    text_T3 = torch.zeros(mask_BT.shape[1], 3, device=noisy.device)
    tokens_BND = components.denoiser(
        hidden_states=pack_2x2(noisy),
        encoder_hidden_states=embeds_BTLD,
        timestep=time,
        position_ids=torch.cat([text_T3, grid_ids(h // 2, w // 2, like=text_T3)]),
        encoder_attention_mask=mask_BT.bool(),
        return_dict=False,
    )[0]
    return unpack_2x2(tokens_BND, h, w)

"""Qwen-Image: a transformer of double blocks for flow matching, conditioned on Qwen2.5-VL.

Its autoencoder is one of video, which gets a single frame. Conventions: diffusers
pipelines/qwenimage/pipeline_qwenimage.py:588-744, examples/dreambooth/train_dreambooth_lora_qwen_image.py:1737-1790.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slider_hooks import Components, Conditioning, Family, Flavour, Flow, Layout, Targets, hookimpl, sigma_as_is

if TYPE_CHECKING:
    from torch import Tensor


def tiny(folder: Path) -> None:
    """Write a random pipeline of real classes: 4x4 latents, 4 tokens."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    from slider_plugin.testing.tiny import qwen2_5_vl, redraw_zeros, seeded

    with seeded(0):
        text_encoder, tokenizer = qwen2_5_vl(hidden_size=32)
        transformer = QwenImageTransformer2DModel(
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 4, 8),
        )
        QwenImagePipeline(
            vae=AutoencoderKLQwenImage(base_dim=4, num_res_blocks=1),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=redraw_zeros(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9, shift_terminal=0.02),
        ).save_pretrained(folder)


FAMILY = Family(
    name="qwen_image",
    title="Qwen-Image",
    denoiser="transformer",
    denoiser_class="QwenImageTransformer2DModel",
    pipeline_class="QwenImagePipeline",
    noise=Flow(time=sigma_as_is),
    targets=Targets(
        self_attention=r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",
        io=r"img_in|proj_out",
        time=r"time_text_embed\.timestep_embedder\.linear_[12]",
        forbidden=r"txt_in|.*\.(add_[qkv]_proj|to_add_out)|.*\.txt_(mod|mlp)\..+",
        standard=r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",
        controlnet=r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)|img_in"
        r"|time_text_embed\.timestep_embedder\.linear_[12]",
    ),
    controlnet_class="QwenImageControlNetModel",
    expects={  # layered and newer edit models want more images
        "guidance_embeds": (False, None),
        "zero_cond_t": (False, None),
        "use_additional_t_cond": (False, None),
        "use_layer3d_rope": (False, None),
    },
    guidance_scale=4.0,
    flavours={"1.0": Flavour(model="Qwen/Qwen-Image", source="diffusers docs: api/pipelines/qwenimage.md")},
    default_flavour="1.0",
    # Tried with diffusers' loader, and held against ComfyUI's table of names: it takes `transformer.` as well.
    layouts={"comfyui": Layout(prefix="diffusion_model.", programs="ComfyUI", reads_diffusers=True)},
    aliases=("qwen", "qwenimage"),
    tiny=tiny,
)


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """The last hidden state of Qwen2.5-VL behind its system prompt, `(T, D)`, without padding: prompts differ in length."""
    from slider_plugin.common.conditioning import without_padding

    embeds_BTD, mask_BT = components.pipeline.encode_prompt(list(prompts), device=components.denoiser.device)
    rows = embeds_BTD if mask_BT is None else without_padding(embeds_BTD, mask_BT)  # None: all are equally long
    return [{"prompt_embeds": embeds_TD} for embeds_TD in rows]


@hookimpl
def encode_images(components: Components, images: Tensor) -> Tensor:
    """`(B, 3, H, W)` to `(B, C, h, w)`, normalised by channel."""
    from slider_plugin.common.latents import normalised_by_channel

    return normalised_by_channel(components.pipeline.vae, images.unsqueeze(2)).squeeze(2)


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """Tokens are 2x2 squares of latents; the positions follow from the number of rows and columns."""
    from slider_plugin.common.conditioning import padded
    from slider_plugin.common.packing import pack_2x2, unpack_2x2

    B, _, h, w = noisy.shape
    embeds_BTD, mask_BT = padded(conditioning, "prompt_embeds")
    equally_long = len({len(c["prompt_embeds"]) for c in conditioning}) == 1
    tokens_BND = components.denoiser(
        hidden_states=pack_2x2(noisy),
        timestep=time,
        encoder_hidden_states=embeds_BTD,
        encoder_hidden_states_mask=None if equally_long else mask_BT,  # attention is faster without a mask
        img_shapes=[[(1, h // 2, w // 2)]] * B,
        return_dict=False,
    )[0]
    return unpack_2x2(tokens_BND, h, w)


@hookimpl
def build_pipeline(components: Components) -> Any:
    """The pipeline with its guidance under the name that other pipelines give it, and on, which takes a negative prompt."""
    from diffusers import QwenImagePipeline

    class WithGuidanceScale(QwenImagePipeline):
        def __call__(
            self,
            prompt: list[str],
            height: int,
            width: int,
            num_inference_steps: int,
            guidance_scale: float,
            generator: Any,
            negative_prompt: list[str] | None = None,
        ) -> Any:
            negative = negative_prompt or [" "] * len(prompt)
            return super().__call__(prompt, negative, guidance_scale, height, width, num_inference_steps, generator=generator)

    return WithGuidanceScale(**components.pipeline.components)


@hookimpl
def load_controlnet(family: Family, components: Components, model: str | None) -> Any:
    """A fresh one has the published number of blocks, 5, or all there are."""
    from slider_plugin.common.controlnet import fresh_from_transformer, load_trained, refuse_config

    if model:
        controlnet = load_trained(family, components, model)
        refuse_config(controlnet, {"extra_condition_channels": "it is one for inpainting, which wants a mask, too"})
        return controlnet
    own = components.denoiser.config
    return fresh_from_transformer(
        family,
        components,
        num_layers=min(5, own.num_layers),
        attention_head_dim=own.attention_head_dim,
        num_attention_heads=own.num_attention_heads,
    )


@hookimpl
def encode_control(latents: Tensor) -> Tensor:
    """Tokens of latents."""
    from slider_plugin.common.packing import pack_2x2

    return pack_2x2(latents)


@hookimpl
def control(components: Components, shown: Tensor, strength: float, call: Mapping[str, Any]) -> Mapping[str, Any]:
    """One residual for some blocks each."""
    from slider_plugin.common.controlnet import call_controlnet

    return {"controlnet_block_samples": call_controlnet(components, shown, strength, call)}

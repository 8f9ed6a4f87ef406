"""ERNIE-Image: a single-stream transformer for flow matching, conditioned on Ministral 3.

Its latents are 2x2 squares as channels, normalised by the running statistics of the autoencoder's batch norm with an epsilon
of 1e-5, whatever its configuration says: diffusers pipelines/ernie_image/pipeline_ernie_image.py:148-182, 320-388.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slider_hooks import Components, Conditioning, Family, Flavour, Flow, Targets, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 1e-5
DOCS = "diffusers docs: api/pipelines/ernie_image.md"
PUBLISHED = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_layers": 36,
    "ffn_hidden_size": 12288,
    "text_in_dim": 3072,
}


def tiny(folder: Path) -> None:
    """Write a random pipeline of real classes: 32x32 pixels are 4x4 latents of 16 channels."""
    from diffusers import (
        AutoencoderKLFlux2,
        ErnieImagePipeline,
        ErnieImageTransformer2DModel,
        FlowMatchEulerDiscreteScheduler,
    )

    from slider_plugin.testing.tiny import qwen_tokenizer, redraw_zeros, seeded

    with seeded(0):
        tokenizer = qwen_tokenizer()
        vae = AutoencoderKLFlux2(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=2,
            sample_size=32,
        )
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2.0)
        transformer = ErnieImageTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=32,
            in_channels=16,
            out_channels=16,
            text_in_dim=24,
            rope_axes_dim=(8, 4, 4),
        )
        ErnieImagePipeline(
            transformer=redraw_zeros(transformer),
            vae=vae,
            text_encoder=_tiny_text_encoder(len(tokenizer)),
            tokenizer=tokenizer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        ).save_pretrained(folder)


def _tiny_text_encoder(vocab_size: int) -> Any:
    from transformers import Mistral3Config, Mistral3Model

    from slider_plugin.testing.tiny import decoder_sizes

    text = decoder_sizes(24, vocab_size) | {"model_type": "ministral3"}
    sight = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sight |= {"num_attention_heads": 2, "head_dim": 8, "image_size": 16, "patch_size": 4}
    return Mistral3Model(Mistral3Config(text_config=text, vision_config=sight))


FAMILY = Family(
    name="ernie",
    title="ERNIE-Image",
    denoiser="transformer",
    denoiser_class="ErnieImageTransformer2DModel",
    pipeline_class="ErnieImagePipeline",
    # A language model that rewrites prompts, differently each time: training and comparing want what was written.
    load_kwargs={"pe": None, "pe_tokenizer": None},
    call_kwargs={"use_pe": False},
    noise=Flow(),
    targets=Targets(
        joint_attention=r"layers\.\d+\.self_attention\.(to_q|to_k|to_v|to_out\.0)",
        io=r"x_embedder\.proj|final_linear",
        time=r"time_embedding\.linear_[12]",
        forbidden=r"text_proj",
        standard=r"layers\.\d+\.self_attention\.(to_q|to_k|to_v|to_out\.0)",
    ),
    expects={"patch_size": (1,)},
    guidance_scale=4.0,
    flavours={
        "base": Flavour(model="baidu/ERNIE-Image", source=DOCS, reference=PUBLISHED),
        "turbo": Flavour(model="baidu/ERNIE-Image-Turbo", source=DOCS, reference=PUBLISHED),
    },
    aliases=("ernie_image",),
    tiny=tiny,
)


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """The last but one hidden state `(T, D)`, without padding: prompts differ in length."""
    embeds = components.pipeline.encode_prompt(list(prompts), device=components.denoiser.device)
    return [{"prompt_embeds": embeds_TD} for embeds_TD in embeds]


@hookimpl
def encode_images(components: Components, images: Tensor) -> Tensor:
    """2x2 squares of the posterior's mode as channels, normalised by channel: `(B, 4C, h/2, w/2)`."""
    from slider_plugin.common.packing import pack_2x2
    from slider_plugin.loading import posterior_mode

    vae = components.pipeline.vae
    z_BChw: Tensor = posterior_mode(vae.encode(images))
    h, w = z_BChw.shape[-2:]
    squares = pack_2x2(z_BChw).transpose(1, 2).unflatten(2, (h // 2, w // 2))
    mean, variance = (values.view(1, -1, 1, 1).to(squares) for values in (vae.bn.running_mean, vae.bn.running_var))
    normalised: Tensor = (squares - mean) / (variance + EPSILON).sqrt()
    return normalised


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """Latents `(B, C, h, w)` go in as they are; the transformer masks what lies behind each prompt's length."""
    from slider_plugin.common.conditioning import padded

    embeds_BTD, mask_BT = padded(conditioning, "prompt_embeds")
    velocity: Tensor = components.denoiser(
        hidden_states=noisy,
        timestep=time,
        text_bth=embeds_BTD,
        text_lens=mask_BT.sum(1),
        return_dict=False,
    )[0]
    return velocity

"""Kolors: the UNet of SDXL, conditioned on ChatGLM3 through a projection of its own; 1100 time steps.

Conventions: diffusers pipelines/kolors/pipeline_kolors.py:285-330,880-1010.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from slider_hooks import Components, Conditioning, Diffusion, Family, Flavour, LoadRequest, UserError, hookimpl
from slider_plugin.common.unet import TARGETS

if TYPE_CHECKING:
    from torch import Tensor


def tiny(folder: Path) -> None:
    """Write a random pipeline: real classes, a real SentencePiece tokenizer, 8x8 latents, 256 tokens."""
    from tempfile import TemporaryDirectory

    _need_sentencepiece()
    from diffusers import KolorsPipeline

    from slider_plugin.testing import tiny as parts

    with parts.seeded(0), TemporaryDirectory() as vocabulary:
        text_encoder, tokenizer = _chatglm(Path(vocabulary), hidden_size=16)
        unet = parts.sdxl_unet(encoder_hid_dim=16, encoder_hid_dim_type="text_proj")
        KolorsPipeline(
            vae=parts.autoencoder(latent_channels=4, shift_factor=None),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=parts.redraw_zeros(unet),
            scheduler=parts.ddim(num_train_timesteps=1100, beta_end=0.014),
        ).save_pretrained(folder)


def _chatglm(folder: Path, hidden_size: int) -> tuple[object, object]:
    """A ChatGLM text encoder and its tokenizer, whose vocabulary lies in a folder until it is saved."""
    import io

    import torch
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
    from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer
    from sentencepiece import SentencePieceTrainer

    from slider_plugin.testing.tiny import WORDS

    pieces = io.BytesIO()  # a file would be told its own path
    SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS),
        model_writer=pieces,
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(pieces.getvalue())
    tokenizer = ChatGLMTokenizer(str(folder / "tokenizer.model"))
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=tokenizer.vocab_size,
        hidden_size=hidden_size,
        ffn_hidden_size=2 * hidden_size,
        kv_channels=8,
        num_attention_heads=2,
        multi_query_attention=True,
        seq_length=256,
        original_rope=True,
    )
    model = ChatGLMModel(config)
    with torch.no_grad():  # its class leaves the memory of its weights as it finds it
        for parameter in model.parameters():
            parameter.normal_(mean=float(parameter.ndim == 1), std=0.1)
    return model, tokenizer


def _need_sentencepiece() -> None:
    """Raise UserError where the tokenizer of ChatGLM3 cannot work."""
    from importlib.util import find_spec

    if find_spec("sentencepiece") is None:
        raise UserError("Kolors reads its prompts with SentencePiece, which is not installed: pip install sentencepiece")


FAMILY = Family(
    name="kolors",
    title="Kolors",
    denoiser="unet",
    denoiser_class="UNet2DConditionModel",
    pipeline_class="KolorsPipeline",
    noise=Diffusion(),
    targets=replace(TARGETS, controlnet=""),  # diffusers has no ControlNet pipeline for it
    reference={
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 5632,
        "use_linear_projection": True,
        "encoder_hid_dim": 4096,
        "encoder_hid_dim_type": "text_proj",
    },
    expects={
        "in_channels": (4,),  # 9 wants a mask
        "addition_embed_type": ("text_time",),
        "encoder_hid_dim_type": ("text_proj",),  # None is SDXL
    },
    guidance_scale=5.0,
    flavours={
        "1.0": Flavour(model="Kwai-Kolors/Kolors-diffusers", source="diffusers pipelines/kolors/pipeline_kolors.py"),
    },
    default_flavour="1.0",
    tiny=tiny,
)


@hookimpl
def load_components(family: Family, request: LoadRequest) -> Components:
    """The default's, once the tokenizer's library is there."""
    from slider_plugin.loading import load_pipeline_components

    _need_sentencepiece()
    return load_pipeline_components(family, request)


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """The last but one hidden state of ChatGLM3, `(T, D)`, padded at its front, and the last of its last token, `(P,)`."""
    from slider_plugin.common.sdxl import tokens_and_pooled

    return tokens_and_pooled(components, prompts)


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """The UNet is told the size of the image as well."""
    from slider_plugin.common.sdxl import predict_at_size

    return predict_at_size(components, noisy, time, conditioning)

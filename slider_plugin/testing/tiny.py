"""Parts of tiny random pipelines: real diffusers and transformers classes, built from configs, for `Family.tiny`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

M = TypeVar("M", bound=torch.nn.Module)

WORDS = ("a photo of one red green blue large small circle square on the left right background in dim bright light",)
CHAT_TEMPLATE = (  # the user and generation turns of Qwen3's own template
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw the weights built inside from one seed and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def redraw_zeros(model: M, std: float = 0.02) -> M:
    """Draw every all-zero parameter anew: a fresh model's zero gates would hide what lies behind them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=std)
    return model


def autoencoder(latent_channels: int, shift_factor: float | None = 0.1, blocks: int = 3) -> AutoencoderKL:
    """A quarter of the side, as `(H, W)` 64 to `(h, w)` 16; an eighth with 4 blocks, which some pipelines take for granted."""
    return AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=2,
        sample_size=32,
        scaling_factor=0.5,
        shift_factor=shift_factor,
    )


def unet(**changes: Any) -> UNet2DConditionModel:
    """The denoiser of Stable Diffusion and its descendants, for 8x8 latents; `changes` are arguments of its class."""
    sizes = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**sizes | changes)


def ddim(**changes: Any) -> DDIMScheduler:
    """A scheduler over the noise of Stable Diffusion; `changes` are arguments of its class."""
    noise = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return DDIMScheduler(**noise | {"clip_sample": False, "steps_offset": 1} | changes)


def trained_tokenizer(kind: Any, vocab_size: int = 400, **kwargs: Any) -> Any:
    """A small tokenizer of a transformers class, trained on a handful of words."""
    return kind().train_new_from_iterator(WORDS, vocab_size=vocab_size, **kwargs)


def clip(hidden_size: int, length: int = 24, projection: bool = False) -> tuple[Any, CLIPTokenizer]:
    """A CLIP text encoder (with its projection, if asked) and its tokenizer, which has a token for every byte."""
    tokenizer = trained_tokenizer(CLIPTokenizer, vocab_size=560)
    tokenizer.model_max_length = length
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=hidden_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config), tokenizer


def t5(hidden_size: int, kind: Literal["t5", "umt5"] = "t5") -> tuple[Any, T5Tokenizer]:
    """A T5 (or UMT5) encoder and its tokenizer."""
    tokenizer = trained_tokenizer(T5Tokenizer)
    config_class, model_class = (T5Config, T5EncoderModel) if kind == "t5" else (UMT5Config, UMT5EncoderModel)
    config = config_class(
        vocab_size=len(tokenizer),
        d_model=hidden_size,
        d_kv=8,
        d_ff=2 * hidden_size,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model_class(config), tokenizer


def decoder_sizes(hidden_size: int, vocab_size: int) -> dict[str, Any]:
    """The arguments that the configurations of small language models share (Llama, Gemma, Mistral, Qwen)."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 512,
    }


def gemma2(hidden_size: int) -> tuple[Gemma2Model, GemmaTokenizer]:
    """A Gemma 2 text encoder and its tokenizer."""
    tokenizer = trained_tokenizer(GemmaTokenizer)
    tokenizer.padding_side = "right"
    return Gemma2Model(Gemma2Config(**decoder_sizes(hidden_size, len(tokenizer)), query_pre_attn_scalar=16)), tokenizer


def qwen_tokenizer(chat_template: str = CHAT_TEMPLATE, extra: Sequence[str] = ()) -> Qwen2Tokenizer:
    """A Qwen tokenizer with its special tokens and a chat template."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *extra]
    tokenizer = trained_tokenizer(Qwen2Tokenizer, new_special_tokens=special)
    tokenizer.chat_template = chat_template
    tokenizer.padding_side = "right"
    return tokenizer


def qwen3(hidden_size: int) -> tuple[Qwen3Model, Qwen2Tokenizer]:
    """A Qwen3 text encoder and its tokenizer with the chat template that Z-Image's pipeline calls."""
    tokenizer = qwen_tokenizer()
    return Qwen3Model(Qwen3Config(**decoder_sizes(hidden_size, len(tokenizer)))), tokenizer

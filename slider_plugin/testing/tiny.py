"""Parts of tiny random pipelines: real diffusers and transformers classes, built from configs, for `Family.tiny`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, Qwen2Tokenizer, Qwen3Config, Qwen3Model

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


def autoencoder(latent_channels: int, shift_factor: float | None = 0.1) -> AutoencoderKL:
    """A quarter of the side, as `(H, W)` 64 to `(h, w)` 16."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=2,
        sample_size=32,
        scaling_factor=0.5,
        shift_factor=shift_factor,
    )


def clip(hidden_size: int, length: int = 24) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """A CLIP text encoder and its tokenizer; every byte has a token, so that any prompt can be encoded."""
    tokenizer: Any = CLIPTokenizer().train_new_from_iterator(WORDS, vocab_size=560)
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
    return CLIPTextModel(config), tokenizer


def qwen3(hidden_size: int) -> tuple[Qwen3Model, Qwen2Tokenizer]:
    """A Qwen3 text encoder and its tokenizer with the chat template that Z-Image's pipeline calls."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer: Any = Qwen2Tokenizer().train_new_from_iterator(WORDS, vocab_size=400, new_special_tokens=special)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.padding_side = "right"
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
    )
    return Qwen3Model(config), tokenizer

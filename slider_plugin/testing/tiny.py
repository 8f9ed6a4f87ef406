"""Parts of tiny random pipelines: real diffusers and transformers classes, built from configs, for `Family.tiny`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo,
    CosmosTransformer3DModel,
    DDIMScheduler,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

M = TypeVar("M", bound=torch.nn.Module)

WORDS = ("a photo of one red green blue large small circle square on the left right background in dim bright light",)
LINE = 16  # words in a line that a tokenizer is trained on; some take a line for one word
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


def flux2_autoencoder(latent_channels: int) -> AutoencoderKLFlux2:
    """A quarter of the side; the batch norm's statistics (of 2x2 squares) are drawn, as those of a fresh one change nothing."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=2,
        sample_size=32,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


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


def sdxl_unet(**changes: Any) -> UNet2DConditionModel:
    """That of SDXL and Kolors, which is told a pooled prompt of 16 features and six numbers for sizes."""
    sizes = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": 32,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
        "use_linear_projection": True,
    }
    return unet(**sizes | changes)


def cosmos(**changes: Any) -> CosmosTransformer3DModel:
    """The denoiser of Cosmos and Anima, of 16 channels and text of 16 features, without the mask that needs torchvision."""
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "mlp_ratio": 2.0,
        "text_embed_dim": 16,
        "adaln_lora_dim": 4,
        "concat_padding_mask": False,
    }
    return redraw_zeros(CosmosTransformer3DModel(**sizes | changes))


def ddim(**changes: Any) -> DDIMScheduler:
    """A scheduler over the noise of Stable Diffusion; `changes` are arguments of its class."""
    noise = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return DDIMScheduler(**noise | {"clip_sample": False, "steps_offset": 1} | changes)


def trained_tokenizer(kind: Any, vocab_size: int = 400, **kwargs: Any) -> Any:
    """A small tokenizer of a transformers class, trained on a handful of words; the same in every process."""
    return kind().train_new_from_iterator(corpus(WORDS), vocab_size=vocab_size, show_progress=False, **kwargs)


def corpus(texts: Sequence[str]) -> list[str]:
    """What a tokenizer is trained on: the beginnings of all words, each as often as no other.

    Which of two equally frequent pairs a tokenizer joins first is a matter of chance, and so would be every token's number.
    """
    words = {word for text in texts for word in text.split()}
    beginnings = sorted({word[:end] for word in words for end in range(1, len(word) + 1)}, key=lambda b: (len(b), b))
    counts = {beginning: 7 * (len(beginnings) - rank) for rank, beginning in enumerate(beginnings)}
    return [
        " ".join([beginning] * min(LINE, count - done)) for beginning, count in counts.items() for done in range(0, count, LINE)
    ]


def clip(hidden_size: int, length: int = 24, projection: bool = False) -> tuple[Any, CLIPTokenizer]:
    """A CLIP text encoder (with its projection, if asked) and its tokenizer, which has a token for every byte."""
    tokenizer = _in_order(trained_tokenizer(CLIPTokenizer, vocab_size=560))
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


def _in_order(tokenizer: CLIPTokenizer) -> CLIPTokenizer:
    """The same with its single letters at the end of a word numbered by the alphabet, not by chance."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary: dict[str, int] = model["vocab"]
    letters = sorted(token for token in vocabulary if token.endswith("</w>") and len(token) == len("a</w>"))
    numbers = sorted(vocabulary[letter] for letter in letters)
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=vocabulary | dict(zip(letters, numbers, strict=True)), merges=merges)


def _unigram() -> T5Tokenizer:
    """A T5 tokenizer with a piece for every word and every letter, stated outright: training one sums in no fixed order."""
    words = sorted({word for text in WORDS for word in text.split()})
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]  # the last one is a blank
    pieces += [(f"\u2581{word}", -3.0 - 0.01 * rank) for rank, word in enumerate(words)]
    return T5Tokenizer(vocab=pieces + [(letter, -9.0 - 0.01 * rank) for rank, letter in enumerate(letters)])


def t5(hidden_size: int, kind: Literal["t5", "umt5"] = "t5") -> tuple[Any, T5Tokenizer]:
    """A T5 (or UMT5) encoder and its tokenizer."""
    tokenizer = _unigram()
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
    tokenizer.add_bos_token = True  # as published: an empty prompt is one token, not none
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


def qwen3_vl_config(hidden_size: int, layers: int, vocab_size: int) -> Qwen3VLConfig:
    """Of a Qwen3-VL with so many layers, and with an eye that text alone never uses."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]}
    text = decoder_sizes(hidden_size, vocab_size) | {"num_hidden_layers": layers, "rope_parameters": rope}
    eye = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": hidden_size}
    return Qwen3VLConfig(
        text_config=text,
        vision_config={**eye, "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    )


def qwen2_5_vl(hidden_size: int) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer]:
    """Qwen2.5-VL, with an eye that text alone never uses, and the tokenizer of its processor (which needs torchvision)."""
    tokenizer = qwen_tokenizer()
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    eye = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": hidden_size}
    config = Qwen2_5_VLConfig(
        text_config={**decoder_sizes(hidden_size, len(tokenizer)), **ends, "rope_parameters": rope},
        vision_config={**eye, "fullatt_block_indexes": [0]},
    )
    return Qwen2_5_VLForConditionalGeneration(config), tokenizer


def hunyuan_video_autoencoder(latent_channels: int) -> AutoencoderKLHunyuanVideo:
    """An eighth of the side and one frame of four after the first: `(F, H, W)` 5, 32, 32 to `(f, h, w)` 2, 4, 4."""
    return AutoencoderKLHunyuanVideo(
        latent_channels=latent_channels, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
    )

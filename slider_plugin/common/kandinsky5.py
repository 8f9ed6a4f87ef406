"""What the image model and the video model of Kandinsky 5 share (diffusers models/transformers/transformer_kandinsky.py).

Shapes: B batch, C channels, f, h and w latent frames, rows and columns, T text tokens, D and P features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slider_hooks import Conditioning, Targets
from slider_plugin.common.conditioning import by_length, stacked

if TYPE_CHECKING:
    from torch import Tensor

TARGETS = Targets(
    self_attention=r"visual_transformer_blocks\.\d+\.self_attention\.(to_query|to_key|to_value|out_layer)",
    io=r"visual_embeddings\.in_layer|out_layer\.out_layer",
    time=r"time_embeddings\.(in|out)_layer",
    forbidden=r"text_transformer_blocks\..+|(pooled_)?text_embeddings\..+|.*\.cross_attention\..+",
    standard=r"visual_transformer_blocks\.\d+\.(self|cross)_attention\.(to_query|to_key|to_value|out_layer)",
    documented=(
        "attn1.to_query", "attn1.to_key", "attn1.to_value",
        "conv_in", "conv_out",
        "time_embedding.linear_1", "time_embedding.linear_2",
    ),
)  # fmt: skip


def encode_each(pipeline: Any, prompts: Sequence[str], device: Any) -> list[Conditioning]:
    """Qwen2.5-VL's tokens `(T, D)` and CLIP's pooled embedding `(P,)`, one prompt at a time: padding would be seen."""
    encoded = [pipeline.encode_prompt([prompt], max_sequence_length=512, device=device) for prompt in prompts]
    return [{"prompt_embeds": embeds_1TD[0], "pooled": pooled_1P[0]} for embeds_1TD, pooled_1P, _ in encoded]


def velocity(
    transformer: Any,
    noisy_BCfhw: Tensor,
    time_B: Tensor,
    conditioning: Sequence[Conditioning],
    scale_factor: tuple[float, float, float],
) -> Tensor:
    """The transformer's answer `(B, C, f, h, w)`; it works with channels last, and takes text of one length at a time.

    Args:
        transformer: a `Kandinsky5Transformer3DModel`.
        noisy_BCfhw: noisy latents.
        time_B: sigma on the scale 0..1000.
        conditioning: `prompt_embeds` and `pooled` of each sample.
        scale_factor: what positions in time, rows and columns are divided by.
    """
    import torch

    _, patch_h, patch_w = transformer.config.patch_size
    C, f, h, w = noisy_BCfhw.shape[1:]
    positions = [torch.arange(n, device=noisy_BCfhw.device) for n in (f, h // patch_h, w // patch_w)]
    tokens_BfhwC = noisy_BCfhw.permute(0, 2, 3, 4, 1)
    if transformer.config.visual_cond:  # latents to start from and their mask: none, in text to video
        tokens_BfhwC = torch.nn.functional.pad(tokens_BfhwC, (0, C + 1))

    def call(group: list[int]) -> Tensor:
        texts = [conditioning[i] for i in group]
        embeds_BTD = stacked(texts, "prompt_embeds")
        answer_BfhwC: Tensor = transformer(
            hidden_states=tokens_BfhwC[group],
            encoder_hidden_states=embeds_BTD,
            pooled_projections=stacked(texts, "pooled"),
            timestep=time_B[group],
            visual_rope_pos=positions,
            text_rope_pos=torch.arange(embeds_BTD.shape[1], device=embeds_BTD.device),
            scale_factor=scale_factor,
        ).sample
        return answer_BfhwC.permute(0, 4, 1, 2, 3)

    return by_length(conditioning, "prompt_embeds", call)


def tiny_parts(**transformer_sizes: Any) -> dict[str, Any]:
    """Parts of a tiny random pipeline: both text encoders with their tokenizers, transformer and scheduler.

    Args:
        transformer_sizes: arguments of `Kandinsky5Transformer3DModel` beyond those that both models share.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5Transformer3DModel

    from slider_plugin.testing import tiny as parts

    text_encoder, tokenizer = parts.qwen2_5_vl(hidden_size=32)
    text_encoder_2, tokenizer_2 = parts.clip(hidden_size=16, length=77)
    transformer = Kandinsky5Transformer3DModel(
        in_text_dim=32,
        in_text_dim2=16,
        time_dim=16,
        patch_size=(1, 2, 2),
        model_dim=48,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(8, 8, 8),
        **transformer_sizes,
    )
    return {
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "text_encoder_2": text_encoder_2,
        "tokenizer_2": tokenizer_2,
        "transformer": parts.redraw_zeros(transformer),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
    }

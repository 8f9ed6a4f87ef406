"""Ideogram 4: one sequence of text and image tokens for flow matching, conditioned on many layers of Qwen3-VL.

It predicts `x0 - noise` and its time runs from 0 (noise) to 1 (image). Guidance comes from a second transformer that sees no
text; the slider trains the first. Conventions: diffusers pipelines/ideogram4/pipeline_ideogram4.py:252-401, 675-745,
examples/dreambooth/train_dreambooth_lora_ideogram4.py:1939-2001.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slider_hooks import Components, Conditioning, Family, Flavour, Flow, Targets, hookimpl, one_minus_sigma

if TYPE_CHECKING:
    from torch import Tensor

CHAT_TEMPLATE = (  # the user and generation turns of Qwen3-VL's own template
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny(folder: Path) -> None:
    """Write a random pipeline of real classes: 4x4 latents of 16 channels, 16 tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Ideogram4Pipeline, Ideogram4Transformer2DModel
    from transformers import Qwen3VLModel

    from slider_plugin.testing import tiny as parts

    def transformer() -> Any:
        return Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=32,
            adaln_dim=16,
            llm_features_dim=13 * 8,
            mrope_section=(4, 2, 2),
        )

    with parts.seeded(0):
        tokenizer = parts.qwen_tokenizer(chat_template=CHAT_TEMPLATE)
        Ideogram4Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=parts.flux2_autoencoder(latent_channels=4),
            text_encoder=Qwen3VLModel(parts.qwen3_vl_config(8, layers=36, vocab_size=len(tokenizer))),  # 13 are used
            tokenizer=tokenizer,
            transformer=parts.redraw_zeros(transformer()),
            unconditional_transformer=parts.redraw_zeros(transformer()),
        ).save_pretrained(folder)


FAMILY = Family(
    name="ideogram4",
    title="Ideogram 4",
    denoiser="transformer",
    denoiser_class="Ideogram4Transformer2DModel",
    pipeline_class="Ideogram4Pipeline",
    noise=Flow(sign=-1, time=one_minus_sigma),
    targets=Targets(
        joint_attention=r"layers\.\d+\.attention\.(to_q|to_k|to_v|to_out\.0)",
        io=r"input_proj|final_layer\.linear",
        time=r"t_embedding\.mlp_(in|out)",
        forbidden=r"llm_cond_proj",
        standard=r"layers\.\d+\.attention\.(to_q|to_k|to_v|to_out\.0)",
    ),
    guidance_scale=7.0,
    call_kwargs={"guidance_schedule": None},  # which the pipeline prefers, and takes no guidance_scale beside it
    flavours={
        "v4": Flavour(model="ideogram-ai/ideogram-v4", source="diffusers source: pipelines/ideogram4/pipeline_ideogram4.py")
    },
    default_flavour="v4",
    aliases=("ideogram",),
    tiny=tiny,
)


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """Hidden states of 13 layers side by side, `(T, D)`, without padding: prompts differ in length."""
    from diffusers.models.transformers.transformer_ideogram4 import LLM_TOKEN_INDICATOR

    pipeline, device = components.pipeline, components.denoiser.device
    embeds_BSD, _, _, indicator_BS = pipeline.encode_prompt(
        list(prompts), grid_h=1, grid_w=1, max_sequence_length=_longest(pipeline.tokenizer, prompts), device=device
    )
    rows = zip(embeds_BSD.to(components.denoiser.dtype), indicator_BS == LLM_TOKEN_INDICATOR, strict=True)
    return [{"prompt_embeds": embeds_SD[is_text_S]} for embeds_SD, is_text_S in rows]


def _longest(tokenizer: Any, prompts: Sequence[str]) -> int:
    """Tokens of the longest prompt: room for the pipeline's 2048 would cost as much as a prompt of 2048."""
    chats = [[{"role": "user", "content": [{"type": "text", "text": prompt}]}] for prompt in prompts]
    return max(len(ids) for ids in tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False))


@hookimpl
def encode_images(components: Components, images: Tensor) -> Tensor:
    """`(B, 3, H, W)` to `(B, 4C, h, w)`: the channels are a 2x2 square's row, column and channel, normalised by batch norm."""
    from slider_plugin.loading import posterior_mode

    vae = components.pipeline.vae
    squares = posterior_mode(vae.encode(images)).unflatten(2, (-1, 2)).unflatten(4, (-1, 2))  # (B, C, h, 2, w, 2)
    latents = squares.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)
    mean, variance = (values.view(1, -1, 1, 1).to(latents) for values in (vae.bn.running_mean, vae.bn.running_var))
    normalised: Tensor = (latents - mean) / (variance + vae.config.batch_norm_eps).sqrt()
    return normalised


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """One sequence of padding that nothing attends to, text, image; each input has zeros where the other one speaks."""
    import torch
    from torch.nn.functional import pad

    h, w = noisy.shape[-2:]
    lengths = [len(c["prompt_embeds"]) for c in conditioning]
    T = max(lengths)
    embeds_BTD = torch.stack([pad(c["prompt_embeds"], (0, 0, T - n, 0)) for c, n in zip(conditioning, lengths, strict=True)])
    positions_BS3, segments_BS, roles_BS = components.pipeline._prepare_ids(lengths, h, w, T, noisy.device)
    output_BSD = components.denoiser(
        hidden_states=pad(noisy.flatten(2).transpose(1, 2), (0, 0, T, 0)),
        timestep=time,
        encoder_hidden_states=pad(embeds_BTD, (0, 0, 0, h * w)),
        position_ids=positions_BS3,
        segment_ids=segments_BS,
        indicator=roles_BS,
        return_dict=False,
    )[0]
    output: Tensor = output_BSD[:, T:].transpose(1, 2).unflatten(2, (h, w))
    return output

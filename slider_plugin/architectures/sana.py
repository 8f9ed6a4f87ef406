"""Sana: a transformer with linear self-attention for flow matching, conditioned on Gemma 2 by cross-attention.

Conventions: diffusers pipelines/sana/pipeline_sana.py:905-966, examples/dreambooth/train_dreambooth_lora_sana.py:1394-1432.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slider_hooks import Components, Conditioning, Family, Flavour, Flow, Targets, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

HUB = "Efficient-Large-Model/Sana_"
DOCS = "diffusers docs: api/pipelines/sana.md"
SMALL = {  # NVlabs: SanaMS_600M_P1_D28, as in diffusers scripts/convert_sana_to_diffusers.py
    "num_layers": 28,
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}


def tiny(folder: Path) -> None:
    """Write a random pipeline of real classes: 8x8 latents."""
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel

    from slider_plugin.testing.tiny import gemma2, redraw_zeros, seeded

    with seeded(0):
        text_encoder, tokenizer = gemma2(hidden_size=32)
        vae = AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8, 16),
            decoder_block_out_channels=(8, 8, 16),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)),
            scaling_factor=0.41407,
        )
        transformer = SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=32,
            sample_size=8,
        )
        SanaPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=redraw_zeros(transformer),
            # The other published scheduler, DPM-Solver, rounds the time to whole steps.
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        ).save_pretrained(folder)


FAMILY = Family(
    name="sana",
    title="Sana",
    denoiser="transformer",
    denoiser_class="SanaTransformer2DModel",
    pipeline_class="SanaPipeline",
    # Published with DPM-Solver, which calls it `flow_shift`: 3 for up to 2048 pixels (scripts/convert_sana_to_diffusers.py).
    noise=Flow(shift=3.0),
    targets=Targets(
        self_attention=r"transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)",
        io=r"patch_embed\.proj|proj_out",
        time=r"time_embed\.emb\.timestep_embedder\.linear_[12]",
        forbidden=r".*\.attn2\..*|caption_projection\..*",
        standard=r"transformer_blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
        controlnet=r"transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)|patch_embed\.proj"
        r"|time_embed\.emb\.timestep_embedder\.linear_[12]",
    ),
    controlnet_class="SanaControlNetModel",
    expects={"guidance_embeds": (False, None)},  # Sprint is told a guidance scale and walks another path (trigflow)
    call_kwargs={"use_resolution_binning": False},  # draw at the very size that is asked for
    guidance_scale=4.5,
    flavours={
        "1.6b-1024": Flavour(model=f"{HUB}1600M_1024px_BF16_diffusers", source=DOCS),
        "1.6b-512": Flavour(model=f"{HUB}1600M_512px_diffusers", source=DOCS, reference={"sample_size": 16}),
        "0.6b-1024": Flavour(model=f"{HUB}600M_1024px_diffusers", source=DOCS, reference=SMALL),
        "0.6b-512": Flavour(model=f"{HUB}600M_512px_diffusers", source=DOCS, reference={**SMALL, "sample_size": 16}),
    },
    default_flavour="1.6b-1024",
    tiny=tiny,
)


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """The last hidden state of Gemma 2, `(T, D)`, without padding; an instruction goes before all but ""."""
    from slider_plugin.common.conditioning import after_instruction

    return after_instruction(components.pipeline, prompts, components.denoiser.device)


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """The published pipeline multiplies the time by a factor of the transformer's configuration."""
    from slider_plugin.common.conditioning import padded

    embeds_BTD, mask_BT = padded(conditioning, "prompt_embeds")
    output: Tensor = components.denoiser(
        noisy,
        timestep=time * components.denoiser.config.timestep_scale,
        encoder_hidden_states=embeds_BTD,
        encoder_attention_mask=mask_BT,
        return_dict=False,
    )[0]
    return output


@hookimpl
def load_controlnet(family: Family, components: Components, model: str | None) -> Any:
    """A fresh one copies the first 7 blocks, the published number; the first block of the denoiser gets no residual."""
    from diffusers import SanaControlNetModel

    from slider_plugin.common.controlnet import in_dtype, load_trained

    if model:
        return load_trained(family, components, model)
    transformer = components.denoiser
    layers = min(7, transformer.config.num_layers - 1)
    fresh = SanaControlNetModel.from_config(dict(transformer.config) | {"num_layers": layers})
    for part in ("patch_embed", "time_embed", "caption_projection", "caption_norm", "transformer_blocks"):
        getattr(fresh, part).load_state_dict(getattr(transformer, part).state_dict(), strict=part != "transformer_blocks")
    return in_dtype(fresh, transformer.dtype)

"""Z-Image and Z-Image Turbo: a single-stream transformer for flow matching, conditioned on Qwen3.

Its output is the negated velocity and its time runs from 0 (noise) to 1 (image):
diffusers pipelines/z_image/pipeline_z_image.py:510-568, examples/dreambooth/train_dreambooth_lora_z_image.py:1727-1769.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slider_hooks import Components, Conditioning, Family, Flavour, Flow, Layout, Targets, UserError, hookimpl, one_minus_sigma

if TYPE_CHECKING:
    from torch import Tensor


def tiny(folder: Path) -> None:
    """Write a random pipeline of a few megabytes: real classes, real tokenizer, 16x16 latents."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    from slider_plugin.testing.tiny import autoencoder, qwen3, redraw_zeros, seeded

    with seeded(0):
        text_encoder, tokenizer = qwen3(hidden_size=32)
        transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[8, 4, 4],
            axes_lens=[640, 64, 64],
        )
        pipeline = ZImagePipeline(
            vae=autoencoder(latent_channels=4),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=redraw_zeros(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    pipeline.save_pretrained(folder)


FAMILY = Family(
    name="z_image",
    title="Z-Image",
    denoiser="transformer",
    denoiser_class="ZImageTransformer2DModel",
    pipeline_class="ZImagePipeline",
    noise=Flow(sign=-1, time=one_minus_sigma),
    targets=Targets(
        self_attention=r"noise_refiner\.\d+\.attention\.(to_q|to_k|to_v|to_out\.0)",
        joint_attention=r"layers\.\d+\.attention\.(to_q|to_k|to_v|to_out\.0)",
        io=r"all_x_embedder\.\d+-\d+|all_final_layer\.\d+-\d+\.linear",
        time=r"t_embedder\.mlp\.[02]",
        weight_read=r"t_embedder\.mlp\.[02]",
        forbidden=r"context_refiner\..*|cap_embedder\..*|siglip_.*",
        controlnet=r"control_(layers|noise_refiner)\.\d+\.attention\.(to_q|to_k|to_v|to_out\.0)|control_all_x_embedder\.\d+-\d+",
        standard=r"(noise_refiner|layers)\.\d+\.attention\.(to_q|to_k|to_v|to_out\.0)",
    ),
    controlnet_class="ZImageControlNetModel",
    expects={"siglip_feat_dim": (None,)},  # Omni wants reference images, too
    guidance_scale=5.0,
    flavours={
        "turbo": Flavour(model="Tongyi-MAI/Z-Image-Turbo", source="diffusers docs: api/pipelines/z_image.md"),
        "z_image_omni": Flavour(reference={"siglip_feat_dim": 1152}),  # for its targets alone
    },
    limits="Omni is refused: its reference images reach no training step",
    default_flavour="turbo",
    # Tried with diffusers' loader, and held against ComfyUI's table of names: it takes `transformer.` as well.
    layouts={"comfyui": Layout(prefix="diffusion_model.", programs="ComfyUI", reads_diffusers=True)},
    aliases=("zimage",),
    tiny_size=64,
    tiny=tiny,
)


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """The last but one hidden state of Qwen3, `(T, D)`, without padding: prompts differ in length."""
    pipeline = components.pipeline
    embeds, _ = pipeline.encode_prompt(list(prompts), device=components.denoiser.device, do_classifier_free_guidance=False)
    return [{"prompt_embeds": embeds_TD} for embeds_TD in embeds]


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """The transformer takes and gives lists of `(C, 1, H, W)`, one frame each."""
    import torch

    embeds = [c["prompt_embeds"] for c in conditioning]
    output = components.denoiser(list(noisy.unsqueeze(2)), time, embeds, return_dict=False)[0]
    return torch.stack(list(output)).squeeze(2)


@hookimpl
def load_controlnet(family: Family, components: Components, model: str | None) -> Any:
    """It shares the embedders and the refiners with the transformer, and with them the adapters in these."""
    from slider_plugin.common.controlnet import load_trained

    if not model:
        raise UserError(
            "controlnet: no source says how a fresh ControlNet of Z-Image is laid out; "
            "give a trained one in controlnet_model_name_or_path"
        )
    controlnet = load_trained(family, components, model)
    controlnet.gradient_checkpointing = False  # its class forgets to set what its forward reads (diffusers 0.42.1)
    return type(controlnet).from_transformer(controlnet, components.denoiser)


@hookimpl
def encode_control(components: Components, latents: Tensor) -> Tensor:
    """Latents of one frame `(B, C, 1, h, w)`, with zeros where version 2 has room for a mask and an image."""
    from torch.nn.functional import pad

    room = components.controlnet.config.control_in_dim - latents.shape[1]
    return pad(latents.unsqueeze(2), (0, 0, 0, 0, 0, 0, 0, room))


@hookimpl
def control(components: Components, shown: Tensor, strength: float, call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Residuals by the number of the layer; the call has other names here (pipeline_z_image_controlnet.py:662)."""
    shown = shown.to(components.controlnet.dtype)
    residuals = components.controlnet(call["x"], call["t"], call["cap_feats"], list(shown), conditioning_scale=strength)
    return {"controlnet_block_samples": residuals}

"""What the UNets of Stable Diffusion 1 and 2, SDXL and Kolors have in common: the names of their modules, their ControlNet.

A family takes the hooks of the ControlNet over by importing them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slider_hooks import Components, Family, Layout, Targets, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

TARGETS = Targets(
    self_attention=r"(.*\.)?attn1\.(to_q|to_k|to_v|to_out\.0)",
    projections=r".*attentions\.\d+\.proj_(in|out)",
    io=r"conv_in|conv_out",
    time=r"time_embedding\.linear_[12]",
    forbidden=r"(.*\.)?attn2\..*|add_embedding\..*|encoder_hid_proj",
    standard=r"(.*\.)?attn[12]\.(to_q|to_k|to_v|to_out\.0)",
    controlnet=r"(.*\.)?attn1\.(to_q|to_k|to_v|to_out\.0)|.*attentions\.\d+\.proj_(in|out)|conv_in|time_embedding\.linear_[12]",
)
"""Slider targets of a `UNet2DConditionModel` whose `attn1` is self-attention and `attn2` attends to text.

In some upscalers `only_cross_attention` makes attn1 attend to text as well: a family states in `expects` that it does not.
"""

KOHYA = Layout(
    prefix="lora_unet_",
    flat=True,
    # Flattened, both layers would end in the same key for diffusers: these are the names of the original model, which all know.
    names=((r"add_embedding\.linear_1", "label_emb.0.0"), (r"add_embedding\.linear_2", "label_emb.0.2"), (r".+", r"\g<0>")),
    programs="ComfyUI, Forge, AUTOMATIC1111, SD.Next",
)
"""Of a diffusers file these programs lose the attention layers (ComfyUI, silently) or refuse all of it (Forge)."""


HINT_CHANNELS = (16, 32, 96, 256)
"""Of the published ControlNets' first layers, each of which but the first halves the image: to an eighth."""


@hookimpl
def load_controlnet(family: Family, components: Components, model: str | None) -> Any:
    """A fresh one copies the encoder half of the UNet, and brings the image down to the size of the latents."""
    from diffusers import ControlNetModel

    from slider_plugin.common.controlnet import in_dtype, load_trained

    if model:
        return load_trained(family, components, model)
    halvings = components.pipeline.vae_scale_factor.bit_length() - 1
    unet = components.denoiser
    fresh = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=HINT_CHANNELS[: halvings + 1])
    return in_dtype(fresh, unet.dtype)


@hookimpl
def encode_control(images: Tensor) -> Tensor:
    """Pixels in 0..1 (diffusers pipeline_controlnet.py: `control_image_processor` does not normalise)."""
    return images / 2 + 0.5


@hookimpl
def control(components: Components, shown: Tensor, strength: float, call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Residuals of the encoder's levels, and one of the middle."""
    from slider_plugin.common.controlnet import call_controlnet

    levels, middle = call_controlnet(components, shown, strength, call)
    return {"down_block_additional_residuals": levels, "mid_block_additional_residual": middle}

"""The denoiser of Cosmos as text-to-image and text-to-video models use it: Cosmos 1, Cosmos Predict2 and Anima.

Source: diffusers transformer_cosmos.py.

Shapes: B batch, C channels, f latent frames, h and w latent rows and columns, T text tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from slider_hooks import Components, Family, LoadRequest, Targets, UserError

if TYPE_CHECKING:
    from torch import Tensor


TARGETS = Targets(
    self_attention=r"transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)",
    io=r"patch_embed\.proj|proj_out",
    time=r"time_embed\.t_embedder\.linear_[12]",
    forbidden=r"transformer_blocks\.\d+\.attn2\..+|(crossattn|img_context)_proj\..+",
    standard=r"transformer_blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
)


class NoChecks:
    """Stands where the pipeline insists on a safety checker (`cosmos_guardrail`), and lets everything pass."""

    def to(self, *_: Any) -> NoChecks:
        """It has no weights to move."""
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames_FHWC: Any) -> Any:
        return frames_FHWC


def load_checked(family: Family, request: LoadRequest, load: Callable[[Family, LoadRequest], Components]) -> Components:
    """What `load` loads. Raises UserError where the model needs torchvision and it is missing: before loading, for a folder."""
    from slider_plugin.loading import denoiser_config, model_folder

    folder = model_folder(family, request.model)
    if folder is not None:
        _check_padding_mask(denoiser_config(family, folder))
    components = load(family, request)
    _check_padding_mask(components.denoiser.config)
    return components


def _check_padding_mask(config: Mapping[str, Any]) -> None:
    from diffusers.utils import is_torchvision_available

    if config.get("concat_padding_mask") and not is_torchvision_available():
        raise UserError("this model resizes its padding mask with torchvision, which is not installed; pip install torchvision")


def answer(denoiser: Any, noisy_BCfhw: Tensor, time_B: Tensor, embeds_BTD: Tensor, fps: int | None = None) -> Tensor:
    """The denoiser's answer in the shape of its input. The mask says that no pixel is padding, `fps` how near frames are."""
    output: Tensor = denoiser(
        hidden_states=noisy_BCfhw,
        timestep=time_B,
        encoder_hidden_states=embeds_BTD,
        fps=fps,
        padding_mask=noisy_BCfhw.new_zeros(1, 1, *noisy_BCfhw.shape[-2:]),
        return_dict=False,
    )[0]
    return output

"""How a UNet that is told a pooled prompt and the size of its image (SDXL, Kolors) is called.

Shapes: B batch, C channels, h and w latent rows and columns, T tokens, D and P features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slider_hooks import Components, Conditioning

if TYPE_CHECKING:
    from torch import Tensor


def tokens_and_pooled(components: Components, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
    """`prompt_embeds` `(T, D)` and `pooled` `(P,)` of each prompt; for "" what the pipeline takes in place of no prompt.

    That is zeros where `force_zeros_for_empty_prompt` is set, as in SDXL (diffusers pipeline_stable_diffusion_xl.py:418-421).
    """
    from slider_plugin.common.conditioning import per_prompt

    embeds_BTD, empty_BTD, pooled_BP, empty_BP = components.pipeline.encode_prompt(
        list(prompts), device=components.denoiser.device, do_classifier_free_guidance=True
    )
    texts = per_prompt(prompt_embeds=embeds_BTD, pooled=pooled_BP)
    empties = per_prompt(prompt_embeds=empty_BTD, pooled=empty_BP)
    return [text if prompt else empty for prompt, text, empty in zip(prompts, texts, empties, strict=True)]


def predict_at_size(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """The denoiser's answer `(B, C, h, w)`; it is told that the image is whole and as large as these latents make it."""
    import torch

    from slider_plugin.common.conditioning import stacked

    scale = components.pipeline.vae_scale_factor
    height, width = (side * scale for side in noisy.shape[-2:])
    sizes = torch.tensor([height, width, 0, 0, height, width], device=noisy.device)  # original, left upper corner, target
    output: Tensor = components.denoiser(
        noisy,
        time,
        encoder_hidden_states=stacked(conditioning, "prompt_embeds"),
        added_cond_kwargs={"text_embeds": stacked(conditioning, "pooled"), "time_ids": sizes.expand(len(noisy), -1)},
        return_dict=False,
    )[0]
    return output

"""The host's answer to every hook: what serves a plain diffusers pipeline, so that a family states only what differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slider_hooks import (
    BucketInfo,
    Components,
    Conditioning,
    Family,
    LoadRequest,
    Objective,
    PromptEntry,
    ResolvedTargets,
    Sampler,
    TargetRequest,
    hookimpl,
)

if TYPE_CHECKING:
    from torch import Tensor

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The standard targets of a ControlNet, by suffix."""


@hookimpl
def resolve_lora_targets(family: Family, controlnet: Any, request: TargetRequest) -> ResolvedTargets:
    """Explicit targets first; for a slider the family's expressions, else the documented list; without one `standard`.

    On a ControlNet the slider targets are its own, and the standard ones all of its attention.
    """
    from slider_plugin.targets import DOCUMENTED, suffix_expression

    targets = family.targets
    if request.explicit:
        explicit = request.explicit
        expression = explicit if isinstance(explicit, str) else suffix_expression(explicit)
        return ResolvedTargets(expression=expression, source="explicit")
    if controlnet is not None:
        own = targets.controlnet if request.slider else suffix_expression(ATTENTION)
        return ResolvedTargets(expression=own, source="slider" if request.slider else "standard")
    if not request.slider:
        return ResolvedTargets(expression=targets.standard, source="standard")
    if targets.slider(request.include_joint):
        return ResolvedTargets(expression=targets.slider(request.include_joint), source="slider")
    return ResolvedTargets(expression=suffix_expression(targets.documented or DOCUMENTED), source="documented")


@hookimpl
def build_objective(name: str, config: Mapping[str, Any]) -> Objective | None:
    """`bucket`, `pair` and `text`."""
    from slider_plugin.objectives import built_in

    return built_in(name, config)


@hookimpl
def build_sampler(buckets: Sequence[BucketInfo], seed: int, weighting: str, neutral_scale: float) -> Sampler:
    """The documented cycle: positive, negative, neutral."""
    from slider_plugin.data.sampler import CycleSampler

    return CycleSampler(buckets, seed, weighting, neutral_scale)


@hookimpl
def validation_prompt_scale(entry: PromptEntry, global_strength: float) -> float:
    """The entry's own strength, or the global one."""
    return global_strength if entry.adapter_strength is None else entry.adapter_strength


@hookimpl
def load_components(family: Family, request: LoadRequest) -> Components:
    """Load a diffusers pipeline folder; see `slider_plugin.loading`."""
    from slider_plugin.loading import load_pipeline_components

    return load_pipeline_components(family, request)


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """The first result of the pipeline's own `encode_prompt`, without classifier-free guidance."""
    result = components.pipeline.encode_prompt(
        list(prompts), device=components.denoiser.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    embeds_BTD = result[0] if isinstance(result, tuple) else result
    return [{"prompt_embeds": embeds_TD} for embeds_TD in embeds_BTD]


@hookimpl
def encode_images(components: Components, images: Tensor) -> Tensor:
    """The mode of the autoencoder's posterior, `(z - shift_factor) * scaling_factor`."""
    from slider_plugin.loading import posterior_mode

    vae = components.pipeline.vae
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (posterior_mode(vae.encode(images)) - shift) * vae.config.scaling_factor  # type: ignore[no-any-return]


@hookimpl
def condition_on_images(images: Tensor) -> Sequence[Conditioning]:
    """Nothing: most denoisers are told about prompts alone."""
    return [{} for _ in range(images.shape[0])]


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """`denoiser(noisy, time, encoder_hidden_states=...)`, which is the call of a UNet and of many transformers."""
    import torch

    embeds_BTD = torch.stack([c["prompt_embeds"] for c in conditioning])
    output: Tensor = components.denoiser(noisy, time, encoder_hidden_states=embeds_BTD, return_dict=False)[0]
    return output


@hookimpl
def load_controlnet(family: Family, components: Components, model: str | None) -> Any:
    """A diffusers ControlNet; a fresh one copies the denoiser's first blocks. See `slider_plugin.common.controlnet`."""
    from slider_plugin.common.controlnet import fresh_from_transformer, load_trained

    return load_trained(family, components, model) if model else fresh_from_transformer(family, components)


@hookimpl
def encode_control(latents: Tensor) -> Tensor:
    """The conditioning images as latents."""
    return latents


@hookimpl
def control(components: Components, shown: Tensor, strength: float, call: Mapping[str, Any]) -> Mapping[str, Any]:
    """One sequence of residuals, for the blocks one after the other."""
    from slider_plugin.common.controlnet import call_controlnet

    return {"controlnet_block_samples": call_controlnet(components, shown, strength, call)[0]}


@hookimpl
def build_pipeline(components: Components) -> Any:
    """The loaded pipeline, whose denoiser the adapter was injected into."""
    return components.pipeline

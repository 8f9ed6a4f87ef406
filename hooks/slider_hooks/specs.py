"""The hooks. One owner answers each: the family if it implements the hook, else the host's default.

An implementation takes the arguments it wants by their names here, without defaults, `*args`, `**kwargs` or keyword-only
arguments. Returning None means "not implemented": the default answers. Exceptions pass through to the user, with the
family, its distribution and the hook named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slider_hooks.markers import hookspec
from slider_hooks.types import (
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
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


@hookspec(firstresult=True)
def resolve_lora_targets(
    family: Family, denoiser: Module, controlnet: Module | None, request: TargetRequest
) -> ResolvedTargets | None:
    """Say where the adapter attaches. Called once, after loading and before injection; also on a model on the meta device.

    Args:
        family: the facts of this family.
        denoiser: the denoiser that the adapter goes into, unless a ControlNet is trained.
        controlnet: the ControlNet, when it is trained instead of the denoiser; else None.
        request: slider targets or not, the user's own targets, the adapter kind, whether joint modules may be matched.

    Returns:
        One regular expression over full module names. The default takes explicit targets first, then, for a slider, the
        expressions of `family.targets`, then (where the family states none) the documented list, then `standard`.

    Example::

        @hookimpl
        def resolve_lora_targets(denoiser, request):
            if request.slider and len(denoiser.blocks) > 40:
                return ResolvedTargets(expression=r"blocks\\.\\d+\\.attn\\.to_[qkv]", source="slider")
    """


@hookspec(firstresult=True)
def build_sampler(
    family: Family, buckets: Sequence[BucketInfo], seed: int, weighting: str, neutral_scale: float
) -> Sampler | None:
    """Build the sampler over the buckets. Called once per run, and never on a batch; for matched pairs (`slider_objective`)
    once for the positive buckets, whose twins the host draws with them, and once for the neutral ones.

    Args:
        family: the facts of this family.
        buckets: the buckets, in the order of the configuration; at least one.
        seed: the run's seed.
        weighting: `uniform` (probability alone) or `auto-weighting` (probability times share of the data).
        neutral_scale: the scale whose plus and minus neutral draws take in turn.

    Returns:
        An endless sampler. The default goes round positive, negative, neutral over the groups that exist; inside a group
        buckets are drawn by probability, and one that has given all its batches leaves until the next epoch. The sequence
        depends on seed and position alone.

    Example::

        @hookimpl
        def build_sampler(buckets, seed):
            return MySampler(buckets, seed)
    """


@hookspec(firstresult=True)
def build_objective(family: Family, name: str, config: Mapping[str, Any]) -> Objective | None:
    """Build what the slider learns from. Called in the preflight of a run, before anything is loaded.

    Args:
        family: the facts of this family.
        name: `slider_objective`.
        config: the run's configuration; `objective_config` in it is for objectives of extensions.

    Returns:
        The objective; None for a name that is not one's own, so that several extensions can stand side by side. Raise
        `UserError` for a configuration that is wrong. The default knows `bucket`, `pair` and `text`.

    Example::

        @hookimpl
        def build_objective(name, config):
            return Mine(**config["objective_config"]) if name == "mine" else None
    """


@hookspec(firstresult=True)
def validation_prompt_scale(family: Family, entry: PromptEntry, global_strength: float) -> float | None:
    """Say at which scale the adapter runs for one entry of the prompt library. Called for each image of a validation.

    Args:
        family: the facts of this family.
        entry: the entry, with its own strength or None.
        global_strength: `validation_adapter_strength`.

    Returns:
        The scale; any finite number. The default is the entry's own strength, or the global one where it has none.

    Example::

        @hookimpl
        def validation_prompt_scale(entry):
            return entry.adapter_strength if entry.adapter_strength is not None else 0.8
    """


@hookspec(firstresult=True)
def load_components(family: Family, request: LoadRequest) -> Components | None:
    """Load a model. Called once per run, in each process; the host then moves it to its device.

    Args:
        family: the facts of this family.
        request: folder or hub id, dtype, revision, variant and the family's own options.

    Returns:
        The loaded parts, frozen and in evaluation mode. The default loads a diffusers pipeline folder, safetensors only.

    Example::

        @hookimpl
        def load_components(request):
            model = MyModel.from_folder(request.model).to(request.dtype).eval().requires_grad_(False)
            return Components(denoiser=model, pipeline=MySampler(model), scheduler=None, prediction="flow")
    """


@hookspec(firstresult=True)
def encode_prompts(family: Family, components: Components, prompts: Sequence[str]) -> Sequence[Conditioning] | None:
    """Encode prompts for `predict`. Called without gradients, a few prompts at a time; the host keeps the results, on disk.

    Args:
        family: the facts of this family.
        components: the loaded model.
        prompts: texts; "" is the unconditional prompt.

    Returns:
        For each prompt, named tensors without a batch dimension. The default calls the pipeline's `encode_prompt` without
        classifier-free guidance and keeps its first result as `prompt_embeds`.

    Example::

        @hookimpl
        def encode_prompts(components, prompts):
            hidden, pooled = components.pipeline.encode_prompt(list(prompts))
            return [{"hidden": h, "pooled": p} for h, p in zip(hidden, pooled)]
    """


@hookspec(firstresult=True)
def encode_images(family: Family, components: Components, images: Tensor) -> Tensor | None:
    """Encode images into the latents that the denoiser works on. Called without gradients; the host keeps the results, on disk.

    Args:
        family: the facts of this family.
        components: the loaded model.
        images: on the device and in the dtype of the autoencoder: `(B, 3, H, W)` in -1..1; where `family.modalities` has
            `video`, `(B, 3, F, H, W)` with F frames, 1 for an image; where it has `audio`, samples `(B, channels, N)` in -1..1.

    Returns:
        Latents `(B, C, h, w)` or `(B, C, f, h, w)` (any shape that `predict` takes), normalised as the denoiser expects. The
        default takes the mode of the autoencoder's posterior, `(z - shift_factor) * scaling_factor`.

    Example::

        @hookimpl
        def encode_images(components, images):
            return components.pipeline.vae.encode(images).latent_dist.mode() * 0.41407
    """


@hookspec(firstresult=True)
def condition_on_images(family: Family, components: Components, images: Tensor) -> Sequence[Conditioning] | None:
    """Encode what the denoiser is told about the images themselves, besides their prompts: the first frame of an
    image-to-video model. Called without gradients after `encode_images`, for the same images; the host keeps the results.

    Args:
        family: the facts of this family.
        components: the loaded model.
        images: as `encode_images` gets them.

    Returns:
        For each image, named tensors without a batch dimension; `predict` finds them beside those of the prompt. The default
        tells nothing.

    Example::

        @hookimpl
        def condition_on_images(components, images):
            first_frames = components.pipeline.vae.encode(images[:, :, :1]).latent_dist.mode()
            return [{"first_frame": frame} for frame in first_frames]
    """


@hookspec(firstresult=True)
def predict(
    family: Family, components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]
) -> Tensor | None:
    """Call the denoiser once. Called in every training step, with and without gradients; everything here costs time.

    Args:
        family: the facts of this family.
        components: the loaded model.
        noisy: noisy latents, in the shape that `encode_images` gave: `(B, C, h, w)` or `(B, C, f, h, w)`.
        time: `(B,)`, for a flow model `family.noise.time(sigma)`, for a diffusion model the integer timestep, or r in 0..1
            where the family states `alpha_bar`.
        conditioning: for each sample what `encode_prompts` and `condition_on_images` gave, on the device.

    Returns:
        The denoiser's output in the shape of `noisy`, as it is: the host multiplies it by `family.noise.sign`. The default
        calls `denoiser(noisy, time, encoder_hidden_states=...)` with the stacked `prompt_embeds`.

    Example::

        @hookimpl
        def predict(components, noisy, time, conditioning):
            text = torch.stack([c["prompt_embeds"] for c in conditioning])
            return components.denoiser(hidden_states=noisy, timestep=time, encoder_hidden_states=text).sample
    """


@hookspec(firstresult=True)
def load_controlnet(family: Family, components: Components, model: str | None) -> Module | None:
    """Load a ControlNet for the loaded denoiser. Called once per run, where the user wants one; the host then freezes it.

    Args:
        family: the facts of this family.
        components: the loaded model.
        model: folder or hub id of a ControlNet; None for a fresh one, whose residuals are zero.

    Returns:
        The ControlNet. The default loads `family.controlnet_class` of diffusers, and makes a fresh one by its
        `from_transformer`, which copies the denoiser's first blocks.

    Example::

        @hookimpl
        def load_controlnet(components, model):
            return MyControlNet.from_pretrained(model) if model else MyControlNet.copy_of(components.denoiser)
    """


@hookspec(firstresult=True)
def encode_control(family: Family, components: Components, images: Tensor, latents: Tensor) -> Tensor | None:
    """Encode conditioning images for the ControlNet. Called without gradients; the host keeps the results.

    Args:
        family: the facts of this family.
        components: the loaded model, with its `controlnet`.
        images: as `encode_images` gets them, `(B, 3, H, W)` in -1..1.
        latents: what `encode_images` gave for them.

    Returns:
        What `control` is given, `(B, ...)`. The default is the latents.

    Example::

        @hookimpl
        def encode_control(images):
            return images / 2 + 0.5
    """


@hookspec(firstresult=True)
def control(
    family: Family, components: Components, shown: Tensor, strength: float, call: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    """Call the ControlNet. Called before each call of the denoiser that is steered, in training and in validation.

    Args:
        family: the facts of this family.
        components: the loaded model, with its `controlnet`.
        shown: what `encode_control` gave, `(B, ...)`, one for each sample of the denoiser's call.
        strength: what the residuals are multiplied by.
        call: the arguments of the denoiser's call, by the names of its `forward`.

    Returns:
        Further arguments of the denoiser's call: the residuals. The default gives the ControlNet those arguments that it
        takes by the same names, and its answer to the denoiser as `controlnet_block_samples`.

    Example::

        @hookimpl
        def control(components, shown, strength, call):
            return {"residuals": components.controlnet(call["noisy"], call["time"], shown) * strength}
    """


@hookspec(firstresult=True)
def build_pipeline(family: Family, components: Components) -> Any | None:
    """Build what draws validation images around the (adapted) denoiser. Called once per validation.

    Args:
        family: the facts of this family.
        components: the loaded model, with the adapter injected into `components.denoiser`.

    Returns:
        An object with the call of a diffusers pipeline: of `prompt=[...], negative_prompt=[...], height=, width=,
        num_frames=, num_inference_steps=, guidance_scale=, generator=[...]` and `family.call_kwargs` it gets those that its
        signature names, and `image=`, a PIL image of that size, if it cannot be called without. The result
        has `images`, a list of PIL images; or `frames`, a list of videos, each a list of PIL images; or `audios`, a tensor or
        array `(B, channels, N)`. The default is `components.pipeline`.

    Example::

        @hookimpl
        def build_pipeline(components):
            return components.pipeline
    """


@hookspec(firstresult=True)
def score_images(family: Family, images: Sequence[Any], positive: str, negative: str) -> Sequence[float] | None:
    """Say how much of a concept pictures show; for extensions alone. Called by `slider report --scorer extension` for the drawn
    pictures and for the positive and negative images, a few at a time.

    Args:
        family: the facts of the family that drew them.
        images: PIL images, RGB.
        positive: words for more of the concept; "" where none are given.
        negative: words for less of it, likewise.

    Returns:
        For each image a finite number, higher for more; unit and zero are free. There is no default: without an extension that
        answers, the report refuses this scorer.

    Example::

        @hookimpl
        def score_images(images):
            return [image.convert("L").resize((1, 1)).getpixel((0, 0)) / 255 for image in images]
    """


@hookspec
def observe(family: Family, event: str, facts: Mapping[str, Any]) -> None:
    """Hear what a run does; for extensions alone, and all of them. Called after each event, in the process that writes files.

    Args:
        family: the facts of the family that is trained.
        event: `loaded`, `step`, `checkpoint`, `validation`, `report` or `exported`; later versions may have more.
        facts: of `loaded` the `config` as a mapping and `hooks`, who answers which; of `step` its `step` and metrics such as
            `loss/positive`; of the others `step` and `path`, the folder or file that was written.

    Returns:
        Nothing. By default nobody listens.

    Example::

        @hookimpl
        def observe(event, facts):
            if event == "exported":
                print(f"{facts['path']} after {facts['step']} steps")
    """


HOOKS: tuple[str, ...] = (
    "resolve_lora_targets",
    "build_objective",
    "build_sampler",
    "validation_prompt_scale",
    "load_components",
    "encode_prompts",
    "encode_images",
    "condition_on_images",
    "load_controlnet",
    "encode_control",
    "control",
    "predict",
    "build_pipeline",
)
"""The hooks that one owner answers. hooks/README.md has the order in which a run calls them."""

FOR_EVERY_FAMILY: tuple[str, ...] = ("build_objective", "build_sampler", "validation_prompt_scale")
"""Those of them that an extension may replace or wrap."""

SCORERS: tuple[str, ...] = ("score_images",)
"""The hooks that an extension may answer, and nobody else does."""

BY_NAME: tuple[str, ...] = ("build_objective",)
"""Those that several extensions may have, since each answers for names of its own."""

OBSERVERS: tuple[str, ...] = ("observe",)
"""The hooks that every extension hears and none answers."""

EVERY: tuple[str, ...] = (*HOOKS, *SCORERS, *OBSERVERS)
"""All hooks."""

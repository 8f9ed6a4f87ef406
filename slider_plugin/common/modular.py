"""Modular pipelines of diffusers, which load their parts in a second step (diffusers modular_pipelines/modular_pipeline.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from slider_hooks import Components, Family, LoadRequest, UserError
from slider_plugin.common.calls import PipelineCall
from slider_plugin.loading import check_folder, model_folder, prediction_of, refuse_without_weights

MODULAR_INDEX = "modular_model_index.json"


def load_modular_components(family: Family, request: LoadRequest, build: Callable[[], Any] | None = None) -> Components:
    """Load all parts of a modular pipeline in `request.dtype`, frozen and in evaluation mode, models from safetensors only.

    Args:
        family: its facts.
        request: folder or hub id, dtype, revision, variant.
        build: the pipeline without its parts, where it is another one than `family.pipeline_class` reads from the folder;
            parts that it already has stay.

    Raises:
        UserError: the folder is missing, is no pipeline folder, holds another family's model, or a part does not load.
    """
    refuse_without_weights(family)
    folder = model_folder(family, request.model)
    if folder is not None:
        check_folder(family, folder)
        if not (folder / MODULAR_INDEX).is_file():
            raise UserError(
                f"{folder} is not a {family.title} model: it has no {MODULAR_INDEX}. "
                "Set model_family to the family of this model"
            )
    try:
        pipeline = build() if build else _published(family, request)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{request.model} could not be loaded as a {family.title} pipeline: {reason}") from error
    pipeline.load_components(
        dtype=request.dtype,
        use_safetensors=dict.fromkeys(_models(pipeline), True),
        **({"variant": request.variant} if request.variant else {}),
    )
    missing = [name for name, part in pipeline.components.items() if part is None]
    if missing:  # diffusers only logs why
        raise UserError(f"{request.model} could not be loaded as a {family.title} pipeline: it has no {', '.join(missing)}")
    for part in pipeline.components.values():
        if hasattr(part, "requires_grad_"):
            part.requires_grad_(False).eval()
    return Components(
        denoiser=getattr(pipeline, family.denoiser),
        pipeline=pipeline,
        scheduler=pipeline.scheduler,
        prediction=prediction_of(family, pipeline.scheduler),
        options=request.options,
    )


def _published(family: Family, request: LoadRequest) -> Any:
    import diffusers

    return getattr(diffusers, family.pipeline_class).from_pretrained(request.model, revision=request.revision)


def _models(pipeline: Any) -> list[str]:
    """Names of the parts that have weights."""
    import torch

    kinds = {name: pipeline.get_component_spec(name).type_hint for name in pipeline.component_names}
    return [name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, torch.nn.Module)]


def _loops(block: Any) -> Iterator[Any]:
    from diffusers.modular_pipelines import LoopSequentialPipelineBlocks

    if isinstance(block, LoopSequentialPipelineBlocks):
        yield block
    for inner in block.sub_blocks.values():
        yield from _loops(inner)


class ModularCall(PipelineCall):
    """A modular pipeline behind the call of a plain one."""

    def set_progress_bar_config(self, **config: Any) -> None:
        """Of all loops: the pipeline's own method reaches its outermost blocks alone."""
        for loop in _loops(self.pipeline._blocks):
            loop.set_progress_bar_config(**config)


class GuidedCall(ModularCall):
    """Guidance is an argument here, and a part of the pipeline there."""

    def __call__(
        self,
        prompt: list[str],
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float,
        generator: Any,
        negative_prompt: list[str] | None = None,
    ) -> Any:
        """What the pipeline's blocks leave behind, `images` among it."""
        self.pipeline.update_components(guider=self.pipeline.guider.new(guidance_scale=guidance_scale))
        return self.pipeline(
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            generator=generator,
        )

"""Load a diffusers pipeline folder, safetensors only, and find out beforehand whether it is the right kind of model.

The families' own loaders call these functions too; they are for everybody's families.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from slider_hooks import Components, Diffusion, Family, LoadRequest
from slider_plugin.errors import UserError

CLASS = "_class_name"
"""Where a configuration names its class. A family that was published under more than one name lists them in `expects`."""

INDEX_FILES = ("model_index.json", "modular_model_index.json")


def model_folder(family: Family, model: str) -> Path | None:
    """The folder that `model` names, or None for a hub id. Raises UserError for a path that is not there."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    looks_like_a_path = folder.exists() or folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1
    if looks_like_a_path:
        kind = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(f"pretrained_model_name_or_path: {model} {kind}; give the folder of a {family.title} pipeline")
    return None


def check_folder(family: Family, folder: Path) -> None:
    """Raise UserError unless the folder holds a pipeline whose denoiser this family can train. Reads JSON only."""
    index = next((folder / name for name in INDEX_FILES if (folder / name).is_file()), None)
    if index is None:
        raise UserError(
            f"{folder} is not a diffusers pipeline folder: it has no {INDEX_FILES[0]}. "
            f"Give the folder that `save_pretrained` of a {family.title} pipeline wrote"
        )
    config = _read_json(folder / family.denoiser / "config.json", family)
    wanted = family.denoiser_class.rpartition(":")[2]
    if config.get(CLASS) not in family.expects.get(CLASS, (wanted,)):
        raise UserError(
            f"{folder} is not a {family.title} model: its {family.denoiser} is a {config.get(CLASS)}, "
            f"and family {family.name} trains {wanted}. Set model_family to the family of this model"
        )
    check_config(family, config, str(folder))


def check_config(family: Family, config: Mapping[str, Any], model: str) -> None:
    """Raise UserError unless the denoiser's configuration is of a kind that this family can train."""
    wrong = {k: config.get(k) for k, allowed in family.expects.items() if k != CLASS and config.get(k) not in allowed}
    if wrong:
        details = ", ".join(f"{k} is {v!r} instead of {_or(family.expects[k])}" for k, v in wrong.items())
        raise UserError(
            f"{model} is not a {family.title} model that family {family.name} can train: in {family.denoiser}/config.json "
            f"{details}. Set model_family to the family of this model, or use another version of it"
        )


def denoiser_config(family: Family, folder: Path) -> dict[str, Any]:
    """The denoiser's configuration as stored in the folder."""
    return _read_json(folder / family.denoiser / "config.json", family)


def pipeline_class_of(folder: Path) -> Any | None:
    """The class that a pipeline folder names; None if diffusers has no such class, or the folder no such name."""
    index = folder / INDEX_FILES[0]
    name = json.loads(index.read_text(encoding="utf-8")).get(CLASS) if index.is_file() else None
    return getattr(importlib.import_module("diffusers"), name, None) if isinstance(name, str) else None


def denoiser_class_of(family: Family) -> Any | None:
    """The class of the denoiser; None if diffusers has no such class."""
    return class_of(family.denoiser_class)


def class_of(written: str) -> Any | None:
    """A class of diffusers by its name, or any by `package.module:Class`; None if there is no such class."""
    module, _, name = written.rpartition(":")
    return getattr(importlib.import_module(module or "diffusers"), name, None)


def on_meta(denoiser_class: Any, config: Mapping[str, Any]) -> Any:
    """A model of any size without its memory: all modules and shapes, no values."""
    import torch

    with torch.device("meta"):
        return denoiser_class.from_config(dict(config)) if hasattr(denoiser_class, "from_config") else denoiser_class(**config)


_WITHOUT_WEIGHTS: ContextVar[Any] = ContextVar("_WITHOUT_WEIGHTS", default=None)


@contextlib.contextmanager
def without_weights(mode: Any) -> Iterator[None]:
    """Inside, `load_pipeline_components` builds the models of a folder from their configurations and reads no weights.

    Args:
        mode: a `FakeTensorMode`, under which models of any size take no memory; their tensors are fake ones.
    """
    token = _WITHOUT_WEIGHTS.set(mode)
    try:
        yield
    finally:
        _WITHOUT_WEIGHTS.reset(token)


def _models_without_weights(folder: Path, dtype: Any) -> dict[str, Any]:
    """The models of a pipeline folder by the names of their parts; nothing unless `without_weights` is on."""
    mode = _WITHOUT_WEIGHTS.get()
    if mode is None:
        return {}

    index = json.loads((folder / INDEX_FILES[0]).read_text(encoding="utf-8"))
    models = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or len(entry) < 2 or not isinstance(entry[0], str) or not (folder / name).is_dir():
            continue
        found: Any = _part_class(*entry[:2])
        if not _is_model_class(found):
            continue
        with mode:
            if hasattr(found, "from_config") and hasattr(found, "load_config"):
                model = found.from_config(found.load_config(folder / name))
            else:
                model = found(found.config_class.from_pretrained(folder / name))
            _cast(model, dtype)
        models[name] = model
    return models


def refuse_without_weights(family: Family) -> None:
    """Raise UserError inside `without_weights`: for loaders that do not go through `load_pipeline_components`."""
    if _WITHOUT_WEIGHTS.get() is not None:
        raise UserError(f"{family.name} has a loader of its own")


def _cast(model: Any, dtype: Any) -> None:
    """What `model.to(dtype)` does, which PyTorch refuses for fake tensors. What was one parameter stays one."""
    import torch

    cast: dict[int, Any] = {}
    kept = list(model.parameters())  # so that no number comes up twice
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                if id(parameter) not in cast:
                    cast[id(parameter)] = torch.nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
                module._parameters[name] = cast[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
    del kept


def _is_model_class(found: Any) -> bool:
    import torch

    return isinstance(found, type) and issubclass(found, torch.nn.Module)


def _part_class(library: str, name: str) -> Any | None:
    """The class of a part as model_index.json writes it: of a library, or of a module of diffusers' pipelines."""
    import diffusers

    module = getattr(diffusers.pipelines, library, None) or importlib.import_module(library)
    return getattr(module, name, None)


def _or(values: tuple[Any, ...]) -> str:
    return " or ".join(repr(v) for v in values)


def _read_json(path: Path, family: Family) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"{path.parent.parent} is not a {family.title} model: it has no {path.parent.name}/config.json. "
            "Set model_family to the family of this model"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}. Copy the model folder again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object. Copy the model folder again")
    return value


def load_pipeline_components(family: Family, request: LoadRequest, pipeline_class: str | None = None) -> Components:
    """Load all parts of a pipeline in `request.dtype`, frozen and in evaluation mode.

    Args:
        family: the facts of the family.
        request: what to load.
        pipeline_class: instead of `Family.pipeline_class`; `DiffusionPipeline` is whatever class the folder names.

    Raises:
        UserError: the folder is missing, is no pipeline folder, or holds another family's model.
    """
    import diffusers

    folder = model_folder(family, request.model)
    if folder is not None:
        check_folder(family, folder)
    loader = getattr(diffusers, pipeline_class or family.pipeline_class or "DiffusionPipeline")
    models = _models_without_weights(folder, request.dtype) if folder is not None else {}
    if models and folder is not None:  # `DiffusionPipeline` loads parts that it is given all the same
        loader = pipeline_class_of(folder) or loader
    try:
        pipeline = loader.from_pretrained(
            request.model,
            dtype=request.dtype,
            use_safetensors=True,
            revision=request.revision,
            variant=request.variant,
            **models | dict(family.load_kwargs),
        )
    except (OSError, ValueError, ImportError) as error:  # ImportError: a part needs a library that is not installed
        raise UserError(f"{request.model} could not be loaded as a {family.title} pipeline: {_first_line(error)}") from error
    denoiser = getattr(pipeline, family.denoiser)
    check_config(family, getattr(denoiser, "config", {}), request.model)
    for part in pipeline.components.values():
        if hasattr(part, "requires_grad_"):
            part.requires_grad_(False).eval()
    return Components(
        denoiser=denoiser,
        pipeline=pipeline,
        scheduler=pipeline.scheduler,
        prediction=prediction_of(family, pipeline.scheduler),
        options=request.options,
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def prediction_of(family: Family, scheduler: Any) -> Any:
    """What the denoiser predicts: what the family states, or else what the loaded scheduler says."""
    if not isinstance(family.noise, Diffusion):
        return "flow"
    prediction = family.noise.prediction or getattr(scheduler, "config", {}).get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise UserError(f"the scheduler's prediction_type is {prediction!r}; {family.title} can train epsilon and v_prediction")
    return prediction


def posterior_mode(encoded: Any) -> Any:
    """The deterministic latents of any diffusers autoencoder's `encode`: AutoencoderKL, AutoencoderTiny, AutoencoderDC."""
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent


def image_dtype(components: Components) -> Any:
    """The `torch.dtype` of the images that `encode_images` gets: the autoencoder's."""
    import torch

    return getattr(getattr(components.pipeline, "vae", None), "dtype", None) or torch.float32

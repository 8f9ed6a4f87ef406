"""Load the pipeline of a folder that nobody has described, and refuse in one line what cannot be probed."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

from slider_plugin.common.cosmos import NoChecks
from slider_plugin.errors import UserError
from slider_plugin.loading import CLASS, INDEX_FILES

CHECKER = "safety_checker"
WHAT = "give the folder that `save_pretrained` of a diffusers pipeline wrote"


def open_pipeline(folder: Path) -> Any:
    """The pipeline of a folder in float32 on the processor, frozen, in evaluation mode; safetensors only.

    Raises:
        UserError: there is no such folder, no pipeline in it, one of a class that diffusers lacks, one that needs more than
            a prompt, or a part does not load.
    """
    import torch

    pipeline_class = _class_in(folder)
    _check_call(pipeline_class)
    missing = _left_out(pipeline_class, folder)
    try:
        pipeline = _load(pipeline_class, folder, missing)
    except (OSError, ValueError, ImportError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        # What a part's own loader raises is anybody's guess; it is the folder's fault or a missing library's.
        raise UserError(f"{folder} could not be loaded as a {pipeline_class.__name__}: {first_line(error)}") from error
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _load(pipeline_class: Any, folder: Path, missing: dict[str, Any]) -> Any:
    import torch

    wanted = {"dtype": torch.float32, "use_safetensors": True, "local_files_only": True}
    try:
        return pipeline_class.from_pretrained(folder, **wanted, **missing)
    except ImportError:
        if CHECKER not in missing:
            raise
        return pipeline_class.from_pretrained(folder, **wanted, **{**missing, CHECKER: NoChecks()})  # it insists on one


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _class_in(folder: Path) -> Any:
    if not folder.is_dir():
        raise UserError(f"--probe: {folder} {'is a file' if folder.exists() else 'does not exist'}; {WHAT}")
    index, modular = (folder / name for name in INDEX_FILES)
    if not index.is_file():
        if modular.is_file():
            raise UserError(
                f"--probe: {folder} holds a modular pipeline ({modular.name}), which has no single call that draws; "
                f"{WHAT} that is not modular"
            )
        raise UserError(f"--probe: {folder} is not a diffusers pipeline folder: it has no {index.name}; {WHAT}")
    try:
        name = json.loads(index.read_text(encoding="utf-8"))[CLASS]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--probe: {index} is damaged: it names no pipeline class. Copy the model folder again") from error
    found = getattr(importlib.import_module("diffusers"), str(name), None)
    if found is None:
        raise UserError(
            f"--probe: {folder} is of the class {name}, which diffusers does not have here; {WHAT}, or update diffusers"
        )
    return found


def _left_out(pipeline_class: Any, folder: Path) -> dict[str, None]:
    """Parts that the class takes and the folder does not have, such as a checker of images: none is given."""
    index = json.loads((folder / INDEX_FILES[0]).read_text(encoding="utf-8"))
    parameters = list(inspect.signature(pipeline_class.__init__).parameters.values())[1:]
    parts = [p.name for p in parameters if p.default is None or p.default is p.empty]
    return {name: None for name in parts if not isinstance(index.get(name), list) or index[name][:2] == [None, None]}


def _check_call(pipeline_class: Any) -> None:
    parameters = list(inspect.signature(pipeline_class.__call__).parameters.values())[1:]
    if "prompt" not in {p.name for p in parameters}:
        raise UserError(
            f"--probe: {pipeline_class.__name__} draws without a prompt, so there is no text to tell from the image; "
            "write its targets by hand"
        )
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if missing := [name for name in needed if name != "prompt"]:
        raise UserError(
            f"--probe: {pipeline_class.__name__} cannot draw from a prompt alone, it needs {', '.join(missing)}; "
            "probe the text-to-image pipeline of the same model"
        )

"""Everything that can be found wrong before a model is loaded, found in one go and told in one message.

Reads JSON and image headers, and builds the denoiser on the meta device, which takes no memory. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from slider_hooks import Family, Objective
from slider_plugin.adapters.attach import check_start, plan_targets
from slider_plugin.adapters.frozen import check_frozen
from slider_plugin.common.controlnet import check_controlnet
from slider_plugin.config import BucketConfig, RunConfig
from slider_plugin.data.buckets import Bucket, Buckets, open_buckets
from slider_plugin.data.cache import check_cache
from slider_plugin.data.conditioning import first_conditioning_image
from slider_plugin.data.drawn import text_infos
from slider_plugin.data.images import check_image as check_image_file
from slider_plugin.data.pairs import matched
from slider_plugin.data.sampler import cycle_length
from slider_plugin.data.wanted import Drawn
from slider_plugin.errors import ConfigError, UserError
from slider_plugin.files import check_writable
from slider_plugin.loading import check_folder, denoiser_class_of, denoiser_config, model_folder, on_meta, pipeline_class_of
from slider_plugin.quantise import check_quantise
from slider_plugin.targets import TargetPlan
from slider_plugin.training.compiling import check_compile
from slider_plugin.training.offload import check_offload
from slider_plugin.training.optimizers import KINDS, check_optimizer, optimizer_warnings
from slider_plugin.training.processes import check_launch
from slider_plugin.training.times import time_problems
from slider_plugin.training.watch import check_trackers
from slider_plugin.validation.render import check_image

if TYPE_CHECKING:
    from torch.nn import Module

    from slider_plugin.family import LoadedFamily

T = TypeVar("T")

USE_ONE = "set controlnet, or name one in controlnet_model_name_or_path"
EXPORTED = "slider.safetensors"
"""Name of the finished slider in `output_dir`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """What is known about a run before anything is loaded."""

    model: str
    """Folder or hub id."""

    buckets: tuple[Bucket, ...]
    targets: TargetPlan | None
    """None where the denoiser cannot be built beforehand: a hub id, or a class of a plugin's own."""

    denoiser: Module | None
    """On the meta device; None likewise."""

    warnings: tuple[str, ...]
    cycle: int
    """Signs that exist among the buckets."""

    draws_per_step: int
    """`gradient_accumulation_steps`, rounded up to whole cycles."""

    twins: Mapping[str, str]
    """Of matched pairs, the negative bucket by the positive one; empty for other objectives."""

    objective: Objective
    """What the slider learns from."""

    drawn: Drawn | None
    """Width, height and frames of the images that a text slider draws itself; None where it draws none."""

    neutral_scale: float
    size: tuple[int, int]
    """(width, height) of most training images."""


def preflight(config: RunConfig, family: LoadedFamily) -> Preflight:
    """Check model folder, targets, buckets, checkpoint and output folder. Raises ConfigError with everything wrong."""
    problems: list[str] = []
    model = _or_note(problems, lambda: model_of(config, family))
    denoiser = _or_note(problems, lambda: meta_denoiser(family, model)) if model else None
    targets = None
    if denoiser is not None and not config.controlnet:  # of a ControlNet only its weights tell which layers are zero
        targets = _or_note(problems, lambda: plan_targets(config, family, denoiser))
    problems.extend(controlnet_problems(config, family.facts))
    _or_note(problems, lambda: check_frozen(config, family.facts, denoiser))
    _or_note(problems, lambda: check_start(config, family, targets))
    _or_note(problems, lambda: check_optimizer(config))
    _or_note(problems, lambda: check_compile(config))
    _or_note(problems, lambda: check_quantise(config))
    _or_note(problems, lambda: check_offload(config, denoiser))
    _or_note(problems, lambda: check_times(config, family, model))
    _or_note(problems, lambda: check_trackers(config))
    objective = _or_note(problems, lambda: family.build_objective(config.slider_objective, config.model_dump(mode="json")))
    optional = objective is not None and objective.data == "optional"
    opened = _or_note(problems, lambda: open_buckets(config, alignment(config), optional))
    twins = _or_note(problems, lambda: twins_of(objective, opened)) or {}
    drawn = _or_note(problems, lambda: drawn_by_the_model(config, family.facts, objective, opened))
    problems.extend(foreign_data(config, family.facts))
    problems.extend(report_problems(config))
    _or_note(problems, lambda: check_output(config))
    problems.extend(check_launch(config))
    _or_note(problems, lambda: check_cache(config))
    if model and draws_any(config):
        _or_note(problems, lambda: _check_first_frame(config, family, model))
    if problems or model is None or opened is None or objective is None:
        raise ConfigError(problems)
    return _facts(config, model, targets, denoiser, opened, twins, objective, drawn)


def _or_note(problems: list[str], work: Callable[[], T]) -> T | None:
    """The result of the work, or None with its problems noted."""
    try:
        return work()
    except ConfigError as error:
        problems.extend(error.problems)
    except UserError as error:
        problems.append(str(error))
    return None


def _facts(
    config: RunConfig,
    model: str,
    targets: TargetPlan | None,
    denoiser: Module | None,
    opened: Buckets,
    twins: Mapping[str, str],
    objective: Objective,
    drawn: Drawn | None,
) -> Preflight:
    infos = [*(b.info(config.train_batch_size) for b in opened.buckets), *(text_infos(1, 1) if drawn else ())]
    cycle = cycle_length(infos) + (1 if objective.anchors else 0)
    draws = -(-config.gradient_accumulation_steps // cycle) * cycle
    warnings = [*opened.warnings, *(targets.warnings if targets else ()), *optimizer_warnings(config)]
    if draws != config.gradient_accumulation_steps and cycle > 1:
        warnings.append(
            f"gradient_accumulation_steps {config.gradient_accumulation_steps} is rounded up to {draws}: each optimizer step "
            f"takes {'a whole cycle' if draws == cycle else 'whole cycles'} of {cycle} draws"
        )
    if config.text_rollout_guidance != 1.0 and drawn is None:
        warnings.append("text_rollout_guidance changes nothing here: the buckets' images are noised, and the model draws none")
    return Preflight(
        model=model,
        buckets=opened.buckets,
        targets=targets,
        denoiser=denoiser,
        warnings=tuple(warnings),
        cycle=cycle,
        twins=twins,
        draws_per_step=draws,
        neutral_scale=config.neutral_strength or max((abs(b.strength or 0.0) for b in opened.buckets), default=0.0) or 1.0,
        objective=objective,
        drawn=drawn,
        size=drawn[:2] if drawn else _most_common_size(opened),
    )


def foreign_data(config: RunConfig, family: Family) -> list[str]:
    """Buckets of data that the family does not make."""
    makes = set(family.modalities) | ({"image"} if "video" in family.modalities else set())
    return [
        f"bucket {bucket.id!r}: dataset_type {bucket.dataset_type}, but {family.name} makes {' and '.join(family.modalities)}"
        for bucket in config.buckets
        if bucket.dataset_type not in makes and not bucket.disabled
    ]


def controlnet_problems(config: RunConfig, family: Family) -> list[str]:
    """What is wrong with the ControlNet of a run, or with conditioning images that no ControlNet is shown."""
    if not config.has_controlnet:
        idle = [b.id for b in config.buckets if b.conditioning_data_dir is not None and not b.disabled]
        lines = [f"bucket {name!r}: it has conditioning images, and no ControlNet takes part; {USE_ONE}" for name in idle]
        return lines + (
            [f"validation_control_image: no ControlNet takes part; {USE_ONE}"] * bool(config.validation_control_image)
        )
    problems: list[str] = []
    _or_note(problems, lambda: check_controlnet(family, config.controlnet_model_name_or_path))
    if config.controlnet and config.lycoris is not None:
        problems.append("controlnet: on a ControlNet a plain LoRA is trained; write lora_type standard")
    if draws_any(config):
        _or_note(problems, lambda: check_image_file(control_image(config), config.max_image_pixels))
    return problems


def control_image(config: RunConfig) -> Path:
    """The image that the ControlNet is shown in validation. Raises UserError if there is none."""
    found = config.validation_control_image or first_conditioning_image([b for b in config.buckets if _is_there(b)])
    if found is None:
        raise UserError("validation_control_image: the ControlNet is to be shown an image in validation; name a file")
    return found


def _is_there(bucket: BucketConfig) -> bool:
    return bucket.conditioning_data_dir is not None and bucket.conditioning_data_dir.is_dir()


def twins_of(objective: Objective | None, opened: Buckets | None) -> dict[str, str]:
    """The matched pairs of buckets, where the objective is one of pairs. Raises ConfigError with what does not match."""
    pairs = objective is not None and objective.data == "pairs"
    return matched(opened.buckets) if opened is not None and pairs else {}


def drawn_by_the_model(config: RunConfig, family: Family, objective: Objective | None, opened: Buckets | None) -> Drawn | None:
    """Width, height and frames of what the model draws where an objective needs no images and has none with a strength.

    Raises:
        ConfigError: images of one sign alone, or a model that cannot draw such.
    """
    if objective is None or objective.data != "optional" or opened is None:
        return None
    signs = {(bucket.strength or 0.0) > 0 for bucket in opened.buckets if bucket.strength}
    if len(signs) == 2:
        return None
    name, problems = config.slider_objective, []
    if signs:
        there, missing = ("positive", "negative") if True in signs else ("negative", "positive")
        problems.append(
            f"slider_objective {name}: there are {there} images and no {missing} ones, and both signs are trained; add "
            "a bucket, or take the others' slider_strength out, so that they are neutral"
        )
    if config.has_controlnet:
        problems.append(
            f"controlnet: slider_objective {name} without images has nothing to show it; give buckets of both signs"
        )
    if not {"image", "video"} & set(family.modalities):
        problems.append(f"slider_objective {name}: {family.name} makes no images to be drawn; give buckets of both signs")
    if problems:
        raise ConfigError(problems)
    step, edge = alignment(config), _edge(config.resolution, config.resolution_type)
    side = max(step, round(edge / step) * step)
    return side, side, num_frames(config)


def num_frames(config: RunConfig) -> int:
    """Frames of a video that is drawn: as asked for, or as many as the longest training clip has."""
    clips = [bucket.num_frames or 1 for bucket in config.buckets]
    return config.validation_num_video_frames or max(clips, default=1)


def draws(config: RunConfig) -> bool:
    """Whether a run draws validation images."""
    return bool(config.prompts) and not config.validation_disable


def draws_any(config: RunConfig) -> bool:
    """Whether a run draws at all: validation images, or those of its reports."""
    return draws(config) or config.validation_report


def report_problems(config: RunConfig) -> list[str]:
    """What keeps a run from reporting on itself."""
    if not config.validation_report:
        return [
            "validation_report_stop: there are no reports to stop by; set validation_report"
        ] * config.validation_report_stop
    problems = []
    if config.validation_disable:
        problems.append("validation_report: validation_disable draws nothing; leave one of them out")
    strengths = [bucket.slider_strength or 0.0 for bucket in config.buckets if not bucket.disabled]
    if not any(s < 0 for s in strengths) or not any(s > 0 for s in strengths):
        problems.append(
            "validation_report: it measures from the negative to the positive images, and one sign has no bucket; add one, or "
            "leave validation_report out"
        )
    return problems


def image_file(config: RunConfig) -> str | None:
    """The file of the image that videos begin with."""
    return None if config.validation_image is None else str(config.validation_image)


def _check_first_frame(config: RunConfig, family: LoadedFamily, model: str) -> None:
    """Raise UserError unless the pipeline of a folder gets the image that it begins with, and that is an image."""
    if config.validation_image is not None:
        check_image_file(config.validation_image, config.max_image_pixels)
    pipeline_class = _pipeline_class(family, model)
    if pipeline_class is not None:
        check_image(pipeline_class, image_file(config))


def check_times(config: RunConfig, family: LoadedFamily, model: str | None) -> None:
    """Raise ConfigError for keys about times and their weights that mean nothing to this family."""
    by_size = config.timestep_shift == "auto"
    if problems := time_problems(config, family.facts, _pipeline_class(family, model) if by_size else None):
        raise ConfigError(problems)


def _pipeline_class(family: LoadedFamily, model: str | None) -> type | None:
    """The class of a pipeline folder; None where it is not known beforehand."""
    folder = model_folder(family.facts, model) if model else None
    return None if folder is None else pipeline_class_of(folder)


def _most_common_size(opened: Buckets) -> tuple[int, int]:
    counts: dict[tuple[int, int], int] = {}
    for bucket in opened.buckets:
        for size, places in bucket.shapes().items():
            counts[size] = counts.get(size, 0) + len(places)
    return max(counts, key=lambda size: (counts[size], size))


def model_of(config: RunConfig, family: LoadedFamily) -> str:
    """Folder or hub id of the model. Raises UserError for an unknown flavour, a missing folder or another family's model."""
    facts = family.facts
    flavour = config.model_flavour or facts.default_flavour
    if config.model_flavour and config.model_flavour not in facts.flavours:
        known = ", ".join(facts.flavours) or "none"
        raise UserError(f"model_flavour: {facts.name} has no flavour {config.model_flavour!r}; it has {known}")
    published = facts.flavours[flavour].model if flavour else None
    model = config.pretrained_model_name_or_path or published
    if not model:
        raise UserError(f"pretrained_model_name_or_path: {facts.name} has no published default; give a model folder")
    folder = model_folder(facts, model)
    if folder is not None and has_pipeline_folders(family):
        check_folder(facts, folder)
    return model


def has_pipeline_folders(family: LoadedFamily) -> bool:
    """Whether the family's models are diffusers pipeline folders: it names their class, or leaves loading to the host."""
    loader = str(family.describe()["hooks"]["load_components"])
    return bool(family.facts.pipeline_class) or loader in ("default", "wrapped default")


def meta_denoiser(family: LoadedFamily, model: str) -> Module | None:
    """The denoiser of a pipeline folder on the meta device: every module, no memory. None if it cannot be built so."""
    folder = model_folder(family.facts, model)
    if folder is None or not (folder / family.facts.denoiser / "config.json").is_file():
        return None
    denoiser_class = denoiser_class_of(family.facts)
    return None if denoiser_class is None else on_meta(denoiser_class, denoiser_config(family.facts, folder))


def alignment(config: RunConfig) -> int:
    """What the sides of training images are multiples of: 64 as usual, less for images that are small themselves."""
    if config.aspect_bucket_alignment:
        return config.aspect_bucket_alignment
    edges = [_edge(b.resolution, b.resolution_type) for b in config.buckets] or [
        _edge(config.resolution, config.resolution_type)
    ]
    return 64 if min(edges) >= 512 else 16 if min(edges) >= 64 else 8


def _edge(resolution: float, unit: str) -> float:
    return 1000.0 * resolution**0.5 if unit == "area" else resolution


def check_output(config: RunConfig) -> None:
    """Raise UserError if the output folder cannot be written, or holds a run that this one would overwrite."""
    from slider_plugin.training.checkpoint import assert_fits, checkpoints, find_checkpoint, verify
    from slider_plugin.training.resuming import check_config

    check_writable(config.output_dir)
    resume = config.resume_from_checkpoint
    path = find_checkpoint(resume, config.output_dir, lambda line: None) if resume else None  # damaged ones are told later
    if path is not None:
        state = verify(path)
        check_config(path, state["facts"], config)
        assert_fits(path, state, KINDS[config.optimizer].class_name, config.use_ema)
    if not resume and (checkpoints(config.output_dir) or (config.output_dir / EXPORTED).exists()):
        raise UserError(
            f"output_dir: {config.output_dir} holds a run already; set resume_from_checkpoint to latest to go on with it, "
            "or choose another output_dir"
        )
    if resume == "latest" and path is None and (config.output_dir / EXPORTED).exists():
        raise UserError(
            f"resume_from_checkpoint: {config.output_dir} holds a finished slider and no checkpoint; choose another output_dir"
        )

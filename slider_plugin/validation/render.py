"""Draw a validation and write it into `step_<number>/`: single images, pairs, strips, one contact sheet, `prompts.json`.

Nothing of it stays behind in the model: the adapter's scale, train and eval modes, the pipeline's scheduler and progress
bar and torch's random numbers are afterwards what they were before, also when drawing fails.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, ImageOps

from slider_hooks import Components, PromptEntry
from slider_plugin.adapters.frozen import drawing_strengths
from slider_plugin.control import encode_for_controlnet
from slider_plugin.data.images import load_image
from slider_plugin.data.media import pixels
from slider_plugin.errors import UserError
from slider_plugin.files import replacing, safe_name, write_json
from slider_plugin.loading import image_dtype
from slider_plugin.validation import strips
from slider_plugin.validation.plan import Panel, Plan, Shot, plan_validation
from slider_plugin.validation.samples import Sample, samples_of
from slider_plugin.validation.strips import format_strength

MOST_PIXELS = 64_000_000
"""Of the image that a video begins with."""


class DrawingFamily(Protocol):
    """What drawing needs of a loaded family."""

    def build_pipeline(self, components: Components, /) -> Any: ...

    def validation_prompt_scale(self, entry: PromptEntry, global_strength: float, /) -> float: ...


class ScalableAdapter(Protocol):
    """What drawing needs of the trainable adapter."""

    def scaled(self, scale: float, /) -> AbstractContextManager[object]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawSettings:
    """How one image is drawn. `batch_size` changes speed and memory, not images."""

    width: int
    height: int
    steps: int
    guidance_scale: float
    negative_prompt: str | None = None
    num_frames: int = 1
    image: str | None = None
    """File of the image that videos begin with."""

    control: str | None = None
    """File of the image that the ControlNet is shown."""

    batch_size: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)
    """The family's own arguments of the pipeline's call."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """What a validation wrote; `contact_sheet` and `prompts` are None if there was nothing to draw."""

    folder: Path
    images: Mapping[Shot, Path]
    pairs: tuple[Path, ...] = ()
    strips: tuple[Path, ...] = ()
    contact_sheet: Path | None = None
    prompts: Path | None = None


def render(
    family: DrawingFamily,
    components: Components,
    adapter: ScalableAdapter,
    prompts: Sequence[PromptEntry],
    *,
    folder: Path,
    step: int,
    seeds: Sequence[int],
    strengths: Sequence[float],
    global_strength: float,
    settings: DrawSettings,
) -> Rendered:
    """Draw all prompts at all scales.

    Args:
        family: the family with its hooks.
        components: the model, with the adapter injected and on its device.
        adapter: the trainable adapter; its `scaled` sets a scale and takes it back.
        prompts: the prompt library.
        folder: the images go into `step_<step>` in it; files of an earlier validation of that step are replaced.
        step: optimizer steps so far.
        seeds: one image of each kind per seed.
        strengths: scales of the strips; empty for none.
        global_strength: scale of prompts without one of their own, before the family's hook has its say.
        settings: size, steps, guidance.

    Raises:
        PluginError: a hook of the family answered something that cannot be used.
    """
    plan = plan_validation(prompts, seeds, strengths, lambda entry: family.validation_prompt_scale(entry, global_strength))
    place = folder / f"step_{step:06d}"
    if not plan.shots:
        return Rendered(place, {})
    files = _Files(place, plan)

    def write(shots: Sequence[Shot], samples: Sequence[Sample]) -> None:  # at once: a killed run keeps its images
        for shot, sample in zip(shots, samples, strict=True):
            path = files.image(shot)
            _save(sample.still(), path)
            sample.write_original(path)

    draw_batches(family, components, adapter, plan.by_scale(), settings, write)
    return _assemble(plan, files, step, settings)


# --- Drawing ----------------------------------------------------------------------------------------------------------


def draw_batches(
    family: DrawingFamily,
    components: Components,
    adapter: ScalableAdapter,
    by_scale: Sequence[tuple[float, Sequence[Shot]]],
    settings: DrawSettings,
    take: Callable[[Sequence[Shot], Sequence[Sample]], None],
) -> None:
    """Draw images in batches of one scale, `settings.batch_size` at a time; memory holds one batch.

    Args:
        family: the family with its hooks.
        components: the model, with the adapter injected and on its device.
        adapter: its `scaled` sets a scale and takes it back.
        by_scale: what is drawn, in groups of one scale.
        settings: size, steps, guidance.
        take: gets each batch, without gradients and at its scale.

    Raises:
        PluginError: a hook of the family answered something that cannot be used.
    """
    pipeline = family.build_pipeline(components)
    check_image(type(pipeline), settings.image)
    with undisturbed(components, pipeline), _steering(family, components, settings):
        for scale, shots in by_scale:
            with adapter.scaled(scale):
                for start in range(0, len(shots), settings.batch_size):
                    batch = shots[start : start + settings.batch_size]
                    take(batch, _call(pipeline, batch, settings))


@contextmanager
def _steering(family: Any, components: Components, settings: DrawSettings) -> Iterator[None]:
    """Show the ControlNet, if there is one, its image."""
    if settings.control is None:
        yield
        return
    image_1CHW = pixels(_fitted(settings.control, settings.width, settings.height)).unsqueeze(0)
    with torch.no_grad():
        device = components.denoiser.device
        shown = encode_for_controlnet(family, components, image_1CHW.to(device, image_dtype(components)))
    with components.control.showing(shown):
        yield


@contextmanager
def undisturbed(components: Components, pipeline: Any) -> Iterator[None]:
    """Everything that drawing needs switched, and all of it back afterwards.

    `no_grad` rather than `inference_mode`: models keep tensors that they make on the way (rotary tables, cached masks), and
    training could not differentiate through an inference tensor. Without gradients, diffusers skips gradient checkpointing
    by itself, so that switch needs no touching.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_same_random_numbers(components.denoiser))
        stack.enter_context(_eval_mode(components.denoiser))
        stack.enter_context(drawing_strengths(components.denoiser))
        stack.enter_context(_own_scheduler(pipeline))
        stack.enter_context(_quiet(pipeline))
        yield


def _same_random_numbers(module: torch.nn.Module) -> AbstractContextManager[None]:
    """A pipeline may draw from the global generators in spite of its own; training's sequence must not notice."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextmanager
def _eval_mode(module: torch.nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]  # each, as a trainer may have frozen parts in eval mode
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def _own_scheduler(pipeline: Any) -> Iterator[None]:
    """Draw with a copy of the scheduler: `set_timesteps` overwrites tables that training may read from the original."""
    scheduler = getattr(pipeline, "scheduler", None)
    if scheduler is None:
        yield
        return
    pipeline.scheduler = copy.deepcopy(scheduler)
    try:
        yield
    finally:
        pipeline.scheduler = scheduler


@contextmanager
def _quiet(pipeline: Any) -> Iterator[None]:
    configure = getattr(pipeline, "set_progress_bar_config", None)
    if configure is None:
        yield
        return
    before = dict(getattr(pipeline, "_progress_bar_config", {}))  # diffusers has no getter
    configure(**{**before, "disable": True})
    try:
        yield
    finally:
        configure(**before)


def _call(pipeline: Any, batch: Sequence[Shot], settings: DrawSettings) -> list[Sample]:
    # One generator per image, and on the CPU: the noise is then the same in any batch and on any device.
    generators = [torch.Generator("cpu").manual_seed(shot.seed) for shot in batch]
    wanted: dict[str, Any] = {
        "height": settings.height,
        "width": settings.width,
        "num_frames": settings.num_frames,
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
    }
    if settings.negative_prompt is not None:
        wanted["negative_prompt"] = [settings.negative_prompt] * len(batch)
    if settings.image is not None:
        wanted["image"] = _fitted(settings.image, settings.width, settings.height)
    taken = call_arguments(pipeline, wanted | dict(settings.extra))
    prompts = [shot.entry.prompt for shot in batch]
    return samples_of(pipeline(prompt=prompts, generator=generators, **taken), pipeline, len(batch))


def _fitted(file: str, width: int, height: int) -> Image.Image:
    """The image at the size of what is drawn, cut in the middle where its aspect is another."""
    return ImageOps.fit(load_image(Path(file), MOST_PIXELS), (width, height), Image.Resampling.LANCZOS)


def check_image(pipeline_class: Any, image: str | None) -> None:
    """Raise UserError if a pipeline cannot draw without an image and none is given, or one is given that it would ignore.

    Args:
        pipeline_class: class of the pipeline.
        image: file, or None.
    """
    parameter = inspect.signature(pipeline_class.__call__).parameters.get("image")
    needed = parameter is not None and parameter.default is parameter.empty
    if needed and image is None:
        raise UserError(
            f"validation_image: {pipeline_class.__name__} begins its videos with an image, and none is given; "
            "name a file, or set validation_disable"
        )
    if image is not None and not needed:
        raise UserError(f"validation_image: {pipeline_class.__name__} begins with no image; leave the key out")


def call_arguments(pipeline: Any, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the pipeline's call names: a pipeline of images has no `num_frames`, one of sound no size.

    Raises:
        UserError: a negative prompt is wanted, and the pipeline takes none.
    """
    parameters = inspect.signature(pipeline).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(wanted)
    if "negative_prompt" in wanted and "negative_prompt" not in parameters:
        raise UserError(f"validation_negative_prompt: {type(pipeline).__name__} takes no negative prompt; leave the key out")
    return {name: value for name, value in wanted.items() if name in parameters}


# --- Files ------------------------------------------------------------------------------------------------------------


class _Files:
    """Where each picture of a plan goes: `NN_name_seed42_base.png` and the like."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder = folder
        entries = dict.fromkeys(shot.entry for shot in plan.bases)
        self._names = {entry: safe_name(entry.name, number) for number, entry in enumerate(entries, start=1)}

    def image(self, shot: Shot) -> Path:
        kind = "base" if shot.scale == 0.0 else f"scale{format_strength(shot.scale)}"
        return self._path(shot.entry, shot.seed, kind)

    def panel(self, panel: Panel, kind: str) -> Path:
        return self._path(panel.entry, panel.seed, kind)

    def _path(self, entry: PromptEntry, seed: int, kind: str) -> Path:
        return self.folder / f"{self._names[entry]}_seed{seed}_{kind}.png"


def _save(image: Image.Image, path: Path) -> None:
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def _assemble(plan: Plan, files: _Files, step: int, settings: DrawSettings) -> Rendered:
    images = {shot: files.image(shot) for shot in plan.shots}
    pairs = tuple(_write_pair(panel, files) for panel in plan.pairs)
    written = tuple(_write_strip(panel, files) for panel in plan.strips)
    several = len({shot.seed for shot in plan.bases}) > 1
    rows = [(_row_title(panel, several), strips.fit(_sheet_strip(panel, files))) for panel in plan.sheet]
    sheet = files.folder / "contact_sheet.png"
    _save(strips.contact_sheet(rows), sheet)
    sidecar = files.folder / "prompts.json"
    write_json(sidecar, {"step": step, "settings": asdict(settings), "images": [_record(s, p) for s, p in images.items()]})
    return Rendered(files.folder, images, pairs, written, sheet, sidecar)


def _contents(panel: Panel, files: _Files) -> tuple[list[Image.Image], list[str]]:
    return [_open(files.image(shot)) for shot in panel.shots], [format_strength(shot.scale) for shot in panel.shots]


def _sheet_strip(panel: Panel, files: _Files) -> Image.Image:
    return strips.strip(*_contents(panel, files), framed=False)


def _write_pair(panel: Panel, files: _Files) -> Path:
    (base, own), (zero, scale) = _contents(panel, files)
    path = files.panel(panel, "pair")
    _save(strips.pair(base, own, (zero, scale)), path)
    return path


def _write_strip(panel: Panel, files: _Files) -> Path:
    path = files.panel(panel, "strip")
    _save(strips.strip(*_contents(panel, files), panel.entry.prompt), path)
    return path


def _row_title(panel: Panel, several_seeds: bool) -> str:
    prompt = panel.entry.prompt or "(empty prompt)"
    return f"{prompt}  -  seed {panel.seed}" if several_seeds else prompt


def _record(shot: Shot, path: Path) -> dict[str, Any]:
    return {
        "name": shot.entry.name,
        "prompt": shot.entry.prompt,
        "seed": shot.seed,
        "scale": shot.scale,
        "file": path.name,
    }

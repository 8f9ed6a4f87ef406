"""`slider report`: check what is asked, load once, draw, score, write."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slider_hooks import Components
from slider_plugin import console, stages
from slider_plugin.adapterfile import read_tensors
from slider_plugin.adapters.attach import attach_file
from slider_plugin.config import PromptConfig, RunConfig
from slider_plugin.data.buckets import Bucket, open_buckets
from slider_plugin.errors import ConfigError, UserError
from slider_plugin.files import check_writable
from slider_plugin.preflight import alignment
from slider_plugin.registry import Plugins
from slider_plugin.report import card as cards
from slider_plugin.report.about import captions_of, facts_about
from slider_plugin.report.calibrate import calibrate, check_calibration
from slider_plugin.report.card import Card, card_of
from slider_plugin.report.ends import Ends, of_buckets, of_words, sides_of
from slider_plugin.report.probe import Drawn, Request, Score, curves_of, draw, strip
from slider_plugin.report.scorers import Words, check_scorer, open_scorer
from slider_plugin.training.processes import check_one_process
from slider_plugin.validation.render import DrawSettings, ScalableAdapter
from slider_plugin.validation.settings import draw_settings, validation_seeds

if TYPE_CHECKING:
    from accelerate import Accelerator

    from slider_plugin.family import LoadedFamily

STRENGTHS = tuple(-2.0 + 0.5 * i for i in range(9))
SEEDS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line asks for besides the configuration."""

    strengths: tuple[float, ...] = STRENGTHS
    prompts: tuple[str, ...] = ()
    """Instead of the configuration's."""

    seeds: int = SEEDS
    scorer: str | None = None
    words: Words = field(default_factory=Words)
    calibrate: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What is known before a model is loaded. `stages.encode` takes it in place of a run's preflight."""

    model: str
    size: tuple[int, int]
    buckets: tuple[Bucket, ...]
    prompts: tuple[str, ...]
    trained: float
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Report:
    """A finished one."""

    card: Card
    json: dict[str, Any]
    path: Path
    calibrated: Path | None = None


def report(config: RunConfig, adapter_file: Path, folder: Path, options: Options) -> Report:
    """Draw, score and write the report of one slider. Raises UserError, before a model is loaded, for anything wrong."""
    check_one_process("report")
    family = Plugins.discover().load(config.model_family)
    config = with_prompts(config, options.prompts)
    checked = check_report(config, family, adapter_file, folder, options)
    desk = Desk.open(config, family, checked, options)
    adapter = attach_file(adapter_file, family, desk.components)
    ends = desk.ends(adapter)
    drawn, card = desk.measure(adapter, ends, checked.trained)
    facts = facts_about(
        family, adapter_file.name, int(checked.metadata.get("slider.steps", 0)), desk.request, options.scorer, ends
    )
    written = cards.as_json(card, facts)
    path = cards.write(folder, written, strip(drawn))
    calibrated = calibrate(adapter_file, card, family.facts) if options.calibrate else None
    return Report(card, written, path, calibrated)


# --- What can be wrong ------------------------------------------------------------------------------------------------


def with_prompts(config: RunConfig, prompts: Sequence[str]) -> RunConfig:
    """The configuration with these prompts, else its own, else some captions of its positive and negative images."""
    chosen = tuple(dict.fromkeys(prompts or (p.prompt for p in config.prompts)))
    if not chosen:
        chosen = captions_of(open_buckets(config, alignment(config)).buckets)
    entries = tuple(PromptConfig(name=f"report{i}", prompt=prompt) for i, prompt in enumerate(chosen))
    return config.model_copy(update={"prompts": entries})


def check_report(config: RunConfig, family: LoadedFamily, file: Path, folder: Path, options: Options) -> Checked:
    """Everything that can be found wrong beforehand, in one message."""
    problems: list[str] = []

    def note(error: UserError) -> None:
        problems.extend(error.problems if isinstance(error, ConfigError) else [str(error)])

    model, size = "", (0, 0)
    buckets: tuple[Bucket, ...] = ()
    metadata: dict[str, str] = {}
    try:
        model, size = stages.check_validation(config, family, file)
        metadata = read_tensors(file)[1]
        if options.calibrate:
            check_calibration(file)
    except UserError as error:
        note(error)
    try:
        buckets = open_buckets(config, alignment(config)).buckets if config.buckets else ()
        if not all(sides_of(buckets)) and not (options.words.positive and options.words.negative):
            problems.append(
                "the report measures along positive and negative images, and there are none of one sign: name buckets of both "
                "in data_backend_config, or give --positive and --negative words"
            )
    except UserError as error:
        note(error)
    problems += check_options(options)
    try:
        check_writable(folder)
        if options.scorer:
            check_scorer(options.scorer, options.words, family)
    except UserError as error:
        note(error)
    if problems:
        raise ConfigError(problems)
    return Checked(
        model=model,
        size=size,
        buckets=tuple(buckets),
        prompts=tuple(prompt.prompt for prompt in config.prompts),
        trained=trained_strength(metadata, buckets),
        metadata=metadata,
    )


def check_options(options: Options) -> list[str]:
    """What is wrong with the command line's numbers."""
    problems = []
    if any(not math.isfinite(strength) for strength in options.strengths):
        problems.append("--strengths: a strength is a finite number")
    elif not any(s < 0 for s in options.strengths) or not any(s > 0 for s in options.strengths):
        problems.append("--strengths: a report needs strengths below and above 0, such as -2,-1,0,1,2")
    if options.seeds < 1:
        problems.append("--seeds: at least one")
    return problems


def trained_strength(metadata: Mapping[str, str], buckets: Sequence[Bucket]) -> float:
    """The largest strength that was trained: what the file says, else what the buckets are, else 1."""
    try:
        told = [abs(float(value)) for value in json.loads(metadata.get("slider.strengths", "[]"))]
    except (ValueError, TypeError):
        told = []
    return max(told, default=0.0) or max((abs(b.strength or 0.0) for b in buckets), default=0.0) or 1.0


# --- With the model loaded --------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Desk:
    """A loaded model, and how reports are made with it."""

    config: RunConfig
    family: LoadedFamily
    components: Components
    machine: Accelerator
    checked: Checked
    options: Options
    settings: DrawSettings
    request: Request

    @classmethod
    def open(cls, config: RunConfig, family: LoadedFamily, checked: Checked, options: Options) -> Desk:
        """Load the model."""
        machine = stages.open_machine(config)
        components = stages.load_model(config, family, checked.model, machine)
        return cls(
            config=config,
            family=family,
            components=components,
            machine=machine,
            checked=checked,
            options=options,
            settings=draw_settings(config, family, components, checked.size),
            request=Request(
                checked.prompts, tuple(validation_seeds(config, options.seeds)), tuple(sorted({0.0, *options.strengths}))
            ),
        )

    def ends(self, adapter: ScalableAdapter) -> Ends:
        """The two ends of the concept; `adapter` is at strength 0 meanwhile."""
        words, buckets = self.options.words, self.checked.buckets
        if all(sides_of(buckets)):
            with adapter.scaled(0.0):
                data = stages.encode(self.config, self.family, self.components, self.checked, self.machine)
            return of_buckets(data, pictures=self.options.scorer is not None)
        return of_words(self.family, self.components, adapter, words, self.settings)

    def measure(self, adapter: ScalableAdapter, ends: Ends, trained: float) -> tuple[Drawn, Card]:
        """Draw and score a slider."""
        score, unit = self._scorer(ends)
        count = len(self.request.prompts) * len(self.request.seeds) * len(self.request.strengths)
        console.say(f"drawing {count} pictures at {self.settings.width}x{self.settings.height}")
        drawn = draw(self.family, self.components, adapter, self.request, self.settings, ends.grid, score)
        axis = ends.axis()
        curves = curves_of(drawn, axis, unit, trained)
        return drawn, card_of(curves, self.config.seed, 1.0 if score else axis.separation)

    def _scorer(self, ends: Ends) -> tuple[Score | None, float]:
        """What scores pictures, and how far it finds the positive from the negative images."""
        if self.options.scorer is None:
            return None, 1.0
        score = open_scorer(self.options.scorer, self.options.words, self.family, self.machine.device, ends.images)
        positive, negative = (float(score(side).mean()) for side in ends.images)
        if positive <= negative:
            raise UserError(
                f"--scorer {self.options.scorer} finds no more of the concept in the positive images ({positive:.4g}) than in "
                f"the negative ones ({negative:.4g}); try other words, or another scorer"
            )
        return score, positive - negative

"""`slider plugins check`: does a family do what the host relies on? Its imports, its lint, then every rule of the kit.

A family is named by its name, by `module:attribute` or by the path of a file; the latter two need no installation.
"""

from __future__ import annotations

import json
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slider_plugin import console, loose
from slider_plugin.errors import PluginError, UserError
from slider_plugin.registry import Plugins

if TYPE_CHECKING:
    from slider_plugin.family import LoadedFamily
    from slider_plugin.testing.subject import Subject

IMPORTS, TINY = "it_is_found_and_imports_without_findings", "tiny_writes_a_pipeline_that_loads"

REMEDIES = {
    IMPORTS: "mend what the message names; a family's facts and hooks are described in hooks/README.md",
    TINY: "state FAMILY.tiny, a function that writes a pipeline folder of real classes, and see that load_components reads it",
    "targets_are_found": "compare Targets with the names of the model's modules: `slider targets --probe FOLDER` lists them",
    "every_target_learns_and_nothing_else_moves": "draw all-zero weights of the tiny model anew (slider_plugin.testing.tiny."
    "redraw_zeros), call the denoiser itself in predict, and leave out targets that the forward pass never uses",
    "gradients_are_those_of_the_loss": "something in the forward pass detaches the graph or runs under no_grad in eval mode",
    "scale_zero_is_the_base_model": "predict must give the same answer twice: no dropout, no random numbers, no state kept",
    "minus_mirrors_plus": "the adapter must enter linearly: leave out targets whose weight is read instead of called",
    "no_target_sees_text_alone": "move the modules that are named to Targets.forbidden, or to joint_attention if they see both",
    "the_published_sampler_lands_on_the_clean_latents": "check the sign and time of FAMILY.noise, its prediction, and the "
    "scaling in encode_images against the pipeline's own lines",
    "training_asks_what_the_pipeline_asks": "compare the arguments in predict and encode_prompts with those of the pipeline's "
    "call of the denoiser: masks, pooled embeddings, ids, guidance",
    "validation_draws_at_three_scales": "build_pipeline must draw with components.denoiser, in which the adapter is",
    "a_saved_slider_answers_the_same_in_a_new_process": "tiny, load_components and predict must not depend on the process: "
    "seed what is random, and keep no order of a set",
}
"""What to do about a rule that fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One rule on one family; the names are an interface (`--json`)."""

    family: str
    rule: str
    passed: bool
    seconds: float
    reason: str
    """What the rule means, or why it failed."""

    remedy: str
    """What to do; "" where it passed."""


def results_of(what: str) -> Iterator[Result]:
    """Each rule in its order, as soon as it is known. After a failure to import or load, the others cannot be asked.

    Args:
        what: a family's name, `module:attribute`, or the path of a Python file.
    """
    outcome: list[LoadedFamily] = []
    yield _judged(what, IMPORTS, "found, imported and linted", lambda: outcome.append(_family(what)))
    if not outcome:
        return
    family = outcome[0]
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room) / "tiny"
        yield (loads := _judged(family.facts.name, TINY, "written and loaded", lambda: _load(family, folder)))
        if not loads.passed:
            return
        from slider_plugin.testing.rules import RULES

        for name, rule in RULES.items():
            meaning = (rule.__doc__ or "").strip().splitlines()[0]
            yield _judged(family.facts.name, name, meaning, lambda rule=rule: rule(_load(family, folder)))  # type: ignore[misc]


def _family(what: str) -> LoadedFamily:
    if not loose.is_file(what) and ":" not in what:
        return Plugins.discover().load(what)
    loose.add([what])
    plugins = Plugins.discover()
    return plugins.load(plugins.name_of(str(Path(what).resolve()) if loose.is_file(what) else what))


def _load(family: LoadedFamily, folder: Path) -> Subject:
    from slider_plugin.testing.subject import Subject, write_tiny

    return Subject.load(family, write_tiny(family.facts, folder))


def _judged(family: str, rule: str, meaning: str, work: Callable[[], object]) -> Result:
    """Run one rule. Any exception is its failure, and is told: what a plugin raises is not known."""
    started = time.perf_counter()
    try:
        work()
    except Exception as error:
        passed, reason = False, _reason(error)
        remedy = "" if isinstance(error, PluginError) else REMEDIES[rule]  # such a message names its own way out
    else:
        passed, reason, remedy = True, meaning, ""
    seconds = round(time.perf_counter() - started, 2)
    return Result(family=family, rule=rule, passed=passed, seconds=seconds, reason=reason, remedy=remedy)


def _reason(error: Exception) -> str:
    """The message of an exception, and for one that is no assertion and no refusal its kind and place."""
    said = str(error).strip() or type(error).__name__
    if isinstance(error, AssertionError | UserError):
        return said
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {said} ({last.filename}:{last.lineno})"


def printing(results: Iterable[Result]) -> list[Result]:
    """Print each result when it is known, and return them all."""
    found = []
    for result in results:
        found.append(result)
        mark, style = ("ok  ", "green") if result.passed else ("FAIL", "red")
        console.out.print(f"[{style}]{mark}[/] {result.rule}", end=f"  ({result.seconds:.1f} s)\n")
        if not result.passed:
            console.out.print(f"     {result.reason}" + (f"\n     -> {result.remedy}" if result.remedy else ""), markup=False)
    failed = sum(not result.passed for result in found)
    console.say(f"{found[-1].family}: {len(found) - failed} of {len(found)} rules hold")
    return found


def as_json(results: Iterable[Result]) -> str:
    """The results as a JSON array."""
    return json.dumps([asdict(result) for result in results], indent=2)

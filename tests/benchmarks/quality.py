"""How well sliders work: every objective on every concept of the tiny world, on both trained fixtures, and the published
formulas beside them.

    python -m tests.benchmarks.quality [--family sd1] [--concept hue] [--objective text,concept-text] [--seeds 7,8] [--out FILE]
    python -m tests.benchmarks.quality --table FILE      # the tables of docs/quality.md from what was measured

Each cell trains with the code that `slider train` runs, loads the exported file as `slider validate` does, draws the demo's 8
held-out prompts with 4 seeds at 9 strengths, and measures the images (`slider_plugin.demo.measure`). Prompts, seeds and
measures were fixed before anything was tuned. The bars are a monotonicity of 0.95 and a balance of 0.6 in at most 200 steps; a
cell that misses one stays in the table.

The cells differ in what the demo's recipes, `KEYS`, `STEPS_OF`, `GUIDANCE` and `WORDS` state. A published formula
(`baselines`) is measured in the same way, with the steps and seeds of the objective that it is like (`LIKENESS`). Results are
added to `--out` cell by cell, so that a run that is cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from slider_plugin import run
from slider_plugin.configfile import read_config
from slider_plugin.demo import measure, world
from slider_plugin.demo.bundle import CONCEPTS, FAMILIES
from slider_plugin.demo.run import draw, read_attributes, write_config
from slider_plugin.registry import Plugins
from slider_plugin.stages import training

from . import baselines

MONOTONICITY, BALANCE, STEPS = 0.95, 0.6, 200
"""The bars."""

SEED = 7
KEYS: Mapping[str, Mapping[str, Any]] = {
    "bucket": {},
    "pair": {"slider_objective": "pair"},
    "addift": {"slider_objective": "pair", "pair_target": "addift"},
    "text": {
        "slider_objective": "text",
        "text_rollout_steps": 6,
        "text_rollout_guidance": 3.0,
        "train_batch_size": 3,
    },
}
"""By objective."""

LIKENESS: Mapping[str, str] = {"concept-text": "text", "concept-image": "pair", "plain-bucket": "bucket"}
"""The objective that a published formula is compared with."""

STEPS_OF: Mapping[tuple[str, str], int] = {("sd1", "position"): 200, ("sd1", "elevation"): 200}
"""Where the demo's number of steps is too small for the side that has less room."""

STRENGTHS: Mapping[str, float] = {"addift": 2.0}
"""Of both buckets, where it is not 1: ADDifT aims at their whole distance at the whole strength, the others at half of it."""

GUIDANCE = {"size": 0.3, "brightness": 0.5, "position": 2.0}
"""Of text. With the whole difference between the two prompts on each side both ends would lie beyond what the world has, and a
size, which starts above the middle, has less room to grow than to shrink. Words for a place say less to these models."""

WORDS: Mapping[str, tuple[Mapping[str, float], Mapping[str, float]]] = {
    "size": ({"radius": 0.38}, {"radius": 0.14}),
    "brightness": ({"light": 0.95}, {"light": 0.40}),
    "position": ({"x": 0.66}, {"x": 0.34}),
}
"""What the world's captions have words for; there are none for a hue beside a colour, or for above and below."""

RANGES = {
    "size": measure.AREA_RANGE,
    "brightness": measure.LIGHT_RANGE * world.PALETTE_VALUE,
    "hue": 48.0,  # degrees, between the two buckets
    "position": measure.PLACE_RANGE,
    "elevation": measure.PLACE_RANGE,
}
"""Of each concept in the world, in the unit of its attribute."""

SUBJECTS = 6
Row = dict[str, Any]


def text_sets(concept: str) -> list[dict[str, str]]:
    """Prompts of a text slider, in the world's own words: a few scenes that are not held out, with and without the concept."""
    rng, held_out, sets = np.random.default_rng(300), set(measure.PROMPTS), []
    while len(sets) < SUBJECTS:
        scene = world.random_scene(rng).with_(radius=0.25, light=0.7, x=0.5)
        if (scene.colour, scene.shape, scene.background) in held_out:
            continue
        more, less = (scene.with_(**end) for end in WORDS[concept])
        said = {"size": concept == "size", "light": concept == "brightness", "place": concept == "position"}
        sets.append(
            {
                "target": world.caption(scene),
                "positive": world.caption(more, **said),
                "negative": world.caption(less, **said),
            }
        )
    return sets


def cells(objectives: Sequence[str] = tuple(KEYS)) -> Iterator[tuple[str, str, str]]:
    """(family, concept, objective) of all that can be trained."""
    for family in FAMILIES:
        for concept in CONCEPTS:
            yield from ((family, concept, o) for o in objectives if not o.endswith("text") or concept in WORDS)


def written(family: str, concept: str, objective: str, seed: int, root: Path) -> Path:
    """The configuration of a cell."""
    path = write_config(family, concept, "lora", None, root / f"{family}-{concept}-{objective}-{seed}")
    keys = json.loads(path.read_text()) | (KEYS | baselines.KEYS)[objective] | {"seed": seed}
    keys["max_train_steps"] = STEPS_OF.get((family, concept), keys["max_train_steps"])
    if keys.get("slider_objective") == "text":
        del keys["data_backend_config"]
        rows = text_sets(concept)
        if objective in LIKENESS:
            rows.append(rows[0] | {"target": ""})  # for its prompt: the formula draws with guidance
        keys |= {"slider_text": rows, "text_guidance": GUIDANCE[concept], "gradient_accumulation_steps": 2}
    else:
        buckets = path.with_name(keys["data_backend_config"])
        found = [bucket for bucket in json.loads(buckets.read_text()) if bucket["slider_strength"] or objective not in LIKENESS]
        for bucket in found:
            bucket["slider_strength"] *= STRENGTHS.get(objective, 1.0)
        buckets.write_text(json.dumps(found))
        keys["gradient_accumulation_steps"] = 3 if len(found) == 3 else 4
    path.write_text(json.dumps(keys))
    return path


def one(family: str, concept: str, objective: str, seed: int, root: Path) -> Row:
    """Train, draw and measure one cell."""
    started = time.perf_counter()
    config = read_config(written(family, concept, objective, seed, root), (), Plugins.discover().facts)[0]
    assert config.max_train_steps <= STEPS
    if objective in LIKENESS:
        published = baselines.trainer(objective, text_sets(concept) if concept in WORDS else (), GUIDANCE.get(concept, 1.0))
        with patch.object(training, "Trainer", published):
            outcome = run.train(config)
    else:
        outcome = run.train(config)
    assert outcome.adapter is not None
    score = measure.score(concept, read_attributes(draw(config, outcome.adapter)))
    response = dict(score.response)
    return {
        "family": family, "concept": concept, "objective": objective, "seed": seed, "steps": config.max_train_steps,
        "monotonicity": round(score.monotonicity, 4), "p10": round(score.monotonicity_p10, 4),
        "balance": round(score.balance, 4), "at": [round(response[s], 4) for s in (-1.0, 0.0, 1.0)],
        "moved": round(score.preservation["mean"], 4), "training_seconds": round(outcome.seconds, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """The first table: one line a cell, over all its seeds; what misses a bar is marked."""
    lines = [
        "| family | concept | objective | monotonicity | balance | attribute at -1, 0, +1 | moved | steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for family, concept, objective in cells():
        found = _of(rows, family, concept, objective)
        if found:
            mean = {name: float(np.mean([r[name] for r in found])) for name in ("monotonicity", "balance", "moved")}
            at = ", ".join(f"{value:.3g}" for value in np.mean([r["at"] for r in found], axis=0))
            lines.append(
                f"| `{family}` | {concept} | {objective} | {_marked(mean['monotonicity'], MONOTONICITY, 3)} | "
                f"{_marked(mean['balance'], BALANCE, 2)} | {at} | {mean['moved']:.3f} | {found[0]['steps']} |"
            )
    return "\n".join(lines)


def comparison(rows: Sequence[Row]) -> str:
    """The second table: each published formula and the objective it is like, over the seeds that both have.

    `moved / response` is how far everything else moved for what the concept itself did, both in units of their ranges.
    """
    lines = [
        "| family | concept | formula | monotonicity | balance | moved | moved / response | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for family, concept, formula in cells(tuple(LIKENESS)):
        pair = [_of(rows, family, concept, name) for name in (formula, LIKENESS[formula])]
        seeds = {row["seed"] for row in pair[0]} & {row["seed"] for row in pair[1]}
        for name, found in zip((formula, LIKENESS[formula]), pair, strict=True):
            common = [row | {"cost": _cost(row)} for row in found if row["seed"] in seeds]
            if common:
                said = " | ".join(
                    _spread(common, *column) for column in (("monotonicity", 3), ("balance", 2), ("moved", 3), ("cost", 2))
                )
                lines.append(f"| `{family}` | {concept} | {name} | {said} | {len(common)} |")
    return "\n".join(lines)


def _of(rows: Sequence[Row], *cell: str) -> list[Row]:
    return [row for row in rows if (row["family"], row["concept"], row["objective"]) == cell]


def _cost(row: Row) -> float:
    """Infinite where the concept did not move the right way."""
    less, _, more = row["at"]
    response = (more - less) / 2 / RANGES[row["concept"]]
    return row["moved"] / response if response > 0 else math.inf


def _spread(rows: Sequence[Row], column: str, places: int) -> str:
    values = [row[column] for row in rows]
    if math.inf in values:
        return "the wrong way"
    return f"{np.mean(values):.{places}f} ± {np.std(values):.{places}f}"


def _marked(value: float, bar: float, places: int) -> str:
    return f"{value:.{places}f}" if value >= bar else f"**{value:.{places}f}**"


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES)
    parser.add_argument("--concept", choices=CONCEPTS)
    parser.add_argument("--objective", type=lambda text: text.split(","), default=list(KEYS), help="also published formulas")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[SEED])
    parser.add_argument("--out", type=Path, help="JSON that rows are added to; cells that it holds are not measured again")
    parser.add_argument("--table", type=Path, help="print the table of such a JSON, and train nothing")
    given = parser.parse_args(arguments)
    rows: list[Row] = json.loads((given.table or given.out).read_text()) if _is_there(given.table or given.out) else []
    if not given.table:
        if unknown := set(given.objective) - KEYS.keys() - LIKENESS.keys():
            parser.error(f"--objective: no {', '.join(sorted(unknown))} among {', '.join([*KEYS, *LIKENESS])}")
        wanted = [
            cell for cell in cells(given.objective) if given.family in (None, cell[0]) and given.concept in (None, cell[1])
        ]
        _measure(wanted, given.seeds, rows, given.out)
    print(table(rows))
    if any(row["objective"] in LIKENESS for row in rows):
        print(f"\n{comparison(rows)}")
    return rows


def _is_there(path: Path | None) -> bool:
    return path is not None and path.is_file()


def _measure(wanted: Sequence[tuple[str, str, str]], seeds: Sequence[int], rows: list[Row], out: Path | None) -> None:
    """Add what is missing to `rows`, and write them after each cell."""
    done = {(r["family"], r["concept"], r["objective"], r["seed"]) for r in rows}
    with tempfile.TemporaryDirectory() as name:
        for seed in seeds:
            for cell in wanted:
                if (*cell, seed) not in done:
                    rows.append(one(*cell, seed, Path(name)))
                    print(json.dumps(rows[-1]), flush=True)
                    if out:
                        out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""`slider demo`: the real code path on the bundled model, with a measure of what came out.

It writes the files that a user would write (config.json, buckets.json, for LyCORIS lycoris_config.json), calls what `slider
train` calls, loads the exported slider as `slider validate` does, draws held-out prompts and measures them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.table import Table

from slider_hooks import PromptEntry
from slider_plugin import console, run, stages
from slider_plugin.adapters.attach import attach_file
from slider_plugin.adapters.presets import preset_for
from slider_plugin.config import RunConfig
from slider_plugin.configfile import read_config
from slider_plugin.demo import measure
from slider_plugin.demo.bundle import CONCEPTS, FAMILIES, fixtures
from slider_plugin.errors import UserError
from slider_plugin.files import replacing, write_json
from slider_plugin.registry import Plugins
from slider_plugin.training.processes import check_one_process
from slider_plugin.validation import strips
from slider_plugin.validation.plan import Shot
from slider_plugin.validation.render import DrawSettings, Rendered, render

RECIPES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "lora": {
        "sd1": {"learning_rate": 2e-3, "max_train_steps": 120},
        "z_image": {"learning_rate": 2e-3, "max_train_steps": 170},
    },
    "lokr": {
        "sd1": {"learning_rate": 5e-3, "max_train_steps": 120},
        "z_image": {"learning_rate": 5e-3, "max_train_steps": 170},
    },
    "full": {
        "sd1": {"learning_rate": 2e-4, "max_train_steps": 120},
        "z_image": {"learning_rate": 2e-4, "max_train_steps": 170},
    },
}
"""By adapter and family: what is right for models of three million parameters; a published model wants the defaults.

`full` moves whole weights and wants a tenth of a LoRA's rate; LoKr, with the fewest parameters, more than a LoRA. Measured on
one processor core (2026-11-21):

                             monotonicity, 10th percentile | +1 to -1 | moved | seconds
    lora sd1     size        1.000, 1.000 | 2.25 | 0.057 | 50
    lora sd1     brightness  1.000, 1.000 | 1.98 | 0.049 | 51
    lora z_image size        0.998, 1.000 | 2.49 | 0.052 | 82
    lora z_image brightness  0.993, 0.983 | 2.24 | 0.085 | 92
    lokr sd1     size        1.000, 1.000 | 1.89 | 0.047 | 48
    lokr sd1     brightness  1.000, 1.000 | 1.83 | 0.036 | 61
    lokr z_image size        0.995, 1.000 | 2.29 | 0.047 | 97
    lokr z_image brightness  0.993, 0.983 | 2.22 | 0.066 | 103
    full sd1     size        1.000, 1.000 | 2.06 | 0.052 | 46
    full sd1     brightness  1.000, 1.000 | 1.91 | 0.040 | 47
    full z_image size        1.000, 1.000 | 2.50 | 0.051 | 88
    full z_image brightness  0.995, 1.000 | 2.24 | 0.080 | 84
"""

ADAPTERS = tuple(RECIPES)
STANDARD = "lora"
"""The adapter that is PEFT's; the others are algorithms of lycoris-lora."""

PRESERVED = ("size",)
"""Concepts that train with the neutral bucket. Its scenes are of any light, and preserving them holds the light where it is:
with it, some of z_image's held-out prompts do not answer to brightness (monotonicity 0.87, not 1.00, after 110 steps)."""

COMMON = {
    "slider_lora_target": True,
    "train_batch_size": 6,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 10,
    "mixed_precision": "no",
    "resolution": 64,
    "validation_disable": True,
    "checkpoint_step_interval": 0,
    "seed": 7,
}
RANK = 8
DRAWING_STEPS = 16
IMAGES_AT_ONCE = 32
STRIP_ROWS = 4  # held-out prompts in strip.png


def demonstrate(family: str, concept: str, adapter: str, steps: int | None, output: Path) -> dict[str, Any]:
    """Train, draw, measure, and write `strip.png`, the slider and `report.json` into `output`.

    Raises:
        UserError: no such family, concept or adapter among those of the demo, or the folder cannot be written.
    """
    check_one_process("demo")
    _check("--family", family, FAMILIES)
    _check("--concept", concept, CONCEPTS)
    _check("--adapter", adapter, ADAPTERS)
    started = time.perf_counter()
    config = read_config(write_config(family, concept, adapter, steps, output))[0]
    console.say(f"training a {concept} slider ({adapter}) on the tiny {family} pipeline, {config.max_train_steps} steps")
    outcome = run.train(config)
    if outcome.adapter is None:
        raise KeyboardInterrupt
    console.say("drawing and measuring held-out prompts")
    rendered = draw(config, outcome.adapter)
    score = measure.score(concept, read_attributes(rendered))
    report = {
        "family": family,
        "concept": concept,
        "adapter_kind": adapter,
        "steps": outcome.steps,
        "seconds": round(time.perf_counter() - started, 1),
        "training_seconds": round(outcome.seconds, 1),
        "monotonicity": round(score.monotonicity, 4),
        "monotonicity_p10": round(score.monotonicity_p10, 4),
        "response": [[s, round(value, 4)] for s, value in score.response],
        "ratio": round(score.ratio, 3),
        "balance": round(score.balance, 3),
        "preservation": {name: round(value, 4) for name, value in score.preservation.items()},
        "prompts": [measure.prompt(*words) for words in measure.PROMPTS],
        "seeds": list(measure.SEEDS),
        "adapter": outcome.adapter.name,
    }
    strip_path, report_path = output / "strip.png", output / "report.json"
    write_strip(rendered, strip_path)
    kind = "" if adapter == STANDARD else f"_{adapter}"
    adapter_path = output / f"{family}_{concept}{kind}.safetensors"
    with replacing(adapter_path) as temporary:
        temporary.write_bytes(outcome.adapter.read_bytes())
    write_json(report_path, report | {"adapter": adapter_path.name})
    console.out.print(_table(report))
    for path in (strip_path, adapter_path, report_path):
        console.out.print(str(path), markup=False)
    return report


def _check(flag: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{flag}: {value!r} is not among {', '.join(known)}")


def write_config(family: str, concept: str, adapter: str, steps: int | None, output: Path) -> Path:
    """Write the configuration that a user would write, and return its path; a new run folder each time."""
    place = fixtures()
    buckets = place / "buckets" / concept
    folder = _free(output / "run")
    data = [
        {"id": "more", "instance_data_dir": str(buckets / "more"), "slider_strength": 1.0},
        {"id": "less", "instance_data_dir": str(buckets / "less"), "slider_strength": -1.0},
    ]
    if concept in PRESERVED:
        data.append({"id": "neutral", "instance_data_dir": str(place / "buckets" / "neutral"), "slider_strength": 0})
    config = (
        COMMON
        | dict(RECIPES[adapter][family])
        | _adapter_keys(family, adapter, output)
        | {
            "model_family": family,
            "pretrained_model_name_or_path": str(place / "tiny" / family),
            "data_backend_config": "buckets.json",
            "output_dir": str(folder),
            "gradient_accumulation_steps": 3 if len(data) == 3 else 4,  # one cycle of three draws, or two of two
        }
    )
    if steps is not None:
        config["max_train_steps"] = steps
        config["lr_warmup_steps"] = min(10, steps - 1)
    write_json(output / "buckets.json", data)
    write_json(output / "config.json", config)
    return output / "config.json"


def _adapter_keys(family: str, adapter: str, output: Path) -> dict[str, Any]:
    """The keys that say what is trained; for LyCORIS the file that they name is written, too."""
    if adapter == STANDARD:
        return {"lora_rank": RANK}
    preset = preset_for(Plugins.discover().facts(family))
    sizes = {"linear_dim": RANK, "linear_alpha": RANK}
    write_json(output / "lycoris_config.json", {"algo": adapter, **sizes, "apply_preset": preset})
    return {"lora_type": "lycoris", "lycoris_config": "lycoris_config.json"}


def _free(folder: Path) -> Path:
    """The folder, or the first one beside it that does not exist yet: an older run is never overwritten."""
    number = 1
    free = folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def draw(config: RunConfig, adapter_file: Path) -> Rendered:
    """Draw all held-out prompts and seeds at all strengths with the exported slider."""
    family = Plugins.discover().load(config.model_family)
    machine = stages.open_machine(config)
    components = stages.load_model(config, family, str(config.pretrained_model_name_or_path), machine)
    adapter = attach_file(adapter_file, family, components)
    card = json.loads((Path(str(config.pretrained_model_name_or_path)) / "training.json").read_text(encoding="utf-8"))
    return render(
        family,
        components,
        adapter,
        [PromptEntry(name="-".join(words), prompt=measure.prompt(*words)) for words in measure.PROMPTS],
        folder=config.output_dir / "held_out",
        step=config.max_train_steps,
        seeds=measure.SEEDS,
        strengths=measure.STRENGTHS,
        global_strength=1.0,
        settings=DrawSettings(
            width=64, height=64, steps=DRAWING_STEPS, guidance_scale=card["guidance"], batch_size=IMAGES_AT_ONCE
        ),
    )


def read_attributes(rendered: Rendered) -> dict[tuple[int, int], dict[float, measure.Attributes]]:
    """Measure all drawn images, by (prompt, seed) and strength."""
    rows: dict[tuple[int, int], dict[float, measure.Attributes]] = {}
    for number, (colour, shape, background) in enumerate(measure.PROMPTS):
        entry = PromptEntry(name=f"{colour}-{shape}-{background}", prompt=measure.prompt(colour, shape, background))
        for seed in measure.SEEDS:
            rows[number, seed] = {
                s: measure.measure(_pixels(rendered.images[Shot(entry, seed, s)]), colour, background)
                for s in measure.STRENGTHS
            }
    return rows


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(_image(path), dtype=np.float32) / 255.0


def _image(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def write_strip(rendered: Rendered, path: Path) -> None:
    """A few held-out prompts at the first seed, strengths rising from left to right."""
    rows = []
    for words in measure.PROMPTS[:STRIP_ROWS]:
        entry = PromptEntry(name="-".join(words), prompt=measure.prompt(*words))
        images = [_image(rendered.images[Shot(entry, measure.SEEDS[0], s)]) for s in measure.STRENGTHS]
        labels = [strips.format_strength(s) for s in measure.STRENGTHS]
        rows.append((entry.prompt, strips.strip(images, labels, framed=False)))
    with replacing(path) as temporary:
        strips.contact_sheet(rows).save(temporary)


def _table(report: dict[str, Any]) -> Table:
    table = Table(
        title=f"{report['family']}: {report['concept']}, {report['adapter_kind']}",
        show_header=False,
        box=None,
        title_justify="left",
    )
    response = report["response"]
    table.add_row("monotonicity", f"{report['monotonicity']:.3f} (10th percentile {report['monotonicity_p10']:.3f})")
    table.add_row(f"{report['concept']} at -1, 0, +1", ", ".join(f"{response[i][1]:.3f}" for i in (0, len(response) // 2, -1)))
    table.add_row("ratio +1 to -1", f"{report['ratio']:.2f}")
    table.add_row("everything else moved", f"{report['preservation']['mean']:.3f} of its range")
    table.add_row("time", f"{report['seconds']:.0f} s, {report['steps']} steps")
    return table

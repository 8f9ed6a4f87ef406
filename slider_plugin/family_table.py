"""The table of families in docs/families.md, made from the code and from what tests/families/routes.py found out.

`python -m slider_plugin.family_table`, in a checkout, or with the path of a routes.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slider_hooks import Diffusion, Family
from slider_plugin.errors import UserError
from slider_plugin.family import LoadedFamily
from slider_plugin.reference import reference_targets
from slider_plugin.registry import Plugins

Routes = Mapping[str, str]
"""By route what came of it: "yes", "-" where the family has nothing that it could work on, or why it is refused."""

COLUMNS = {"lora": "LoRA", "lokr": "LyCORIS", "full": "full", "controlnet": "ControlNet", "assistant": "assistant"}
"""Routes of a slider and their columns."""

HEAD = ("family", "models", "targets", "joint", "predicts", "makes", *COLUMNS.values())
SAID = ("yes", "-")
OUTCOMES = Path(__file__).parents[1] / "tests" / "families" / "routes.json"
LEGEND = """\
The last five columns are what [a program](../tests/families/routes.py) tried on each family's tiny pipeline, and found: the
layers of its expression and no others are wrapped, each learns, strength 0 is the base bit for bit, every layer's change at
-1 mirrors the one at +1, and the file answers the same in diffusers, PEFT or lycoris-lora. *LyCORIS* is LoKr. *full* leaves
out layers whose weights the model reads. *ControlNet* is a slider on the family's own (`-`: it has none). *assistant* is a
frozen LoRA beside each of the first three; it adds the same at +1, 0 and -1.
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One family."""

    name: str
    title: str
    matched: int
    joint: int
    prediction: str
    modalities: str
    routes: tuple[str, ...]
    """The cells of `COLUMNS`."""

    notes: tuple[str, ...]
    """What is said below the table."""

    def cells(self) -> tuple[str, ...]:
        counts = (str(self.matched), str(self.joint))
        return (f"`{self.name}`", self.title, *counts, self.prediction, self.modalities, *self.routes)


def row_of(family: LoadedFamily, routes: Routes) -> Row:
    """The facts of one family, with the targets of its default version counted on the real class."""
    facts, plan = family.facts, reference_targets(family)
    refused = [f"{column} is refused: {routes[route]}" for route, column in COLUMNS.items() if routes[route] not in SAID]
    return Row(
        name=facts.name,
        title=facts.title,
        matched=len(plan.modules),
        joint=plan.joint,
        prediction=prediction(facts),
        modalities=", ".join(facts.modalities),
        routes=tuple(routes[route] if routes[route] in SAID else "no" for route in COLUMNS),
        notes=tuple(note for note in (facts.limits, *refused, lora_loader(facts), _controlnet(facts)) if note),
    )


def prediction(facts: Family) -> str:
    """What the denoiser predicts, in words."""
    what = (facts.noise.prediction or "epsilon or v, as the scheduler says") if isinstance(facts.noise, Diffusion) else "flow"
    return what if facts.noise.sign == 1 else f"{what}, negated"


def lora_loader(facts: Family) -> str:
    """What loads a LoRA file in diffusers, where the family's pipeline does not; "" where it does."""
    import diffusers

    # A family that leaves the choice of the pipeline to the folder has several, named after its denoiser.
    name = facts.pipeline_class or facts.denoiser_class.replace("Transformer2DModel", "Pipeline")
    if hasattr(getattr(diffusers, name, None), "load_lora_weights"):
        return ""
    if hasattr(getattr(diffusers, facts.denoiser_class, None), "load_lora_adapter"):
        return f'in diffusers a slider is loaded with `{facts.denoiser}.load_lora_adapter(file, prefix="{facts.denoiser}")`'
    return "diffusers loads no LoRA here; `slider` and PEFT do"


def _controlnet(facts: Family) -> str:
    return f"its ControlNet is `{facts.controlnet_class}`" if facts.controlnet_class else ""


def markdown(rows: list[Row]) -> str:
    """The table, and below it what there is to say about single families."""
    lines = [" | ".join(HEAD), " | ".join("---" for _ in HEAD), *(" | ".join(row.cells()) for row in rows)]
    notes = [f"* `{row.name}`: {'; '.join(row.notes)}" for row in rows if row.notes]
    return "\n".join(["\n".join(f"| {line} |" for line in lines), "", LEGEND, *notes]) + "\n"


def read_outcomes(path: Path = OUTCOMES) -> dict[str, dict[str, str]]:
    """By family what came of each route. Raises UserError if the file is not there, as in an installed package."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; run this in a checkout, or name the file of tests/families/routes.py")
    outcomes: dict[str, dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))
    return outcomes


def all_rows(outcomes: Mapping[str, Routes]) -> list[Row]:
    """The rows of all families that come with this distribution, by name. Raises UserError if one of them was not tried."""
    plugins = Plugins.discover()
    names = sorted(plugins.families())
    untried = [name for name in names if not outcomes.get(name, {}).keys() >= COLUMNS.keys()]
    if untried:
        raise UserError(f"routes.json has not every route of {', '.join(untried)}: run python tests/families/routes.py")
    return [row_of(plugins.load(name), outcomes[name]) for name in names]


def main(arguments: list[str]) -> int:
    """Print the table; the argument is the path of a routes.json."""
    try:
        print(markdown(all_rows(read_outcomes(*map(Path, arguments[:1])))), end="")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

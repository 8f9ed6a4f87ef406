"""The probe against the built-in families: `python -m slider_plugin.probing.agreement` renews hooks/PROBE.md.

The probe is given the folder of each family's tiny pipeline and nothing else. What it proposes is then compared with the
family's own expressions, which were verified by other means, on the tiny model and on the published geometry.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from slider_plugin.errors import UserError
from slider_plugin.family import LoadedFamily
from slider_plugin.probing import Probe, probe_folder
from slider_plugin.reference import reference_denoiser
from slider_plugin.registry import Plugins
from slider_plugin.targets import adaptable_modules

PAGE = Path(__file__).parents[2] / "hooks" / "PROBE.md"
"""In a checkout."""

HEAD = ("family", "tiny model: targets, without joint", "published model: targets, without joint", "same", "unsure", "why")
INTRODUCTION = """# What the probe finds, and what the families state

`slider targets --probe DIR` measures a pipeline that no family describes. Here it was given the tiny pipeline of each
built-in family, without the family: how many modules its proposal selects there and on the published geometry, with joint
modules and without, and whether these are the very modules that the family's own expressions select. *Unsure* are modules
that it asks you to look at yourself.

The pipeline is asked for the smallest image that it agrees to draw, in float32 on the processor: a denoiser of 12 billion
parameters needs 48 GB of memory for its weights alone.

<!-- python -m slider_plugin.probing.agreement -->

"""


@dataclass(frozen=True, slots=True)
class Row:
    """One family. `tiny` and `published` are numbers of modules with joint ones and without; None where nothing was probed."""

    family: str
    tiny: tuple[int, int] | None
    published: tuple[int, int] | None
    differing: tuple[str, ...]
    """Modules of the tiny and of the published model that the proposal or the family selects, and not both."""

    unsure: tuple[str, ...]
    why: str
    """Why the probe is unsure, or why there was nothing to probe."""

    def cells(self) -> tuple[str, ...]:
        same = "-" if self.tiny is None else f"no: {', '.join(self.differing)}" if self.differing else "yes"
        names = ", ".join(f"`{name}`" for name in self.unsure)
        return f"`{self.family}`", _numbers(self.tiny), _numbers(self.published), same, names, self.why


def _numbers(counts: tuple[int, int] | None) -> str:
    return "-" if counts is None else f"{counts[0]}, {counts[1]}"


def row_of(family: LoadedFamily, folder: Path) -> Row:
    """Probe the tiny pipeline that `Family.tiny` wrote into `folder` and compare."""
    try:
        probe = probe_folder(folder)
    except UserError as error:
        refusal = str(error).replace(str(folder), "its folder").removeprefix("--probe: ")
        return Row(family.facts.name, None, None, (), (), refusal)
    published = list(adaptable_modules(reference_denoiser(family.facts)))
    return Row(
        family=family.facts.name,
        tiny=_counts(probe, probe.streams),
        published=_counts(probe, published),
        differing=tuple(sorted({*_differing(family, probe, probe.streams), *_differing(family, probe, published)})),
        unsure=tuple(probe.unsure),
        why="; ".join(dict.fromkeys(probe.unsure.values())),
    )


def _counts(probe: Probe, names: Iterable[str]) -> tuple[int, int]:
    known = list(names)
    return len(selected(probe.proposal.slider(), known)), len(selected(probe.proposal.slider(include_joint=False), known))


def _differing(family: LoadedFamily, probe: Probe, names: Iterable[str]) -> set[str]:
    known, ours, theirs = list(names), family.facts.targets, probe.proposal
    return {
        name
        for include_joint in (True, False)
        for name in selected(ours.slider(include_joint), known) ^ selected(theirs.slider(include_joint), known)
    }


def selected(expression: str, names: Iterable[str]) -> set[str]:
    """The names that an expression matches as a whole; none for an empty one."""
    return {name for name in names if expression and re.fullmatch(expression, name)}


def page(rows: Iterable[Row]) -> str:
    """The page, from its rows."""
    lines = [HEAD, tuple("---" for _ in HEAD), *(row.cells() for row in rows)]
    return INTRODUCTION + "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def all_rows(root: Path) -> list[Row]:
    """The rows of all families that come with this distribution; their tiny pipelines are written into `root`."""
    plugins = Plugins.discover()
    names = sorted(row.name for row in plugins.rows() if row.family and row.builtin and row.status == "available")
    rows = []
    for name in names:
        family = plugins.load(name)
        if family.facts.tiny is not None:
            family.facts.tiny(root / name)
            rows.append(row_of(family, root / name))
    return rows


if __name__ == "__main__":
    if not PAGE.parent.is_dir():
        sys.exit(f"{PAGE.parent} does not exist: run this in a checkout that is installed with `pip install -e .`")
    with tempfile.TemporaryDirectory() as scratch:
        text = page(all_rows(Path(scratch)))
    PAGE.write_text(text, encoding="utf-8")
    sys.stdout.write(text)

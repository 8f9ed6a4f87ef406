"""What a validation draws: which images, each once, and which pictures are put together from them.

Pure: no model, no files. Rendering goes through `Plan.by_scale`, since changing the adapter's scale is what cannot be
done inside a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from slider_hooks import PromptEntry
from slider_plugin.errors import PluginError


@dataclass(frozen=True, slots=True)
class Shot:
    """One image: it depends on these three alone."""

    entry: PromptEntry
    seed: int
    scale: float


@dataclass(frozen=True, slots=True)
class Panel:
    """Images of one entry and one seed that are shown side by side, in this order."""

    entry: PromptEntry
    seed: int
    shots: tuple[Shot, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """All images of a validation, and what is put together from them."""

    shots: tuple[Shot, ...]
    """Every image once, by rising scale, then in the order of the prompts and seeds."""

    pairs: tuple[Panel, ...]
    """Scale 0 beside the entry's own scale; none for an entry whose own scale is 0."""

    strips: tuple[Panel, ...]
    """Rising strengths; none if no strengths are asked for."""

    def by_scale(self) -> list[tuple[float, tuple[Shot, ...]]]:
        """The images in groups of one scale, which can share batches."""
        groups: dict[float, list[Shot]] = {}
        for shot in self.shots:
            groups.setdefault(shot.scale, []).append(shot)
        return [(scale, tuple(shots)) for scale, shots in groups.items()]

    @property
    def bases(self) -> tuple[Shot, ...]:
        """The images at scale 0: one for every entry and seed, in their order."""
        return tuple(shot for shot in self.shots if shot.scale == 0.0)

    @property
    def sheet(self) -> tuple[Panel, ...]:
        """Rows of the contact sheet: the strips; without strengths the pairs, or the base image where there is no pair."""
        if self.strips:
            return self.strips
        pairs = {(panel.entry, panel.seed): panel for panel in self.pairs}
        return tuple(pairs.get((b.entry, b.seed)) or Panel(b.entry, b.seed, (b,)) for b in self.bases)


def plan_validation(
    prompts: Iterable[PromptEntry],
    seeds: Iterable[int],
    strengths: Iterable[float],
    scale_of: Callable[[PromptEntry], float],
) -> Plan:
    """Every prompt with every seed: at 0, at its own scale, and at each strength.

    Args:
        prompts: entries of the library; a repeated entry counts once.
        seeds: one image of each kind per seed.
        strengths: scales of the strips, in any order; empty for no strips.
        scale_of: the entry's own scale, which is the answer of the hook `validation_prompt_scale`.

    Raises:
        PluginError: an entry's own scale is not a finite number.
    """
    entries, numbers = list(dict.fromkeys(prompts)), list(dict.fromkeys(seeds))
    rising = sorted({_scale(strength) for strength in strengths})
    own = {entry: _own_scale(entry, scale_of) for entry in entries}
    cells = [(entry, seed) for entry in entries for seed in numbers]
    strips = [_panel(entry, seed, rising) for entry, seed in cells] if rising else []
    pairs = [_panel(entry, seed, (0.0, own[entry])) for entry, seed in cells if own[entry] != 0.0]
    bases = [_panel(entry, seed, (0.0,)) for entry, seed in cells]
    return Plan(_once([*bases, *pairs, *strips], cells), tuple(pairs), tuple(strips))


def _panel(entry: PromptEntry, seed: int, scales: Sequence[float]) -> Panel:
    return Panel(entry, seed, tuple(Shot(entry, seed, scale) for scale in scales))


def _once(panels: Sequence[Panel], cells: Sequence[tuple[PromptEntry, int]]) -> tuple[Shot, ...]:
    place = {cell: number for number, cell in enumerate(cells)}
    shots = {shot for panel in panels for shot in panel.shots}
    return tuple(sorted(shots, key=lambda shot: (shot.scale, place[shot.entry, shot.seed])))


def _own_scale(entry: PromptEntry, scale_of: Callable[[PromptEntry], float]) -> float:
    answer = scale_of(entry)
    if isinstance(answer, bool) or not isinstance(answer, (int, float)) or not math.isfinite(answer):
        raise PluginError(f"validation_prompt_scale answered {answer!r} for prompt `{entry.name}`; it must be a finite number")
    return _scale(answer)


def _scale(value: float) -> float:
    return float(value) + 0.0  # -0.0 and 0.0 are the same image, and print alike

"""Several sliders together: what each does to the axes of the others, and how their sum draws.

All files are put into one LoRA: ranks side by side (`B A = sum_i w_i B_i A_i`), each with a weight of its own, so that one
loaded model draws each of them alone and all of them together. The images of each slider are those of the run that made it,
whose config.json lies beside its file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from slider_hooks import Components
from slider_plugin import console, stages
from slider_plugin.adapterfile import read_adapter, read_tensors
from slider_plugin.adapters.attach import CONTROLNET
from slider_plugin.adapters.peft_lora import LoraAdapter
from slider_plugin.config import RunConfig
from slider_plugin.configfile import read_config
from slider_plugin.errors import ConfigError, UserError
from slider_plugin.files import replacing, write_json
from slider_plugin.registry import Plugins
from slider_plugin.report.command import Desk, Options, check_report, with_prompts
from slider_plugin.report.ends import Ends, of_buckets
from slider_plugin.report.probe import Drawn, draw, strip
from slider_plugin.report.scores import spearman
from slider_plugin.training.processes import check_one_process

if TYPE_CHECKING:
    from slider_plugin.family import LoadedFamily

State = dict[str, dict[str, Tensor]]

LEAKAGE, SUM = "leakage.json", "sum.png"


class SliderSet:
    """Several LoRAs in one model, each with a weight."""

    def __init__(self, model: torch.nn.Module, states: Sequence[State]) -> None:
        """Inject them.

        Args:
            model: changed in place.
            states: the folded factors of each file by module; a module that a file has not counts as zeros there.
        """
        self._ranks = [next(iter(state.values()))["lora_A"].shape[0] for state in states]
        modules = list(dict.fromkeys(name for state in states for name in state))
        rank = sum(self._ranks)
        self._adapter = LoraAdapter(model, modules, rank=rank, alpha=float(rank))
        whole = {name: {part: _beside(states, self._ranks, name, part) for part in ("lora_A", "lora_B")} for name in modules}
        self._adapter.load_folded(whole, "the sliders together")
        self._ups = [(p, p.detach().clone()) for name, p in self._adapter.named_parameters() if name.endswith("lora_B")]
        self._weights = [0.0] * len(states)

    @contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """All weights times `scale` inside; nothing outside."""
        with self._adapter.scaled(scale):
            yield

    @contextmanager
    def weighted(self, weights: Sequence[float]) -> Iterator[SliderSet]:
        """Inside, slider i has `weights[i]` at scale 1."""
        before, self._weights = self._weights, list(weights)
        self._write()
        try:
            yield self
        finally:
            self._weights = before
            self._write()

    @torch.no_grad()
    def _write(self) -> None:
        weights_R = torch.repeat_interleave(torch.tensor(self._weights), torch.tensor(self._ranks))
        for parameter, up in self._ups:
            parameter.copy_(up * weights_R.to(up).reshape(1, -1, *[1] * (up.ndim - 2)))


def _beside(states: Sequence[State], ranks: Sequence[int], module: str, part: str) -> Tensor:
    """The factors of one module side by side along the rank; zeros for a file without it."""
    axis = 0 if part == "lora_A" else 1
    known = next(state[module][part] for state in states if module in state)
    parts = []
    for state, rank in zip(states, ranks, strict=True):
        shape = [*known.shape]
        shape[axis] = rank
        parts.append(state[module][part].float() if module in state else torch.zeros(shape))
    return torch.cat(parts, dim=axis)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A finished leakage matrix."""

    json: dict[str, Any]
    path: Path
    table: tuple[str, ...]


def report_set(config: RunConfig, files: Sequence[Path], folder: Path, options: Options) -> Matrix:
    """Draw each slider alone and all together, and write `leakage.json` and `sum.png`.

    Raises:
        UserError: before a model is loaded, for anything wrong with one of the files.
    """
    check_one_process("report")
    family = Plugins.discover().load(config.model_family)
    config = with_prompts(config, options.prompts)
    configs = _check(config, family, files, folder, options)
    checked = check_report(config, family, files[0], folder, options)
    desk = Desk.open(config, family, checked, options)
    sliders = SliderSet(desk.components.denoiser, [_read(file, family)[0] for file in files])
    ends = [_ends(own, family, desk.components, desk) for own in configs]
    names = names_of(files)
    drawn = []
    for number, name in enumerate(names):
        console.say(f"drawing {name} alone")
        with sliders.weighted([float(i == number) for i in range(len(names))]) as one:
            drawn.append(draw(family, desk.components, one, desk.request, desk.settings, ends[0].grid))
    console.say("drawing the sum")
    with sliders.weighted([1.0] * len(names)) as everything:
        whole = draw(family, desk.components, everything, desk.request, desk.settings, ends[0].grid)
    matrix = leakage(names, drawn, ends, checked.trained)
    matrix |= {
        "family": family.facts.name,
        "sum": SUM,
        "prompts": list(desk.request.prompts),
        "seeds": list(desk.request.seeds),
    }
    return Matrix(matrix, _write(folder, matrix, strip(whole)), table(matrix))


def names_of(files: Sequence[Path]) -> list[str]:
    """Short names of the files: without the suffix, and with the folder where several are called alike."""
    stems = [file.stem for file in files]
    return [file.stem if stems.count(file.stem) == 1 else f"{file.resolve().parent.name}/{file.stem}" for file in files]


def leakage(names: Sequence[str], drawn: Sequence[Drawn], ends: Sequence[Ends], trained: float) -> dict[str, Any]:
    """What each slider (row) does along each one's axis (column), from minus to plus the trained strength.

    `range` is the mean response there (as in a report), `leak` its size as a share of the one on the slider's own axis (large:
    a slider does what another is for), `monotonicity` the mean Spearman correlation with the strength.
    """
    axes = [end.axis() for end in ends]
    rows = [[_on(one, axis, trained) for axis in axes] for one in drawn]
    ranges = [[round(cell[0], 4) for cell in row] for row in rows]
    return {
        "sliders": list(names),
        "range": ranges,
        "leak": [[round(abs(v) / max(abs(row[i]), 1e-9), 4) for v in row] for i, row in enumerate(ranges)],
        "monotonicity": [[round(cell[1], 4) for cell in row] for row in rows],
    }


def _on(drawn: Drawn, axis: Any, trained: float) -> tuple[float, float]:
    strengths = drawn.request.strengths
    inside = [i for i, s in enumerate(strengths) if abs(s) <= trained + 1e-9]
    inside = inside if len(inside) >= 3 else list(range(len(strengths)))
    zero = strengths.index(0.0)
    response_PQS = axis.along(drawn.vectors_PQSN - drawn.vectors_PQSN[:, :, zero : zero + 1])[:, :, inside]
    at = np.asarray(strengths)[inside]
    mean_S = response_PQS.mean(axis=(0, 1))
    return float(mean_S[-1] - mean_S[0]), float(spearman(at, response_PQS).mean())


def table(matrix: dict[str, Any]) -> tuple[str, ...]:
    """The matrix as lines of text."""
    names = matrix["sliders"]
    width = max(9, *(len(name) + 2 for name in names))
    head = "range on the axis of".ljust(width + 12) + "".join(name.rjust(width) for name in names)
    rows = zip(names, matrix["range"], strict=True)
    return head, *(name.ljust(width + 12) + "".join(f"{v:+.2f}".rjust(width) for v in row) for name, row in rows)


def _write(folder: Path, matrix: dict[str, Any], picture: Image.Image) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / SUM) as temporary:
        picture.save(temporary, format="PNG")
    write_json(folder / LEAKAGE, matrix)
    return folder / LEAKAGE


# --- What can be wrong ------------------------------------------------------------------------------------------------


def _check(config: RunConfig, family: LoadedFamily, files: Sequence[Path], folder: Path, options: Options) -> list[RunConfig]:
    """The configuration of each slider's own run. Raises ConfigError with everything wrong."""
    problems: list[str] = []
    configs: list[RunConfig] = []
    for file in files:
        try:
            own = _config_beside(file)
            check_report(with_prompts(own, ["-"]), family, file, folder, options)
            _read(file, family)
            configs.append(own)
        except UserError as error:
            problems.extend(error.problems if isinstance(error, ConfigError) else [str(error)])
    if options.calibrate or options.scorer:
        problems.append("--calibrate and --scorer: they are for one slider; leave them out, or report on each by itself")
    if problems:
        raise ConfigError(problems)
    return configs


def _config_beside(file: Path) -> RunConfig:
    path = file.parent / "config.json"
    if not path.is_file():
        raise UserError(f"{file}: there is no config.json beside it, which names the images of its axis; keep it with its run")
    return read_config(path, (), Plugins.discover().facts)[0]


def _read(file: Path, family: LoadedFamily) -> tuple[State, dict[str, str]]:
    tensors, _ = read_tensors(file)
    if any(name.startswith(("lycoris_", f"{CONTROLNET}.")) for name in tensors):
        raise UserError(f"{file}: a set takes plain LoRAs of the denoiser; report on a LyCORIS or ControlNet slider by itself")
    state, metadata = read_adapter(file, family.facts.denoiser)
    if len({int(parts["lora_A"].shape[0]) for parts in state.values()}) > 1:
        raise UserError(f"{file} has modules of different ranks; this version reads one rank")
    return state, metadata


def _ends(own: RunConfig, family: LoadedFamily, components: Components, desk: Desk) -> Ends:
    """The images of one slider's run, in the latents of the model that is loaded."""
    from slider_plugin.data.buckets import open_buckets
    from slider_plugin.preflight import alignment

    wanted = _Wanted(desk.checked.model, open_buckets(own, alignment(own)).buckets)
    return of_buckets(stages.encode(own, family, components, wanted, desk.machine), pictures=False)


@dataclass(frozen=True, slots=True)
class _Wanted:
    model: str
    buckets: tuple[Any, ...]

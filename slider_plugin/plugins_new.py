"""`slider plugins new NAME`: a package for a new family, written from the template that lies beside this file.

The template is itself a package that works, of a family called `my_model`; making one is copying it under another name. With
`--from`, a probe of a pipeline folder fills in what can be measured, and a few files of the template have another version.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from itertools import chain, groupby
from pathlib import Path
from string import Template
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from slider_plugin.demo.bundle import fixtures
from slider_plugin.errors import UserError
from slider_plugin.files import check_writable, folder_replacing
from slider_plugin.registry import Plugins
from slider_plugin.targets import alternatives

if TYPE_CHECKING:
    from slider_plugin.probing import Probe

TEMPLATE = Path(__file__).parent / "template"
FAMILY, PROBED = TEMPLATE / "family", TEMPLATE / "probed"
MY_NAME, MY_DASHED, MY_TITLE = "my_model", "my-model", "My Model"
FILLED = ".in"  # suffix of the template's files that hold `$placeholders`
BUCKETS = {"more": Path("size", "more"), "less": Path("size", "less"), "neutral": Path("neutral")}
ONE_LINE = 90  # characters of an expression
NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")  # a name that ends with `_` could not name a distribution


def create(name: str, output: Path | None = None, source: Path | None = None) -> Path:
    """Write a package for a new family, whole or not at all.

    Args:
        name: of the family; its module is `slider_family_<name>`.
        output: folder of the package, which must not exist; None for `slider-family-<name>` below the current directory.
        source: a pipeline folder to probe for denoiser and targets; None takes the template's working family.

    Returns:
        The folder.

    Raises:
        UserError: the name is none or taken, something is at the folder's place, or the source cannot be probed.
    """
    _check_name(name)
    folder = output or Path(f"slider-family-{_dashed(name)}")
    check_writable(folder.parent)
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder} exists already and is not overwritten: remove it, or choose another folder with --output")
    facts = None if source is None else _facts(source)
    with folder_replacing(folder) as place:
        for path, text in _texts(facts):
            file = place / _renamed(path, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(_filled(_renamed(text, name), facts), encoding="utf-8")
        for bucket, images in BUCKETS.items():
            shutil.copytree(fixtures() / "buckets" / images, place / "example" / "buckets" / bucket)
    return folder


def next_steps(name: str, folder: Path, probed: bool) -> list[str]:
    """What to type after `create`, in order."""
    tiny = [] if probed else [f"python -m slider_family_{name} tiny-model"]
    return [f"cd {folder}", 'pip install -e ".[test]"', *tiny, "slider train example/config.json"]


# --- Names ------------------------------------------------------------------------------------------------------------


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise UserError(
            f"{name!r} is no name for a family: it needs lower-case letters and digits, a letter first, and single underscores "
            "between words, such as my_model"
        )
    plugins = Plugins.discover()
    rows = {row.name: row for row in plugins.rows() if row.family}
    for row in rows.values():
        aliases = plugins.facts(row.name).aliases if row.builtin and row.status == "available" else ()
        if name in {other.replace("-", "_") for other in (row.name, *aliases)}:
            as_what = "" if name == row.name else f" as another name of {row.name}"
            raise UserError(f"there is a family {name} already{as_what}, from {row.distribution}; choose another name")


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _renamed(text: str, name: str) -> str:
    """A text or path of the template with the new family's name in it."""
    words = {MY_NAME: name, MY_DASHED: _dashed(name), MY_TITLE: name.replace("_", " ").title()}
    return re.sub("|".join(words), lambda found: words[found[0]], text)


# --- Texts ------------------------------------------------------------------------------------------------------------


def _texts(facts: Mapping[str, str] | None) -> Iterator[tuple[str, str]]:
    """Path below the package and text of each file; those of a probed family go before the template's own."""
    files = {path.relative_to(FAMILY).as_posix(): path for path in _files(FAMILY)}
    if facts is not None:
        files |= {path.relative_to(PROBED).as_posix().removesuffix(FILLED): path for path in _files(PROBED)}
    yield from ((name, path.read_text(encoding="utf-8")) for name, path in files.items())


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def _filled(text: str, facts: Mapping[str, str] | None) -> str:
    return text if facts is None else Template(text).substitute(facts)


# --- What a probe tells -------------------------------------------------------------------------------------------------


def _facts(source: Path) -> dict[str, str]:
    """What the probe of a pipeline folder puts into the template's placeholders."""
    from slider_plugin.probing import probe_folder

    try:
        probe = probe_folder(source)
    except UserError as error:
        raise UserError(str(error).replace("--probe", "--from")) from error  # here the folder came by another option
    config, noise = _read(source / probe.denoiser / "config.json"), _noise(source)
    return {
        "model": json.dumps(str(source.absolute())),
        "denoiser": probe.denoiser,
        "denoiser_class": probe.denoiser_class,
        "pipeline_class": probe.pipeline_class,
        "noise": noise,
        "names": ", ".join(sorted([noise, "Family", "Targets"])),
        "drawing": _drawing(source),
        "targets": _targets(probe),
        "unsure": _unsure(probe),
        "reference": _reference(config),
        "matched": str(len(probe.targets())),
    }


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _noise(source: Path) -> str:
    """`Flow` or `Diffusion`, as the published scheduler is for; the sign and the time are not to be read from it."""
    path = source / "scheduler" / "scheduler_config.json"
    scheduler = _read(path) if path.is_file() else {}
    flow = "Flow" in str(scheduler.get("_class_name")) or scheduler.get("prediction_type") == "flow_prediction"
    return "Flow" if flow or scheduler.get("use_flow_sigmas") else "Diffusion"


def _drawing(source: Path) -> str:
    """What the call of the published pipeline tells: whether it makes videos, and its usual guidance."""
    from slider_plugin.loading import pipeline_class_of

    pipeline_class: Any = pipeline_class_of(source)
    arguments = inspect.signature(pipeline_class.__call__).parameters
    lines = ['    modalities=("image", "video"),'] if "num_frames" in arguments else []
    guidance = getattr(arguments.get("guidance_scale"), "default", None)
    if isinstance(guidance, int | float):
        lines.append(f"    guidance_scale={float(guidance)},  # of validation images, as the pipeline's own")
    return "".join(f"\n{line}" for line in lines)


def _targets(probe: Probe) -> str:
    """The proposed expressions as arguments of `Targets`, one line for each alternative of a long one."""
    kinds = ("self_attention", "joint_attention", "projections", "io", "time", "forbidden", "standard")
    stated = {kind: getattr(probe.proposal, kind) for kind in kinds}
    return "\n".join(f"        {kind}={_literal(expression)}," for kind, expression in stated.items() if expression)


def _literal(expression: str) -> str:
    if len(expression) < ONE_LINE:
        return f'r"{expression}"'
    first, *others = alternatives(expression)
    pieces = [piece for part in (first, *(f"|{other}" for other in others)) for piece in _pieces(part)]
    return "(\n" + "\n".join(f'            r"{piece}"' for piece in pieces) + "\n        )"


def _pieces(part: str) -> Iterator[str]:
    """A text in pieces of one line each, cut behind the dots of module names."""
    line = ""
    for step in re.split(r"(?<=\\\.)", part):
        if line and len(line + step) > ONE_LINE:
            yield line
            line = ""
        line += step
    yield line


def _unsure(probe: Probe) -> str:
    """The modules that the probe was not sure of, as a comment; layers of equal blocks in one line."""
    if not probe.unsure:
        return "    # Every module was told apart by measurement."
    patterns = sorted((reason, re.sub(r"\d+", "N", module)) for module, reason in probe.unsure.items())
    lines = [f"{pattern} ({len(list(same))}): {reason}" for (reason, pattern), same in groupby(patterns)]
    wrapped = [wrap(line, 120, initial_indent="    #   ", subsequent_indent="    #     ") for line in lines]
    head = "    # The probe was not sure of these modules; look at them before you trust the targets:"
    return "\n".join([head, *chain.from_iterable(wrapped)])


def _reference(config: Mapping[str, Any]) -> str:
    """The denoiser's configuration as a literal, one key to a line."""
    lines = [f"        {_python(key)}: {_python(value)}," for key, value in config.items() if not key.startswith("_")]
    return "\n".join(["{", *lines, "    }"])


def _python(value: Any) -> str:
    """A value of a JSON document as Python writes it."""
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_python, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_python(key)}: {_python(item)}" for key, item in value.items()) + "}"
    return repr(value)

"""The finished adapter as one safetensors file in diffusers' key names, and the same file read back with suspicion.

Readers disagree about where `alpha` belongs: some ignore it, some refuse a file that states it twice. So `alpha / rank` is
multiplied into `lora_B`, in float32 and before the cast to the file's dtype, and the file states no alpha at all: every reader
then applies `W + strength * B @ A`. A file takes its place only after it was read back and found equal bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata as distributions
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from slider_hooks import CONTRACT
from slider_plugin.errors import UserError
from slider_plugin.files import replacing

AdapterState = Mapping[str, Mapping[str, Tensor]]
"""By module name: `lora_A` (r, in[, kh, kw]) and `lora_B` (out, r[, 1, 1])."""

HEADER_LIMIT = 32 * 2**20
FILE_LIMIT = 8 * 2**30

_TWINS = ("lora_A", "lora_B")
_KEY = re.compile(r"(?P<prefix>[^.]+)\.(?P<module>.+)\.(?P<twin>lora_[AB])\.weight")
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_PICKLE_MARKS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_DTYPES = ("F64", "F32", "F16", "BF16")


class ExportError(RuntimeError):
    """The file that was written is not the one that was meant: a fault of the disk, a library or ours."""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written."""

    path: Path
    modules: int
    parameters: int
    ranks: tuple[int, ...]
    dtype: str
    size: int
    sha256: str


# --- Writing ----------------------------------------------------------------------------------------------------------


def export_diffusers(
    adapter_state: AdapterState,
    scalings: Mapping[str, float],
    prefix: str,
    metadata: Mapping[str, str],
    path: Path,
    dtype: torch.dtype,
) -> ExportReport:
    """Write the adapter in diffusers' format, whole or not at all; an older file stays until the new one is verified.

    Args:
        adapter_state: the two factors of each module, by its name inside the denoiser.
        scalings: `alpha / rank` of each module.
        prefix: the pipeline component that the adapter belongs to, `unet` or `transformer`.
        metadata: strings for the header, see `slider_metadata`.
        path: the file.
        dtype: of the tensors in the file.

    Raises:
        UserError: a value is not finite, so the training has diverged or `dtype` cannot hold it.
        ExportError: the file read back is not what was meant.
    """
    tensors = fold(adapter_state, scalings, prefix, dtype)
    header = _header(metadata)
    data = _sorted_bytes(safetensors.torch.save(tensors, metadata=header))
    with replacing(path) as temporary:
        temporary.write_bytes(data)
        _compare(temporary, tensors, header)
    return ExportReport(
        path=path,
        modules=len(adapter_state),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        ranks=tuple(sorted({factors["lora_A"].shape[0] for factors in adapter_state.values()})),
        dtype=str(dtype).removeprefix("torch."),
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def fold(adapter_state: AdapterState, scalings: Mapping[str, float], prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the file by key: `lora_A` as it is, `lora_B * scaling` in float32, both then cast."""
    _check_state(adapter_state, scalings)
    tensors: dict[str, Tensor] = {}
    for module in sorted(adapter_state):
        down = adapter_state[module]["lora_A"].detach().to("cpu", torch.float32)
        up = adapter_state[module]["lora_B"].detach().to("cpu", torch.float32) * scalings[module]
        for twin, tensor in zip(_TWINS, (down, up), strict=True):
            # A copy, since safetensors refuses tensors that share memory, and training goes on with the originals.
            tensors[f"{prefix}.{module}.{twin}.weight"] = _finite(tensor, f"{module}.{twin}", dtype)
    return tensors


def _finite(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise UserError(f"{name} holds values that are not finite: the training has diverged; try a lower learning_rate")
    cast = tensor.to(dtype, copy=True).contiguous()
    if not torch.isfinite(cast).all():
        raise UserError(
            f"{name} holds values that {str(dtype).removeprefix('torch.')} cannot hold; export in bfloat16 or float32"
        )
    return cast


def _check_state(adapter_state: AdapterState, scalings: Mapping[str, float]) -> None:
    if not adapter_state:
        raise ValueError("no modules to export")
    if adapter_state.keys() != scalings.keys():
        raise ValueError(f"scalings and modules differ: {sorted(adapter_state.keys() ^ scalings.keys())[:3]}")
    for module, factors in adapter_state.items():
        if set(factors) != set(_TWINS):
            raise ValueError(f"{module}: expected lora_A and lora_B, got {sorted(factors)}")
        if problem := _shape_problem(factors["lora_A"].shape, factors["lora_B"].shape):
            raise ValueError(f"{module}: {problem}")
        if not math.isfinite(scalings[module]):
            raise ValueError(f"{module}: scaling {scalings[module]}")


def _shape_problem(down: Sequence[int], up: Sequence[int]) -> str:
    if len(down) < 2 or len(down) != len(up):
        return f"lora_A {tuple(down)} and lora_B {tuple(up)} do not belong to one layer"
    if down[0] != up[1]:
        return f"lora_A has rank {down[0]}, lora_B rank {up[1]}"
    return "" if min(*down, *up) > 0 else f"an empty tensor: lora_A {tuple(down)}, lora_B {tuple(up)}"


def _header(metadata: Mapping[str, str]) -> dict[str, str]:
    header = {**metadata, "format": "pt"}
    wrong = [key for key, value in header.items() if not isinstance(value, str)]
    if wrong or "lora_adapter_metadata" in header:
        raise ValueError(f"metadata must be strings, without lora_adapter_metadata: {wrong}")
    return header


def _sorted_bytes(data: bytes) -> bytes:
    """The same file with its header sorted: safetensors writes metadata in an order that differs between runs."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8, as safetensors itself arranges
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _compare(path: Path, meant: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    data = path.read_bytes()
    try:
        read = safetensors.torch.load(data)
    except SafetensorError as error:
        raise ExportError(f"{path.name} cannot be read back: {error}") from error
    if read.keys() != meant.keys() or _read_header(data)[0].get("__metadata__") != header:
        raise ExportError(f"{path.name} was written with other keys than meant")
    for key, tensor in meant.items():
        if read[key].dtype != tensor.dtype or not torch.equal(_bits(read[key]), _bits(tensor)):
            raise ExportError(f"{path.name} was written with other values than meant in {key}")


def _bits(tensor: Tensor) -> Tensor:
    """Bytes, so that 0.0 and -0.0 differ."""
    return tensor.contiguous().flatten().view(torch.uint8)


# --- Metadata ---------------------------------------------------------------------------------------------------------


def slider_metadata(
    *,
    family: str,
    flavour: str | None,
    plugin: str,
    plugin_version: str,
    targets: str,
    targets_source: str,
    strengths: Sequence[float],
    rank: int,
    alpha: float,
    steps: int,
    seed: int,
    base_model: str,
    objective: str,
    extra: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The `slider.*` strings of a file; what is None is left out, and `extra` adds keys of its own (with any prefix).

    `rank` and `alpha` tell how it was trained: the file itself has alpha folded in and runs at strength 1 as trained.
    """
    values: dict[str, Any] = {
        "version": _own_version(),
        "family": family,
        "flavour": flavour,
        "plugin": plugin,
        "plugin_version": plugin_version,
        "contract": ".".join(map(str, CONTRACT)),
        "targets": targets,
        "targets_source": targets_source,
        "strengths": json.dumps([float(strength) for strength in strengths]),
        "rank": rank,
        "alpha": f"{alpha:g}",
        "steps": steps,
        "seed": seed,
        "base_model": _last_part(base_model),
        "objective": objective,
    }
    return {f"slider.{key}": str(value) for key, value in values.items() if value is not None} | dict(extra or {})


def _own_version() -> str:
    try:
        return distributions.version("slider-plugin")
    except distributions.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def _last_part(place: str) -> str:
    """Name of a model folder, or of a hub repository: the path to it tells about somebody's machine."""
    name = re.split(r"[/\\]", place.rstrip("/\\"))[-1]
    return Path(place).resolve().name if name in ("", ".", "..") else name


# --- Reading ----------------------------------------------------------------------------------------------------------


def read_adapter(path: Path, prefix: str | None = None) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """Read a file that `export_diffusers` (or diffusers, with alpha equal to the rank) wrote; it may come from a stranger.

    Returns:
        The factors by module, as `export_diffusers` takes them with scaling 1, without the prefix; and the metadata.

    Args:
        path: the file.
        prefix: the component that it must belong to; None takes any one.

    Raises:
        UserError: the file cannot be read or is not such a file; the message names it.
    """
    _refuse_pickle(path)
    data = _read_bytes(path)
    header, problem = _read_header(data)
    if problem:
        raise UserError(f"{path}: not a safetensors file ({problem})")
    metadata: dict[str, str] = header.pop("__metadata__", {})
    shapes = _adapter_shapes(path, header, prefix)
    _check_alpha(path, metadata)
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error})") from error
    state: dict[str, dict[str, Tensor]] = {}
    for module, keys in shapes.items():
        state[module] = {twin: _finite_in(path, tensors[key], key) for twin, key in keys.items()}
    return state, metadata


def _refuse_pickle(path: Path) -> None:
    if path.suffix.lower() in _PICKLES:
        raise UserError(f"{path}: {path.suffix} files are pickles, which can run code when read; only .safetensors is read")


def _read_bytes(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > FILE_LIMIT:
            raise UserError(f"{path}: {size / 2**30:.1f} GiB is too large for an adapter; is it a whole model?")
        with path.open("rb") as file:
            start = file.read(8)
            # The marks of a pickle can also begin a header's length, but then of an absurd header.
            if start.startswith(_PICKLE_MARKS) and int.from_bytes(start, "little") > HEADER_LIMIT:
                raise UserError(
                    f"{path}: a pickle in spite of its name, which can run code when read; only safetensors is read"
                )
            return start + file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read_header(data: bytes) -> tuple[dict[str, Any], str]:
    """The header, and what is wrong with it ("" if nothing is)."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        return {}, "it is cut off, or something else"
    if length > HEADER_LIMIT:
        return {}, f"its header has {length} bytes"
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):  # ValueError: no JSON, or no UTF-8
        return {}, "its header is not JSON"
    if not isinstance(header, dict) or not all(isinstance(value, dict) for value in header.values()):
        return {}, "its header is not a table of tensors"
    if not all(isinstance(value, str) for value in header.get("__metadata__", {}).values()):
        return {}, "its metadata are not strings"
    return header, ""


def _adapter_shapes(path: Path, header: Mapping[str, Any], prefix: str | None) -> dict[str, dict[str, str]]:
    """Judge keys, dtypes and shapes by the header alone; gives the two keys of each module."""
    matches = {key: match for key in sorted(header) if (match := _KEY.fullmatch(key))}
    if not matches:
        raise UserError(f"{path}: no LoRA layers in it ({_foreign(header)})")
    if strangers := sorted(header.keys() - matches.keys()):
        raise UserError(f"{path}: {len(strangers)} keys belong to no LoRA layer, such as `{strangers[0]}`")
    prefixes = {match["prefix"] for match in matches.values()}
    if len(prefixes) > 1 or prefix not in (None, *prefixes):
        raise UserError(
            f"{path}: its layers belong to {', '.join(sorted(prefixes))}; expected {prefix or 'one component'} alone"
        )
    modules: dict[str, dict[str, str]] = {}
    for key, match in matches.items():
        if header[key].get("dtype") not in _DTYPES:
            raise UserError(f"{path}: `{key}` has dtype {header[key].get('dtype')}; expected one of {', '.join(_DTYPES)}")
        modules.setdefault(match["module"], {})[match["twin"]] = key
    for module, keys in modules.items():
        _check_twins(path, module, keys, header)
    return modules


def _check_twins(path: Path, module: str, keys: Mapping[str, str], header: Mapping[str, Any]) -> None:
    for twin in _TWINS:
        if twin not in keys:
            raise UserError(f"{path}: `{module}` has no {twin}; the file is incomplete")
    down, up = (_shape(header[keys[twin]]) for twin in _TWINS)
    if problem := _shape_problem(down, up):
        raise UserError(f"{path}: `{module}`: {problem}")


def _shape(info: Mapping[str, Any]) -> tuple[int, ...]:
    shape = info.get("shape")
    well_formed = isinstance(shape, list) and all(type(size) is int for size in shape)
    return tuple(shape) if well_formed and shape is not None else ()


def _foreign(header: Mapping[str, Any]) -> str:
    """What the keys look like instead, for the message."""
    if not header:
        return "it is empty"
    first = next(iter(sorted(header)))
    if any(".lora_down." in key or ".lora_up." in key or key.startswith("lycoris_") for key in header):
        return f"its keys are of the kohya or LyCORIS format, such as `{first}`; only diffusers keys are read"
    return f"its keys are such as `{first}`"


def _check_alpha(path: Path, metadata: Mapping[str, str]) -> None:
    """diffusers may leave alpha in the metadata: such a file means another strength than its tensors alone say."""
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its lora_adapter_metadata is not JSON") from error
    items = values.items() if isinstance(values, dict) else ()
    found = {key.rsplit(".", 1)[-1]: value for key, value in items}
    special = [key for key in ("alpha_pattern", "use_rslora", "use_dora") if found.get(key)]
    if found.get("lora_alpha") != found.get("r") or special:
        raise UserError(f"{path}: its strength is scaled by metadata (alpha is not the rank); export it with alpha folded in")


def _finite_in(path: Path, tensor: Tensor, key: str) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise UserError(f"{path}: `{key}` holds values that are not finite")
    return tensor.clone()  # own, aligned memory: arithmetic on the file's buffer may take another path by some last bits

"""An adapter file read back with suspicion: it may come from a stranger. Safetensors only, headers judged before data."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from slider_plugin.errors import UserError

HEADER_LIMIT = 32 * 2**20
FILE_LIMIT = 8 * 2**30

TWINS = ("lora_A", "lora_B")
_KEY = re.compile(r"(?P<prefix>[^.]+)\.(?P<module>.+)\.(?P<twin>lora_[AB])\.weight")
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_PICKLE_MARKS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_DTYPES = ("F64", "F32", "F16", "BF16")


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
    data, header, metadata = _opened(path)
    shapes = _adapter_shapes(path, header, prefix)
    _check_alpha(path, metadata)
    tensors = _loaded(path, data)
    state: dict[str, dict[str, Tensor]] = {}
    for module, keys in shapes.items():
        state[module] = {twin: _finite_in(path, tensors[key], key) for twin, key in keys.items()}
    return state, metadata


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file by key, and its metadata, whoever wrote it. Raises UserError as `read_adapter`."""
    data, _, metadata = _opened(path)
    return {key: _finite_in(path, tensor, key) for key, tensor in _loaded(path, data).items()}, metadata


def _opened(path: Path) -> tuple[bytes, dict[str, Any], dict[str, str]]:
    """The bytes of a safetensors file, its header without the metadata, and these."""
    _refuse_pickle(path)
    data = _read_bytes(path)
    header, problem = read_header(data)
    if problem:
        raise UserError(f"{path}: not a safetensors file ({problem})")
    return data, header, header.pop("__metadata__", {})


def _loaded(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error})") from error
    return tensors


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


def read_header(data: bytes) -> tuple[dict[str, Any], str]:
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
    for twin in TWINS:
        if twin not in keys:
            raise UserError(f"{path}: `{module}` has no {twin}; the file is incomplete")
    down, up = (_shape(header[keys[twin]]) for twin in TWINS)
    if problem := shape_problem(down, up):
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


def shape_problem(down: Sequence[int], up: Sequence[int]) -> str:
    if len(down) < 2 or len(down) != len(up):
        return f"lora_A {tuple(down)} and lora_B {tuple(up)} do not belong to one layer"
    if down[0] != up[1]:
        return f"lora_A has rank {down[0]}, lora_B rank {up[1]}"
    return "" if min(*down, *up) > 0 else f"an empty tensor: lora_A {tuple(down)}, lora_B {tuple(up)}"

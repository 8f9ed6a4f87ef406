"""The finished adapter as one safetensors file in diffusers' key names.

Readers disagree about where `alpha` belongs: some ignore it, some refuse a file that states it twice. So `alpha / rank` is
multiplied into `lora_B`, in float32 and before the cast to the file's dtype, and the file states no alpha at all: every reader
then applies `W + strength * B @ A`. A file takes its place only after it was read back and found equal bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from slider_plugin.adapterfile import TWINS, read_header, shape_problem
from slider_plugin.errors import UserError
from slider_plugin.files import replacing

AdapterState = Mapping[str, Mapping[str, Tensor]]
"""By module name: `lora_A` (r, in[, kh, kw]) and `lora_B` (out, r[, 1, 1])."""


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
    ranks = {factors["lora_A"].shape[0] for factors in adapter_state.values()}
    return write_verified(path, tensors, metadata, modules=len(adapter_state), ranks=sorted(ranks))


def write_verified(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    modules: int,
    ranks: Sequence[int],
    check: Callable[[Path], None] | None = None,
) -> ExportReport:
    """Write tensors of one dtype, but for alphas, and read them back; an older file stays until the new one is found equal.

    Args:
        path: the file.
        tensors: by key.
        metadata: strings for the header.
        modules: how many there are, for the report.
        ranks: of theirs, for the report.
        check: looks at the new file under its temporary name; where it raises, nothing is written.

    Raises:
        ExportError: the file read back is not what was meant.
    """
    header = _header(metadata)
    data = _sorted_bytes(safetensors.torch.save(dict(tensors), metadata=header))
    with replacing(path) as temporary:
        temporary.write_bytes(data)
        _compare(temporary, tensors, header)
        if check is not None:
            check(temporary)
    (dtype,) = {tensor.dtype for key, tensor in tensors.items() if not key.endswith(".alpha")}
    return ExportReport(
        path=path,
        modules=modules,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        ranks=tuple(ranks),
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
        for twin, tensor in zip(TWINS, (down, up), strict=True):
            # A copy, since safetensors refuses tensors that share memory, and training goes on with the originals.
            tensors[f"{prefix}.{module}.{twin}.weight"] = _finite(tensor, f"{module}.{twin}", dtype)
    return tensors


def _finite(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise UserError(f"{name} holds values that are not finite: the training has diverged; try a lower learning_rate")
    return cast(tensor, name, dtype)


def cast(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """A copy of a finite tensor in another dtype. Raises UserError, naming it, if that cannot hold its values."""
    found = tensor.to(dtype, copy=True).contiguous()
    if not torch.isfinite(found).all():
        raise UserError(
            f"{name} holds values that {str(dtype).removeprefix('torch.')} cannot hold; export in bfloat16 or float32"
        )
    return found


def _check_state(adapter_state: AdapterState, scalings: Mapping[str, float]) -> None:
    if not adapter_state:
        raise ValueError("no modules to export")
    if adapter_state.keys() != scalings.keys():
        raise ValueError(f"scalings and modules differ: {sorted(adapter_state.keys() ^ scalings.keys())[:3]}")
    for module, factors in adapter_state.items():
        if set(factors) != set(TWINS):
            raise ValueError(f"{module}: expected lora_A and lora_B, got {sorted(factors)}")
        if problem := shape_problem(factors["lora_A"].shape, factors["lora_B"].shape):
            raise ValueError(f"{module}: {problem}")
        if not math.isfinite(scalings[module]):
            raise ValueError(f"{module}: scaling {scalings[module]}")


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
    if read.keys() != meant.keys() or read_header(data)[0].get("__metadata__") != header:
        raise ExportError(f"{path.name} was written with other keys than meant")
    for key, tensor in meant.items():
        if read[key].dtype != tensor.dtype or not torch.equal(_bits(read[key]), _bits(tensor)):
            raise ExportError(f"{path.name} was written with other values than meant in {key}")


def _bits(tensor: Tensor) -> Tensor:
    """Bytes, so that 0.0 and -0.0 differ."""
    return tensor.contiguous().flatten().view(torch.uint8)

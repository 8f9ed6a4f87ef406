"""The exported file means what was trained, is written whole, and damaged ones are refused by name."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from slider_plugin import export
from slider_plugin.adapterfile import read_adapter
from slider_plugin.errors import UserError
from slider_plugin.export import ExportError, export_diffusers, slider_metadata

RANK = 4
MODULES = {
    "down.0.attn1.to_q": ((RANK, 6), (5, RANK)),
    "conv_in": ((RANK, 3, 3, 3), (7, RANK, 1, 1)),
    "down.0.attn1.to_out.0": ((RANK, 8), (8, RANK)),
}
META = {"slider.family": "sd1", "slider.note": "猫"}


def adapter(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {"lora_A": torch.randn(down, generator=generator), "lora_B": torch.randn(up, generator=generator)}
        for name, (down, up) in MODULES.items()
    }


def scalings(value: float = 1.0) -> dict[str, float]:
    return dict.fromkeys(MODULES, value)


def write(path: Path, scaling: float = 1.0, dtype: torch.dtype = torch.float32, state: Any = None) -> export.ExportReport:
    return export_diffusers(state or adapter(), scalings(scaling), "unet", META, path, dtype)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "slider.safetensors"


# --- what is written --------------------------------------------------------------------------------------------------


def test_keys_metadata_and_report(file: Path) -> None:
    report = write(file)
    tensors = safetensors.torch.load_file(file)
    assert set(tensors) == {f"unet.{module}.{twin}.weight" for module in MODULES for twin in ("lora_A", "lora_B")}
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {**META, "format": "pt"}
    assert report.path == file and report.modules == 3 and report.ranks == (RANK,) and report.dtype == "float32"
    assert report.size == file.stat().st_size and report.parameters == sum(t.numel() for t in tensors.values())


@pytest.mark.parametrize("scaling", [1.0, 0.5, 0.7, 2.0, 1 / 3])
def test_alpha_is_folded_into_lora_b_in_float32(file: Path, scaling: float) -> None:
    write(file, scaling)
    state, _ = read_adapter(file, "unet")
    for module, factors in adapter().items():
        assert torch.equal(state[module]["lora_A"], factors["lora_A"])
        assert torch.equal(state[module]["lora_B"], factors["lora_B"] * scaling)


def test_the_file_at_strength_1_is_the_adapter_as_trained(file: Path) -> None:
    write(file, 0.7)
    state, _ = read_adapter(file)
    trained = adapter()
    for name in ("down.0.attn1.to_q", "down.0.attn1.to_out.0"):
        wanted = 0.7 * trained[name]["lora_B"] @ trained[name]["lora_A"]
        torch.testing.assert_close(state[name]["lora_B"] @ state[name]["lora_A"], wanted)


def test_scalings_may_differ_by_module(file: Path) -> None:
    factors = {name: 0.25 * (i + 1) for i, name in enumerate(MODULES)}
    export_diffusers(adapter(), factors, "unet", {}, file, torch.float32)
    state, _ = read_adapter(file)
    for name, value in factors.items():
        assert torch.equal(state[name]["lora_B"], adapter()[name]["lora_B"] * value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_cast_comes_last(file: Path, dtype: torch.dtype) -> None:
    write(file, 0.7, dtype)
    state, _ = read_adapter(file)
    early = []
    for module, factors in adapter().items():
        assert torch.equal(state[module]["lora_A"], factors["lora_A"].to(dtype))
        assert torch.equal(state[module]["lora_B"], (factors["lora_B"] * 0.7).to(dtype))
        early.append(torch.equal(state[module]["lora_B"], factors["lora_B"].to(dtype) * 0.7))
    assert not all(early)


def test_low_precision_factors_are_folded_in_float32(file: Path) -> None:
    state = {name: {twin: t.bfloat16() for twin, t in factors.items()} for name, factors in adapter().items()}
    write(file, 0.7, torch.float32, state)
    read, _ = read_adapter(file)
    assert torch.equal(read["conv_in"]["lora_B"], state["conv_in"]["lora_B"].float() * 0.7)


def test_the_training_weights_are_left_alone(file: Path) -> None:
    state = adapter()
    for factors in state.values():
        for tensor in factors.values():
            tensor.requires_grad_()
    write(file, 0.5, state=state)
    assert all(torch.equal(state[n][t], adapter()[n][t]) and state[n][t].requires_grad for n in state for t in state[n])


def test_views_and_shared_tensors_can_be_exported(file: Path) -> None:
    shared = torch.randn(RANK, 6)
    state = {"a": {"lora_A": shared, "lora_B": torch.randn(RANK, 5).T}, "b": {"lora_A": shared, "lora_B": torch.randn(5, RANK)}}
    export_diffusers(state, {"a": 1.0, "b": 1.0}, "transformer", {}, file, torch.float32)
    assert torch.equal(read_adapter(file, "transformer")[0]["a"]["lora_B"], state["a"]["lora_B"])


def test_the_same_adapter_gives_the_same_bytes(file: Path, tmp_path: Path) -> None:
    first = write(file)
    turned = dict(reversed(adapter().items()))
    metadata = dict(reversed(META.items()))
    second = export_diffusers(turned, scalings(), "unet", metadata, tmp_path / "b.safetensors", torch.float32)
    assert first.sha256 == second.sha256 and file.read_bytes() == second.path.read_bytes()
    # In another process too: safetensors orders metadata by a hash that is seeded anew each time.
    code = (
        "import sys, torch; from pathlib import Path; from slider_plugin.export import export_diffusers as e;"
        "s={'m': {'lora_A': torch.ones(2, 3), 'lora_B': torch.ones(3, 2)}};"
        "print(e(s, {'m': 1.0}, 'unet', {f'slider.{i}': 'x' for i in range(9)}, Path(sys.argv[1]), torch.float32).sha256)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(tmp_path / "c.safetensors")]
    outputs = {subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout for _ in range(2)}
    state = {"m": {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(3, 2)}}
    here = export_diffusers(state, {"m": 1.0}, "unet", {f"slider.{i}": "x" for i in range(9)}, file, torch.float32)
    assert outputs == {here.sha256 + "\n"}


def test_tensors_begin_at_a_multiple_of_8(file: Path) -> None:
    write(file)
    assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_adapter_is_refused_and_the_old_file_stays(file: Path, value: float) -> None:
    write(file)
    old = file.read_bytes()
    broken = adapter()
    broken["conv_in"]["lora_B"][0, 0] = value
    with pytest.raises(UserError, match=r"conv_in.*diverged"):
        write(file, state=broken)
    assert file.read_bytes() == old


def test_values_that_the_dtype_cannot_hold_are_refused(file: Path) -> None:
    large = adapter()
    large["conv_in"]["lora_A"][0] = 1e6
    with pytest.raises(UserError, match="float16 cannot hold"):
        write(file, dtype=torch.float16, state=large)
    assert not file.exists()
    write(file, dtype=torch.bfloat16, state=large)


def test_states_that_are_not_whole_are_refused(file: Path) -> None:
    good = adapter()
    cases: list[tuple[Any, Any]] = [
        ({}, {}),
        (good, {}),
        ({"m": {"lora_A": torch.ones(2, 3)}}, {"m": 1.0}),
        ({"m": {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(3, 4)}}, {"m": 1.0}),
        ({"m": {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(3, 2)}}, {"m": float("nan")}),
    ]
    for state, factors in cases:
        with pytest.raises(ValueError):
            export_diffusers(state, factors, "unet", {}, file, torch.float32)
    for metadata in ({"slider.rank": 4}, {"lora_adapter_metadata": "{}"}):
        with pytest.raises(ValueError):
            export_diffusers(good, scalings(), "unet", metadata, file, torch.float32)  # type: ignore[arg-type]
    assert not file.exists()


def test_a_failure_in_the_middle_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(file)
    old = file.read_bytes()

    def cut(self: Path, data: bytes) -> int:
        with self.open("wb") as opened:
            opened.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", cut)
    with pytest.raises(OSError, match="No space"):
        write(file, 0.5)
    assert file.read_bytes() == old and [p.name for p in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("place", [-1, 20, None])
def test_a_file_that_reads_back_differently_never_takes_its_place(
    file: Path, monkeypatch: pytest.MonkeyPatch, place: int | None
) -> None:
    write(file)
    old = file.read_bytes()

    def flip(self: Path, data: bytes) -> int:
        damaged = bytearray(data)
        if place is None:
            del damaged[-4:]
        else:
            damaged[place] ^= 1
        with self.open("wb") as opened:
            return opened.write(damaged)

    monkeypatch.setattr(Path, "write_bytes", flip)
    with pytest.raises(ExportError):
        write(file, 0.5)
    assert file.read_bytes() == old and [p.name for p in file.parent.iterdir()] == [file.name]


# --- metadata ---------------------------------------------------------------------------------------------------------


def metadata(**changes: Any) -> dict[str, str]:
    facts: dict[str, Any] = {
        "family": "sd1", "flavour": None, "plugin": "slider-plugin", "plugin_version": "1.2", "targets": r"a\.b",
        "targets_source": "slider", "strengths": [-1, 0, 2.5], "steps": 100, "seed": 42,
        "base_model": "org/model", "objective": "bucket", "adapter": {"slider.rank": "4", "slider.alpha": "2"},
    }  # fmt: skip
    return slider_metadata(**{**facts, **changes})


def test_metadata_goes_round(file: Path) -> None:
    written = metadata(extra={"modelspec.title": "cats"})
    export_diffusers(adapter(), scalings(), "unet", written, file, torch.float32)
    _, read = read_adapter(file)
    assert read == {**written, "format": "pt"}
    assert all(isinstance(value, str) for value in read.values())
    assert json.loads(read["slider.strengths"]) == [-1.0, 0.0, 2.5] and read["slider.alpha"] == "2"
    assert read["slider.contract"].count(".") == 1 and "slider.flavour" not in read
    assert metadata(flavour="turbo")["slider.flavour"] == "turbo"


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("/home/me/models/sdxl", "sdxl"),
        ("/home/me/models/sdxl/", "sdxl"),
        ("C:\\Users\\me\\sdxl", "sdxl"),
        ("org/name", "name"),
        ("x", "x"),
    ],
)
def test_the_base_model_is_a_name_and_never_a_path(place: str, name: str) -> None:
    assert metadata(base_model=place)["slider.base_model"] == name


def test_the_base_model_in_the_working_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert metadata(base_model=".")["slider.base_model"] == "mine"


# --- reading ----------------------------------------------------------------------------------------------------------


def refuse(path: Path, match: str, prefix: str | None = None) -> None:
    with pytest.raises(UserError, match=match) as caught:
        read_adapter(path, prefix)
    assert str(path) in str(caught.value)


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    return path


def twins(module: str = "unet.m") -> dict[str, Tensor]:
    return {f"{module}.lora_A.weight": torch.ones(2, 3), f"{module}.lora_B.weight": torch.ones(3, 2)}


def test_pickles_are_refused_by_name_and_by_content(tmp_path: Path) -> None:
    for suffix in (".pt", ".bin", ".ckpt", ".PTH"):
        refuse(tmp_path / f"a{suffix}", "pickle")  # refused before it is opened: the file does not even exist
    torch.save(twins(), tmp_path / "zip.safetensors")
    (tmp_path / "raw.safetensors").write_bytes(pickle.dumps(twins()))
    refuse(tmp_path / "zip.safetensors", "pickle")
    refuse(tmp_path / "raw.safetensors", "pickle")


@pytest.mark.parametrize("length", [640, 896, 1152])
def test_a_header_length_that_looks_like_a_pickle_is_read(file: Path, length: int) -> None:
    data = safetensors.torch.save(twins())
    old = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + old].rstrip()
    file.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + data[8 + old :])
    assert set(read_adapter(file)[0]) == {"m"}


def test_files_that_are_not_safetensors(tmp_path: Path) -> None:
    contents = {
        "empty": b"", "short": b"\x01\x02", "text": b"this is not a model at all",
        "huge": (2**40).to_bytes(8, "little") + b"{}",
        "json": (8).to_bytes(8, "little") + b"not json", "list": (2).to_bytes(8, "little") + b"[]",
        "flat": (8).to_bytes(8, "little") + b'{"a": 1}', "binary": (4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc",
        "deep": (200_000).to_bytes(8, "little") + b'{"a":' * 40_000,
        "meta": (26).to_bytes(8, "little") + b'{"__metadata__": {"a": 1}}',
    }  # fmt: skip
    for name, content in contents.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        refuse(path, "not a safetensors file")
    refuse(tmp_path / "missing.safetensors", "cannot be read")
    refuse(tmp_path, "cannot be read")


def test_a_cut_file_is_refused(file: Path) -> None:
    write(file)
    data = file.read_bytes()
    for length in (4, 30, len(data) - 1, len(data) // 2):
        file.write_bytes(data[:length])
        refuse(file, "not a safetensors file")


def test_a_header_that_lies_about_shapes_is_refused(file: Path) -> None:
    write(file)
    data = file.read_bytes()
    cases = ((b"[5,4]", b"[9,4]", "not a safetensors"), (b"[5,4]", b'"abc"', "one layer"), (b'"F32"', b'"F99"', "dtype F99"))
    for old, new, match in cases:
        assert old in data
        file.write_bytes(data.replace(old, new, 1))
        refuse(file, match)


def test_files_that_hold_something_else(file: Path) -> None:
    refuse(save(file, {"conv.weight": torch.ones(2)}), "no LoRA layers")
    refuse(save(file, {}), "no LoRA layers in it .it is empty")
    refuse(save(file, {"lora_unet_m.lora_down.weight": torch.ones(2, 3)}), "kohya")
    refuse(save(file, {**twins(), "unet.m.alpha": torch.tensor(1.0)}), "`unet.m.alpha`")
    refuse(save(file, {**twins(), **twins("text_encoder.m")}), "text_encoder, unet")
    refuse(save(file, twins()), "expected transformer", prefix="transformer")
    refuse(save(file, {key: tensor.to(torch.int32) for key, tensor in twins().items()}), "dtype I32")


def test_incomplete_and_broken_layers(file: Path) -> None:
    good = twins()
    for key in good:
        refuse(save(file, {k: v for k, v in good.items() if k != key}), "`m` has no lora_")
    refuse(save(file, {**good, "unet.m.lora_B.weight": torch.ones(3, 5)}), "rank 2, lora_B rank 5")
    refuse(save(file, {**good, "unet.m.lora_B.weight": torch.ones(3, 2, 1, 1)}), "one layer")
    refuse(save(file, {**good, "unet.m.lora_B.weight": torch.ones(0, 2)}), "empty")
    refuse(save(file, {**good, "unet.m.lora_B.weight": torch.full((3, 2), float("nan"))}), "not finite")


def test_alpha_in_the_metadata_is_refused_unless_it_is_the_rank(file: Path) -> None:
    for values in ({"unet.r": 2, "unet.lora_alpha": 2}, {"unet.r": 2, "unet.lora_alpha": 2, "unet.alpha_pattern": {}}):
        assert read_adapter(save(file, twins(), {"lora_adapter_metadata": json.dumps(values)}))[0]
    for values in ({"unet.r": 2, "unet.lora_alpha": 1}, {"unet.r": 2, "unet.lora_alpha": 2, "unet.use_rslora": True}):
        refuse(save(file, twins(), {"lora_adapter_metadata": json.dumps(values)}), "alpha is not the rank")
    refuse(save(file, twins(), {"lora_adapter_metadata": "{"}), "not JSON")


def test_what_is_read_has_memory_of_its_own(file: Path) -> None:
    write(file)
    state, _ = read_adapter(file)
    state["conv_in"]["lora_A"].add_(1)
    assert torch.equal(read_adapter(file)[0]["conv_in"]["lora_A"], adapter()["conv_in"]["lora_A"])
    assert all(t.data_ptr() % 64 == 0 for factors in state.values() for t in factors.values())

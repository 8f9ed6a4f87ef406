"""Encoders out of memory: how much that is, and that nothing else changes by it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import Embedding, Linear, Module, Parameter

from slider_hooks import Components
from slider_plugin import run
from slider_plugin.configfile import read_config
from slider_plugin.errors import UserError
from slider_plugin.parts import other_models, other_parts
from slider_plugin.registry import Plugins
from slider_plugin.testing.subject import Subject
from slider_plugin.training.parking import Parked

Project = Callable[..., Path]
CPU = torch.device("cpu")
FAMILIES = Plugins.discover().families()


class Encoder(Module):
    """A parameter that is tied, one that shares another's memory, one in another memory layout, a buffer, nothing learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = Embedding(7, 4)
        self.tied = Embedding(7, 4)
        self.tied.weight = self.shared.weight
        self.view = Parameter(self.shared.weight.data, requires_grad=False)
        self.turned = Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
        self.narrow = Parameter(torch.randn(5).bfloat16())
        self.nothing = Parameter(torch.empty(0, 3))
        self.register_buffer("positions", torch.arange(5))
        self.register_parameter("absent", None)


def components_of(**parts: Any) -> Components:
    denoiser = Linear(4, 4).requires_grad_(False)
    for part in parts.values():
        if isinstance(part, Module):
            part.requires_grad_(False)
    pipeline = SimpleNamespace(components={"transformer": denoiser, "tokenizer": object(), "scheduler": None, **parts})
    return Components(denoiser=denoiser, pipeline=pipeline, scheduler=None, prediction="flow")


def live_bytes(*models: Module) -> int:
    """Of the parameters' storages on real devices, each counted once."""
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters() if not p.is_meta
    }
    return sum(storages.values())


def test_parameters_leave_and_come_back_as_they_were(tmp_path: Path) -> None:
    encoder, vae = Encoder(), Linear(3, 3)
    components = components_of(text_encoder=encoder, vae=vae)
    encoder.view.note = "kept"  # type: ignore[attr-defined]
    before = {name: (p.clone(), p.stride()) for name, p in encoder.named_parameters(remove_duplicate=False)}
    parked = Parked(components, CPU, tmp_path)
    assert parked.names == ("text_encoder", "vae")
    assert parked.size == 4 * (7 * 4 + 2 * 3 * 16 + 9 + 3) + 2 * 5
    for _ in range(2):
        assert live_bytes(encoder, vae) == 0 and live_bytes(components.denoiser) > 0
        assert encoder.positions.tolist() == [0, 1, 2, 3, 4]
        assert encoder.tied.weight is encoder.shared.weight
        with parked.awake():
            for name, p in encoder.named_parameters(remove_duplicate=False):
                values, stride = before[name]
                assert torch.equal(p, values) and p.stride() == stride and p.dtype == values.dtype, name
                assert not p.requires_grad
            assert encoder.tied.weight is encoder.shared.weight
            assert encoder.view is not encoder.shared.weight
            assert encoder.view.data_ptr() == encoder.shared.weight.data_ptr()
            assert encoder.view.note == "kept"  # type: ignore[attr-defined]
    assert not list(tmp_path.iterdir())  # the file has no name, so a killed run leaves nothing


def test_they_come_back_to_the_disk_after_an_error(tmp_path: Path) -> None:
    encoder = Encoder()
    parked = Parked(components_of(text_encoder=encoder), CPU, tmp_path)
    with pytest.raises(ValueError), parked.awake():
        raise ValueError
    assert live_bytes(encoder) == 0


def test_what_is_never_needed_again_is_dropped(tmp_path: Path) -> None:
    encoder = Encoder()
    parked = Parked(components_of(text_encoder=encoder), CPU, None)
    assert live_bytes(encoder) == 0
    with pytest.raises(AssertionError), parked.awake():
        pass


def test_what_training_needs_stays(tmp_path: Path) -> None:
    """What holds a weight of the denoiser, of `extras`, or one that is trained; and what is not made of plain parameters."""
    encoder, connector, trained, moved = Encoder(), Linear(2, 2), Linear(2, 2), Linear(2, 2)
    components = components_of(text_encoder=encoder, connector=connector, trained=trained, moved=moved)
    trained.requires_grad_(True)
    moved._hf_hook = object()  # type: ignore[assignment]
    around = torch.nn.ModuleList([components.denoiser, Linear(2, 2)])
    components.pipeline.components["around"] = around
    components.extras["connector"] = connector
    assert list(other_models(components)) == ["text_encoder", "moved"]
    assert "transformer" not in other_parts(components)
    assert Parked(components, CPU, tmp_path).names == ("text_encoder",)
    assert live_bytes(connector, trained, moved, around) > 0


def test_large_parts_are_written_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slider_plugin.training.parking.CHUNK_BYTES", 100)
    encoder = Encoder()
    before = [p.clone() for p in encoder.parameters()]
    parked = Parked(components_of(text_encoder=encoder), CPU, tmp_path)
    with parked.awake():
        assert all(torch.equal(*pair) for pair in zip(encoder.parameters(), before, strict=True))


def test_no_room_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("slider_plugin.training.parking.save_file", full)
    with pytest.raises(UserError, match=r"output_dir: .* no room for the encoders.*No space left"):
        Parked(components_of(text_encoder=Encoder()), CPU, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_accelerator_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none here: what counts is that each part is told where to go."""
    places: list[tuple[str, str]] = []
    vae = Linear(2, 2)
    monkeypatch.setattr(vae, "to", lambda device: places.append(("vae", str(device))))
    components = components_of(vae=vae)
    components.pipeline.to = lambda device: places.append(("pipeline", str(device)))
    parked = Parked(components, torch.device("mps"), Path())
    assert places == [("vae", "cpu")]
    with parked.awake():
        assert places[1:] == [("pipeline", "mps"), ("vae", "mps")]
    assert places[3:] == [("vae", "cpu")]


# --- Runs -------------------------------------------------------------------------------------------------------------


def train(config: Path, *flags: str) -> run.Outcome:
    return run.train(read_config(config, flags, Plugins.discover().facts)[0])


DRAWING = {
    "validation_prompt": "a red circle",
    "validation_num_inference_steps": 2,
    "validation_strengths": [-1, 0, 1],
    "validation_step_interval": 2,
}


@pytest.mark.parametrize("family", ["sd1", "z_image"])
def test_parking_changes_no_pixel_and_no_weight(
    project: Project, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a validation in the middle of the run and one at its end."""
    config = project(family, **DRAWING)
    gone: list[int] = []
    park = Parked._park

    def counting(self: Parked) -> None:
        park(self)
        gone.append(live_bytes(*self._models.values()))

    monkeypatch.setattr(Parked, "_park", counting)
    parked = train(config, "--output_dir", str(tmp_path / "parked"))
    assert gone == [0, 0, 0]
    monkeypatch.setattr(Parked, "_park", lambda self: None)
    monkeypatch.setattr(Parked, "_wake", lambda self: None)
    plain = train(config, "--output_dir", str(tmp_path / "plain"))
    assert parked.adapter and plain.adapter and parked.adapter.read_bytes() == plain.adapter.read_bytes()
    images = [sorted((tmp_path / name).rglob("*.png")) for name in ("parked", "plain")]
    assert len(images[0]) == len(images[1]) >= 10
    for one, other in zip(*images, strict=True):
        assert one.name == other.name and one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_without_its_encoders(name: str, tiny_folders: Callable[[str], Path], tmp_path: Path) -> None:
    """`predict` needs nothing of a pipeline but its denoiser, and encoders that come back answer the same."""
    subject = Subject.load(Plugins.discover().load(name), tiny_folders(name))
    with torch.no_grad():
        latents = subject.latents()
        text = subject.conditioning()
        told = [{**one, **other} for one, other in zip(text, subject.told(latents), strict=True)]
        predict = partial(subject.family.predict, subject.components, latents, torch.full((1,), 0.5), told)
        before = predict()
        parked = Parked(subject.components, CPU, tmp_path)
        assert parked.names
        assert live_bytes(*other_models(subject.components).values()) == 0
        assert torch.equal(predict(), before)
        with parked.awake():
            again = subject.conditioning()
    for one, other in zip(text, again, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_memory_goes_back_to_the_system(tmp_path: Path) -> None:
    """400 MB of parameters, in a process of its own: its resident memory, in MB, before, parked, awake and parked again."""
    script = (
        "import json, sys, psutil, torch\n"
        "from pathlib import Path\n"
        "from types import SimpleNamespace\n"
        "from slider_hooks import Components\n"
        "from slider_plugin.training.parking import Parked\n"
        "rss = lambda: psutil.Process().memory_info().rss / 1e6\n"
        "denoiser = torch.nn.Linear(4, 4)\n"
        "encoder = torch.nn.Sequential(*(torch.nn.Linear(5000, 5000) for _ in range(4))).requires_grad_(False)\n"
        "pipeline = SimpleNamespace(components={'text_encoder': encoder})\n"
        "components = Components(denoiser=denoiser, pipeline=pipeline, scheduler=None, prediction='flow')\n"
        "seen = [rss()]\n"
        "parked = Parked(components, torch.device('cpu'), Path(sys.argv[1]))\n"
        "seen.append(rss())\n"
        "with parked.awake():\n"
        "    encoder(torch.ones(1, 5000)); seen.append(rss())\n"
        "seen.append(rss())\n"
        "print(json.dumps(seen))\n"
    )
    pytest.importorskip("psutil")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    before, parked, awake, again = json.loads(done.stdout)
    print("resident MB before, parked, awake, parked:", [round(mb) for mb in (before, parked, awake, again)])
    assert before - parked > 300 and awake - parked > 300 and awake - again > 300

"""The cache of latents and embeddings: what is encoded again and what is not, and that the disk changes no bit of a result."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from slider_plugin import run, stages
from slider_plugin.adapters.attach import new_adapter
from slider_plugin.configfile import read_config
from slider_plugin.data import cache as cache_module
from slider_plugin.data.cache import Cache, Memory, cache_folder
from slider_plugin.data.digests import Digests
from slider_plugin.data.encode import Encoded
from slider_plugin.data.fingerprint import Opaque, fingerprint
from slider_plugin.errors import ConfigError, UserError
from slider_plugin.family import LoadedFamily
from slider_plugin.preflight import preflight
from slider_plugin.registry import Plugins
from slider_plugin.testing.subject import Subject

Project = Callable[..., Path]
CPU = torch.device("cpu")
FAMILIES = Plugins.discover().families()


class Calls:
    """How many images and prompts went through the family's hooks."""

    def __init__(self) -> None:
        self.images = self.prompts = 0

    def take(self) -> tuple[int, int]:
        """Images and prompts since the last time."""
        counted = (self.images, self.prompts)
        self.images = self.prompts = 0
        return counted


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    counted = Calls()
    images, prompts = LoadedFamily.encode_images, LoadedFamily.encode_prompts

    def encode_images(self: LoadedFamily, components: Any, given: torch.Tensor) -> torch.Tensor:
        counted.images += len(given)
        return images(self, components, given)

    def encode_prompts(self: LoadedFamily, components: Any, given: Any) -> Any:
        counted.prompts += len(given)
        return prompts(self, components, given)

    monkeypatch.setattr(LoadedFamily, "encode_images", encode_images)
    monkeypatch.setattr(LoadedFamily, "encode_prompts", encode_prompts)
    return counted


def encode(config: Path, *flags: str, change: Callable[[Any], None] = lambda components: None) -> Encoded:
    """What a run encodes; `change` may alter the loaded model first."""
    parsed = read_config(config, flags, Plugins.discover().facts)[0]
    family = Plugins.discover().load(parsed.model_family)
    checked = preflight(parsed, family)
    machine = stages.open_machine(parsed)
    components = stages.load(parsed, family, checked, machine)
    change(components)
    return stages.encode(parsed, family, components, checked, machine)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob(".slider-cache/*/*.safetensors"))


def test_a_second_start_encodes_nothing(
    project: Project, calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = project("sd1", neutral=True)
    cold = encode(config)
    assert calls.take() == (10, 4)
    assert "10 images: 0 from the cache, 10 encoded; 4 captions: 0 from the cache, 4 encoded" in capsys.readouterr().err
    warm = encode(config, "--output_dir", str(tmp_path / "another"))
    assert calls.take() == (0, 0)
    assert "10 images: 10 from the cache, 0 encoded; 4 captions: 4 from the cache" in capsys.readouterr().err
    assert (warm.fresh_images, warm.fresh_prompts) == (0, 0)
    for key in cold.latents:
        assert torch.equal(cold.latents[key], warm.latents[key])
    assert not [path for path in (tmp_path / "data").rglob("*") if path.suffix not in (".png", ".txt") and path.is_file()]


@pytest.mark.parametrize("family", ["sd1", "z_image", "wan"])
def test_values_come_back_bit_for_bit(project: Project, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a run whose encodings never leave memory."""
    config = project(family)
    encode(config)
    cached = encode(config)

    def hidden(*_: Any) -> str:
        raise Opaque("all of it")

    monkeypatch.setattr(stages.data, "fingerprint", hidden)
    kept = encode(config)
    assert kept.fresh_images == 8 and cached.fresh_images == 0
    for key in kept.latents:
        assert torch.equal(kept.latents[key], cached.latents[key])
        _same(kept.conditions[key], cached.conditions[key])
    for caption in kept.prompts:
        _same(kept.prompts[caption], cached.prompts[caption])


def _same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


def test_cold_warm_and_uncached_runs_end_in_the_same_weights(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = project("sd1", neutral=True)

    def train(name: str) -> bytes:
        parsed = read_config(config, ["--output_dir", str(tmp_path / name)], Plugins.discover().facts)[0]
        adapter = run.train(parsed).adapter
        assert adapter
        return adapter.read_bytes()

    cold, warm = train("cold"), train("warm")
    monkeypatch.setattr(stages.data, "Cache", lambda *_: Memory())
    assert cold == warm == train("uncached")


def test_only_what_changed_is_encoded_again(project: Project, calls: Calls, tmp_path: Path) -> None:
    config = project("sd1")
    encode(config)
    assert calls.take() == (8, 4)

    # An image of the same name, size in bytes and time.
    path = tmp_path / "data" / "more" / "1.png"
    before = path.stat()
    Image.new("RGB", (40, 40), (1, 2, 3)).save(path)
    path.write_bytes(path.read_bytes().ljust(before.st_size, b"\0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    encode(config)
    assert calls.take() == (1, 0)

    (tmp_path / "data" / "less" / "2.txt").write_text("another caption\n")
    encode(config)
    assert calls.take() == (0, 1)

    shutil.move(tmp_path / "data" / "less" / "3.png", tmp_path / "data" / "less" / "9.png")  # the same image elsewhere
    shutil.move(tmp_path / "data" / "less" / "3.txt", tmp_path / "data" / "less" / "9.txt")
    encode(config)
    assert calls.take() == (0, 0)

    encode(config, "--resolution", "48")
    assert calls.take() == (8, 0)
    encode(config)
    assert calls.take() == (0, 0)


def test_another_crop_is_encoded_again(
    project: Project, calls: Calls, tmp_path: Path, image_folder: Callable[..., Path]
) -> None:
    config = project("sd1")
    shutil.rmtree(tmp_path / "data" / "more")
    image_folder(tmp_path / "data" / "more", 4, 220, (80, 40))
    entries = json.loads((tmp_path / "buckets.json").read_text())

    def with_crop(style: str) -> None:
        entries[0] |= {"crop": True, "crop_style": style}
        (tmp_path / "buckets.json").write_text(json.dumps(entries))
        encode(config)

    with_crop("center")
    calls.take()
    with_crop("corner")
    assert calls.take() == (4, 0)
    with_crop("center")
    assert calls.take() == (0, 0)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_another_encoder_is_encoded_again(project: Project, calls: Calls, part: str) -> None:
    config = project("sd1")
    encode(config)
    calls.take()

    def tuned(components: Any) -> None:
        for parameter in getattr(components.pipeline, part).parameters():
            parameter.data *= 1.001

    encode(config, change=tuned)
    assert calls.take() == (8, 4)
    encode(config, change=tuned)
    assert calls.take() == (0, 0)


def test_one_image_in_two_buckets_is_encoded_once(project: Project, calls: Calls, tmp_path: Path) -> None:
    config = project("sd1")
    shutil.rmtree(tmp_path / "data" / "less")
    shutil.copytree(tmp_path / "data" / "more", tmp_path / "data" / "less")
    data = encode(config)
    assert calls.take() == (4, 4)
    assert len(data.latents) == 8


# --- What the fingerprint sees ----------------------------------------------------------------------------------------


def _changes() -> dict[str, Callable[[Any], None]]:
    def weights(components: Any) -> None:
        next(components.pipeline.text_encoder.parameters()).data += 1e-3

    def buffers(components: Any) -> None:
        components.pipeline.vae.register_buffer("statistics", torch.ones(3))

    def settings(components: Any) -> None:
        components.pipeline.vae.register_to_config(scaling_factor=0.123)

    def precision(components: Any) -> None:
        components.pipeline.vae.to(torch.bfloat16)

    def tokens(components: Any) -> None:
        components.pipeline.tokenizer.add_tokens(["zebra"])

    def options(components: Any) -> None:
        components.options = {"language": "en"}

    def extras(components: Any) -> None:
        components.extras["silence"] = torch.ones(3)

    return {f.__name__: f for f in (weights, buffers, settings, precision, tokens, options, extras)}


@pytest.mark.parametrize("what", list(_changes()))
def test_the_fingerprint_changes(load: Callable[[str], tuple[Any, Any]], what: str) -> None:
    family, components = load("sd1")
    before = fingerprint(family, components, CPU)
    _changes()[what](components)
    assert fingerprint(family, components, CPU) != before


def test_the_fingerprint_stays(
    load: Callable[[str], tuple[Any, Any]], tiny_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """After encoding, for the same files elsewhere, for another denoiser, with an adapter in it."""
    from slider_hooks import LoadRequest

    family, components = load("sd1")
    before = fingerprint(family, components, CPU)
    family.encode_prompts(components, ["a cat", "a"])
    family.encode_images(components, torch.zeros(1, 3, 32, 32))
    assert fingerprint(family, components, CPU) == before
    shutil.copytree(tiny_folders("sd1"), tmp_path / "elsewhere")
    again = Plugins.discover().load("sd1")
    moved = again.load_components(LoadRequest(model=str(tmp_path / "elsewhere"), dtype=torch.float32))
    for parameter in moved.denoiser.parameters():
        parameter.data += 1
    assert fingerprint(again, moved, CPU) == before


QUICK = ("ace_step", "anima", "kolors", "omnigen", "sd3")
"""Modular, with lyrics, with a tokenizer of its own, with a processor, with three encoders."""


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES])
def test_every_family_can_be_cached(tiny_folders: Callable[[str], Path], name: str) -> None:
    """Its pipeline can be looked into, and neither encoding nor loading it again makes another one of it."""
    first, again = (Subject.load(Plugins.discover().load(name), tiny_folders(name)) for _ in range(2))
    before = fingerprint(first.family, first.components, CPU)
    first.conditioning(["a cat", "a"])
    assert fingerprint(first.family, first.components, CPU) == before
    assert fingerprint(again.family, again.components, CPU) == before


def test_the_fingerprint_sees_code_and_versions(
    load: Callable[[str], tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    family, components = load("sd1")
    before = fingerprint(family, components, CPU)
    makers = LoadedFamily.makers
    monkeypatch.setattr(LoadedFamily, "makers", lambda self, hooks: makers(self, hooks) | {"more": []})
    assert fingerprint(family, components, CPU) != before
    monkeypatch.undo()
    family.version = "0.0.0"
    assert fingerprint(family, components, CPU) == before  # what counts is the version of whoever owns the hook
    assert fingerprint(family, components, torch.device("cuda")) != before


def test_makers_name_the_code(load: Callable[[str], tuple[Any, Any]]) -> None:
    family, _ = load("z_image")
    (default, own) = family.makers(["encode_prompts"])["encode_prompts"]
    assert default[0] == "default" and own[:2] == ["family", "slider-plugin"]
    assert default[3] != own[3] and len(own[3]) == 64


def test_what_cannot_be_seen_is_not_cached(
    project: Project, calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = project("sd1")

    def hide(components: Any) -> None:
        components.extras["secret"] = iter(())

    for _ in range(2):
        data = encode(config, change=hide)
        assert calls.take() == (8, 4)
        assert len(data.batch(next(iter(stages_sampler(config, data)))).files) == 2
    assert "nothing can be told of what encodes: extras.secret" in capsys.readouterr().err
    assert not shards(tmp_path)


def stages_sampler(config: Path, data: Encoded) -> Iterator[Any]:
    return iter(Plugins.discover().load("sd1").build_sampler(data.infos(), 1))


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "replaced"])
def test_a_damaged_shard_is_encoded_again(
    project: Project, calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    config = project("sd1")
    whole = {key: latents.clone() for key, latents in encode(config).latents.items()}
    calls.take()
    (path,) = shards(tmp_path)
    data = bytearray(path.read_bytes())
    path.unlink()  # which leaves what is mapped alone
    if damage == "flipped":
        data[-100] ^= 1
    path.write_bytes({"cut": data[:-10], "empty": b"", "flipped": data, "replaced": b"\x08" + b"\0" * 7 + b"{}      "}[damage])
    again = encode(config)
    assert calls.take() == (8, 4)
    assert f"{path} is damaged" in capsys.readouterr().err
    assert all(torch.equal(again.latents[key], whole[key]) for key in whole)
    encode(config)
    assert calls.take() == (0, 0)
    assert "is damaged" not in capsys.readouterr().err


def entry(value: float) -> dict[str, torch.Tensor]:
    return {"latents": torch.full((2, 3), value), "mask": torch.tensor([True, False]), "one": torch.tensor(value).bfloat16()}


def opened(folder: Path) -> Cache:
    return Cache(folder, "f" * 40, Digests(folder / "digests.json"))


def test_entries_of_any_kind(tmp_path: Path) -> None:
    wanted = {
        "a": entry(1.5),
        "nothing": {},
        "empty": {"x": torch.empty(0, 4)},
        "turned": {"x/y": torch.arange(6.0).reshape(2, 3).T},
        "whole": {"ids": torch.arange(5), "half": torch.ones(3, dtype=torch.float16)},
    }
    first = opened(tmp_path)
    first.add(wanted)
    assert "a" in first
    first.finish()
    for store in (first, opened(tmp_path)):
        for key, tensors in wanted.items():
            assert key in store
            _same(tensors, {name: store.tensor(key, name) for name in store.names(key)})
    assert "b" not in first


def test_what_was_written_before_a_kill_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "SHARD_BYTES", 1)
    killed = opened(tmp_path)
    killed.add({"a": entry(1)})
    (tmp_path / ("f" * 40) / ".tmp-0123.safetensors").write_bytes(b"half")  # what a kill leaves
    assert "a" in opened(tmp_path)


def test_a_killed_process_is_gone_on_with(project: Project, tmp_path: Path, calls: Calls) -> None:
    """Kill -9 in the middle of encoding: nothing that was written is encoded again, and no bit differs."""
    config = project("sd1", neutral=True)
    script = (
        "import os, sys\n"
        "from slider_plugin.data import cache, wanted\n"
        "from slider_plugin.family import LoadedFamily\n"
        "cache.SHARD_BYTES, wanted.AT_ONCE['image'] = 1, 2\n"
        "images, done = LoadedFamily.encode_images, []\n"
        "def counted(self, components, given):\n"
        "    if len(done) == 2: os.kill(os.getpid(), 9)\n"
        "    done.append(1)\n"
        "    return images(self, components, given)\n"
        "LoadedFamily.encode_images = counted\n"
        "from slider_plugin.cli import execute\n"
        f"execute(['train', {str(config)!r}])\n"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == -9
    encode(config)
    assert calls.take() == (10 - 4, 4)


def test_an_interrupt_keeps_what_is_encoded(project: Project, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    config = project("sd1")

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LoadedFamily, "encode_prompts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            encode(config)
    calls.take()
    encode(config)
    assert calls.take() == (0, 4)


def test_two_processes_fill_one_cache(tmp_path: Path) -> None:
    """Half of what they add is the same, in other batches; whoever comes later, everything is there and whole."""
    script = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from slider_plugin.data import cache\n"
        "from slider_plugin.data.digests import Digests\n"
        "folder, first = Path(sys.argv[1]), int(sys.argv[2])\n"
        "cache.SHARD_BYTES = 1\n"
        "store = cache.Cache(folder, 'f' * 40, Digests(folder / 'digests.json'))\n"
        "for i in range(first, first + 100, 2):\n"
        "    store.add({str(k): {'latents': torch.full((4, 4), float(k))} for k in (i, i + 1)})\n"
        "store.finish()\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path), first]) for first in ("0", "49")]
    assert [process.wait() for process in both] == [0, 0]
    store = opened(tmp_path)
    assert all(torch.equal(store.tensor(str(k), "latents"), torch.full((4, 4), float(k))) for k in range(149))


def test_what_another_process_writes_meanwhile_is_taken_in(tmp_path: Path) -> None:
    mine, other = opened(tmp_path), opened(tmp_path)
    other.add({"a": entry(2)})
    other.finish()
    assert "a" not in mine
    mine.refresh()
    assert torch.equal(mine.tensor("a", "latents"), torch.full((2, 3), 2.0))


def test_the_same_batch_twice_is_one_shard(tmp_path: Path) -> None:
    for store in (opened(tmp_path), opened(tmp_path)):
        store._entries.clear()
        store.add({"a": entry(1), "b": entry(2)})
        store.finish()
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 1


def test_reading_copies_nothing(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.add({"a": entry(1)})
    store.finish()
    assert store.tensor("a", "latents").data_ptr() == store.tensor("a", "latents").data_ptr()


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(tmp_path)
    store.add({"a": entry(1)})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "write_atomic", full)
    with pytest.raises(UserError, match=r"cache_dir: .* cannot be used \(No space left on device\)"):
        store.finish()


# --- Digests ----------------------------------------------------------------------------------------------------------


def old(path: Path, content: bytes) -> Path:
    """A file that seems to have been there for a while."""
    path.write_bytes(content)
    return path


def test_files_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slider_plugin.data.digests.SETTLED_NS", -1)
    path, index = old(tmp_path / "x", b"abc"), tmp_path / "digests.json"
    first = Digests(index)
    digest = first.of(path)
    first.save()
    opened_files: list[Path] = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: (opened_files.append(self), real(self, *a, **k))[1])
    assert Digests(index).of(path) == digest
    assert path not in opened_files
    path.write_bytes(b"abd")
    assert Digests(index).of(path) != digest


def test_a_file_that_has_just_changed_is_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slider_plugin.data.digests.SETTLED_NS", 10**18)
    path, index = tmp_path / "x", tmp_path / "digests.json"
    path.write_bytes(b"abc")
    digests = Digests(index)
    digests.of(path)
    digests.save()
    assert not index.exists()


def test_two_processes_keep_each_other_s_digests(tmp_path: Path) -> None:
    index, paths = tmp_path / "digests.json", [tmp_path / name for name in "abc"]
    one, other = Digests(index), Digests(index)
    for digests, path in zip((one, other, other), paths, strict=True):
        path.write_bytes(path.name.encode())
        digests.note(path, "0" * 64)
    one.save()
    other.save()
    assert set(json.loads(index.read_text())["files"]) == {str(path) for path in paths}
    paths[0].unlink()
    third = Digests(index)
    third.note(paths[1], "1" * 64)
    third.save()
    assert set(json.loads(index.read_text())["files"]) == {str(path) for path in paths[1:]}


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1, "files": {"a": 5}}', '{"format": 1}'])
def test_a_damaged_index_is_made_anew(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    index, path = tmp_path / "digests.json", tmp_path / "x"
    index.write_text(text)
    path.write_bytes(b"abc")
    assert Digests(index).of(path).startswith("ba7816bf")
    assert "is damaged" in capsys.readouterr().err


def test_a_folder_of_frames_is_its_frames_in_order(tmp_path: Path) -> None:
    for name, light in (("a.png", 10), ("b.png", 20)):
        Image.new("L", (8, 8), light).save(tmp_path / name)
    digests = Digests(tmp_path / "digests.json")
    before = digests.of(tmp_path)
    (tmp_path / "notes.txt").write_text("no frame")
    assert digests.of(tmp_path) == before
    (tmp_path / "a.png").rename(tmp_path / "c.png")
    assert digests.of(tmp_path) != before


# --- Where the cache is -----------------------------------------------------------------------------------------------


def test_the_default_folder_is_shared_by_runs_side_by_side(project: Project, tmp_path: Path) -> None:
    def folder(*flags: str) -> Path:
        return cache_folder(read_config(project_file, flags, Plugins.discover().facts)[0])

    project_file = project("sd1")
    assert folder() == folder("--output_dir", str(tmp_path / "b")) == tmp_path / ".slider-cache"
    assert folder("--cache_dir", "elsewhere") == Path.cwd() / "elsewhere"


def test_a_cache_inside_an_image_folder_is_refused(project: Project, tmp_path: Path) -> None:
    config = project("sd1", cache_dir=str(tmp_path / "data" / "more" / "cache"))
    with pytest.raises(ConfigError, match=r"cache_dir: .* is inside .*more, the images of bucket 'more'"):
        encode(config)
    assert not (tmp_path / "data" / "more" / "cache").exists()


def test_a_cache_that_cannot_be_written_is_refused(project: Project, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cache_dir: cannot write to"):
        encode(project("sd1", cache_dir=str(tmp_path / "file" / "cache")))


def test_an_adapter_does_not_change_what_is_cached(project: Project, calls: Calls) -> None:
    """A run encodes with the adapter in place, and another run with another adapter finds the same."""
    config = project("sd1")
    encode(config)
    calls.take()
    parsed = read_config(config, ("--lora_rank", "2"), Plugins.discover().facts)[0]
    family = Plugins.discover().load("sd1")
    checked, machine = preflight(parsed, family), stages.open_machine(parsed)
    components = stages.load(parsed, family, checked, machine)
    new_adapter(parsed, family, components, stages.find_targets(parsed, family, checked, components))
    stages.encode(parsed, family, components, checked, machine)
    assert calls.take() == (0, 0)

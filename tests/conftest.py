"""Shared fixtures: tiny pipelines of the built-in families, image folders, and a registry that sees our own plugins alone."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may reach for a hub
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # known answers are those of the processor
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from threads, and files of tests run side by side


@pytest.fixture(autouse=True)
def _only_own_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may depend on what else is installed."""
    monkeypatch.setenv("SLIDER_PLUGIN_ALLOW", "slider-plugin")
    monkeypatch.setenv("SLIDER_PLUGIN_EXTRA", "")


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a family's tiny random pipeline, built once."""
    root = tmp_path_factory.mktemp("tiny")

    def build(name: str) -> Path:
        from slider_plugin.registry import Plugins
        from slider_plugin.testing.subject import write_tiny

        return write_tiny(Plugins.discover().facts(name), root / name)

    return build


@pytest.fixture(scope="session")
def tiny_image_to_video(tiny_folders: Callable[[str], Path]) -> Callable[[bool], Path]:
    """Folder of a tiny Wan that begins with an image, which Wan 2.1 sees through CLIP as well, and Wan 2.2 does not."""

    def build(clip: bool) -> Path:
        from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
        from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

        from slider_plugin.testing.tiny import redraw_zeros, seeded

        text = WanPipeline.from_pretrained(tiny_folders("wan"))
        folder = tiny_folders("wan").parent / f"wan_i2v_{'clip' if clip else 'plain'}"
        if folder.exists():
            return folder
        with seeded(0):
            sight = CLIPVisionConfig(
                hidden_size=20, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
            )
            transformer = WanTransformer3DModel(
                num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=32, ffn_dim=48, num_layers=2,
                in_channels=36, rope_max_seq_len=32, image_dim=20 if clip else None, added_kv_proj_dim=24 if clip else None,
            )  # fmt: skip
            WanImageToVideoPipeline(
                vae=text.vae, text_encoder=text.text_encoder, tokenizer=text.tokenizer, scheduler=text.scheduler,
                transformer=redraw_zeros(transformer), image_encoder=CLIPVisionModel(sight) if clip else None,
                image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28) if clip else None,
            ).save_pretrained(folder)  # fmt: skip
        return folder

    return build


@pytest.fixture
def load(tiny_folders: Callable[[str], Path]) -> Callable[[str], tuple[Any, Any]]:
    """`(family, components)` of a tiny pipeline, loaded anew."""

    def load_one(name: str) -> tuple[Any, Any]:
        import torch

        from slider_hooks import LoadRequest
        from slider_plugin.registry import Plugins

        family = Plugins.discover().load(name)
        return family, family.load_components(LoadRequest(model=str(tiny_folders(name)), dtype=torch.float32))

    return load_one


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(tmp_path))
    from site_packages import Site

    before = set(sys.modules)
    yield Site(tmp_path)
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def draw_images(folder: Path, count: int, light: int, size: tuple[int, int] = (40, 40)) -> Path:
    """Plain images with captions; `light` 0..255 sets them apart."""
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True)
    for number in range(count):
        image = Image.new("RGB", size, (light, light // 2, 40 + 10 * number))
        ImageDraw.Draw(image).rectangle((5, 5, 10 + 2 * number, 20), fill=(255 - light, 200, 30))
        image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a photo of a circle {number}\n")
    return folder


@pytest.fixture
def image_folder() -> Callable[..., Path]:
    """`draw_images`, for tests in other files."""
    return draw_images


def place(project: Path, site: Path) -> None:
    """What `pip install project` leaves in a site folder: its modules, and metadata with its entry points."""
    facts = tomllib.loads((project / "pyproject.toml").read_text())
    wheel, about = facts["tool"]["hatch"]["build"]["targets"]["wheel"], facts["project"]
    for name in (*wheel.get("packages", ()), *wheel.get("only-include", ())):
        source = project / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, site / name)
    info = site / f"{about['name'].replace('-', '_')}-{about['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n")
    groups = about["entry-points"].items()
    lines = [line for group, points in groups for line in (f"[{group}]", *(f"{k} = {v}" for k, v in points.items()))]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def place_package() -> Callable[[Path, Path], None]:
    """`place`, for tests in other files."""
    return place


@pytest.fixture
def project(tmp_path: Path, tiny_folders: Callable[[str], Path]) -> Callable[..., Path]:
    """Write a small training project; returns its config.json. Keyword arguments are keys of it."""

    def write(family: str = "sd1", neutral: bool = False, **keys: Any) -> Path:
        more = draw_images(tmp_path / "data" / "more", 4, 220)
        less = draw_images(tmp_path / "data" / "less", 4, 40)
        entries = [
            {"id": "more", "instance_data_dir": str(more), "slider_strength": 0.5},
            {"id": "less", "instance_data_dir": str(less), "slider_strength": -0.5},
        ]
        if neutral:
            plain = draw_images(tmp_path / "data" / "plain", 2, 120)
            entries.append({"id": "plain", "instance_data_dir": str(plain), "slider_strength": 0})
        (tmp_path / "buckets.json").write_text(json.dumps(entries))
        config = {
            "model_family": family,
            "pretrained_model_name_or_path": str(tiny_folders(family)),
            "data_backend_config": "buckets.json",
            "output_dir": str(tmp_path / "out"),
            "slider_lora_target": True,
            "lora_rank": 4,
            "resolution": 32,
            "train_batch_size": 2,
            "max_train_steps": 4,
            "learning_rate": 1e-3,
            "mixed_precision": "no",
            "seed": 1,
        }
        (tmp_path / "config.json").write_text(json.dumps(config | keys))
        return tmp_path / "config.json"

    return write

"""A model of another family, or one that the family cannot train: one clear line, or it simply works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slider_hooks import LoadRequest
from slider_plugin.errors import UserError
from slider_plugin.loading import check_folder
from slider_plugin.registry import Plugins
from slider_plugin.targets_cmd import target_facts

Folders = Callable[[str], Path]


def changed(source: Path, to: Path, component: str, **values: Any) -> Path:
    """A copy of a pipeline folder whose component has another configuration; weights are not needed to be refused."""
    shutil.copytree(source, to)
    path = to / component / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return to


def refused(family: str, folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        check_folder(Plugins.discover().facts(family), folder)
    text = str(caught.value)
    assert "\n" not in text and "model_family" in text
    return text


def test_an_sdxl_folder_given_to_sd1(tiny_folders: Folders) -> None:
    assert "addition_embed_type is 'text_time'" in refused("sd1", tiny_folders("sdxl"))


def test_an_sd1_folder_given_to_sdxl(tiny_folders: Folders) -> None:
    assert "addition_embed_type is None" in refused("sdxl", tiny_folders("sd1"))


def test_a_transformer_given_to_a_unet(tiny_folders: Folders) -> None:
    assert "has no unet/config.json" in refused("sd1", tiny_folders("flux"))


def test_another_transformer(tiny_folders: Folders) -> None:
    assert "its transformer is a FluxTransformer2DModel" in refused("sd3", tiny_folders("flux"))


def test_an_sdxl_refiner(tiny_folders: Folders, tmp_path: Path) -> None:
    """Its UNet has the embeddings of one text encoder, and five time ids: aesthetic score instead of target size."""
    refiner = changed(
        tiny_folders("sdxl"), tmp_path / "refiner", "unet", cross_attention_dim=1280, projection_class_embeddings_input_dim=2560
    )
    assert "unet/config.json" in refused("sdxl", refiner)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_an_inpainting_unet(tiny_folders: Folders, tmp_path: Path, family: str) -> None:
    assert "in_channels is 9" in refused(family, changed(tiny_folders(family), tmp_path / "inpaint", "unet", in_channels=9))


def test_a_wan_model_of_first_and_last_frame(tiny_folders: Folders, tmp_path: Path) -> None:
    both = changed(tiny_folders("wan"), tmp_path / "flf", "transformer", in_channels=36, pos_embed_seq_len=514)
    assert "pos_embed_seq_len is 514" in refused("wan", both)


@pytest.mark.parametrize(("family", "other"), [("cosmos1", "cosmos2"), ("cosmos2", "cosmos1")])
def test_the_other_cosmos(tiny_folders: Folders, family: str, other: str) -> None:
    assert "extra_pos_embed_type is" in refused(family, tiny_folders(other))


def flux(folder: Path, **options: Any) -> Any:
    family = Plugins.discover().load("flux")
    values = {option.name: option.default for option in family.facts.options} | options
    return family, family.load_components(LoadRequest(model=str(folder), dtype=torch.float32, options=values))


def test_flux_schnell_with_a_guidance(tmp_path: Path, tiny_folders: Folders) -> None:
    schnell = changed(tiny_folders("flux"), tmp_path / "schnell", "transformer", guidance_embeds=False)
    family, components = flux(schnell)  # as it is, it works: it is told no guidance
    latents = torch.zeros(1, 4, 8, 8)
    answer = family.predict(components, latents, torch.tensor([0.5]), family.encode_prompts(components, ["a"]))
    assert answer.shape == latents.shape
    with pytest.raises(UserError, match=r"flux_guidance_value: .* takes no guidance"):
        flux(schnell, flux_guidance_value=3.5)


def test_sd35_with_dual_attention_given_as_sd3() -> None:
    """Its second attention is one among image tokens, and is matched as such."""
    family = Plugins.discover().load("sd3")
    plain, dual = target_facts(family), target_facts(family, flavour="sd3.5-medium")
    assert dual.matched - plain.matched == 4 * 13 and dual.joint == 0 and not dual.forbidden_matched

"""Matched pairs: drawn together with one noise, in one order, and everything that does not match is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from trainers import assert_goes_on_to_the_same_weights, trainer_of

from slider_plugin.configfile import read_config
from slider_plugin.errors import ConfigError, UserError
from slider_plugin.preflight import preflight
from slider_plugin.registry import Plugins
from slider_plugin.training.seeds import generator

Project = Callable[..., Path]


def edit(tmp_path: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    entries = json.loads((tmp_path / "buckets.json").read_text())
    change(entries)
    (tmp_path / "buckets.json").write_text(json.dumps(entries))


@pytest.mark.parametrize("neutral", [False, True])
def test_a_positive_draw_is_followed_by_its_twin(project: Project, neutral: bool) -> None:
    trainer = trainer_of(project("sd1", neutral=neutral, slider_objective="pair"))
    draws = [next(trainer.sampler) for _ in range(24)]
    assert [draw.position for draw in draws] == list(range(24))
    length = 3 if neutral else 2
    seen = set()
    for one, other in zip(draws[::length], draws[1::length], strict=True):
        assert (one.bucket, one.scale, other.bucket, other.scale) == ("more", 0.5, "less", -0.5)
        own, twin = (trainer.data.batch(draw) for draw in (one, other))
        assert [path.stem for path in own.files] == [path.stem for path in twin.files]
        seen.update(path.stem for path in own.files)
    assert seen == {"0", "1", "2", "3"}
    if neutral:
        assert all(draw.neutral for draw in draws[2::3])


def test_the_loss_of_a_pair_is_that_of_concept_sliders(project: Project) -> None:
    """`||f_s(x_t, t) - e||^2` of the one and `||f_-s(y_t, t) - e||^2` of the other, at one t and one e."""
    trainer = trainer_of(project("sd1", slider_objective="pair"))
    with torch.no_grad():
        for name, parameter in trainer.adapter.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(3))
    one, other = (trainer.data.batch(next(trainer.sampler)) for _ in range(2))
    t = trainer.noise.draw_time(2, generator(1, "time", 0))
    e = torch.randn(one.clean_BCHW.shape, generator=generator(1, "noise", 0))
    alpha = trainer.components.scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    for batch in (one, other):
        x_t = alpha.sqrt() * batch.clean_BCHW + (1 - alpha).sqrt() * e
        with torch.no_grad(), trainer.adapter.scaled(batch.draw.scale):
            text = torch.stack([c["prompt_embeds"] for c in batch.conditioning])
            answer = trainer.components.denoiser(x_t, t, encoder_hidden_states=text).sample
            assert float(trainer.loss(batch)) == pytest.approx(float(((answer - e) ** 2).mean()), rel=1e-5)


def test_several_levels_of_strength(project: Project, tmp_path: Path) -> None:
    path = project("sd1", slider_objective="pair")
    for name in ("more", "less"):
        shutil.copytree(tmp_path / "data" / name, tmp_path / "data" / f"{name}2")
    more = [{"id": f"{n}2", "instance_data_dir": str(tmp_path / "data" / f"{n}2"), "slider_strength": s} for n, s in
            (("more", 2), ("less", -2))]  # fmt: skip
    edit(tmp_path, lambda entries: entries.extend(more))
    trainer = trainer_of(path)
    draws = [next(trainer.sampler) for _ in range(16)]
    pairs = {(a.bucket, a.scale, b.bucket, b.scale) for a, b in zip(draws[::2], draws[1::2], strict=True)}
    assert pairs == {("more", 0.5, "less", -0.5), ("more2", 2.0, "less2", -2.0)}


def test_a_run_that_stopped_goes_on_to_the_same_weights(project: Project, tmp_path: Path) -> None:
    path = project("sd1", neutral=True, slider_objective="pair", max_train_steps=5, checkpoint_step_interval=2)
    assert_goes_on_to_the_same_weights(path, tmp_path / "out")


def problems_of(path: Path) -> str:
    config = read_config(path)[0]
    with pytest.raises(ConfigError) as caught:
        preflight(config, Plugins.discover().load(config.model_family))
    return str(caught.value)


def test_what_does_not_match_is_told_at_once(project: Project, tmp_path: Path) -> None:
    path = project("sd1", slider_objective="pair")
    more, less = tmp_path / "data" / "more", tmp_path / "data" / "less"
    (less / "0.png").unlink()
    Image.new("RGB", (48, 40)).save(less / "1.png")
    shutil.copy(more / "2.png", less / "2.png")
    told = problems_of(path)
    assert f"bucket 'less': 0 has no twin in {less}" in told
    assert "1.png are 40x40 and 48x40: a pair has one size" in told
    assert "2.png are the same image" in told
    assert "3" not in [line.split()[-1] for line in told.splitlines()]


def test_one_picture_in_two_files_is_told_once_it_is_encoded(project: Project, tmp_path: Path) -> None:
    path = project("sd1", slider_objective="pair")
    with Image.open(tmp_path / "data" / "more" / "2.png") as image:
        image.save(tmp_path / "data" / "less" / "2.png", compress_level=0)
    with pytest.raises(UserError, match=r"more/2.png and .*less/2.png show the same image"):
        trainer_of(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"slider_strength": -1}, "bucket 'more' has no other side: none has slider_strength -0.5"),
        ({"slider_strength": 0.5}, "buckets 'more' and 'less' have one slider_strength"),
        ({"repeats": 1}, "repeats 0, and 1 in 'less'; both need the same"),
        ({"crop": True, "crop_style": "corner", "resolution": 24}, "are cropped differently"),
    ],
)
def test_buckets_that_do_not_match(project: Project, tmp_path: Path, change: dict[str, Any], told: str) -> None:
    path = project("sd1", slider_objective="pair")
    edit(tmp_path, lambda entries: entries[1].update(change))
    assert told in problems_of(path)


def test_neutral_buckets_alone(project: Project, tmp_path: Path) -> None:
    path = project("sd1", slider_objective="pair")
    edit(tmp_path, lambda entries: [entry.update(slider_strength=0) for entry in entries] and None)
    assert "slider_objective pair: every bucket is neutral" in problems_of(path)

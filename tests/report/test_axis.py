"""The axis between two groups of images, and what is measured along and beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slider_plugin.errors import UserError
from slider_plugin.report.axis import fit_axis
from slider_plugin.report.probe import Drawn, Request, curves_of
from slider_plugin.report.vectors import contrast, grid_of, pooled

GRID = (4, 4)
N = 3 * 16
AT = (-1.0, 0.0, 1.0)


def groups(distance: float, count: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two groups of unit noise that are `distance` apart along a direction, and that direction."""
    rng = np.random.default_rng(seed)
    direction = rng.standard_normal(N)
    direction /= np.linalg.norm(direction)
    plus, minus = (rng.standard_normal((count, N)) + sign * distance / 2 * direction for sign in (1, -1))
    return plus, minus, direction


def test_going_from_the_negative_to_the_positive_images_is_a_response_of_one() -> None:
    plus, minus, direction = groups(12.0, count=40)
    axis = fit_axis(plus, minus, GRID)
    assert axis.separation == 1.0 and axis.images == (40, 40)
    assert axis.along(12.0 * direction) == pytest.approx(1.0, rel=0.1)
    assert axis.along(-3.0 * direction) == pytest.approx(-0.25, rel=0.1)
    aside = np.random.default_rng(9).standard_normal(N)
    aside -= (aside @ direction) * direction
    assert abs(float(axis.along(6.0 * aside / np.linalg.norm(aside)))) < 0.15


def test_the_distance_is_that_of_images_left_out() -> None:
    """With few images the means differ by chance as well; what was not in the fit does not."""
    plus, minus, _ = groups(4.0, count=6)
    axis = fit_axis(plus, minus, GRID)
    fitted = float((plus.mean(0) - minus.mean(0)) / axis.scale_N @ axis.unit_N)
    assert axis.distance < 0.9 * fitted


def test_noise_is_no_concept() -> None:
    found = [fit_axis(*groups(0.0, seed=seed)[:2], GRID).separation for seed in range(10)]
    assert np.mean(found) < 0.65


def test_what_there_is_no_axis_between_is_refused() -> None:
    plus, minus, _ = groups(3.0)
    with pytest.raises(UserError, match="two positive and two negative images, and there are 1 and 12"):
        fit_axis(plus[:1], minus, GRID)
    with pytest.raises(UserError, match="are the same"):
        fit_axis(plus, plus, GRID)


def drawn(vectors_PQSN: np.ndarray) -> Drawn:
    prompts, seeds = vectors_PQSN.shape[:2]
    request = Request(tuple(map(str, range(prompts))), tuple(range(seeds)), AT)
    return Drawn(request=request, grid=GRID, vectors_PQSN=vectors_PQSN, scores_PQS=None, pictures={})


def scenes(change: np.ndarray) -> np.ndarray:
    """2 prompts, 3 seeds: noise of their own, plus `change[s]` (S, N) at each strength."""
    bases = np.random.default_rng(5).standard_normal((2, 3, 1, N)) * 3
    return bases + change[None, None]


def test_moving_along_the_axis_keeps_everything_else() -> None:
    plus, minus, _ = groups(12.0, count=40)
    axis = fit_axis(plus, minus, GRID)
    steps = np.array(AT)[:, None] * 3.0 * axis.unit_N * axis.scale_N
    curves = curves_of(drawn(scenes(steps)), axis, 1.0, 1.0)
    assert curves.kept_PQS == pytest.approx(1.0)
    mean = curves.response_PQS.mean((0, 1))
    assert mean[2] == pytest.approx(-mean[0]) and mean[1] == 0.0 and mean[2] > 0.2
    assert curves.spread_S == pytest.approx(1.0)


def test_another_picture_is_not_kept_and_a_weaker_one_is() -> None:
    plus, minus, _ = groups(12.0, count=40)
    axis = fit_axis(plus, minus, GRID)
    rng = np.random.default_rng(6)
    vectors = scenes(np.zeros((3, N)))
    vectors[:, :, 0] = 3 * rng.standard_normal((2, 3, N))  # other pictures
    vectors[:, :, 2] = axis.centre_N + 0.3 * (vectors[:, :, 1] - axis.centre_N)  # the same with less contrast
    kept = curves_of(drawn(vectors), axis, 1.0, 1.0).kept_PQS.mean((0, 1))
    assert abs(kept[0]) < 0.2 and kept[1] == pytest.approx(1.0) and kept[2] == pytest.approx(1.0)


def test_seeds_of_one_prompt_that_look_alike_do_not_count_as_other_pictures() -> None:
    """Or a change as small as that between two seeds would be another picture."""
    plus, minus, _ = groups(12.0, count=40)
    axis = fit_axis(plus, minus, GRID)
    assert 0.0 <= axis.chance < 0.1
    rng = np.random.default_rng(7)
    bases = 3 * rng.standard_normal(N) + 0.3 * rng.standard_normal((1, 3, 1, N))
    vectors = np.repeat(bases, 3, axis=2)
    vectors[:, :, 2] += 0.4 * rng.standard_normal((1, 3, N))
    vectors[:, :, 0] = 3 * rng.standard_normal((1, 3, N))
    kept = curves_of(drawn(vectors), axis, 1.0, 1.0).kept_PQS.mean((0, 1))
    assert abs(kept[0]) < 0.25 and kept[2] > 0.95


def test_pictures_that_become_alike_lose_their_spread_and_grey_ones_their_contrast() -> None:
    plus, minus, _ = groups(12.0, count=40)
    axis = fit_axis(plus, minus, GRID)
    vectors = scenes(np.zeros((3, N)))
    vectors[:, :, 2] = vectors[:1, :1, 2]  # all the same
    vectors[:, :, 0] *= 0.1
    curves = curves_of(drawn(vectors), axis, 1.0, 1.0)
    assert curves.spread_S[2] == pytest.approx(0.0, abs=1e-9) and curves.contrast_S[2] == pytest.approx(1.0, abs=0.3)
    assert curves.contrast_S[0] == pytest.approx(0.1)


def test_pooling_keeps_places_and_takes_any_media() -> None:
    latents = torch.zeros(2, 32, 32)
    latents[1, 16:, :16] = 4.0
    grid = grid_of(latents)
    assert grid == (16, 16)
    vector = pooled(latents, grid).reshape(2, 16, 16)
    assert (vector[1, 8:, :8] == 4.0).all() and vector.sum() == 4.0 * 64
    video = torch.stack([latents, latents + 1.0], dim=1)
    assert np.allclose(pooled(video, grid), pooled(latents, grid) + 0.5)
    assert pooled(torch.ones(8, 40), grid_of(torch.ones(8, 40))).shape == (8 * 16,)
    assert contrast(pooled(latents, grid)[None], grid)[0] == pytest.approx(np.sqrt(16 * 0.25 * 0.75 / 2))

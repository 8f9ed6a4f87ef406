"""That the published formulas the objectives are compared with are the formulas, in the benchmark's own cells."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from benchmarks import baselines, quality
from trainers import trainer_of

from slider_plugin.stages import training
from slider_plugin.training.loop import Trainer
from slider_plugin.training.rollout import rollout


def trainer(objective: str, folder: Path, concept: str = "size") -> Trainer:
    """Of a cell of sd1, as the benchmark trains it."""
    config = quality.written("sd1", concept, objective, 7, folder)
    if objective not in quality.LIKENESS:
        return trainer_of(config)
    with patch.object(training, "Trainer", baselines.trainer(objective, quality.text_sets(concept), 0.5)):
        return trainer_of(config)


@pytest.mark.parametrize("objective", ["bucket", "plain-bucket"])
def test_draws_of_a_cycle_share_noise_and_times_with_us_alone(objective: str, tmp_path: Path) -> None:
    built = trainer(objective, tmp_path)
    one, other = (built.data.batch(next(built.sampler)) for _ in range(2))
    assert {one.draw.scale, other.draw.scale} == {1.0, -1.0}
    shared = objective == "bucket"
    assert torch.equal(built._noise(one), built._noise(other)) is shared
    assert torch.equal(built._times(one), built._times(other)) is shared
    assert torch.equal(built._noise(one), built._noise(one))


def test_baselines_have_no_neutral_draws_and_no_fewer_signed_ones(tmp_path: Path) -> None:
    ours, *others = (trainer(name, tmp_path / name) for name in ("bucket", "plain-bucket", "concept-image"))
    of_a_step = [[next(built.sampler) for _ in range(built.draws_per_step)] for built in (ours, *others)]
    signed = [sum(not draw.neutral for draw in draws) for draws in of_a_step]
    assert signed == [2, 4, 4] and any(draw.neutral for draw in of_a_step[0])


def test_pairs_have_no_captions_and_published_times(tmp_path: Path) -> None:
    built = trainer("concept-image", tmp_path)
    one, other = (built.data.batch(next(built.sampler)) for _ in range(2))
    for batch in (one, other):
        assert all(torch.equal(told["prompt_embeds"], built.data.prompts[""]["prompt_embeds"]) for told in batch.conditioning)
    assert torch.equal(built._noise(one), built._noise(other)) and torch.equal(built._times(one), built._times(other))
    steps_B = (1.0 - built.noise.share(built._times(one))) * baselines.STEPS
    assert torch.allclose(steps_B, steps_B.round(), atol=0.02) and 1 <= steps_B.min() <= steps_B.max() < baselines.STEPS


def test_the_text_formula_is_that_of_the_paper(tmp_path: Path) -> None:
    """An untrained adapter answers as the frozen model, so the loss is `|| eta (f(x_t, c+) - f(x_t, c-)) ||^2`."""
    built = trainer("concept-text", tmp_path)
    assert isinstance(built, baselines.ConceptText)
    row, noise_BCHW = built.rows[0], torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))

    def answer(noisy_BCHW: torch.Tensor, time_B: torch.Tensor, prompt: str) -> torch.Tensor:
        with torch.no_grad():
            told = torch.stack([built.data.prompts[prompt]["prompt_embeds"]] * 2)
            predicted: torch.Tensor = built.components.denoiser(noisy_BCHW, time_B, told, return_dict=False)[0]
            return predicted

    def guided(noisy_BCHW: torch.Tensor, time_B: torch.Tensor) -> torch.Tensor:
        without_BCHW = answer(noisy_BCHW, time_B, "")
        return without_BCHW + 3.0 * (answer(noisy_BCHW, time_B, row["target"]) - without_BCHW)

    time_B = built.noise.at(1.0 - 5 / baselines.STEPS, 2)
    noisy_BCHW = rollout(built.noise, guided, noise_BCHW, time_B, 5)
    towards_BCHW = 0.5 * (answer(noisy_BCHW, time_B, row["positive"]) - answer(noisy_BCHW, time_B, row["negative"]))
    torch.testing.assert_close(built.formula(row, noise_BCHW, 5).detach(), towards_BCHW.square().mean(), rtol=1e-4, atol=1e-7)


def test_the_text_formula_trains_the_positive_side_alone(tmp_path: Path) -> None:
    built = trainer("concept-text", tmp_path)
    (report,) = [built.optimizer_step() for _ in range(2)][-1].draws  # the first is at the bottom of the warm-up
    assert (report.draw.scale, report.samples) == (1.0, 6)
    assert any(float(parameter.abs().max()) > 0 for name, parameter in built.adapter.named_parameters() if "lora_B" in name)

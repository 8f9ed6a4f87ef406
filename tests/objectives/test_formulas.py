"""The objectives' formulas, on numbers: targets, masks, shares, norms, the cap of anchors."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from slider_hooks import Ask, Draw, Flow, Question, UserError
from slider_plugin.config import TextConfig
from slider_plugin.objectives.losses import ANCHOR_CAP, anchor_loss, learning_loss, preservation_loss, share_of
from slider_plugin.objectives.pair import Pair, difference_mask
from slider_plugin.objectives.text import Text, norm_matched
from slider_plugin.training.noise import DiffusionProcess, FlowProcess, NoiseProcess

ALPHAS = torch.cumprod(1.0 - torch.linspace(1e-4, 2e-2, 1000), 0)
PROCESSES: dict[str, NoiseProcess] = {
    "flow": FlowProcess(Flow(), 1.0),
    "epsilon": DiffusionProcess(ALPHAS, "epsilon"),
    "v_prediction": DiffusionProcess(ALPHAS, "v_prediction"),
}


def random(seed: int, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(seed))


def question(process: NoiseProcess, scale: float = 1.0, share: float = 0.5, turn: int = 0) -> Question:
    clean, noise, time_B = random(0), random(1), process.at(share, 2)
    return Question(
        draw=Draw(position=0, epoch=0, bucket="more", index=0, scale=scale, neutral=False),
        turn=turn,
        ask=Ask(noisy=process.add_noise(clean, noise, time_B), time=time_B, conditioning=({}, {})),
        clean=clean,
        noise=noise,
        twin=random(2),
        strength=1.0,
        add_noise=lambda c, n: process.add_noise(c, n, time_B),
        truth=lambda c, n: process.target(c, n, time_B),
        told=lambda prompt: ({"text": torch.tensor(hash(prompt))},) * 2,
    )


# --- Pairs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES.values(), ids=list(PROCESSES))
def test_addift_aims_at_the_noise_that_is_found_in_the_other_image(process: NoiseProcess) -> None:
    """Whatever a model predicts: the target, taken apart at x_t, has the noise of the frozen answer, taken apart at y_t."""
    asked, pair = question(process), Pair("addift")
    (other,) = pair.asks(asked)
    assert asked.twin is not None and torch.equal(other.noisy, process.add_noise(asked.twin, asked.noise, other.time))
    frozen = random(3)  # not the truth about anything
    wanted = process.apart(other.noisy, frozen, other.time)[1]
    found = process.apart(asked.ask.noisy, pair.target(asked, [frozen]), asked.ask.time)[1]
    assert torch.allclose(found, wanted, atol=1e-4)


def test_addift_of_a_model_that_predicts_noise_is_the_plain_frozen_answer() -> None:
    asked, frozen = question(PROCESSES["epsilon"]), random(3)
    assert torch.equal(Pair("addift").target(asked, [frozen]), frozen)


def test_addift_leads_from_the_one_image_beyond_it() -> None:
    """In much noise a model sees one image in both, and the clean image of the target lies all of x0 - y0 beyond that."""
    process = PROCESSES["flow"]
    asked = question(process, share=0.999)
    assert asked.twin is not None
    blurred = torch.zeros_like(asked.clean)
    (other,) = Pair("addift").asks(asked)
    frozen = (other.noisy - blurred) / 0.999  # the velocity that points at it
    clean, _ = process.apart(asked.ask.noisy, Pair("addift").target(asked, [frozen]), asked.ask.time)
    assert torch.allclose(clean, asked.clean - asked.twin, atol=1e-2)


def test_the_mask_is_one_where_images_differ_and_the_floor_elsewhere() -> None:
    one = torch.zeros(2, 3, 4, 4)
    other = one.clone()
    other[0, :, 1, 2], other[0, 0, 3, 3] = 1.0, 0.05  # the latter is what an autoencoder spreads
    mask_B1HW = difference_mask(one, other, 0.25)
    assert mask_B1HW.shape == (2, 1, 4, 4)
    assert mask_B1HW[0, 0, 1, 2] == 1.0 and mask_B1HW[0].sum() == 1.0 + 15 * 0.25
    assert torch.equal(mask_B1HW[1], torch.ones(1, 4, 4)), "where nothing differs all counts alike"


def test_a_masked_loss_is_the_weighted_mean_of_each_sample() -> None:
    answer, target, mask = random(0), random(1), random(2, 1).abs()
    by_hand = [float((mask[b] * (answer[b] - target[b]) ** 2).sum() / (3 * mask[b].sum())) for b in range(2)]
    assert float(learning_loss(answer, target, None, mask)) == pytest.approx(sum(by_hand) / 2, rel=1e-5)
    weight_B = torch.tensor([1.0, 0.0])
    assert float(learning_loss(answer, target, weight_B, mask)) == pytest.approx(by_hand[0] / 2, rel=1e-5)
    assert float(learning_loss(answer, target, None, torch.ones(2, 1, 4, 4))) == pytest.approx(
        float(learning_loss(answer, target)), rel=1e-6
    )


# --- Text --------------------------------------------------------------------------------------------------------------


def words(**given: object) -> TextConfig:
    return TextConfig.model_validate({"target": "a man", "positive": "an old man", "negative": "a young man"} | given)


def asked_prompts(text: Text, asked: Question) -> list[int]:
    return [int(ask.conditioning[0]["text"]) for ask in text.asks(asked)[1:]]


@pytest.mark.parametrize("scale", [1.0, -1.0, 0.5])
def test_the_target_is_the_paper_s_with_both_signs(scale: float) -> None:
    text = Text([words(attributes=("male", "female"), positive="old", negative="young")], 0.7)
    asked = question(PROCESSES["epsilon"], scale)
    said = ("male old", "female old", "male young", "female young")
    assert asked_prompts(text, asked) == [hash(prompt) for prompt in said]
    assert text.asks(asked)[0] is asked.ask and text.prompts == ("a man", *said)
    base, *ends = (random(seed) for seed in range(5))
    wanted = base + scale * 0.7 * ((ends[0] - ends[2]) + (ends[1] - ends[3])) / 2
    assert torch.allclose(text.target(asked, [base, *ends]), wanted, atol=1e-6)


def test_above_a_guidance_of_one_the_norm_is_that_of_the_frozen_answer() -> None:
    asked, frozen = question(PROCESSES["epsilon"]), [random(seed) for seed in range(3)]
    strong, plain = Text([words()], 3.0).target(asked, frozen), Text([words()], 1.0).target(asked, frozen)
    norms = [tensor.flatten(1).norm(dim=1) for tensor in (strong, frozen[0], plain)]
    assert torch.allclose(norms[0], norms[1], rtol=1e-5) and not torch.allclose(norms[2], norms[1], rtol=1e-2)
    direction = frozen[0] + 3.0 * (frozen[1] - frozen[2])
    cosine = torch.nn.functional.cosine_similarity(strong.flatten(1), direction.flatten(1))
    assert torch.allclose(cosine, torch.ones(2), atol=1e-5)
    assert torch.equal(norm_matched(frozen[0], frozen[0]), frozen[0])


def test_a_text_slider_without_prompts_is_refused() -> None:
    with pytest.raises(UserError, match="slider_text: slider_objective text needs it"):
        Text([])


def test_sets_of_prompts_take_turns() -> None:
    text = Text([words(anchors=("a cat",)), words(target="a woman", positive="old", negative="young", anchors=("a cat", ""))])
    assert [text.prompt(turn) for turn in range(3)] == ["a man", "a woman", "a man"]
    assert asked_prompts(text, question(PROCESSES["flow"], turn=1)) == [hash("old"), hash("young")]
    assert text.anchors == ("a cat", "")


# --- What all have in common --------------------------------------------------------------------------------------------


def test_a_share_lies_on_the_line_from_the_frozen_answer_to_the_target() -> None:
    frozen, target = random(0), random(1)
    assert torch.equal(share_of(frozen, target, 0.0), frozen) and torch.allclose(
        share_of(frozen, target, 1.0), target, atol=1e-6
    )
    assert torch.allclose(share_of(frozen, target, 0.25), 0.75 * frozen + 0.25 * target, atol=1e-6)


def gradient(loss: Sequence[Tensor] | Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss, of)[0]


def test_an_anchor_that_drifts_far_is_capped_in_size_and_not_in_sense() -> None:
    frozen = random(0)
    near, far = ((frozen + drift * random(1)).requires_grad_() for drift in (0.01, 3.0))
    assert torch.equal(anchor_loss(near, frozen), preservation_loss(near, frozen))
    assert float(anchor_loss(far, frozen).detach()) == pytest.approx(ANCHOR_CAP * float(frozen.square().mean()), rel=1e-5)
    capped, whole = gradient(anchor_loss(far, frozen), far), gradient(preservation_loss(far, frozen), far)
    assert float(capped.norm()) < 0.01 * float(whole.norm())
    assert torch.nn.functional.cosine_similarity(capped.flatten(), whole.flatten(), dim=0) > 0.9999
    same = frozen.clone().requires_grad_()
    assert float(anchor_loss(same, frozen).detach()) == 0.0 and not gradient(anchor_loss(same, frozen), same).any()

"""The plan draws each image once and puts the right ones together."""

import pytest

from slider_hooks import PromptEntry
from slider_plugin.errors import PluginError
from slider_plugin.validation.plan import Panel, Shot, plan_validation

CAT = PromptEntry(name="cat", prompt="a cat")
DOG = PromptEntry(name="dog", prompt="a dog", adapter_strength=-1.5)
NONE = PromptEntry(name="none", prompt="a house", adapter_strength=0.0)


def own(entry: PromptEntry) -> float:
    return 1.0 if entry.adapter_strength is None else entry.adapter_strength


def test_no_image_is_drawn_twice() -> None:
    plan = plan_validation([CAT, DOG, CAT], [1, 2, 1], [1, -1, 0, 1.0, -0.0], own)
    assert len(plan.shots) == len(set(plan.shots))
    assert {(s.entry.name, s.seed, s.scale) for s in plan.shots} == {
        *(("cat", seed, scale) for seed in (1, 2) for scale in (-1, 0, 1)),
        *(("dog", seed, scale) for seed in (1, 2) for scale in (-1.5, -1, 0, 1)),
    }


def test_groups_share_a_scale_and_cover_everything() -> None:
    plan = plan_validation([CAT, DOG], [1, 2], [-1, 0, 1], own)
    groups = plan.by_scale()
    assert [scale for scale, _ in groups] == [-1.5, -1.0, 0.0, 1.0]
    assert all(shot.scale == scale for scale, shots in groups for shot in shots)
    assert [shot for _, shots in groups for shot in shots] == list(plan.shots)
    zero = dict(groups)[0.0]
    assert [(s.entry.name, s.seed) for s in zero] == [("cat", 1), ("cat", 2), ("dog", 1), ("dog", 2)]


def test_pairs_and_strips_are_made_of_planned_images() -> None:
    plan = plan_validation([CAT, DOG], [7], [2, -2, 0], own)
    assert plan.pairs == tuple(Panel(e, 7, (Shot(e, 7, 0.0), Shot(e, 7, own(e)))) for e in (CAT, DOG))
    assert [[s.scale for s in strip.shots] for strip in plan.strips] == [[-2, 0, 2]] * 2
    assert {s for panel in (*plan.pairs, *plan.strips) for s in panel.shots} == set(plan.shots)
    assert plan.sheet == plan.strips


def test_without_strengths_the_sheet_shows_pairs() -> None:
    plan = plan_validation([CAT, NONE, DOG], [7], [], own)
    assert plan.strips == () and [p.entry for p in plan.pairs] == [CAT, DOG]
    assert [(row.entry, [s.scale for s in row.shots]) for row in plan.sheet] == [(CAT, [0, 1]), (NONE, [0]), (DOG, [0, -1.5])]


def test_a_strip_need_not_hold_zero_but_the_base_is_drawn() -> None:
    plan = plan_validation([CAT], [7], [1, 2], own)
    assert [s.scale for s in plan.shots] == [0, 1, 2] and [s.scale for s in plan.strips[0].shots] == [1, 2]


def test_nothing_to_draw() -> None:
    for plan in (plan_validation([], [1], [1], own), plan_validation([CAT], [], [1], own)):
        assert plan.shots == plan.pairs == plan.strips == plan.sheet == () and plan.by_scale() == []


def test_negative_zero_is_zero() -> None:
    plan = plan_validation([CAT], [1], [-0.0], lambda _: -0.0)
    assert [str(s.scale) for s in plan.shots] == ["0.0"]


@pytest.mark.parametrize("answer", [float("nan"), float("inf"), None, "1", True])
def test_a_hook_that_answers_nonsense_is_named(answer: object) -> None:
    with pytest.raises(PluginError, match=r"validation_prompt_scale .* `cat`"):
        plan_validation([CAT], [1], [1], lambda _: answer)  # type: ignore[arg-type,return-value]

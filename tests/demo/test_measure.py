"""The demo's measures against scenes whose truth is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slider_plugin.demo import bundle, measure, world

SCENE = world.Scene(shape="circle", colour="red", background="mint", radius=0.25, light=0.8, x=0.5, y=0.5)


def attributes(scene: world.Scene) -> measure.Attributes:
    return measure.measure(world.render(scene), scene.colour, scene.background)


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("radius", [0.12, 0.2, 0.3])
def test_size_is_the_share_of_the_image(shape: str, radius: float) -> None:
    measured = attributes(SCENE.with_(shape=shape, radius=radius)).size
    assert measured == pytest.approx(np.pi * radius**2, rel=0.06)


@pytest.mark.parametrize("light", [0.35, 0.6, 1.0])
@pytest.mark.parametrize("radius", [0.12, 0.4])
def test_brightness_is_the_light_whatever_the_size(light: float, radius: float) -> None:
    measured = attributes(SCENE.with_(light=light, radius=radius)).brightness
    assert measured == pytest.approx(light * world.PALETTE_VALUE, abs=0.005)


def test_size_does_not_depend_on_light_or_colour() -> None:
    sizes = [attributes(SCENE.with_(light=light, colour=colour)).size for light in (0.4, 1.0) for colour in world.COLOURS]
    assert max(sizes) - min(sizes) < 0.004


def test_place_and_colours_are_read() -> None:
    moved = attributes(SCENE.with_(x=0.4, y=0.6))
    assert moved.place == pytest.approx((0.4, 0.6), abs=0.01)
    red, green = attributes(SCENE), attributes(SCENE.with_(colour="green"))
    assert red.colour[0] > 0.7 and green.colour[1] > 0.7
    assert measure.CHANGES["colour"](red, green) > 0.9
    assert measure.CHANGES["background"](red, attributes(SCENE.with_(background="white"))) > 0.05
    assert measure.CHANGES["place"](red, moved) == pytest.approx(np.hypot(0.1, 0.1) / 0.4, abs=0.05)


@pytest.mark.parametrize("colour", list(world.COLOURS))
@pytest.mark.parametrize("turn", [-25.0, 0.0, 25.0])
@pytest.mark.parametrize("light", [0.5, 1.0])
def test_a_turned_hue_is_read_whatever_the_colour_and_the_light(colour: str, turn: float, light: float) -> None:
    scene = SCENE.with_(colour=colour, turn=turn, light=light)
    assert attributes(scene).hue == pytest.approx(turn, abs=4.0)  # angles of mixed colours are not quite those of HSV
    assert attributes(scene).brightness == pytest.approx(light * world.PALETTE_VALUE, abs=0.005)


def test_an_elevation_is_how_far_up_it_is() -> None:
    assert attributes(SCENE.with_(y=0.35)).elevation == pytest.approx(0.65, abs=0.01)


def test_a_position_is_how_far_right_it_is() -> None:
    assert attributes(SCENE.with_(x=0.35)).position == pytest.approx(0.35, abs=0.01)
    moved = measure.score("position", {(0, 0): {s: attributes(SCENE.with_(x=0.5 + 0.1 * s)) for s in (-1.0, 0.0, 1.0)}})
    assert moved.monotonicity == pytest.approx(1.0) and moved.balance > 0.95 and "place" not in moved.preservation


def test_balance_is_the_smaller_side_over_the_larger() -> None:
    def score(low: float, high: float) -> float:
        rows = {(0, 0): {s: attributes(SCENE.with_(light=0.6 + c)) for s, c in ((-1.0, low), (0.0, 0.0), (1.0, high))}}
        return measure.score("brightness", rows).balance

    assert score(-0.2, 0.1) == pytest.approx(0.5, abs=0.02) and score(-0.1, 0.2) == pytest.approx(0.5, abs=0.02)
    assert score(0.1, 0.2) == 0.0, "both ends are brighter: that is no slider"


def test_spearman_known_answers() -> None:
    assert measure.spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert measure.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert measure.spearman([1, 2, 3], [5, 5, 5]) == 0.0
    assert measure.spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)  # 1 - 6*4/(5*24)
    assert measure.spearman([1, 2, 3, 4], [1, 1, 2, 2]) == pytest.approx(0.8944, abs=1e-4)


def rows(radius_at: dict[float, float]) -> dict[tuple[int, int], dict[float, measure.Attributes]]:
    return {(0, 0): {s: attributes(SCENE.with_(radius=r)) for s, r in radius_at.items()}}


def test_score_of_a_perfect_a_reversed_and_a_dead_slider() -> None:
    perfect = measure.score("size", rows({-1.0: 0.15, 0.0: 0.2, 1.0: 0.3}))
    assert perfect.monotonicity == perfect.monotonicity_p10 == pytest.approx(1.0)
    assert perfect.ratio == pytest.approx(4.0, rel=0.1)
    assert perfect.preservation["mean"] < 0.02
    assert measure.score("size", rows({-1.0: 0.3, 0.0: 0.2, 1.0: 0.15})).monotonicity == pytest.approx(-1.0)
    assert measure.score("size", rows({-1.0: 0.2, 0.0: 0.2, 1.0: 0.2})).monotonicity == 0.0


def test_preservation_sees_what_else_moves() -> None:
    images = {(0, 0): {s: attributes(SCENE.with_(radius=0.2 + 0.1 * s, light=0.7 + 0.2 * s)) for s in (-1.0, 0.0, 1.0)}}
    moved = measure.score("size", images).preservation
    assert moved["brightness"] == pytest.approx(0.2 / (1.0 - 0.35), rel=0.05)
    assert "size" not in moved


def test_held_out_prompts_are_in_no_bucket() -> None:
    captions = {p.read_text().strip() for p in (bundle.fixtures() / "buckets").rglob("*.txt")}
    held_out = {measure.prompt(*words) for words in measure.PROMPTS}
    assert len(held_out) >= 8 and len(measure.SEEDS) >= 4 and len(measure.STRENGTHS) == 9
    assert captions and not captions & held_out


def test_bucket_captions_do_not_name_the_concept() -> None:
    words = " ".join(p.read_text() for p in (bundle.fixtures() / "buckets").rglob("*.txt"))
    assert not {"small", "large", "dim", "bright", "light"} & set(words.split())


@pytest.mark.parametrize(
    ("concept", "least"), [("size", 0.15), ("brightness", 0.4), ("hue", 35.0), ("position", 0.2), ("elevation", 0.2)]
)
def test_the_two_sides_of_a_concept_are_pairs_that_differ_in_it(concept: str, least: float) -> None:
    folder = bundle.fixtures() / "buckets" / concept
    names = sorted(path.name for path in (folder / "more").glob("*.png"))
    assert names == sorted(path.name for path in (folder / "less").glob("*.png"))
    for name in names:
        texts = [(folder / side / name).with_suffix(".txt").read_text() for side in ("more", "less")]
        assert texts[0] == texts[1]
        colour, background = (texts[0].split()[place] for place in (1, 5))
        sides = []
        for side in ("more", "less"):
            with Image.open(folder / side / name) as image:
                sides.append(measure.measure(np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0, colour, background))
        assert getattr(sides[0], concept) - getattr(sides[1], concept) > least


def test_buckets_are_balanced() -> None:
    for concept in bundle.CONCEPTS:
        counts = {side: len(list((bundle.fixtures() / "buckets" / concept / side).glob("*.png"))) for side in ("more", "less")}
        assert counts["more"] == counts["less"] >= 4


@pytest.mark.parametrize("family", bundle.FAMILIES)
def test_fixtures_are_small_and_have_their_card(family: str) -> None:
    folder = bundle.fixtures() / "tiny" / family
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert size < 10e6
    card = Path(folder, "README.md").read_text()
    for word in ("seed", "steps", "seconds", "adherence"):
        assert word in card

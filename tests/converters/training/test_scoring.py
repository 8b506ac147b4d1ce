"""The reader and the scorer, on pictures whose content is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgedit.converters.training.captions import Claims, GroupClaim, RelationClaim, caption
from edgedit.converters.training.scene_reader import read_scene
from edgedit.converters.training.scoring import score_scene, wilson_interval
from edgedit.converters.training.world import COLOURS, SHAPES, Item, Relation, Scene, render, sample_scene


def test_rendered_scenes_are_read_back_at_least_995_times_in_1000() -> None:
    seed = int(np.random.default_rng().integers(2**31))
    rng = np.random.default_rng(seed)
    total = 1000
    wrong = []
    for index in range(total):
        scene = sample_scene(rng, held_out=index % 2 == 0)
        text, claims = caption(scene, rng, complete=True)
        if not score_scene(read_scene(render(scene)), claims).all_right:
            wrong.append(text)
    assert len(wrong) <= 0.005 * total, f"seed {seed}: {wrong}"


def test_the_reader_finds_positions_to_a_pixel() -> None:
    seed = int(np.random.default_rng().integers(2**31))
    rng = np.random.default_rng(seed)
    for _ in range(60):
        scene = sample_scene(rng, count=1)
        (item,) = scene.items
        (found,) = read_scene(render(scene)).items
        assert abs(found.x - item.x) < 1.2, f"seed {seed}: {scene}"
        assert abs(found.y - item.y) < 1.2, f"seed {seed}: {scene}"


CIRCLE = Item("circle", "red", "medium", 34.0, 30.0, 64.0)
SQUARE = Item("square", "blue", "small", 22.0, 95.0, 60.0)
SCENE = Scene("white", (CIRCLE, SQUARE))
CLAIMS = Claims(
    groups=(
        GroupClaim(1, "circle", "red", "medium", "left"),
        GroupClaim(1, "square", "blue", "small", None),
    ),
    relations=(RelationClaim(0, "left of", 1),),
    background="white",
)


def wrong_claims(scene: Scene, claims: Claims = CLAIMS) -> set[str]:
    score = score_scene(read_scene(render(scene)), claims)
    return {name for name in score.claimed if score.claimed[name] != score.right[name]}


def test_a_right_picture_has_nothing_wrong() -> None:
    assert wrong_claims(SCENE) == set()


@pytest.mark.parametrize(
    ("scene", "expected"),
    [
        (Scene("white", (replace(CIRCLE, colour="green"), SQUARE)), {"colour"}),
        (Scene("white", (replace(CIRCLE, shape="ring"), SQUARE)), {"shape"}),
        (Scene("white", (replace(CIRCLE, size="large", extent=50.0), SQUARE)), {"size"}),
        (Scene("white", (replace(CIRCLE, y=28.0), SQUARE)), {"place"}),
        (Scene("white", (replace(CIRCLE, x=95.0), replace(SQUARE, x=30.0))), {"place", "relation"}),
        (Scene("pink", SCENE.items), {"background"}),
        (Scene("white", (*SCENE.items, Item("star", "green", "small", 22.0, 64.0, 110.0))), {"count"}),
        (Scene("white", (CIRCLE,)), {"count", "shape", "colour", "size", "relation"}),
        (Scene("white", ()), {"count", "shape", "colour", "size", "place", "relation"}),
    ],
)
def test_each_kind_of_mistake_is_noticed(scene: Scene, expected: set[str]) -> None:
    assert wrong_claims(scene) == expected


def test_swapped_colours_are_noticed() -> None:
    swapped = Scene("white", (replace(CIRCLE, colour="blue"), replace(SQUARE, colour="red")))
    assert wrong_claims(swapped) == {"colour"}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("extent", [20.5, 34.0, 53.0])
def test_every_other_shape_counts_as_wrong(shape: str, extent: float) -> None:
    size = {20.5: "small", 34.0: "medium", 53.0: "large"}[extent]
    scene = Scene("grey", (Item(shape, "yellow", size, extent, 60.3, 66.8),))
    for claimed in SHAPES:
        wrong = wrong_claims(scene, Claims((GroupClaim(1, claimed, "yellow", size, "centre"),), (), "grey"))
        assert wrong == (set() if claimed == shape else {"shape"})


@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below"])
def test_a_relation_holds_one_way_only(relation: Relation) -> None:
    dx, dy = {"left of": (-40, 5), "right of": (40, 5), "above": (5, -40), "below": (5, 40)}[relation]
    scene = Scene("black", (replace(CIRCLE, x=64.0 + dx, y=64.0 + dy), replace(SQUARE, x=64.0, y=64.0)))
    groups = (GroupClaim(1, "circle", None, None, None), GroupClaim(1, "square", None, None, None))
    assert wrong_claims(scene, Claims(groups, (RelationClaim(0, relation, 1),), None)) == set()
    assert wrong_claims(scene, Claims(groups, (RelationClaim(1, relation, 0),), None)) == {"relation"}


def test_a_pale_blur_has_no_shape_and_noise_does_not_crash() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert not score_scene(read_scene(noise), CLAIMS).all_right
    for colour in COLOURS.values():
        flat = np.full((128, 128, 3), colour, np.uint8)
        assert read_scene(flat).items == ()


def test_wilson_interval_has_its_textbook_values() -> None:
    low, high = wilson_interval(9, 10)
    assert (round(low, 4), round(high, 4)) == (0.5958, 0.9821)
    assert wilson_interval(0, 0) == (0.0, 1.0)

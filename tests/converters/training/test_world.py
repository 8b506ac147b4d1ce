"""The world: deterministic, well separated, and with a held-out part that training never draws from."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgedit.converters.training.captions import caption, vocabulary
from edgedit.converters.training.tokens import MAX_TOKENS, build_tokenizer, wrap_tokenizer
from edgedit.converters.training.world import (
    BACKGROUNDS,
    GAP,
    IMAGE_SIZE,
    MARGIN,
    SIZES,
    combination,
    is_held_out,
    place_of,
    relation_of,
    render,
    sample_scene,
)


def test_a_seed_fixes_scene_picture_and_caption() -> None:
    seed = int(np.random.default_rng().integers(2**31))
    runs = []
    for _ in range(2):
        rng = np.random.default_rng(seed)
        scene = sample_scene(rng)
        runs.append((scene, render(scene).tobytes(), caption(scene, rng)))
    assert runs[0] == runs[1], f"seed {seed}"


def test_the_held_out_hash_stays_what_it_was() -> None:
    rng = np.random.default_rng(20)
    scenes = [sample_scene(rng, held_out=bool(i % 2)) for i in range(6)]
    assert [combination(scene) for scene in scenes[:2]] == [
        combination(scene) for scene in (sample_scene(np.random.default_rng(20)), scenes[1])
    ]
    assert [is_held_out(scene) for scene in scenes] == [False, True] * 3


def test_training_and_held_out_scenes_share_no_combination() -> None:
    seed = int(np.random.default_rng().integers(2**31))
    rng = np.random.default_rng(seed)
    training = {combination(sample_scene(rng)) for _ in range(4000)}
    held_out = {combination(sample_scene(rng, held_out=True)) for _ in range(1000)}
    assert not training & held_out, f"seed {seed}"
    assert len(held_out) > 400, f"seed {seed}"


def test_objects_are_inside_apart_and_never_of_the_background_colour() -> None:
    seed = int(np.random.default_rng().integers(2**31))
    rng = np.random.default_rng(seed)
    for _ in range(500):
        scene = sample_scene(rng)
        for item in scene.items:
            assert item.colour != scene.background
            assert SIZES[item.size][0] <= item.extent <= SIZES[item.size][1]
            for centre, half in zip((item.x, item.y), item.half, strict=True):
                assert centre - half >= MARGIN - 1e-6, f"seed {seed}: {scene}"
                assert centre + half <= IMAGE_SIZE - MARGIN + 1e-6, f"seed {seed}: {scene}"
        for a, b in itertools.combinations(scene.items, 2):
            across = abs(a.x - b.x) - a.half[0] - b.half[0]
            down = abs(a.y - b.y) - a.half[1] - b.half[1]
            assert max(across, down) >= GAP, f"seed {seed}: {scene}"


def test_claims_say_what_is_in_the_scene() -> None:
    seed = int(np.random.default_rng().integers(2**31))
    rng = np.random.default_rng(seed)
    for index in range(1000):
        scene = sample_scene(rng, held_out=index % 2 == 0)
        text, claims = caption(scene, rng, complete=index % 3 == 0)
        where = f"seed {seed}: {text!r} of {scene}"
        assert claims.count == len(scene.items), where
        assert claims.background in (None, scene.background), where
        members = []
        for group in claims.groups:
            found = [
                item
                for item in scene.items
                if item.shape == group.shape
                and group.colour in (None, item.colour)
                and group.size in (None, item.size)
                and group.place in (None, place_of(item))
            ]
            assert len(found) >= group.count, where
            members.append(found)
        for claim in claims.relations:
            pairs = itertools.product(members[claim.first], members[claim.second])
            assert any(relation_of(a, b) == claim.relation for a, b in pairs if a is not b), where


def test_claims_are_named_in_the_text() -> None:
    seed = int(np.random.default_rng().integers(2**31))
    rng = np.random.default_rng(seed)
    for _ in range(500):
        scene = sample_scene(rng)
        text, claims = caption(scene, rng)
        words = text.replace(",", " ").replace(".", " ").replace("gray", "grey").split()
        colours = {group.colour for group in claims.groups} | {claims.background}
        assert {word for word in words if word in BACKGROUNDS} == colours - {None}, f"seed {seed}: {text}"
        for group in claims.groups:
            plural = "es" if group.shape == "cross" else "s"
            assert group.shape + (plural if group.count > 1 else "") in words, f"seed {seed}: {text}"


def test_the_tokenizer_knows_every_caption_and_ends_it() -> None:
    seed = int(np.random.default_rng().integers(2**31))
    rng = np.random.default_rng(seed)
    tokenizer = build_tokenizer()
    for _ in range(2000):
        text, _ = caption(sample_scene(rng), rng)
        tokens = tokenizer.encode(text.upper()).tokens
        assert "<unk>" not in tokens, f"seed {seed}: {text}"
        assert tokens[-1] == "</s>"
        assert len(tokens) < MAX_TOKENS
    assert tokenizer.encode("").tokens == ["</s>"]
    assert tokenizer.encode("A Zebra, on white!").tokens == ["a", "<unk>", ",", "on", "white", "!", "</s>"]
    assert len(vocabulary()) + 3 == tokenizer.get_vocab_size()


def test_transformers_pads_as_the_pipeline_asks() -> None:
    wrapped = wrap_tokenizer(build_tokenizer())
    batch = wrapped(["a red circle", ""], padding="max_length", max_length=6, truncation=True)
    assert batch["attention_mask"] == [[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert wrapped.convert_ids_to_tokens(batch["input_ids"][0]) == ["a", "red", "circle", "</s>", "<pad>", "<pad>"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_number_of_objects_can_be_asked_for(count: int) -> None:
    assert len(sample_scene(np.random.default_rng(count), count=count, held_out=True).items) == count

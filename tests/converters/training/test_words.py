"""What the nouns of captions stand for, and that the text encoder learns it."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch

from edgedit.converters.training.captions import caption
from edgedit.converters.training.data import training_scenes
from edgedit.converters.training.loop import Budget, run_stage
from edgedit.converters.training.text_encoder import TextStage
from edgedit.converters.training.tokens import build_tokenizer
from edgedit.converters.training.words import FACTS, noun_facts
from edgedit.converters.training.world import BACKGROUNDS, COLOURS, SHAPES, Item, Scene


def test_every_claim_of_a_caption_is_among_the_facts_of_its_nouns() -> None:
    rng = np.random.default_rng()
    tokenizer = build_tokenizer()
    for scene in training_scenes(150, seed=int(rng.integers(2**31))):
        text, claims = caption(scene, rng, complete=True)
        facts = noun_facts(tokenizer.encode(text).tokens, scene)
        named = facts[facts[:, 0] >= 0]
        assert len(named) == len(claims.groups), text
        found = {(list(SHAPES)[row[0]], list(COLOURS)[row[1]], row[3] + 1) for row in named}
        assert found == {(group.shape, group.colour, group.count) for group in claims.groups}, text
        assert {list(BACKGROUNDS)[row[FACTS.index("background")]] for row in named} == {scene.background}


def test_a_noun_that_could_mean_two_objects_has_no_facts() -> None:
    scene = Scene("white", (Item("star", "red", "small", 20, 30, 30), Item("star", "blue", "small", 20, 90, 30)))
    facts = noun_facts(["a", "star", "and", "a", "blue", "star"], scene)
    assert (facts[1] == -1).all()
    assert facts[5].tolist() == [3, 5, 0, 0, 2, 0, 0, 2]
    assert noun_facts(["a", "red", "star"], scene)[2].tolist() == [3, 0, 0, 0, 0, 0, 0, 1]


def test_the_text_encoder_learns_which_colour_belongs_to_the_object_and_which_to_the_background(
    tmp_path: Path,
) -> None:
    stage = TextStage(training_scenes(400, seed=2), seed=2, device=torch.device("cpu"), batch_size=64)
    run_stage(stage, tmp_path, Budget(steps=150), log=lambda line: None, warm_up=20)
    tokenizer, modules = build_tokenizer(), stage.modules
    pairs = list(itertools.permutations(COLOURS, 2))
    ids = [tokenizer.encode(f"a {colour} circle on a {background} background").ids for colour, background in pairs]
    with torch.no_grad():
        states = modules["text_encoder"](input_ids=torch.tensor(ids)).last_hidden_state
        found = modules["word_head"](states)[:, 2, 8:16].argmax(-1)
    # Half would be right if the two colours could not be told apart.
    right = np.mean([list(COLOURS)[index] == colour for index, (colour, _) in zip(found, pairs, strict=True)])
    assert right > 0.8

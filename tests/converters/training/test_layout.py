"""The layout that the training-only head learns, against the rendered pictures."""

from __future__ import annotations

import numpy as np
import torch

from edgedit.converters.training.data import training_scenes
from edgedit.converters.training.layout import LayoutHead, layout_loss, layout_of
from edgedit.converters.training.world import BACKGROUNDS, COLOURS, SHAPES, SIZES, render


def test_tokens_without_an_object_are_background_in_the_picture() -> None:
    scenes = training_scenes(60, seed=int(np.random.default_rng().integers(2**31)))
    for scene, layout in zip(scenes, layout_of(scenes, 8), strict=True):
        picture = render(scene).astype(int).reshape(8, 16, 8, 16, 3).transpose(0, 2, 1, 3, 4).reshape(64, 256, 3)
        plain = (np.abs(picture - BACKGROUNDS[scene.background]).max(-1) <= 8).mean(-1)
        empty = layout[:, 0] < 0
        assert (plain[empty] > 0.7).all(), scene
        assert (layout[empty, :3] == -1).all()
        assert (plain[~empty] < 1).mean() > 0.5, scene
        assert {list(BACKGROUNDS)[index] for index in layout[:, 3]} == {scene.background}


def test_the_token_at_an_objects_centre_has_its_shape_colour_and_size() -> None:
    scenes = training_scenes(60, seed=int(np.random.default_rng().integers(2**31)))
    for scene, layout in zip(scenes, layout_of(scenes, 8), strict=True):
        for item in scene.items:
            shape, colour, size, _ = layout[int(item.y // 16) * 8 + int(item.x // 16)]
            found = (list(SHAPES)[shape], list(COLOURS)[colour], list(SIZES)[size])
            assert found == (item.shape, item.colour, item.size), scene


def test_the_loss_falls_to_nothing_when_the_head_is_right_and_counts_no_empty_token() -> None:
    layout = torch.from_numpy(layout_of(training_scenes(4, seed=2), 8))
    logits = torch.zeros(4, 64, 32)
    plain = layout_loss(logits, layout)
    assert abs(plain.item() - np.log([8, 8, 3, 11, 2]).sum()) < 1e-4
    held = layout[..., 0] >= 0
    ends = np.cumsum([0, 8, 8, 3, 11])
    for part, offset in zip((0, 1, 2, 3), ends[:4], strict=True):
        wanted = torch.nn.functional.one_hot(layout[..., part].long().clamp(min=0), 32).roll(int(offset), -1)
        logits += 50 * wanted
    logits[..., 30], logits[..., 31] = 50 * (~held), 50 * held
    assert layout_loss(logits, layout).item() < 1e-6
    noise = torch.randn(4, 64, 19) * (~held)[..., None]
    logits[..., :19] += noise
    assert layout_loss(logits, layout).item() < 1e-6


def test_the_head_takes_hidden_states_of_any_width() -> None:
    assert LayoutHead(24)(torch.randn(2, 5, 24)).shape == (2, 5, 32)

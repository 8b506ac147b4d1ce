"""Where something is, told from latents."""

from __future__ import annotations

import numpy as np
import torch

from edgedit.converters.training.layout import object_cells
from edgedit.converters.training.salience import salience
from edgedit.converters.training.world import BACKGROUNDS, render, sample_scene


def test_objects_on_a_plain_background_weigh_more_and_the_mean_is_one() -> None:
    rng = np.random.default_rng()
    scenes = [sample_scene(rng, count=2) for _ in range(8)]
    pictures = torch.from_numpy(np.stack([render(scene) for scene in scenes])).permute(0, 3, 1, 2).float()
    weights = salience(pictures[..., 4::8, 4::8] / 127.5 - 1)[:, 0]
    cells = torch.from_numpy(object_cells(scenes, 16))
    assert torch.allclose(weights.mean((1, 2)), torch.ones(8))
    for scene, weight, cell in zip(scenes, weights, cells, strict=True):
        assert weight[cell].max() > 3 * weight[~cell].min(), scene
        assert (weight[~cell] == weight[~cell].min()).all(), BACKGROUNDS[scene.background]


def test_a_picture_without_a_background_is_weighed_nearly_alike() -> None:
    weights = salience(torch.randn(4, 8, 16, 16))
    assert weights.max() < 1.6
    assert weights.min() > 0.4


def test_a_plain_picture_is_no_division_by_nothing() -> None:
    assert torch.equal(salience(torch.ones(1, 4, 6, 4)), torch.ones(1, 1, 6, 4))

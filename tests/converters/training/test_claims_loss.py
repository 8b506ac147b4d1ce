"""The loss of claims against the scorer that counts them, on readings that are sure and right."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgedit.converters.training.captions import Claims, caption
from edgedit.converters.training.claims_loss import ClaimBatch, claims_loss
from edgedit.converters.training.latent_reader import LatentReader, Reading, centres_of, reading_loss
from edgedit.converters.training.scene_reader import read_scene
from edgedit.converters.training.scoring import score_scene
from edgedit.converters.training.world import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, render, sample_scene

GRID = 16
SURE = 14.0


def sure_reading(scenes: list[Scene]) -> Reading:
    """What a reader that is always right would say of the scenes."""
    centres = torch.from_numpy(centres_of(scenes, GRID)).long()
    held = centres[..., 0] >= 0
    parts = [
        SURE * torch.nn.functional.one_hot(centres[..., index].clamp(min=0), len(names)).float()
        for index, names in enumerate((SHAPES, COLOURS, SIZES))
    ]
    background = SURE * torch.nn.functional.one_hot(centres[:, 0, 3], len(BACKGROUNDS)).float()
    return Reading(torch.where(held, SURE, -SURE), *parts, background)


def draw(count: int) -> tuple[list[Scene], list[Claims]]:
    seed = int(np.random.default_rng().integers(2**31))
    print("seed", seed)
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    return scenes, [caption(scene, rng)[1] for scene in scenes]


def test_a_scene_meets_the_claims_of_its_own_captions() -> None:
    scenes, claims = draw(100)
    losses = claims_loss(sure_reading(scenes), ClaimBatch.of(claims))
    # A relation of two near objects can turn when centres are rounded to cells.
    assert (losses < 0.1).float().mean() > 0.93


def test_captions_of_other_scenes_are_told_as_the_scorer_tells_them() -> None:
    scenes, claims = draw(60)
    others = claims[1:] + claims[:1]
    losses = claims_loss(sure_reading(scenes), ClaimBatch.of(others))
    right = [
        score_scene(read_scene(render(scene)), claim).all_right for scene, claim in zip(scenes, others, strict=True)
    ]
    assert np.mean([(float(loss) < 0.4) == hit for loss, hit in zip(losses, right, strict=True)]) > 0.93


@pytest.mark.parametrize("attribute", ["shape", "colour", "background", "count"])
def test_one_wrong_attribute_costs(attribute: str) -> None:
    rng = np.random.default_rng()
    scene = sample_scene(rng, count=2, grouped=False)
    _, claims = caption(scene, rng, complete=True)
    reading = sure_reading([scene])
    before = claims_loss(reading, ClaimBatch.of([claims]))
    if attribute == "count":
        reading.centre[0, int(torch.argmin(reading.centre[0]))] = SURE
    else:
        logits = getattr(reading, attribute)
        logits.copy_(logits.roll(1, -1))
    assert claims_loss(reading, ClaimBatch.of([claims])) > before + 0.4


def test_the_loss_draws_a_reader_to_what_is_claimed() -> None:
    torch.manual_seed(int(np.random.default_rng().integers(2**31)))
    _scenes, claims = draw(8)
    reader = LatentReader(4, width=16, depth=1)
    latents = torch.randn(8, 4, GRID, GRID, requires_grad=True)
    batch = ClaimBatch.of(claims)
    optimiser = torch.optim.Adam([*reader.parameters(), latents], lr=0.02)
    first = float(claims_loss(reader(latents), batch).mean())
    for _ in range(60):
        optimiser.zero_grad()
        loss = claims_loss(reader(latents), batch).mean()
        loss.backward()
        optimiser.step()
    assert torch.isfinite(loss)
    assert float(loss) < 0.7 * first


def test_a_sure_and_right_reading_has_no_loss_and_a_wrong_one_has() -> None:
    scenes, _ = draw(6)
    centres = torch.from_numpy(centres_of(scenes, GRID))
    assert reading_loss(sure_reading(scenes), centres) < 0.01
    others = torch.from_numpy(centres_of([sample_scene(np.random.default_rng()) for _ in scenes], GRID))
    assert reading_loss(sure_reading(scenes), others) > 5

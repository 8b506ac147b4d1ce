"""Windows over larger latents, against loops written out in torch."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPanoramaPipeline

import edgedit
from edgedit.denoise import StepState, StoppedError
from edgedit.errors import InputError
from edgedit.recipes import Recipe
from edgedit.windows import Windows

Saved = Callable[[str], tuple[Any, Path, int]]
PROMPT = "a red cat on the big square"


def draw(generator: random.Random) -> tuple[Windows, int, int]:
    step = generator.choice([1, 2, 4])
    side = step * generator.randint(1, 9)
    overlap = step * generator.randrange(side // step)
    return Windows(side, overlap, step), step * generator.randint(1, 30), step * generator.randint(1, 30)


def test_windows_cover_everything_on_the_grid_and_overlap_as_they_should() -> None:
    seed = random.randrange(2**32)
    generator = random.Random(seed)
    for _ in range(300):
        windows, height, width = draw(generator)
        for length in (height, width):
            starts, side = windows.starts(length), min(windows.side, length)
            assert starts[0] == 0, seed
            assert starts[-1] + side == length, seed
            assert all(start % windows.step == 0 for start in starts), seed
            for a, b in itertools.pairwise(starts):
                assert 0 < b - a <= side - windows.overlap, (seed, windows, length)


def test_at_the_distance_of_the_panorama_the_windows_are_those_of_diffusers() -> None:
    views = StableDiffusionPanoramaPipeline.get_views(None, 512, 2048, window_size=64, stride=8)
    found = Windows(64, 56, 8).places(64, 256)
    assert [(r.start, r.stop, c.start, c.stop) for r, c in found] == views


def blended(predict: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, windows: Windows) -> torch.Tensor:
    """The weighted mean of all windows' predictions, pixel by pixel in float64."""
    height, width = x.shape[2:]
    total, count = torch.zeros_like(x, dtype=torch.float64), torch.zeros(height, width, dtype=torch.float64)
    tall, wide = min(windows.side, height), min(windows.side, width)
    for top in windows.starts(height):
        for left in windows.starts(width):
            answer = predict(x[:, :, top : top + tall, left : left + wide])
            for i in range(tall):
                for j in range(wide):
                    edge = [min(k, n - 1 - k) + 0.5 for k, n in ((i, tall), (j, wide))]
                    weight = float(np.prod([min(1, e / max(windows.overlap, 1)) for e in edge]))
                    total[:, :, top + i, left + j] += answer[:, :, i, j].double() * weight
                    count[top + i, left + j] += weight
    return (total / count).float()


def test_predictions_are_averaged_as_by_a_loop_over_pixels() -> None:
    seed = random.randrange(2**32)
    generator = random.Random(seed)
    for _ in range(5):
        windows, height, width = draw(generator)
        height, width = min(height, 24), min(width, 24)
        x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed))

        def predict(part: torch.Tensor) -> torch.Tensor:
            # Depends on where a pixel lies in its window and on the window's mean.
            ramp = torch.arange(part.shape[3], dtype=torch.float32)
            return part * ramp + part.mean(dim=(2, 3), keepdim=True)

        found = windows.blend(lambda part: predict(torch.from_numpy(part)).numpy(), x.numpy())
        wanted = blended(predict, x, windows).numpy()
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max(), err_msg=str((seed, windows)))


@pytest.fixture(scope="module")
def pipes(saved_pipeline: Saved, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], edgedit.Pipeline]:
    made: dict[str, edgedit.Pipeline] = {}

    def get(kind: str) -> edgedit.Pipeline:
        if kind not in made:
            path = tmp_path_factory.mktemp(kind) / "x.edgedit"
            edgedit.convert(saved_pipeline(kind)[1], path, measure=False)
            made[kind] = edgedit.load(path, threads=1)
        return made[kind]

    return get


@pytest.mark.parametrize("kind", ["pixart-sigma", "sana"])
def test_one_window_as_large_as_the_picture_is_the_plain_run_to_the_bit(
    pipes: Callable[[str], edgedit.Pipeline], kind: str
) -> None:
    pipe = pipes(kind)
    settings: dict[str, Any] = {"seed": random.randrange(2**32), "steps": 3, "width": 16, "height": 24}
    plain = pipe.generate(PROMPT, **settings)
    for tile in (24, 32):
        found = pipe.generate(PROMPT, denoise_tile=tile, **settings)
        assert np.array_equal(found.latents, plain.latents)
        assert np.array_equal(np.asarray(found.images[0]), np.asarray(plain.images[0]))


@pytest.mark.parametrize("kind", ["pixart-sigma", "sana"])
def test_a_run_in_windows_is_that_of_a_loop_with_diffusers_network_and_scheduler(
    pipes: Callable[[str], edgedit.Pipeline], saved_pipeline: Saved, kind: str
) -> None:
    """MultiDiffusion written out: every step, all windows of the shared noise, guidance, one step of the scheduler."""
    pipe, reference = pipes(kind), saved_pipeline(kind)[0]
    seed = random.randrange(2**31)
    latents = torch.randn(1, 4, 8, 14, generator=torch.Generator().manual_seed(seed))
    positive, negative = pipe.encode_prompt(PROMPT), pipe.encode_prompt("", negative=True)
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(reference.scheduler.config)
    scheduler.set_timesteps(3)
    scale = getattr(reference.transformer.config, "timestep_scale", 1.0)
    windows = Windows(6, 2, reference.transformer.config.patch_size)
    x = latents * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:

            def predict(part: torch.Tensor, embedding: Any, t: torch.Tensor = t) -> torch.Tensor:
                out = (
                    reference.transformer(
                        part,
                        encoder_hidden_states=torch.from_numpy(embedding.hidden_states),
                        encoder_attention_mask=torch.from_numpy(embedding.attention_mask),
                        timestep=t[None] * scale,
                        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                        return_dict=False,
                    )
                    if kind.startswith("pixart")
                    else reference.transformer(
                        part,
                        encoder_hidden_states=torch.from_numpy(embedding.hidden_states),
                        encoder_attention_mask=torch.from_numpy(embedding.attention_mask),
                        timestep=t[None] * scale,
                        return_dict=False,
                    )
                )
                return out[0][:, :4]

            guided = [blended(lambda part, e=e: predict(part, e), x, windows) for e in (positive, negative)]  # type: ignore[misc]
            x = scheduler.step(guided[1] + 3.0 * (guided[0] - guided[1]), t, x, return_dict=False)[0]
    found = pipe.generate(
        PROMPT,
        negative_prompt="",
        seed=0,
        latents=latents.numpy(),
        steps=3,
        width=28,
        height=16,
        guidance_scale=3.0,
        denoise_tile=12,
        denoise_overlap=4,
        attention_scale=1.0,
        decode=False,
    ).latents
    assert np.linalg.norm(found - x.numpy()) <= 2e-4 * np.linalg.norm(x.numpy()), seed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"denoise_tile": 7}, "denoise tile 7 is not a multiple of 4"),
        ({"denoise_tile": 0}, "denoise tile must be a positive"),
        ({"denoise_overlap": 4}, "does nothing without a denoise tile"),
        ({"denoise_tile": 8, "denoise_overlap": 8}, "multiple of 4 from 0 to below the tile's 8"),
        ({"denoise_tile": 8, "denoise_overlap": 3}, "multiple of 4"),
    ],
)
def test_windows_that_cannot_be_are_one_line(
    pipes: Callable[[str], edgedit.Pipeline], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        pipes("pixart-sigma").generate(PROMPT, steps=1, **settings)
    assert "\n" not in str(caught.value)


def test_a_run_in_windows_can_be_stopped_between_two_of_them(pipes: Callable[[str], edgedit.Pipeline]) -> None:
    seen: list[tuple[int, int]] = []
    steps: list[int] = []

    def stop_at_the_third(done: int, total: int) -> bool:
        seen.append((done, total))
        return len(seen) < 3

    found = pipes("pixart-sigma").generate(
        PROMPT,
        seed=1,
        steps=3,
        width=32,
        height=32,
        denoise_tile=16,
        on_window=stop_at_the_third,
        on_step=lambda state: steps.append(state.step),
    )
    assert found.stopped
    assert seen == [(1, 9), (2, 9), (3, 9)]
    assert steps == []
    assert found.images == []


def test_a_run_that_is_stopped_between_windows_keeps_the_latents_of_its_last_whole_step(
    pipes: Callable[[str], edgedit.Pipeline],
) -> None:
    pipe = pipes("sana")
    recipe = Recipe.resolve(
        pipe.bundle,
        prompt=PROMPT,
        **dict.fromkeys(("negative_prompt", "guidance_scale", "sampler", "sigmas", "strength")),
        steps=3,
        width=32,
        height=32,
        guidance_interval=(0.0, 1.0),
        rng="philox",
        has_image=False,
        has_latents=False,
        denoise_tile=16,
    )
    kept: list[np.ndarray] = []

    def one_step(state: StepState) -> None:
        kept.append(state.latents)

    prompts = [pipe.encode_prompt(PROMPT)]
    with pytest.raises(StoppedError) as stopped:
        pipe.denoise_together(
            recipe, prompts, None, [4], on_step=one_step, on_window=lambda done, _: not kept or done < 2
        )
    assert len(kept) == 1
    assert np.array_equal(stopped.value.latents, kept[0])

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import edgedit
from edgedit.denoise import StepState
from edgedit.errors import InputError
from edgedit.guidance import Guidance
from edgedit.recipes import Recipe

Saved = Callable[[str], tuple[Any, Path, int]]
PROMPT = "a red cat on the big square"


@pytest.fixture(scope="module")
def bundle_path(saved_pipeline: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "x.edgedit"
    edgedit.convert(saved_pipeline("pixart-sigma")[1], path)
    return path


@pytest.fixture(scope="module")
def pipe(bundle_path: Path) -> edgedit.Pipeline:
    return edgedit.load(bundle_path)


def test_a_seed_gives_the_same_picture_whatever_else_is_drawn(pipe: edgedit.Pipeline) -> None:
    several = pipe.generate(PROMPT, seed=[5, 6, 7], steps=3)
    alone = pipe.generate(PROMPT, seed=6, steps=3)
    assert np.array_equal(several.latents[1:2], alone.latents)
    assert [recipe["seed"] for recipe in several.recipes] == [5, 6, 7]
    assert not np.array_equal(several.latents[0], several.latents[1])


def test_a_random_seed_is_told_and_draws_the_picture_again(pipe: edgedit.Pipeline) -> None:
    first = pipe.generate(PROMPT, steps=2)
    again = pipe.generate(PROMPT, steps=2, seed=first.recipe["seed"])
    assert np.array_equal(first.latents, again.latents)
    assert pipe.generate(PROMPT, steps=2).recipe["seed"] != first.recipe["seed"]


def test_memory_settings_do_not_change_the_picture(bundle_path: Path, pipe: edgedit.Pipeline) -> None:
    with edgedit.load(bundle_path, low_ram=True, threads=1) as frugal:
        a = frugal.generate(PROMPT, seed=1, steps=3, guidance_scale=5.0)
        assert frugal.components.loaded == ["decoder"]
    b = pipe.generate(PROMPT, seed=1, steps=3, guidance_scale=5.0)
    assert np.linalg.norm(a.latents - b.latents) <= 1e-4 * np.linalg.norm(b.latents)


def test_the_steps_one_by_one_give_the_picture_of_generate(pipe: edgedit.Pipeline) -> None:
    noise = np.random.default_rng().standard_normal((1, 4, 8, 4)).astype(np.float32)
    settings: dict[str, Any] = {"steps": 4, "guidance_scale": 3.0, "sampler": "euler a", "seed": 5}
    whole = pipe.generate(PROMPT, latents=noise, width=8, height=16, **settings)
    latents = pipe.denoise(noise, pipe.encode_prompt(PROMPT), **settings)
    assert np.array_equal(latents, whole.latents)
    assert np.array_equal(np.asarray(pipe.decode(latents)[0]), np.asarray(whole.images[0]))


def test_torch_noise_is_that_of_a_torch_generator(pipe: edgedit.Pipeline) -> None:
    seed = int(np.random.default_rng().integers(2**31))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).numpy()
    a = pipe.generate(PROMPT, seed=seed, rng="torch", steps=2, width=16, height=16)
    b = pipe.generate(PROMPT, seed=0, latents=noise, steps=2, width=16, height=16)
    assert np.array_equal(a.latents, b.latents)


def test_the_step_callback_sees_every_step_and_can_stop(pipe: edgedit.Pipeline) -> None:
    seen: list[StepState] = []
    result = pipe.generate(PROMPT, seed=[1, 2], steps=4, on_step=lambda state: seen.append(state))
    assert [(s.index, s.seed, s.step, s.steps) for s in seen] == [
        (i, i + 1, k, 4) for i in (0, 1) for k in (1, 2, 3, 4)
    ]
    assert np.array_equal(seen[3].latents, result.latents[:1])
    assert seen[0].preview is not None
    assert isinstance(seen[0].preview(), Image.Image)

    stopped = pipe.generate(
        PROMPT, seed=[1, 2], steps=4, on_step=lambda state: not (state.index == 1 and state.step == 2)
    )
    assert stopped.stopped
    assert len(stopped.images) == len(stopped.recipes) == 1
    assert np.array_equal(stopped.latents, result.latents[:1])


def test_decoding_agrees_with_diffusers_as_array_and_as_picture(saved_pipeline: Saved, pipe: edgedit.Pipeline) -> None:
    reference = saved_pipeline("pixart-sigma")[0]
    latents = torch.randn(2, 4, 6, 10)
    with torch.no_grad():
        wanted = reference.vae.decode(latents / reference.vae.config.scaling_factor, return_dict=False)[0]
    array = pipe.decode(latents.numpy(), output="array")
    assert array.dtype == np.float32
    assert np.abs(array - wanted.clamp(-1, 1).numpy()).max() < 1e-4
    pictures = reference.image_processor.postprocess(wanted, output_type="pil")
    for a, b in zip(pipe.decode(latents.numpy()), pictures, strict=True):
        assert np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max() <= 1


def test_encoding_a_picture_gives_the_posterior_mean_of_diffusers(
    saved_pipeline: Saved, pipe: edgedit.Pipeline
) -> None:
    reference = saved_pipeline("pixart-sigma")[0]
    picture = Image.fromarray(np.random.default_rng().integers(0, 256, (24, 16, 3), np.uint8))
    with torch.no_grad():
        pixels = reference.image_processor.preprocess(picture, height=24, width=16)
        wanted = reference.vae.encode(pixels).latent_dist.mean * reference.vae.config.scaling_factor
    found = pipe.encode_image(picture, width=16, height=24)
    assert np.linalg.norm(found - wanted.numpy()) <= 1e-4 * np.linalg.norm(wanted.numpy())


def test_image_to_image_starts_from_the_noised_picture(pipe: edgedit.Pipeline) -> None:
    picture = Image.fromarray(np.random.default_rng().integers(0, 256, (16, 16, 3), np.uint8))
    steps: list[int] = []
    pipe.generate(
        PROMPT,
        image=picture,
        strength=0.5,
        steps=10,
        seed=1,
        width=16,
        height=16,
        on_step=lambda s: steps.append(s.steps),
    )
    assert steps == [5] * 5
    faint = pipe.generate(
        PROMPT, image=picture, strength=0.1, steps=10, seed=1, width=16, height=16, guidance_scale=1.0
    )
    start = pipe.encode_image(picture, width=16, height=16)
    noise = pipe.generate(PROMPT, steps=10, seed=1, width=16, height=16, guidance_scale=1.0)
    assert np.linalg.norm(faint.latents - start) < np.linalg.norm(noise.latents - start)


def test_encoding_ignores_padding_as_diffusers_masks_it(saved_pipeline: Saved, pipe: edgedit.Pipeline) -> None:
    reference = saved_pipeline("pixart-sigma")[0]
    with torch.no_grad():
        states, mask, _, _ = reference.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    found = pipe.encode_prompt(PROMPT)
    length = int(mask.sum())
    assert found.hidden_states.shape[1] == length
    wanted = states[:, :length].numpy()
    assert np.linalg.norm(found.hidden_states - wanted) <= 1e-5 * np.linalg.norm(wanted)


def test_what_was_cut_and_what_is_unknown_is_told(pipe: edgedit.Pipeline) -> None:
    long = pipe.encode_prompt("red cat " * 2000 + "dog")
    assert long.cut.endswith("dog")
    assert pipe.encode_prompt("a purple cat").unknown == ("purple",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be a whole number from 1 to 1000, not 0"),
        ({"steps": -3}, "steps must be"),
        ({"steps": 2.5}, "steps must be"),
        ({"width": 17}, "width 17 is not a multiple of 4, as this model needs; use 16 or 20"),
        ({"height": 2}, "height 2 is not a multiple of 4, as this model needs; use 4"),
        ({"height": -16}, "positive whole number"),
        ({"guidance_scale": -1.0}, "guidance scale"),
        ({"guidance_scale": float("nan")}, "guidance scale"),
        ({"guidance_interval": (0.5, 0.2)}, "guidance interval"),
        ({"sampler": "eulr"}, "eulr"),
        ({"rng": "mersenne"}, "unknown rng 'mersenne'; choose one of: philox, torch"),
        ({"seed": -1}, "seed"),
        ({"seed": []}, "no seed"),
        ({"seed": True}, "seed"),
        ({"sigmas": [0.5, 0.9]}, "fall"),
        ({"sigmas": []}, "sigmas"),
        ({"strength": 0.5}, "strength needs an image"),
        ({"image": Image.new("RGB", (8, 8)), "strength": 0.0}, "strength must be"),
        ({"image": "no-such-file.png"}, "no-such-file.png"),
        ({"latents": np.zeros((1, 4, 3, 3), np.float32)}, "do not fit"),
        ({"latents": np.full((1, 4, 8, 8), np.nan, np.float32)}, "not numbers"),
        ({"prompt": 3}, "prompt must be a string"),
    ],
)
def test_a_setting_that_cannot_be_honoured_is_one_line(
    pipe: edgedit.Pipeline, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        pipe.generate(**{"prompt": PROMPT, "steps": 2, "width": 16, "height": 16, **settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["pixart-sigma", "pixart-alpha", "sana", "sana-sprint"])
def test_pictures_denoised_together_are_those_denoised_alone_to_the_bit(
    kind: str, saved_pipeline: Saved, tmp_path: Path
) -> None:
    edgedit.convert(saved_pipeline(kind)[1], tmp_path / "x.edgedit")
    prompts, seeds = ["a red cat", "a blue dog", "the big circle"], [3, 2**63, 5]
    with edgedit.load(tmp_path / "x.edgedit", threads=1, low_ram=False) as pipe:
        recipe = Recipe.resolve(
            pipe.bundle,
            prompt="",
            negative_prompt=None,
            steps=2,
            width=None,
            height=None,
            guidance_scale=None,
            guidance_interval=(0.0, 1.0),
            sampler=None,
            sigmas=None,
            rng="philox",
            strength=None,
            has_image=False,
            has_latents=False,
        )
        alone = [pipe.generate(p, seed=s, steps=2).latents for p, s in zip(prompts, seeds, strict=True)]
        embeddings = [pipe.encode_prompt(prompt) for prompt in prompts]
        guided = Guidance.from_manifest(pipe.bundle.manifest.guidance).needs_negative(recipe.guidance_scale)
        negatives = [pipe.encode_prompt(recipe.negative_prompt, negative=True)] * 3 if guided else None
        together = pipe.denoise_together(recipe, embeddings, negatives, seeds)
        assert np.array_equal(together, np.concatenate(alone))
        longer = pipe.encode_prompt("a red cat on the dog")
        with pytest.raises(InputError, match="of one length"):
            pipe.denoise_together(recipe, [embeddings[0], longer], None, seeds[:2])

"""The embedded model: the same pictures as diffusers draws from its checkpoint, and pictures of what was asked for."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_blas  # noqa: F401  (before MLX)
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from numpy.typing import NDArray

import edgedit
from edgedit.api import BUILTIN
from edgedit.converters.training.captions import Claims, GroupClaim, RelationClaim
from edgedit.converters.training.scene_reader import read_scene
from edgedit.converters.training.scoring import score_scene

CHECKPOINT = Path(__file__).parent.parent.parent / "models" / "scenes"


@pytest.fixture(scope="module")
def pipe() -> edgedit.Pipeline:
    return edgedit.load()


def test_the_checkpoint_is_small_enough_to_ship() -> None:
    for folder in (CHECKPOINT, BUILTIN):
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 30e6


def test_the_embedded_bundle_is_what_convert_makes_of_the_checkpoint(tmp_path: Path) -> None:
    edgedit.convert(CHECKPOINT, tmp_path / "scenes.edgedit", dtype="fp16")
    made, shipped = (
        json.loads((folder / "manifest.json").read_text()) for folder in (tmp_path / "scenes.edgedit", BUILTIN)
    )
    graphs = {path for path in shipped["files"] if not path.startswith("reference/")}
    assert {path: made["files"][path] for path in graphs} == {path: shipped["files"][path] for path in graphs}
    for section in ("schedule", "latents", "prompt", "recommended", "guidance", "positions"):
        if section != "latents":
            assert made[section] == shipped[section]
    assert edgedit.verify(BUILTIN).passed


def test_the_picture_of_the_demo_is_what_its_prompt_says(pipe: edgedit.Pipeline) -> None:
    makefile = (CHECKPOINT.parents[1] / "Makefile").read_text()
    prompt, seed = (re.search(rf"^{name} \?= (.*)$", makefile, re.MULTILINE) for name in ("PROMPT", "SEED"))
    assert prompt is not None
    assert seed is not None
    picture = pipe.generate(prompt[1], seed=int(seed[1])).images[0]
    claims = Claims(
        (GroupClaim(1, "circle", "red", None, None), GroupClaim(1, "square", "blue", None, None)),
        (RelationClaim(0, "above", 1),),
        "white",
    )
    score = score_scene(read_scene(np.asarray(picture.convert("RGB"))), claims)
    assert score.all_right, score.wrong


class FreshNoise(FlowMatchEulerDiscreteScheduler):
    """With the two members, trivial on this path, that the PixArt pipeline asks a scheduler for."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: torch.Tensor, timestep: float) -> torch.Tensor:
        return sample


def fresh_noise(reference: Any) -> dict[str, Any]:
    """The scheduler that `edgedit.json` means, and what to call the pipeline with."""
    config = json.loads((CHECKPOINT / "edgedit.json").read_text())
    steps, shift = config["recommended"]["steps"], config["schedule"]["shift"]
    reference.scheduler = FreshNoise(shift=shift, stochastic_sampling=True)
    return {"sigmas": np.linspace(1, 1 / steps, steps).tolist()}


def folders_own(reference: Any) -> dict[str, Any]:
    """The scheduler that diffusers finds in the folder."""
    return {}


def drawn_by_diffusers(reference: Any, prompt: str, seed: int, moved_by: float = 0.0, **options: Any) -> NDArray[Any]:
    """Its final latents [1, C, h, w], from a start each of whose numbers is moved by up to `moved_by` of itself."""
    side, generator = reference.transformer.config.sample_size, torch.Generator().manual_seed(seed)
    start = torch.randn(1, reference.transformer.config.in_channels, side, side, generator=generator)
    start = start * (1 + moved_by * (2 * torch.rand(start.shape) - 1))
    latents = reference(
        prompt,
        latents=start,
        generator=generator,
        use_resolution_binning=False,
        output_type="latent",
        **options,
    )[0]
    return np.asarray(latents)


def distance(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize(("sampler", "arrange"), [(None, fresh_noise), ("dpmpp_2m", folders_own)])
def test_pictures_agree_with_diffusers_at_the_recommended_settings(
    sampler: str | None, arrange: Callable[[Any], dict[str, Any]], pipe: edgedit.Pipeline
) -> None:
    reference = DiffusionPipeline.from_pretrained(CHECKPOINT, torch_dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    recommended, limit = pipe.bundle.manifest.recommended, pipe.bundle.manifest.prompt
    assert recommended is not None
    assert limit is not None
    options = {
        "num_inference_steps": recommended.steps,
        "guidance_scale": recommended.guidance_scale,
        "max_sequence_length": limit.positive.max_length,
        **arrange(reference),
    }
    for prompt in ("a red circle above a blue square on a white background", "three small yellow stars", ""):
        for _ in range(3):
            seed = random.randrange(2**31)
            latents = drawn_by_diffusers(reference, prompt, seed, **options)
            result = pipe.generate(prompt, seed=seed, rng="torch", sampler=sampler)
            error = distance(result.latents, latents)
            # Where a scene is undecided for long, rounding grows: at one seed in some sixty, a start moved by what one
            # evaluation rounds leads diffusers itself past the bound, and the seed says nothing of who is right.
            if error <= 1e-4:
                break
            moved = [distance(drawn_by_diffusers(reference, prompt, seed, 1e-6, **options), latents) for _ in range(3)]
            assert max(moved) > 1e-4, (prompt, seed, error, moved)
        assert error <= 1e-4, (prompt, seed)
        with torch.no_grad():
            scaled = torch.from_numpy(latents) / reference.vae.config.scaling_factor
            picture = reference.vae.decode(scaled, return_dict=False)[0]
        wanted = np.asarray(reference.image_processor.postprocess(picture, output_type="pil")[0], np.int16)
        assert np.abs(np.asarray(result.images[0], np.int16) - wanted).max() <= 2, (prompt, seed)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_mlx_draws_the_pictures_that_onnx_runtime_draws(dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    edgedit.convert(CHECKPOINT, tmp_path / "whole.edgedit", measure=False)
    edgedit.convert(CHECKPOINT, tmp_path / "mlx.edgedit", to=("mlx",), dtype=dtype, measure=False)
    seed, pictures = random.randrange(2**31), []
    for folder, backend in (("whole.edgedit", "onnx"), ("mlx.edgedit", "mlx")):
        with edgedit.load(tmp_path / folder, backend, use_cache=False) as drawing:
            result = drawing.generate("three small yellow stars", seed=seed, steps=4)
        pictures.append(np.asarray(result.images[0], np.float64))
    difference = pictures[1] - pictures[0]
    if dtype == "fp32":
        assert np.abs(difference).max() <= 2, seed
    else:
        assert 10 * np.log10(255**2 / np.square(difference).mean()) >= 45, seed

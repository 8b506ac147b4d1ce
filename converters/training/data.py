"""Scenes of the training set and the cache of their latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from diffusers import AutoencoderKL

from edgedit.converters.training.autoencoder import encode_mean, pictures_to_tensor
from edgedit.converters.training.loop import step_rng
from edgedit.converters.training.world import Scene, render, sample_scene

__all__ = ["cache_latents", "training_scenes"]


def training_scenes(count: int, *, seed: int) -> list[Scene]:
    """The first `count` scenes of the training set; scene i depends on `(seed, i)` alone."""
    return [sample_scene(step_rng(seed, index, purpose=2)) for index in range(count)]


def cache_latents(
    autoencoder: AutoencoderKL,
    scenes: list[Scene],
    path: Path,
    *,
    log: Callable[[str], None] = print,
    batch_size: int = 32,
) -> npt.NDArray[np.float16]:
    """Posterior means of the scenes' pictures as float16 (N, 8, 16, 16), read from `path` when it has them."""
    if path.exists():
        cached: npt.NDArray[np.float16] = np.load(path)
        if len(cached) == len(scenes):
            return cached
    parts: list[npt.NDArray[np.float16]] = []
    for start in range(0, len(scenes), batch_size):
        pictures = [render(scene) for scene in scenes[start : start + batch_size]]
        parts.append(encode_mean(autoencoder, pictures_to_tensor(pictures)).numpy().astype(np.float16))
        if start // batch_size % 200 == 199:
            log(f"latents: {start + batch_size} of {len(scenes)}")
    latents = np.concatenate(parts)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.save(file, latents)
    temporary.replace(path)
    return latents

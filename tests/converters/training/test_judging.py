"""`judge`: pictures of what was asked for, and of something else."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from edgedit.converters.prompts import read_prompts
from edgedit.converters.training.autoencoder import encode_mean, pictures_to_tensor
from edgedit.converters.training.data import training_scenes
from edgedit.converters.training.judging import judge
from edgedit.converters.training.world import render
from edgedit.errors import InputError

CHECKPOINT = Path(__file__).parents[3] / "models" / "scenes"
CPU = torch.device("cpu")


def test_what_a_prompt_says_is_right_and_what_another_says_is_wrong() -> None:
    first, count = random.randrange(0, 900), 24
    prompts = read_prompts("self", CHECKPOINT)[: first + count]
    scenes = training_scenes(first + count, seed=0)
    autoencoder = AutoencoderKL.from_pretrained(CHECKPOINT / "vae", torch_dtype=torch.float32).eval()
    drawn = encode_mean(autoencoder, pictures_to_tensor([render(scene) for scene in scenes[first:]]))
    latents = np.zeros((first + count, *drawn.shape[1:]), np.float16)
    latents[first:] = (drawn * autoencoder.config.scaling_factor).numpy()
    told: list[int] = []
    right = judge(CHECKPOINT, prompts, latents, device=CPU, on_step=lambda done, total: told.append(total - done))
    assert right[first:].mean() >= 0.8, first
    assert told[-1] == 0
    latents[first:] = np.roll(latents[first:], 1, axis=0)
    assert judge(CHECKPOINT, prompts, latents, device=CPU)[first:].mean() <= 0.2, first


def test_prompts_of_another_world_are_refused() -> None:
    with pytest.raises(InputError, match=r"only the prompts .* not 'a dog'"):
        judge(CHECKPOINT, ["a dog"], np.zeros((1, 8, 16, 16), np.float16), device=CPU)

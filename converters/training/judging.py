"""Which of a teacher's pictures are what their prompts say, where the embedded model's scene reader can tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL

from edgedit.converters.training.captions import Claims, caption
from edgedit.converters.training.data import training_scenes
from edgedit.converters.training.loop import step_rng
from edgedit.converters.training.scene_reader import read_scene
from edgedit.converters.training.scoring import score_scene
from edgedit.errors import InputError

__all__ = ["captions_and_claims", "judge"]

BATCH = 32


def captions_and_claims(count: int) -> list[tuple[str, Claims]]:
    """Captions of the first training scenes and what they claim: the embedded model's `calibration.txt`."""
    scenes = enumerate(training_scenes(count, seed=0))
    return [caption(scene, step_rng(0, index, purpose=6)) for index, scene in scenes]


@torch.no_grad()
def judge(
    checkpoint: Path,
    prompts: Sequence[str],
    latents: npt.NDArray[np.float16],
    *,
    device: torch.device,
    on_step: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.bool_]:
    """Whether everything that a prompt claims is in the picture of its latents (N, C, H, W).

    Latents number i are of prompt i modulo the number of prompts.

    Raises InputError when a prompt is none of those that the embedded model is calibrated on.
    """
    known = dict(captions_and_claims(len(prompts)))
    strange = next((prompt for prompt in prompts if prompt not in known), None)
    if strange is not None:
        raise InputError(
            f"--keep-right knows only the prompts of the embedded model's calibration.txt, and not {strange!r}; "
            "leave it out"
        )
    vae = AutoencoderKL.from_pretrained(checkpoint / "vae", torch_dtype=torch.float32).eval()
    vae.to(device, memory_format=torch.channels_last)
    right = np.empty(len(latents), np.bool_)
    for start in range(0, len(latents), BATCH):
        some = torch.from_numpy(latents[start : start + BATCH].astype(np.float32)).to(device)
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        decoded = vae.decode(some / vae.config.scaling_factor + shift, return_dict=False)[0]
        pixels = ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).cpu().numpy()
        for number, picture in enumerate(pixels.astype(np.uint8), start):
            right[number] = score_scene(read_scene(picture), known[prompts[number % len(prompts)]]).all_right
        if on_step is not None:
            on_step(min(start + BATCH, len(latents)), len(latents))
    return right

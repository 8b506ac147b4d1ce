"""Few steps by regression: from each point at which the student will be called to where the teacher goes from there.

The teacher draws as the student will: from noise at the first of the student's levels to a picture, fresh noise up to
the next level, and down again from there, guidance included. The points at which it set out and the pictures at which
it arrived are kept, and the student's clean estimate at a point learns the picture. There is no chain of targets as in
a consistency model, so nothing has to find its way from the last level to the first: a few hundred steps are enough.
What it costs is the teacher's drawing beforehand.

With a judge, only ways that ended well are learnt from (rejection sampling: Dong et al., "RAFT: Reward rAnked
FineTuning for Generative Foundation Model Alignment", 2023, algorithm 1), so a student need not be as wrong as its
teacher.

References: Luhman and Luhman, "Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed"
(2021), section 3; Liu et al., "InstaFlow" (2023), section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgedit.converters.training.calibration import Calibration, batch_noise, draw_latents
from edgedit.converters.training.denoisers import Denoiser
from edgedit.converters.training.distill import HUBER, DistillationStage, first_latents
from edgedit.converters.training.loop import autocast, step_rng
from edgedit.converters.training.salience import salience
from edgedit.errors import InputError

__all__ = ["TrajectoryStage", "descent", "sample_trajectories"]

TEACHER_STEPS = 12
"""The teacher's steps from pure noise."""
LEAST_STEPS = 6
"""Its steps from the student's last level, at least."""
LEAST_RIGHT = 16
"""Fewer good ways than these teach nothing."""


def descent(denoiser: Denoiser, level: float) -> npt.NDArray[np.float64]:
    """The teacher's falling levels from one of the student's to 0, spread as its own sampler spreads them."""
    fine = denoiser.levels(20 * TEACHER_STEPS)
    below = fine[fine < level - 1e-9]
    count = min(len(below), max(LEAST_STEPS, round(len(below) / 20)))
    chosen = np.round(np.linspace(0, len(below) - 1, count + 1)[1:]).astype(int)
    return np.concatenate([[level], below[chosen]])


def sample_trajectories(
    denoiser: Denoiser,
    data: Calibration,
    *,
    levels: Sequence[float],
    shape: tuple[int, int, int],
    count: int,
    device: torch.device,
    on_step: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.float16]:
    """`count` ways through the student's falling `levels`: (count, 2, levels, *shape), points before pictures.

    Way i is for prompt i modulo the number of prompts; batch k depends on `(seed, k)` alone. `data` gives prompts,
    guidance scale, seed and batch size.

    Raises InputError when the model draws values that are not numbers.
    """
    found = np.empty((count, 2, len(levels), *shape), np.float16)
    ways = [descent(denoiser, level) for level in levels]
    for index, start in enumerate(range(0, count, data.batch_size)):
        size = min(data.batch_size, count - start)
        text = data.prompts(np.arange(start, start + size), device)
        rng = step_rng(data.seed, index, purpose=14)
        noise = torch.from_numpy(batch_noise(data.seed, index, size, shape)).to(device)
        point, picture = first_latents(denoiser, noise, levels[0]), noise
        for number, way in enumerate(ways):
            if number:
                fresh = torch.from_numpy(rng.standard_normal((size, *shape), dtype=np.float32)).to(device)
                point = (1 - levels[number]) * picture + levels[number] * fresh
            with autocast(device):
                picture = draw_latents(
                    denoiser,
                    point,
                    text,
                    data.negative(size, device),
                    guidance_scale=data.guidance_scale,
                    levels=way,
                )
            found[start : start + size, :, number] = torch.stack([point, picture], 1).cpu().numpy()
        if not np.isfinite(found[start : start + size]).all():
            raise InputError("the checkpoint draws values that are not numbers; it cannot be distilled")
        if on_step is not None:
            on_step(start + size, count)
    return found


class TrajectoryStage(DistillationStage):
    """ "trajectory"; where `calibration.right` is known, only samples that are right are learnt from."""

    def __init__(self, *arguments: Any, learning_rate: float = 3e-4, **named: Any) -> None:
        super().__init__(*arguments, learning_rate=learning_rate, **named)
        data = self.calibration
        if data.points is None or data.pictures is None:
            raise ValueError("the points of the teacher's trajectories were not kept")
        self._points, self._pictures = data.points, data.pictures
        self._rows = np.arange(len(data.points)) if data.right is None else np.flatnonzero(data.right)
        if data.right is not None and len(self._rows) < LEAST_RIGHT:
            raise InputError(
                f"only {len(self._rows)} of {len(data.right)} of the teacher's pictures are right; "
                "give more --samples, or leave --keep-right out"
            )

    def loss(self, step: int) -> Tensor:
        """Pseudo-Huber distance of the clean estimate from the teacher's picture."""
        rng = step_rng(self.seed, step, purpose=24)
        rows = self._rows[rng.integers(len(self._rows), size=self.batch_size)]
        level = rng.integers(len(self.levels), size=self.batch_size)
        text = self.calibration.prompts(rows, self.device)
        x, picture = (
            torch.from_numpy(kept[rows, level].astype(np.float32)).to(self.device)
            for kept in (self._points, self._pictures)
        )
        s = self.numbers(np.asarray(self.levels)[level])
        with autocast(self.device):
            clean = x - s.view(-1, 1, 1, 1) * self.student(x, s, text)
        error = (salience(picture) * (clean - picture).square()).mean((1, 2, 3))
        return ((error + HUBER**2).sqrt() - HUBER).mean()

"""Few steps by regression: from each point at which the student will be called to the end of the teacher's trajectory.

The teacher draws, guidance included, from known noise; the points of its trajectories at the student's levels, and
their ends, are kept. The student's clean estimate at a point learns the end. There is no chain of targets as in a
consistency model, so nothing has to find its way from the last level to the first: a few hundred steps are enough. What
it costs is the teacher's drawing beforehand, and that ends are as good as the teacher's pictures, no better.

References: Luhman and Luhman, "Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed"
(2021), section 3; Liu et al., "InstaFlow" (2023), section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgedit.converters.training.calibration import Calibration, batch_noise, trajectory
from edgedit.converters.training.denoisers import Denoiser
from edgedit.converters.training.distill import HUBER, DistillationStage, first_latents
from edgedit.converters.training.loop import autocast, step_rng
from edgedit.errors import InputError

__all__ = ["TEACHER_STEPS", "TrajectoryStage", "sample_trajectories", "teacher_levels"]

TEACHER_STEPS = 12
"""Least number of the teacher's steps on a trajectory."""


def teacher_levels(denoiser: Denoiser, steps: int) -> tuple[npt.NDArray[np.float64], list[int]]:
    """The teacher's falling levels, which pass through those of `steps` steps, and where they do."""
    finer = -(-TEACHER_STEPS // steps)
    levels = denoiser.levels(steps * finer)
    where = list(range(0, steps * finer, finer))
    levels[where] = denoiser.levels(steps)[:-1]
    return levels, where


def sample_trajectories(
    denoiser: Denoiser,
    data: Calibration,
    *,
    steps: int,
    shape: tuple[int, int, int],
    count: int,
    device: torch.device,
    on_step: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.float16]:
    """Points of `count` trajectories at the student's levels, (count, steps + 1, *shape), the last of each its end.

    Trajectory i is for prompt i modulo the number of prompts; batch k depends on `(seed, k)` alone. `data` gives
    prompts, guidance scale, seed and batch size.

    Raises InputError when the model draws values that are not numbers.
    """
    levels, where = teacher_levels(denoiser, steps)
    found = np.empty((count, steps + 1, *shape), np.float16)
    for index, start in enumerate(range(0, count, data.batch_size)):
        size = min(data.batch_size, count - start)
        noise = torch.from_numpy(batch_noise(data.seed, index, size, shape)).to(device)
        with autocast(device):
            way = list(
                trajectory(
                    denoiser,
                    first_latents(denoiser, noise, float(levels[0])),
                    data.prompts(np.arange(start, start + size), device),
                    data.negative(size, device),
                    guidance_scale=data.guidance_scale,
                    levels=levels,
                )
            )
        points = torch.stack([way[step] for step in [*where, -1]], 1)
        if not torch.isfinite(points).all():
            raise InputError("the checkpoint draws values that are not numbers; it cannot be distilled")
        found[start : start + size] = points.cpu().numpy()
        if on_step is not None:
            on_step(start + size, count)
    return found


class TrajectoryStage(DistillationStage):
    """ "trajectory"; `chosen` are the samples to learn from, all by default."""

    def __init__(
        self,
        *arguments: Any,
        chosen: npt.NDArray[np.int64] | None = None,
        learning_rate: float = 3e-4,
        **named: Any,
    ) -> None:
        super().__init__(*arguments, learning_rate=learning_rate, **named)
        if self.calibration.states is None:
            raise ValueError("the points of the teacher's trajectories were not kept")
        self._states = self.calibration.states
        self._rows = np.arange(len(self._states)) if chosen is None else chosen

    def loss(self, step: int) -> Tensor:
        """Pseudo-Huber distance of the clean estimate from the end of the trajectory."""
        rng = step_rng(self.seed, step, purpose=24)
        rows = self._rows[rng.integers(len(self._rows), size=self.batch_size)]
        # Half of the samples at the first level: it decides what the picture holds.
        level = np.where(rng.random(self.batch_size) < 0.5, 0, rng.integers(len(self.levels), size=self.batch_size))
        end, text = self.calibration.batch(rows, self.device)
        x = torch.from_numpy(self._states[rows, level].astype(np.float32)).to(self.device)
        s = self.numbers(np.asarray(self.levels)[level])
        with autocast(self.device):
            clean = x - s.view(-1, 1, 1, 1) * self.student(x, s, text)
        error = (clean - end).square().mean((1, 2, 3))
        return ((error + HUBER**2).sqrt() - HUBER).mean()

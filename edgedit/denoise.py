"""The sampling loop: one network, one schedule, one solver, guidance, and a callback that sees every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from edgedit.errors import EdgeditError

if TYPE_CHECKING:
    from edgedit.guidance import Guidance
    from edgedit.noise import Noise
    from edgedit.schedules import Schedule
    from edgedit.solvers import Solver

__all__ = ["Predict", "StepState", "StoppedError", "denoise"]

#: (latents as the network takes them, timestep, guided?) → predictions [B, C, H, W] with the prompt and, if guided,
#: without. May raise StoppedError.
Predict = Callable[[np.ndarray, float, bool], tuple[np.ndarray, np.ndarray | None]]


class StoppedError(EdgeditError):
    """A callback returned False. `latents` are those of the last finished step."""

    def __init__(self, latents: np.ndarray) -> None:
        super().__init__("stopped by a callback")
        self.latents = latents


@dataclass(frozen=True)
class StepState:
    """What a step callback sees after each network evaluation.

    Attributes:
        step: evaluations done, from 1 to `steps`.
        steps: evaluations in all.
        timestep: what the network was told.
        sigma: noise level after the step.
        latents: float32 [B, C, H, W] after the step.
        x0: the solver's estimate of the finished latents.
        index: which picture of the run this is, from 0.
        seed: its seed.
        reused: whether a step cache left blocks out.
        preview: a function that renders `x0` cheaply as a small PIL picture, or None where the bundle has no preview
            factors.
    """

    step: int
    steps: int
    timestep: float
    sigma: float
    latents: np.ndarray
    x0: np.ndarray
    index: int = 0
    seed: int | None = None
    reused: bool = False
    preview: Callable[[], object] | None = field(default=None, compare=False)


def denoise(
    predict: Predict,
    schedule: Schedule,
    solver: Solver,
    latents: np.ndarray,
    noise: Noise,
    *,
    guidance: Guidance,
    guidance_scale: float,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    start: int = 0,
    on_step: Callable[[StepState], bool | None] | None = None,
) -> np.ndarray:
    """Run the solver from entry `start` of the schedule to its end and return the last latents, float32 [B, C, H, W].

    Classifier-free guidance evaluates the network with and without the prompt while the step lies in
    `guidance_interval` (fractions of the steps); outside it, and at a scale of at most 1, only with.

    Raises:
        StoppedError: `on_step` returned False, or `predict` was stopped.
        EdgeditError: the network's output is not finite.
    """
    total = len(schedule)
    for i in range(start, total):
        timestep = schedule.told(i)
        model_input = (latents * np.float32(schedule.input_scale(i))).astype(np.float32, copy=False)
        guided = guidance.active(i, total, guidance_scale, guidance_interval)
        try:
            output, unconditional = predict(model_input, timestep, guided)
        except StoppedError:
            raise StoppedError(latents) from None
        if unconditional is not None:
            output = guidance.apply(output, unconditional, guidance_scale)
        if not np.isfinite(output).all():
            raise EdgeditError(
                f"the transformer returned values that are not numbers at step {i + 1} of {total}; "
                "check the bundle with: edgedit verify"
            )
        latents = solver.step(i, latents, output, noise.normal)
        if on_step is not None:
            state = StepState(
                step=i + 1 - start,
                steps=total - start,
                timestep=timestep,
                sigma=float(schedule.sigmas[i + 1]),
                latents=latents,
                x0=solver.x0,
            )
            if on_step(state) is False:
                raise StoppedError(latents)
    return latents

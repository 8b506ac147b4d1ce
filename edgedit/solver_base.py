"""What all solvers share: the prediction is turned into x0 once, state is kept, inputs are checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgedit.errors import InputError
from edgedit.schedules import Schedule

__all__ = ["Latents", "NoiseSource", "Solver", "predict_x0", "slope_float32"]

Latents = NDArray[Any]
NoiseSource = Callable[[tuple[int, ...]], NDArray[np.float32]]


def predict_x0(schedule: Schedule, i: int, latents: NDArray[Any], model_output: NDArray[Any]) -> NDArray[Any]:
    """The clean estimate x0 that a network's output means at evaluation i, in the shape and precision of `latents`.

    With x = alpha x0 + sigma eps: "epsilon" gives eps, "sample" x0, "flow" eps - x0, "trigflow" and "v_prediction"
    alpha eps - sigma x0 (after scaling to alpha^2 + sigma^2 = 1, Salimans & Ho 2022).
    """
    x, out = latents, model_output.astype(latents.dtype)
    alpha, sigma = latents.dtype.type(schedule.alphas[i]), latents.dtype.type(schedule.sigmas[i])
    if schedule.prediction == "sample":
        return out
    if schedule.prediction == "epsilon":
        return np.asarray((x - sigma * out) / alpha)
    if schedule.prediction == "flow":
        return np.asarray((x - sigma * out) / (alpha + sigma))
    norm = alpha * alpha + sigma * sigma
    return np.asarray(out * (-sigma / np.sqrt(norm)) + x * alpha / norm)


def slope_float32(x: Latents, x0: Latents, sigma: float) -> Latents:
    """(x - x0) / sigma, which is dx / dsigma where alpha is 1 or 1 - sigma.

    A scaled latent is up to 157 times x0, and its float32 rounding, left over after a long step, is more than 1e-5 of
    the result. So Euler and Heun keep float32 and diffusers' order of operations there, to err as it does.
    """
    return np.asarray((x - x0) / np.float32(sigma))


class Solver(ABC):
    """One run of one solver over one schedule. Make it with `edgedit.solvers.make_solver`; use it for one run only.

    Call `step` for i = start, start + 1, ..., N - 1, where start is 0 or `schedule.start_at(strength)`. A multistep
    solver that starts in the middle starts with first order, as diffusers does after `set_begin_index`.
    """

    name: ClassVar[str]
    paths: ClassVar[tuple[str, ...]]
    accepts: ClassVar[tuple[str, ...]] = ()
    highest_order: ClassVar[int] = 3
    order: ClassVar[int] = 1

    def __init__(self, schedule: Schedule, options: Mapping[str, Any]) -> None:
        self.precision: type[np.floating[Any]] = np.float64
        self.schedule = schedule
        self.options = dict(options)
        self._x0: NDArray[Any] | None = None
        self._next: int | None = None

    @property
    def evaluations(self) -> int:
        """Network calls of a whole run: one for each entry of the schedule (2 * steps - 1 for Heun)."""
        return len(self.schedule)

    @property
    def x0(self) -> NDArray[np.float32]:
        """The last clean estimate (diffusers: pred_original_sample, denoised), for previews.

        Raises `ValueError` before the first step.
        """
        if self._x0 is None:
            raise ValueError("there is no clean estimate before the first step")
        return self._x0.astype(np.float32, copy=False)

    def step(
        self, i: int, latents: NDArray[np.float32], model_output: NDArray[np.float32], noise: NoiseSource
    ) -> NDArray[np.float32]:
        """From the latent of evaluation i, and what the network said of it, the latent of evaluation i + 1.

        latents, model_output: float32, same shape; `latents` without `schedule.input_scale`.
        noise: draws unit normal noise of the shape asked for; called when, and as often as, diffusers' scheduler draws.
        After the last step the result is the finished latent.

        Raises `ValueError` when i is not the evaluation that is due, or the shapes differ.
        """
        if not 0 <= i < len(self.schedule) or (self._next is not None and i != self._next):
            due = f"0 to {len(self.schedule) - 1}" if self._next is None else str(self._next)
            raise ValueError(f"evaluation {i} is not due; expected {due}")
        if latents.shape != model_output.shape:
            raise ValueError(f"latents have shape {latents.shape} and the model output {model_output.shape}")
        x = latents.astype(self.precision)
        self._x0 = predict_x0(self.schedule, i, x, model_output)
        result = self._advance(i, x, self._x0, noise)
        self._next = i + 1
        return result.astype(np.float32, copy=False)

    @abstractmethod
    def _advance(self, i: int, x: Latents, x0: Latents, noise: NoiseSource) -> Latents:
        """The next latent. May replace `self._x0` by what diffusers reports as the clean estimate."""

    def _epsilon(self, i: int, x: Latents, x0: Latents) -> Latents:
        return np.asarray((x - self.schedule.alphas[i] * x0) / self.schedule.sigmas[i])

    def _clip(self, x0: Latents) -> Latents:
        limit = self.options.get("clip_sample_range")
        return x0 if limit is None else np.clip(x0, -limit, limit)

    def _eta(self, default: float) -> float:
        value = self.options.get("eta")
        return default if value is None else float(value)

    def _refuse(self, why: str) -> InputError:
        return InputError(f"sampler {self.name} {why}")

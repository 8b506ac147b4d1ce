"""Solvers of higher order: DPM-Solver++ and UniPC (x0 extrapolated in lambda = log(alpha / sigma)), and Heun."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgedit.schedules import Schedule
from edgedit.solver_base import Latents, NoiseSource, Solver, slope_float32

__all__ = ["DPMSolverPP2M", "DPMSolverPP2MSDE", "Heun", "UniPC"]


def _lambdas(schedule: Schedule) -> list[float]:
    """log(alpha / sigma) of every level; -inf for pure noise, inf for none."""
    levels = []
    for alpha, sigma in zip(schedule.alphas, schedule.sigmas, strict=True):
        level = -math.inf if alpha <= 0 else math.log(alpha)
        levels.append(math.inf if sigma <= 0 else level - math.log(sigma))
    return levels


class DPMSolverPP2M(Solver):
    """Lu et al. 2022 (arXiv 2211.01095), multistep, of order 1, 2 or 3. DPMSolverMultistepScheduler, dpmsolver++."""

    name = "dpmpp_2m"
    paths = ("vp", "ve", "flow")
    accepts = ("solver_order", "solver_type", "lower_order_final", "euler_at_final")
    stochastic = False

    def __init__(self, schedule: Schedule, options: Mapping[str, Any]) -> None:
        super().__init__(schedule, options)
        self._history: list[Latents] = []
        self._lambdas = _lambdas(schedule)
        self._heun = self.options.get("solver_type") == "heun"

    def _order(self, i: int) -> int:
        count = len(self.schedule)
        short = bool(self.options["lower_order_final"]) and count < 15
        order = min(int(self.options["solver_order"]), len(self._history))
        ends_clean = self.schedule.sigmas[-1] == 0
        if i == count - 1 and (self.options["euler_at_final"] or short or ends_clean):
            return 1
        return min(order, 2) if i == count - 2 and short else order

    def _advance(self, i: int, x: Latents, x0: Latents, noise: NoiseSource) -> Latents:
        self._history = [*self._history, x0][-int(self.options["solver_order"]) :]
        fresh = noise(x.shape) if self.stochastic else None
        plan, order = self.schedule, self._order(i)
        alpha, sigma, ratio = plan.alphas[i + 1], plan.sigmas[i + 1], plan.sigmas[i + 1] / plan.sigmas[i]
        h = self._lambdas[i + 1] - self._lambdas[i]
        # the SDE solver is the ODE solver over twice the distance, plus noise (arXiv 2211.01095, appendix B)
        span = 2.0 * h if self.stochastic else h
        if fresh is not None:
            ratio *= math.exp(-h)
        result = ratio * x - alpha * math.expm1(-span) * x0
        if order > 1:
            result = result + alpha * self._correction(i, h, span, order)
        if fresh is not None:
            result = result + sigma * math.sqrt(-math.expm1(-2.0 * h)) * fresh
        return np.asarray(result)

    def _correction(self, i: int, h: float, span: float, order: int) -> Latents:
        """The part that comes from the derivatives of x0, over alpha."""
        first = (self._lambdas[i] - self._lambdas[i - 1]) / h
        slope = (self._history[-1] - self._history[-2]) / first
        if order == 2:
            half = -0.5 * math.expm1(-span)
            return np.asarray((math.expm1(-span) / span + 1.0 if self._heun else half) * slope)
        second = (self._lambdas[i - 1] - self._lambdas[i - 2]) / h
        earlier = (self._history[-2] - self._history[-3]) / second
        bend = (slope - earlier) / (first + second)
        linear = math.expm1(-h) / h + 1.0
        quadratic = (math.expm1(-h) + h) / h**2 - 0.5
        return np.asarray(linear * (slope + first * bend) - quadratic * bend)


class DPMSolverPP2MSDE(DPMSolverPP2M):
    """The same with noise at every step, of order 1 or 2. DPMSolverMultistepScheduler, sde-dpmsolver++."""

    name = "dpmpp_2m_sde"
    highest_order = 2
    stochastic = True


class UniPC(Solver):
    """Zhao et al. 2023 (arXiv 2302.04867), predicting x0, of order 1 to 3. UniPCMultistepScheduler."""

    name = "unipc"
    paths = ("vp", "ve", "flow")
    accepts = ("solver_order", "solver_type", "lower_order_final", "disable_corrector")

    def __init__(self, schedule: Schedule, options: Mapping[str, Any]) -> None:
        super().__init__(schedule, options)
        self._history: list[Latents] = []
        self._lambdas = _lambdas(schedule)
        self._last: Latents | None = None
        self._last_order = 1
        self._bh1 = self.options.get("solver_type") == "bh1"

    def _advance(self, i: int, x: Latents, x0: Latents, noise: NoiseSource) -> Latents:
        limit = int(self.options["solver_order"])
        if self._last is not None and i - 1 not in self.options["disable_corrector"]:
            x = self._update(i - 1, self._last, self._last_order, x0)
        self._history = [*self._history, x0][-limit:]
        order = min(limit, len(self.schedule) - i) if self.options["lower_order_final"] else limit
        self._last_order = min(order, len(self._history))
        self._last = x
        return self._update(i, x, self._last_order, None)

    def _update(self, i: int, x: Latents, order: int, arrived: Latents | None) -> Latents:
        """From level i to level i + 1: the predictor (UniP), or with x0 as seen at i + 1 the corrector (UniC)."""
        plan, newest = self.schedule, self._history[-1]
        h = self._lambdas[i + 1] - self._lambdas[i]
        alpha, ratio = plan.alphas[i + 1], plan.sigmas[i + 1] / plan.sigmas[i]
        base = np.asarray(ratio * x - alpha * math.expm1(-h) * newest)
        if h == 0 or math.isinf(h):
            return base
        scale = -h if self._bh1 else math.expm1(-h)
        ratios, slopes = [], []
        for back in range(1, order):
            r = (self._lambdas[i - back] - self._lambdas[i]) / h
            ratios.append(r)
            slopes.append((self._history[-1 - back] - newest) / r)
        if arrived is not None:
            ratios.append(1.0)
            slopes.append(arrived - newest)
        if not slopes:
            return base
        weights = self._weights(ratios, -h, scale)
        return np.asarray(base - alpha * scale * sum(w * slope for w, slope in zip(weights, slopes, strict=True)))

    def _weights(self, ratios: list[float], hh: float, scale: float) -> Latents:
        count = len(ratios)
        if count == 1:
            # the authors' simplification, for the predictor of order 2 and the corrector of order 1
            return np.array([0.5])
        rows, wanted = [], []
        phi, factorial = math.expm1(hh) / hh - 1, 1.0
        for k in range(1, count + 1):
            rows.append(np.power(ratios, k - 1))
            wanted.append(phi * factorial / scale)
            factorial *= k + 1
            phi = phi / hh - 1 / factorial
        return np.asarray(np.linalg.solve(np.array(rows), np.array(wanted)))


class Heun(Solver):
    """Karras et al. 2022 (arXiv 2206.00364), algorithm 1 without churn: the mean of the slopes at both ends.

    HeunDiscreteScheduler ("ve"), FlowMatchHeunDiscreteScheduler ("flow"): on both, dx / dsigma = (x - x0) / sigma.
    """

    name = "heun"
    paths = ("ve", "flow")
    accepts = ("clip_sample_range",)
    order = 2

    def __init__(self, schedule: Schedule, options: Mapping[str, Any]) -> None:
        super().__init__(schedule, options)
        self.precision = np.float32
        self._begun: tuple[Latents, Latents, np.float32] | None = None

    def _advance(self, i: int, x: Latents, x0: Latents, noise: NoiseSource) -> Latents:
        sigmas = self.schedule.sigmas
        self._x0 = self._clip(x0)
        slope = slope_float32(x, self._x0, sigmas[i])
        if self._begun is None:
            if i % 2:
                raise ValueError(f"evaluation {i} is the second half of a step; start at an even one")
            distance = np.float32(sigmas[i + 1]) - np.float32(sigmas[i])
            self._begun = (x, slope, distance)
            return np.asarray(x + slope * distance)
        start, first_slope, distance = self._begun
        self._begun = None
        return np.asarray(start + (first_slope + slope) / np.float32(2) * distance)

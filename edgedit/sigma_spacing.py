"""Ways to spread noise levels between a largest and a smallest one, and the way back from a level to a timestep."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedit.errors import InputError

__all__ = ["beta_quantile", "sigma_to_timestep", "spread_sigmas"]


def _beta_continued_fraction(x: float, a: float, b: float) -> float:
    """Lentz's method for the continued fraction of the incomplete beta function (Abramowitz & Stegun 26.5.8)."""
    tiny = 1e-300
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1.0)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    value = d
    for m in range(1, 400):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 + numerator * d
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = 1.0 + numerator / c
            c = c if abs(c) > tiny else tiny
            value *= d * c
        if abs(d * c - 1.0) < 1e-16:
            break
    return value


def _symmetric_beta_cdf(x: float, a: float) -> float:
    log_front = a * (math.log(x) + math.log1p(-x)) + math.lgamma(2 * a) - 2 * math.lgamma(a)
    return math.exp(log_front) * _beta_continued_fraction(x, a, a) / a


def beta_quantile(q: float, a: float) -> float:
    """The x in [0, 1] at which a Beta(a, a) variable reaches probability q, to about 1e-14 relative."""
    if q <= 0.0 or q >= 1.0:
        return 0.0 if q <= 0.0 else 1.0
    if q > 0.5:
        return 1.0 - beta_quantile(1.0 - q, a)
    low, high = 0.0, 0.5
    x = 0.25
    for _ in range(200):
        error = _symmetric_beta_cdf(x, a) - q
        if error > 0:
            high = x
        else:
            low = x
        log_density = (a - 1) * (math.log(x) + math.log1p(-x)) + math.lgamma(2 * a) - 2 * math.lgamma(a)
        step = error * math.exp(-log_density)
        newton = x - step
        following = newton if low < newton < high else 0.5 * (low + high)
        if abs(following - x) <= 1e-16 * x:
            return following
        x = following
    return x


def spread_sigmas(spacing: str, sigma_min: float, sigma_max: float, steps: int) -> NDArray[np.float64]:
    """`steps` noise levels from `sigma_max` down to `sigma_min`, float64 [steps].

    "karras": Karras et al. 2022, equation 5 with rho 7. "exponential": even in log sigma. "beta": Beta(0.6, 0.6)
    quantiles (arXiv 2407.12173). "lu": even in log(alpha/sigma) (DPM-Solver, Lu et al. 2022).
    """
    if spacing == "karras":
        rho = 7.0
        ramp = np.linspace(0, 1, steps)
        low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
        return np.asarray((high + ramp * (low - high)) ** rho, dtype=np.float64)
    if spacing == "beta":
        quantiles = [beta_quantile(float(q), 0.6) for q in 1 - np.linspace(0, 1, steps)]
        return np.array([sigma_min + q * (sigma_max - sigma_min) for q in quantiles], dtype=np.float64)
    if spacing not in ("exponential", "lu"):
        raise InputError(f"unknown sigma spacing {spacing!r}; choose karras, exponential, beta or lu")
    if sigma_min <= 0:
        raise InputError(f"the {spacing} spacing needs a smallest sigma above 0; choose karras or beta")
    return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), steps))


def sigma_to_timestep(sigmas: NDArray[Any], log_sigmas: NDArray[np.float32]) -> NDArray[np.float64]:
    """The (fractional) training timesteps at which the noise levels occur, interpolated in log sigma, float64 [N].

    `sigmas` is sigma / alpha, float32 or float64 [N]; `log_sigmas` the logarithms of the training levels, rising [T].
    The precision of `sigmas` is kept throughout: diffusers' `_sigma_to_t` does so, and its timesteps depend on it.
    """
    wanted = np.log(np.maximum(sigmas, np.asarray(1e-10, dtype=sigmas.dtype)))
    above = np.cumsum(wanted[None, :] - log_sigmas[:, None] >= 0, axis=0)
    low = above.argmax(axis=0).clip(max=len(log_sigmas) - 2)
    high = low + 1
    weight = np.clip((log_sigmas[low] - wanted) / (log_sigmas[low] - log_sigmas[high]), 0, 1)
    return np.asarray((1 - weight) * low + weight * high, dtype=np.float64)

"""The training levels of a DDPM model (betas, cumulative products, sigma / alpha), in float32 as torch has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedit.errors import BundleError

__all__ = ["alphas_cumprod", "linspace_float32", "relative_sigmas"]

_F32 = np.float32


def linspace_float32(start: float, end: float, count: int) -> NDArray[np.float32]:
    """`torch.linspace(start, end, count)` in float32, to the bit (one fused multiply-add from the nearer end)."""
    if count == 1:
        return np.array([start], dtype=_F32)
    low, high = np.float64(_F32(start)), np.float64(_F32(end))
    step = np.float64(_F32(_F32(high - low) / _F32(count - 1)))
    index = np.arange(count, dtype=np.float64)
    return np.where(index < count // 2, low + step * index, high - step * (count - 1 - index)).astype(_F32)


def _cosine_betas(count: int) -> NDArray[np.float32]:
    def level(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    ratios = (level((i + 1) / count) / level(i / count) for i in range(count))
    return np.array([min(1 - ratio, 0.999) for ratio in ratios], dtype=_F32)


def _rescale_to_zero_snr(betas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Lin et al. 2023 (arXiv 2305.08891), algorithm 1."""
    roots = np.sqrt(_cumulative_product(_F32(1) - betas))
    first, last = roots[:1].copy(), roots[-1:].copy()
    roots = (roots - last) * (first / (first - last))
    levels = roots**2
    return _F32(1) - np.concatenate([levels[:1], levels[1:] / levels[:-1]])


def _cumulative_product(alphas: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(np.cumprod(alphas.astype(np.float64)), dtype=_F32)


def alphas_cumprod(config: Mapping[str, Any]) -> NDArray[np.float32]:
    """The training levels alpha_bar (alpha^2), float32 [T], from the fields described in `edgedit.schedule_config`."""
    count, start, end = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    if config["trained_betas"] is not None:
        betas = np.array(config["trained_betas"], dtype=_F32)
    elif config["beta_schedule"] == "linear":
        betas = linspace_float32(start, end, count)
    elif config["beta_schedule"] == "scaled_linear":
        betas = linspace_float32(start**0.5, end**0.5, count) ** 2
    else:
        betas = _cosine_betas(count)
    if config["rescale_betas_zero_snr"]:
        betas = _rescale_to_zero_snr(betas)
    return _cumulative_product(_F32(1) - betas)


def relative_sigmas(levels: NDArray[np.float32], *, terminal: bool) -> NDArray[np.float32]:
    """sigma / alpha per training timestep; with `terminal`, a last level of pure noise is kept finite (2^-24)."""
    levels = levels.copy()
    if terminal:
        levels[-1] = 2.0**-24
    if levels[-1] <= 0:
        raise BundleError(
            "the manifest's schedule ends in pure noise; set rescale_betas_zero_snr or choose --sampler ddim"
        )
    return np.asarray(np.sqrt((_F32(1) - levels) / levels), dtype=_F32)

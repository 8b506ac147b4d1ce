"""Noise levels and timesteps of models trained on the variance-preserving (DDPM) path.

Each function gives what the diffusers scheduler of that sampler gives, in the same precision, because a network that is
told a timestep one off, or one float32 rounding off, draws another picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedit.errors import InputError
from edgedit.sigma_spacing import sigma_to_timestep, spread_sigmas
from edgedit.vp_table import alphas_cumprod, linspace_float32, relative_sigmas

__all__ = ["Levels", "vp_levels"]

_F32 = np.float32
TABLE_SAMPLERS = ("ddim", "ddpm", "lcm", "tcd", "dmd")
SCALED_SAMPLERS = ("euler", "euler_ancestral", "heun")


@dataclass(frozen=True)
class Levels:
    """What a grid function hands back: timesteps [N], alphas and sigmas [N + 1], and optional oddities."""

    timesteps: NDArray[Any]
    alphas: NDArray[np.float64]
    sigmas: NDArray[np.float64]
    path: str
    init_noise_scale: float = 1.0
    landing_alphas: NDArray[np.float64] | None = None
    landing_sigmas: NDArray[np.float64] | None = None
    table: NDArray[np.float32] | None = None
    order: int = 1


def _spaced(config: Mapping[str, Any], steps: int, last: int, *, skip_end: bool) -> NDArray[np.float64]:
    """Timesteps from high to low, not yet rounded for "linspace", float64 [steps].

    `skip_end`: one interval more than steps, the last point (0) left out, as the multistep schedulers do.
    """
    total, spacing = config["num_train_timesteps"], config["timestep_spacing"]
    if spacing == "trailing":
        # np.arange can yield one value too many, which rounds to timestep -1.
        return np.asarray(np.arange(last, 0, -total / steps).round()[:steps] - 1, dtype=np.float64)
    count = steps + 1 if skip_end else steps
    if spacing == "leading":
        points = np.arange(0, count) * (last // count) * 1.0
    else:
        points = np.linspace(0.0, last - 1.0, count)
    points = points[::-1][:-1] if skip_end else points[::-1]
    offset = config["steps_offset"] if spacing == "leading" else 0
    return np.asarray(points + offset, dtype=np.float64)


def _checked_timesteps(given: Sequence[float], total: int, *, integer: bool) -> NDArray[np.float64]:
    points = np.asarray(given, dtype=np.float64)
    wrong = points.ndim != 1 or points.size == 0 or not np.all(np.isfinite(points))
    if wrong or np.any(np.diff(points) >= 0) or points[0] >= total or points[-1] < 0:
        raise InputError(f"timesteps must fall from below {total} to 0 or more; got {list(given)}")
    if integer and np.any(points != np.round(points)):
        raise InputError(f"this sampler's timesteps must be whole numbers; got {list(given)}")
    return points


def _checked_sigmas(given: Sequence[float]) -> NDArray[np.float32]:
    sigmas = np.asarray(given, dtype=_F32)
    if (
        sigmas.ndim != 1
        or sigmas.size < 2
        or not np.all(np.isfinite(sigmas))
        or np.any(np.diff(sigmas) >= 0)
        or sigmas[-1] < 0
    ):
        raise InputError(
            f"sigmas must be two or more falling numbers, the last one (usually 0) the end; got {list(given)}"
        )
    return sigmas


def _subset_of_teacher(config: Mapping[str, Any], steps: int) -> NDArray[np.float64]:
    total, original = config["num_train_timesteps"], config["original_inference_steps"]
    if original > total or steps > original:
        limit = min(original, total)
        raise InputError(f"this model was distilled from {original} steps; ask for {limit} steps or fewer, not {steps}")
    teacher = np.arange(1, original + 1) * (total // original) - 1
    chosen = np.floor(np.linspace(0, original, num=steps, endpoint=False)).astype(np.int64)
    return np.asarray(teacher[::-1][chosen], dtype=np.float64)


def _table_levels(
    config: Mapping[str, Any], sampler: str, steps: int, given: Sequence[float] | None, levels: NDArray[np.float32]
) -> Levels:
    total = config["num_train_timesteps"]
    if given is not None:
        points = _checked_timesteps(given, total, integer=True)
    elif sampler in ("lcm", "tcd"):
        points = _subset_of_teacher(config, steps)
    else:
        points = _spaced(config, steps, total, skip_end=False)
    timesteps = points.round().astype(np.int64)
    if timesteps[0] >= total:
        raise InputError(
            f"{steps} steps with steps_offset {config['steps_offset']} pass the last training timestep; ask for fewer"
        )
    end = float(levels[0]) if sampler == "tcd" or (sampler == "ddim" and not config["set_alpha_to_one"]) else 1.0
    if sampler == "ddim" and given is None:
        # DDIM steps by a fixed stride, which "linspace" and "trailing" grids do not follow exactly.
        previous = timesteps - total // steps
        landing = np.where(previous >= 0, levels[previous], _F32(end)).astype(np.float64)
    else:
        landing = np.append(levels[timesteps[1:]].astype(np.float64), end)
    here = np.append(levels[timesteps].astype(np.float64), landing[-1])
    return Levels(
        timesteps, np.sqrt(here), np.sqrt(1 - here), "vp", 1.0, np.sqrt(landing), np.sqrt(1 - landing), levels
    )


def _end_sigma(config: Mapping[str, Any], table: NDArray[np.float32]) -> float:
    return 0.0 if config["final_sigma"] == "zero" else float(table[0])


def _spread(config: Mapping[str, Any], spacing: str, table: NDArray[Any], steps: int) -> NDArray[np.float64]:
    low = config["sigma_min"] if config["sigma_min"] is not None else float(table.min())
    high = config["sigma_max"] if config["sigma_max"] is not None else float(table.max())
    return spread_sigmas(spacing, low, high, steps)


def _scaled_levels(
    config: Mapping[str, Any],
    sampler: str,
    steps: int,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    table: NDArray[np.float32],
) -> Levels:
    """Latents in k-diffusion's scale, x = x0 + sigma eps (Karras et al. 2022): alpha is 1 and the input is scaled."""
    spacing, log_table = config["sigma_spacing"], np.log(table)
    if sigmas is not None:
        levels = _checked_sigmas(sigmas)
        points = sigma_to_timestep(levels[:-1], log_table)
    else:
        if timesteps is not None:
            points = _checked_timesteps(timesteps, config["num_train_timesteps"], integer=False)
        else:
            points = _spaced(config, steps, config["num_train_timesteps"], skip_end=False)
        points = points.astype(_F32).astype(np.float64)
        # log_linear gives the end too: the last step lands on the smallest level, whatever final_sigma says.
        whole = config["interpolation_type"] == "log_linear" and sampler == "euler"
        if whole:
            values = np.exp(linspace_float32(float(log_table[-1]), float(log_table[0]), steps + 1)).astype(np.float64)
        else:
            values = np.interp(points, np.arange(len(table)), table)
        if spacing != "table":
            values = _spread(config, spacing, values, steps)
            points = sigma_to_timestep(values, log_table)
        end = [] if whole and spacing == "table" else [_end_sigma(config, table)]
        levels = np.append(values, end).astype(_F32)
    largest = float(levels.max())
    wide = config["timestep_spacing"] in ("linspace", "trailing")
    scale = largest if wide else float(np.sqrt(levels.max() ** 2 + _F32(1)))
    order = 1
    if sampler == "heun":
        levels = np.concatenate([levels[:1], np.repeat(levels[1:-1], 2), levels[-1:]])
        points = np.concatenate([points[:1], np.repeat(points[1:], 2)])
        order = 2
    doubled = levels.astype(np.float64)
    return Levels(points.astype(_F32), np.ones_like(doubled), doubled, "ve", scale, order=order)


def _multistep_levels(
    config: Mapping[str, Any],
    sampler: str,
    steps: int,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    table: NDArray[np.float32],
) -> Levels:
    spacing, log_table = config["sigma_spacing"], np.log(table)
    cosine = config["beta_schedule"] == "squaredcos_cap_v2"
    end = _end_sigma(config, table)
    if sigmas is not None:
        given = _checked_sigmas(sigmas)
        values, end = given[:-1].astype(np.float64), float(given[-1])
        points = sigma_to_timestep(values, log_table).round()
    elif spacing != "table":
        values = _spread(config, spacing, table, steps)
        points = sigma_to_timestep(values, log_table)
        # karras and lu timesteps are rounded (but for a cosine schedule), the others truncated
        if (spacing == "karras" and (sampler == "unipc" or not cosine)) or (spacing == "lu" and not cosine):
            points = points.round()
        if sampler == "unipc" and config["final_sigma"] == "sigma_min":
            end = float(values[-1])
    else:
        if timesteps is not None:
            points = _checked_timesteps(timesteps, config["num_train_timesteps"], integer=True)
        else:
            points = _spaced(config, steps, _last_timestep(config, sampler, table), skip_end=True).round()
        values = np.interp(points, np.arange(len(table)), table)
    relative = np.append(values, end).astype(_F32).astype(np.float64)
    alphas = 1 / np.sqrt(relative**2 + 1)
    return Levels(points.astype(np.int64), alphas, relative * alphas, "vp")


def _last_timestep(config: Mapping[str, Any], sampler: str, table: NDArray[np.float32]) -> int:
    total = int(config["num_train_timesteps"])
    limit = config["lambda_min_clipped"]
    if limit is None or sampler == "unipc":
        return total
    # log(alpha / sigma) rises from the last timestep to the first
    return total - int(np.searchsorted(-np.log(table)[::-1], limit))


def vp_levels(
    config: Mapping[str, Any],
    sampler: str,
    steps: int,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
) -> Levels:
    """The grid of one sampler on the VP path. `config` has been through `check_schedule_config`.

    Raises `InputError` when the sampler cannot honour what is asked of it.
    """
    spacing, has_list = config["sigma_spacing"], timesteps is not None
    if timesteps is not None and sigmas is not None:
        raise InputError("give timesteps or sigmas, not both")
    if has_list and spacing != "table":
        raise InputError(f"timesteps cannot be combined with the {spacing} sigma spacing; leave one of them out")
    levels = alphas_cumprod(config)
    if sampler in TABLE_SAMPLERS:
        if sigmas is not None or spacing != "table":
            asked = "explicit sigmas" if sigmas is not None else f"the {spacing} sigma spacing"
            raise InputError(
                f"sampler {sampler} walks training timesteps and cannot use {asked}; choose euler or dpmpp_2m"
            )
        if levels[-1] <= 0 and config["prediction"] == "epsilon":
            raise InputError(
                f"sampler {sampler} cannot start an epsilon model from pure noise; choose euler or dpmpp_2m"
            )
        return _table_levels(config, sampler, steps, timesteps, levels)
    table = relative_sigmas(levels, terminal=config["rescale_betas_zero_snr"])
    if sampler in SCALED_SAMPLERS:
        if spacing == "lu":
            raise InputError(f"sampler {sampler} has no lu sigma spacing; choose dpmpp_2m, or karras")
        return _scaled_levels(config, sampler, steps, timesteps, sigmas, table)
    if spacing == "lu" and sampler == "unipc":
        raise InputError("sampler unipc has no lu sigma spacing; choose dpmpp_2m, or karras")
    return _multistep_levels(config, sampler, steps, timesteps, sigmas, table)

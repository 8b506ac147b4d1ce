"""Noise levels and timesteps of rectified-flow and TrigFlow models, as the diffusers schedulers compute them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedit.errors import InputError
from edgedit.schedules_vp import Levels
from edgedit.sigma_spacing import spread_sigmas
from edgedit.vp_table import linspace_float32

__all__ = ["dynamic_mu", "flow_levels", "trigflow_levels"]

_F32 = np.float32


def dynamic_mu(rule: Mapping[str, Any], image_tokens: int | None, steps: int) -> float:
    """The mu of a resolution-dependent shift. `rule` is the schedule's `dynamic_shift` object.

    Raises `InputError` when the rule needs the number of image tokens and none is given.
    """
    if rule["rule"] == "fixed":
        return float(rule["mu"])
    if image_tokens is None or image_tokens < 1:
        raise InputError("this model's schedule depends on the picture's size; give image_tokens, a positive number")
    if rule["rule"] == "sqrt":
        return float((image_tokens / rule["base_tokens"]) ** 0.5 * rule["max_shift"] + rule["base_shift"])
    if rule["rule"] == "linear":
        slope = (rule["max_shift"] - rule["base_shift"]) / (rule["max_tokens"] - rule["base_tokens"])
        return float(image_tokens * slope + (rule["base_shift"] - slope * rule["base_tokens"]))
    # Fitted by Black Forest Labs for FLUX.2: one line at 200 steps, one at 10, interpolated in the number of steps.
    at_200 = 0.00016927 * image_tokens + 0.45666666
    if image_tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * image_tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * steps + (at_200 - 200.0 * slope)


def _static_shift(sigmas: NDArray[Any], shift: float) -> NDArray[Any]:
    return np.asarray(shift * sigmas / (1 + (shift - 1) * sigmas))


def _shifted(config: Mapping[str, Any], sigmas: NDArray[Any], mu: float | None) -> NDArray[Any]:
    """The shift, then the stretch to `shift_terminal`; keeps float32 as float32, which the timesteps depend on."""
    if mu is None:
        sigmas = _static_shift(sigmas, float(config["shift"]))
    else:
        factor = math.exp(mu) if config["dynamic_shift"]["curve"] == "exponential" else mu
        with np.errstate(divide="ignore"):
            sigmas = factor / (factor + (1 / sigmas - 1))
    if config["shift_terminal"]:
        rest = 1 - sigmas
        if rest[-1] > 0:  # a single step starts and ends at pure noise, which no stretch can move
            sigmas = 1 - rest / (rest[-1:] / (1 - config["shift_terminal"]))
    return sigmas


def _checked_sigmas(given: Sequence[float], dtype: type[np.floating[Any]]) -> NDArray[Any]:
    sigmas = np.asarray(given, dtype=dtype)
    if sigmas.size > 1 and sigmas[-1] == 0:
        sigmas = sigmas[:-1]
    if sigmas.ndim != 1 or sigmas.size == 0 or not np.all(np.isfinite(sigmas)):
        raise InputError(f"sigmas must be a list of numbers; got {list(given)}")
    if np.any(np.diff(sigmas) >= 0) or sigmas[0] > 1 or sigmas[-1] <= 0:
        raise InputError(
            f"sigmas of a flow model must fall from at most 1 to above 0 (a final 0 is allowed); got {list(given)}"
        )
    return sigmas


def _checked_timesteps(given: Sequence[float], total: int) -> NDArray[np.float32]:
    points = np.asarray(given, dtype=_F32)
    if points.ndim != 1 or points.size == 0 or not np.all(np.isfinite(points)):
        raise InputError(f"timesteps must be a list of numbers; got {list(given)}")
    if np.any(np.diff(points) >= 0) or points[0] > total or points[-1] <= 0:
        raise InputError(f"timesteps of a flow model must fall from at most {total} to above 0; got {list(given)}")
    return points


def _matching_levels(
    config: Mapping[str, Any],
    steps: int,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    mu: float | None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """FlowMatchEulerDiscreteScheduler (and its Heun and LCM kin): told timesteps [N], sigmas [N], float32."""
    total = int(config["num_train_timesteps"])
    told = None if timesteps is None else _checked_timesteps(timesteps, total)
    values: NDArray[Any]
    if sigmas is not None:
        values = _checked_sigmas(sigmas, np.float32)
        if told is not None and len(told) != len(values):
            raise InputError(f"{len(told)} timesteps and {len(values)} sigmas were given; give as many of each")
    elif told is not None:
        values = told / _F32(total)
    elif config["base_sigmas"] == "unit":
        values = np.linspace(1.0, 1 / steps, steps).astype(_F32)
    else:
        ends = np.array([total, 1], dtype=_F32) / _F32(total)
        if mu is None:
            ends = _static_shift(ends, float(config["shift"]))
        values = np.linspace(float(ends[0]) * total, float(ends[1]) * total, steps) / total
    values = _shifted(config, values, mu)
    if config["sigma_spacing"] != "table":
        low = config["sigma_min"] if config["sigma_min"] is not None else float(values[-1])
        high = config["sigma_max"] if config["sigma_max"] is not None else float(values[0])
        values = spread_sigmas(config["sigma_spacing"], low, high, steps)
    levels = values.astype(_F32)
    return (levels * _F32(total) if told is None else told), levels


def _multistep_sigmas(
    config: Mapping[str, Any], sampler: str, steps: int, sigmas: Sequence[float] | None, mu: float | None
) -> NDArray[np.float64]:
    """DPMSolverMultistepScheduler and UniPCMultistepScheduler with `use_flow_sigmas`: sigmas [N + 1], float64."""
    total = int(config["num_train_timesteps"])
    if sigmas is not None:
        base = np.asarray(_checked_sigmas(sigmas, np.float64), dtype=np.float64)
    elif sampler == "unipc":
        base = np.linspace(1, 1 / total, steps + 1)[:-1]
    else:
        base = (1.0 - np.linspace(1, 1 / total, steps + 1))[::-1][:-1]
    if mu is not None and sampler != "unipc" and config["dynamic_shift"]["curve"] == "exponential":
        config, mu = {**config, "shift": math.exp(mu)}, None
    values = np.asarray(_shifted(config, base, mu), dtype=np.float64)
    if sampler == "unipc" and abs(values[0] - 1) < 1e-6:
        values = values.copy()
        values[0] -= 1e-6
    end = values[-1] if config["final_sigma"] == "sigma_min" else 0.0
    return np.append(values, end)


def flow_levels(
    config: Mapping[str, Any],
    sampler: str,
    steps: int,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    image_tokens: int | None,
) -> Levels:
    """The grid of one sampler on the flow path. `config` has been through `check_schedule_config`.

    Raises `InputError` when the sampler cannot honour what is asked of it.
    """
    spacing = config["sigma_spacing"]
    mu = None if config["dynamic_shift"] is None else dynamic_mu(config["dynamic_shift"], image_tokens, steps)
    if spacing == "lu":
        raise InputError("the lu sigma spacing needs a VP model; leave it out, or choose karras")
    if sampler in ("dpmpp_2m", "dpmpp_2m_sde", "unipc"):
        if timesteps is not None:
            raise InputError(
                f"sampler {sampler} takes sigmas and not timesteps on a flow model; give sigmas, or choose euler"
            )
        if spacing != "table":
            raise InputError(
                f"sampler {sampler} has no {spacing} sigma spacing on a flow model; leave it out, or choose euler"
            )
        levels = _multistep_sigmas(config, sampler, steps, sigmas, mu)
        told = (levels[:-1] * config["num_train_timesteps"]).astype(np.int64)
        # timesteps are truncated from the float64 levels, the solver steps between float32 ones
        kept = levels.astype(_F32).astype(np.float64)
        return Levels(told, 1.0 - kept, kept, "flow")
    if config["final_sigma"] != "zero":
        raise InputError(f"sampler {sampler} ends a flow model at sigma 0; choose unipc to end at sigma_min")
    if (timesteps is not None or sigmas is not None) and spacing != "table":
        raise InputError(f"explicit levels cannot be combined with the {spacing} sigma spacing; leave one of them out")
    points, values = _matching_levels(config, steps, timesteps, sigmas, mu)
    order = 1
    full = np.append(values, _F32(0))
    if sampler == "heun":
        full = np.concatenate([full[:1], np.repeat(full[1:-1], 2), full[-1:]])
        points = np.concatenate([points[:1], np.repeat(points[1:], 2)])
        order = 2
    doubled = full.astype(np.float64)
    return Levels(points, 1.0 - doubled, doubled, "flow", order=order)


def trigflow_levels(
    config: Mapping[str, Any], steps: int, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None
) -> Levels:
    """TrigFlow (arXiv 2410.11081): x = cos(s) x0 + sin(s) eps in units of the data's standard deviation.

    `timesteps` are the N + 1 angles, the last one (usually 0) the end. Equals `diffusers.SCMScheduler`, whose latents
    are this module's times its `sigma_data`.
    """
    if sigmas is not None:
        raise InputError(
            "a TrigFlow model's schedule is in angles; give timesteps from about 1.5708 down to 0, not sigmas"
        )
    if timesteps is not None:
        angles = np.asarray(timesteps, dtype=_F32)
        wrong = angles.ndim != 1 or angles.size < 2 or not np.all(np.isfinite(angles))
        if wrong or np.any(np.diff(angles) >= 0) or angles[0] > 1.5709 or angles[-1] < 0:
            raise InputError(
                f"TrigFlow timesteps must fall from at most 1.5708 to the end, usually 0; got {list(timesteps)}"
            )
    elif steps == 2 and config["intermediate_timestep"] is not None:
        angles = np.array([config["max_timestep"], config["intermediate_timestep"], 0.0], dtype=_F32)
    else:
        angles = linspace_float32(config["max_timestep"], 0.0, steps + 1)
    alphas, sines = np.cos(angles.astype(np.float64)), np.sin(angles.astype(np.float64))
    told = angles[:-1].astype(np.float64) if config["prediction"] == "trigflow" else (sines / (alphas + sines))[:-1]
    return Levels(told.astype(_F32), alphas, sines, "trigflow")

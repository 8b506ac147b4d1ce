"""Schedules: what the network is told, and how much signal and noise a latent holds, at every evaluation.

Every family is x_t = alpha_t * x0 + sigma_t * eps. A `Schedule` is a table of that: it is made from the manifest's
"schedule" object (see `edgedit.schedule_config` for its fields) for one sampler and one number of steps. Timesteps
equal those of the diffusers scheduler that the sampler is named after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedit.errors import InputError
from edgedit.sampler_names import resolve_sampler
from edgedit.schedule_config import SOLVER_OPTIONS, check_schedule_config, schedule_json_schema
from edgedit.schedules_diffusers import schedule_config_from_diffusers
from edgedit.schedules_flow import flow_levels, trigflow_levels
from edgedit.schedules_vp import Levels, vp_levels

__all__ = [
    "SAMPLERS_OF_PATH",
    "Schedule",
    "make_schedule",
    "own_steps",
    "schedule_config_from_diffusers",
    "schedule_json_schema",
]

_TRIGFLOW_SAMPLERS = ("scm", "euler", "dmd")
_FLOW_SAMPLERS = ("euler", "euler_ancestral", "heun", "lcm", "dmd", "dpmpp_2m", "dpmpp_2m_sde", "unipc")
_VP_SAMPLERS = (
    "euler",
    "ddim",
    "euler_ancestral",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "unipc",
    "heun",
    "ddpm",
    "lcm",
    "tcd",
    "dmd",
)
SAMPLERS_OF_PATH: Mapping[str, tuple[str, ...]] = {
    "vp": _VP_SAMPLERS,
    "flow": _FLOW_SAMPLERS,
    "trigflow": _TRIGFLOW_SAMPLERS,
}
"""Which samplers can run a model, by the path of its schedule object."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """N network evaluations, and the noise levels between which a solver steps.

    timesteps: float32 [N], the timestep of each evaluation. `timesteps_integer` says that they are whole numbers.
    timestep_scale: the network is told its timestep times this; see `told`.
    alphas, sigmas: float64 [N + 1]; entry i is the level of the latent of evaluation i, the last one the end point.
    prediction: "epsilon", "v_prediction", "sample", "flow" or "trigflow".
    path: "vp" (alpha^2 + sigma^2 = 1), "ve" (a VP model with latents scaled so that alpha = 1, as k-diffusion and
        diffusers' Euler and Heun keep them), "flow" (alpha = 1 - sigma) or "trigflow" (cos, sin).
    sampler: the canonical sampler name that the schedule was made for.
    order: evaluations a step: 2 for Heun (entries 2k - 1 and 2k share a level), else 1.
    init_noise_scale: unit noise times this is the first latent. Any other start is `add_noise`.
    landing_alphas, landing_sigmas: float64 [N], where step i lands; differs from entry i + 1 only for DDIM, which steps
        by a fixed stride.
    table: float32 [T], the training alpha_bar (VP samplers that step between training timesteps), else None.
    options: the solver options of the manifest's schedule object.
    """

    timesteps: NDArray[np.float32]
    alphas: NDArray[np.float64]
    sigmas: NDArray[np.float64]
    prediction: str
    path: str
    sampler: str
    order: int = 1
    init_noise_scale: float = 1.0
    timesteps_integer: bool = False
    timestep_scale: float = 1.0
    landing_alphas: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    landing_sigmas: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    table: NDArray[np.float32] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.landing_alphas.size == 0:
            object.__setattr__(self, "landing_alphas", self.alphas[1:])
            object.__setattr__(self, "landing_sigmas", self.sigmas[1:])

    def __len__(self) -> int:
        """The number of network evaluations, N."""
        return len(self.timesteps)

    @property
    def steps(self) -> int:
        """The number of steps as a person counts them; Heun evaluates the network twice in each but the last."""
        return (len(self) + self.order - 1) // self.order

    def told(self, i: int) -> float:
        """The number that the network is told at evaluation i, rounded to float32."""
        return float(self.timesteps[i] * np.float32(self.timestep_scale))

    def input_scale(self, i: int) -> float:
        """What the latent is multiplied by before evaluation i (diffusers: scale_model_input)."""
        if self.path == "ve":
            return float(1.0 / np.sqrt(self.sigmas[i] ** 2 + 1.0))
        if self.path == "trigflow" and self.prediction == "flow":
            return float(1.0 / (self.alphas[i] + self.sigmas[i]))
        return 1.0

    def add_noise(self, x0: NDArray[np.float32], noise: NDArray[np.float32], i: int) -> NDArray[np.float32]:
        """The latent of evaluation i for a clean x0 and unit noise, float32 (diffusers: add_noise, scale_noise)."""
        if x0.shape != noise.shape:
            raise InputError(
                f"the image latents have shape {x0.shape} and the noise {noise.shape}; give the same shape"
            )
        mixed = self.alphas[i] * x0.astype(np.float64) + self.sigmas[i] * noise.astype(np.float64)
        return np.asarray(mixed, dtype=np.float32)

    def start_at(self, strength: float) -> int:
        """The first evaluation of an image-to-image run; evaluations `range(start, len(schedule))` remain.

        strength in (0, 1]: the share of the steps that is run. VP models round as diffusers' Stable Diffusion pipelines
        do (N * strength down to whole steps), flow and TrigFlow models as those of SD3, FLUX and SANA-Sprint do (the
        skipped steps are rounded down).

        Raises `InputError` for a strength outside (0, 1], or so small that no step is left.
        """
        if not 0.0 < strength <= 1.0:
            raise InputError(f"strength must be above 0 and at most 1; got {strength}")
        total = self.steps
        if self.path in ("vp", "ve"):
            skipped = max(total - min(int(total * strength), total), 0)
        else:
            skipped = int(max(total - min(total * strength, total), 0))
        if skipped >= total:
            raise InputError(f"strength {strength} leaves none of {total} steps; raise the strength or the steps")
        return skipped * self.order


def _steps_of(levels: Sequence[float], path: str, *, told: bool) -> int:
    """Steps of a list of timesteps (`told`) or sigmas: its length, less the end point where the list has one."""
    count = len(levels)
    end_given = count > 0 and (
        (path == "vp" and not told)
        or (path == "flow" and not told and count > 1 and levels[-1] == 0)
        or path == "trigflow"
    )
    return count - end_given


def _own_tables(config: Mapping[str, Any]) -> dict[int, dict[str, Sequence[float]]]:
    """The model's own tables by their number of steps, in the order given: {steps: {"timesteps" or "sigmas": levels}}.

    Where it has both, the tables that make the same number of steps belong together.
    """
    tables: dict[int, dict[str, Sequence[float]]] = {}
    for key in ("timesteps", "sigmas"):
        value = config[key]
        several = value and isinstance(value[0], (list, tuple))
        for levels in () if value is None else value if several else (value,):
            steps = _steps_of(levels, config["path"], told=key == "timesteps")
            tables.setdefault(steps, {})[key] = levels
    return tables


def own_steps(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The numbers of steps that a distilled model was trained for, its default first; empty for any other model.

    config: the manifest's "schedule" object. Raises `BundleError` for a faulty one.
    """
    return tuple(_own_tables(check_schedule_config(config)))


def _own_levels(config: Mapping[str, Any], steps: int | None) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """The model's own timesteps and sigmas for a number of steps, None for the default; (None, None) without tables."""
    tables = _own_tables(config)
    if not tables:
        return None, None
    wanted = next(iter(tables)) if steps is None else steps
    if wanted not in tables:
        able = " or ".join(str(count) for count in sorted(tables))
        raise InputError(f"this model was distilled for {able} step{'s' * (able != '1')}; ask for that, not {wanted}")
    return tables[wanted].get("timesteps"), tables[wanted].get("sigmas")


def _checked_count(config: Mapping[str, Any], steps: int | None, timesteps: Any, sigmas: Any) -> int:
    given = timesteps if timesteps is not None else sigmas
    if steps is not None and (isinstance(steps, bool) or int(steps) != steps or steps < 1):
        raise InputError(f"the number of steps must be a whole number, 1 or more; got {steps}")
    if given is None:
        if steps is None:
            raise InputError("give the number of steps, or a list of timesteps or sigmas")
        if config["path"] != "flow" and steps > config["num_train_timesteps"]:
            raise InputError(
                f"this model knows {config['num_train_timesteps']} timesteps; ask for that many steps or fewer"
            )
        return int(steps)
    count = _steps_of(given, config["path"], told=timesteps is not None)
    if count < 1:
        raise InputError(f"a list of levels needs at least one step; got {list(given)}")
    if steps is not None and steps != count:
        raise InputError(
            f"the list of levels makes {count} steps and {steps} steps were asked for; leave one of them out"
        )
    return count


def make_schedule(
    config: Mapping[str, Any],
    steps: int | None,
    *,
    sigmas: Sequence[float] | None = None,
    image_tokens: int | None = None,
    timesteps: Sequence[float] | None = None,
    sampler: str | None = None,
) -> Schedule:
    """The schedule of one run.

    config: the manifest's "schedule" object (fields: `edgedit.schedule_config`).
    steps: 1 or more; None takes the length of `sigmas`, `timesteps` or of the model's own first table.
    sigmas: explicit noise levels, falling, before the model's shift, as diffusers' `set_timesteps(sigmas=...)` takes
        them: sigma / alpha with the end point last for VP models; in (0, 1] for flow models, a final 0 is implied.
    timesteps: explicit training timesteps (angles with the end point last for TrigFlow models).
    image_tokens: the transformer's image tokens, (height / 8 / patch) * (width / 8 / patch), for models whose shift
        depends on the size.
    sampler: any spelling that `resolve_sampler` knows; None is the model's own. "... karras" also sets the spacing.

    Raises `InputError` for steps, levels or a sampler that this model cannot use, `BundleError` for a faulty config.
    """
    config = check_schedule_config(config)
    name, spacing = (config["sampler"], None) if sampler is None else resolve_sampler(sampler)
    if spacing is not None:
        config["sigma_spacing"] = spacing
    path = config["path"]
    if name not in SAMPLERS_OF_PATH[path]:
        known = ", ".join(SAMPLERS_OF_PATH[path])
        raise InputError(f"sampler {name} cannot run this model's {path} schedule; choose one of: {known}")
    if sigmas is None and timesteps is None:
        timesteps, sigmas = _own_levels(config, steps)
    count = _checked_count(config, steps, timesteps, sigmas)
    if path == "vp":
        levels = vp_levels(config, name, count, timesteps, sigmas)
    elif path == "flow":
        levels = flow_levels(config, name, count, timesteps, sigmas, image_tokens)
    else:
        if config["sigma_spacing"] != "table":
            raise InputError(
                f"a TrigFlow model has no {config['sigma_spacing']} sigma spacing; choose --sampler {name}"
            )
        levels = trigflow_levels(config, count, timesteps, sigmas)
    return _assemble(config, name, levels)


def _assemble(config: Mapping[str, Any], name: str, levels: Levels) -> Schedule:
    landing_alphas = levels.alphas[1:] if levels.landing_alphas is None else levels.landing_alphas
    landing_sigmas = levels.sigmas[1:] if levels.landing_sigmas is None else levels.landing_sigmas
    return Schedule(
        timesteps=levels.timesteps.astype(np.float32),
        alphas=levels.alphas,
        sigmas=levels.sigmas,
        prediction=config["prediction"],
        path=levels.path,
        sampler=name,
        order=levels.order,
        init_noise_scale=levels.init_noise_scale,
        timesteps_integer=bool(np.issubdtype(levels.timesteps.dtype, np.integer)),
        timestep_scale=float(config["timestep_scale"]),
        landing_alphas=landing_alphas,
        landing_sigmas=landing_sigmas,
        table=levels.table,
        options={key: config[key] for key in SOLVER_OPTIONS if config[key] is not None},
    )

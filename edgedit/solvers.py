"""Solvers: from the latent at one noise level to the latent at the next.

`SOLVERS` lists them, `make_solver` makes one. Each is a small function of (x_t, x0 and its history, schedule, i,
noise), computed in float64 (on scaled latents float32) and handed on in float32. It agrees with the diffusers scheduler
that it is named after to float32 rounding. The multistep ones and Heun are in `edgedit.solvers_multistep`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgedit.errors import InputError
from edgedit.sampler_names import SAMPLERS, resolve_sampler
from edgedit.schedule_config import FIELDS
from edgedit.schedules import Schedule
from edgedit.solver_base import Latents, NoiseSource, Solver, predict_x0, slope_float32
from edgedit.solvers_multistep import DPMSolverPP2M, DPMSolverPP2MSDE, Heun, UniPC

__all__ = ["SAMPLERS", "SOLVERS", "NoiseSource", "Solver", "make_solver", "predict_x0", "resolve_sampler"]


class Euler(Solver):
    """x_s = alpha_s x0 + sigma_s eps, which is Euler's method in sigma / alpha, and DDIM without noise.

    EulerDiscreteScheduler ("ve"), FlowMatchEulerDiscreteScheduler ("flow").
    """

    name = "euler"
    paths = ("vp", "ve", "flow", "trigflow")

    def __init__(self, schedule: Schedule, options: Mapping[str, Any]) -> None:
        super().__init__(schedule, options)
        self._straight = schedule.path in ("ve", "flow")
        if self._straight:
            self.precision = np.float32

    def _advance(self, i: int, x: Latents, x0: Latents, noise: NoiseSource) -> Latents:
        plan = self.schedule
        if self._straight:
            distance = np.float32(plan.sigmas[i + 1]) - np.float32(plan.sigmas[i])
            return np.asarray(x + slope_float32(x, x0, plan.sigmas[i]) * distance)
        return np.asarray(plan.landing_alphas[i] * x0 + plan.landing_sigmas[i] * self._epsilon(i, x, x0))


class DDIM(Solver):
    """Song et al. 2021 (arXiv 2010.02502), equation 12; `eta` 0 to 1. DDIMScheduler.

    With `clip_sample_range` x0 is clipped and eps is not, as `use_clipped_model_output=False` has it.
    """

    name = "ddim"
    paths = ("vp",)
    accepts = ("eta", "clip_sample_range")

    def _advance(self, i: int, x: Latents, x0: Latents, noise: NoiseSource) -> Latents:
        plan, eta = self.schedule, self._eta(0.0)
        alpha, sigma = plan.landing_alphas[i], plan.landing_sigmas[i]
        epsilon = self._epsilon(i, x, x0)
        self._x0 = self._clip(x0)
        deviation = 0.0
        if eta > 0:
            ratio = (sigma / plan.sigmas[i]) ** 2 * (1 - (plan.alphas[i] / alpha) ** 2)
            deviation = eta * max(float(ratio), 0.0) ** 0.5
        result = alpha * self._x0 + max(sigma**2 - deviation**2, 0.0) ** 0.5 * epsilon
        return np.asarray(result + deviation * noise(x.shape) if eta > 0 else result)


class EulerAncestral(Solver):
    """A step down to a lower level than asked for, then noise back up to it; `eta` 0 to 1, 1 is the usual.

    "ve": EulerAncestralDiscreteScheduler. "flow": LTXEulerAncestralRFScheduler, which draws nothing on the last step.
    """

    name = "euler_ancestral"
    paths = ("ve", "flow")
    accepts = ("eta",)

    def __init__(self, schedule: Schedule, options: Mapping[str, Any]) -> None:
        super().__init__(schedule, options)
        if schedule.path == "ve":
            self.precision = np.float32

    def _advance(self, i: int, x: Latents, x0: Latents, noise: NoiseSource) -> Latents:
        plan, eta = self.schedule, self._eta(1.0)
        if plan.path == "flow":
            return self._advance_flow(float(plan.sigmas[i]), float(plan.sigmas[i + 1]), eta, x, x0, noise)
        # float32, as in diffusers: the last difference cancels, and what is left shows in the result
        start, end = np.float32(plan.sigmas[i]), np.float32(plan.sigmas[i + 1])
        up = min(end, np.float32(eta) * np.sqrt(end**2 * (start**2 - end**2) / start**2))
        down = np.sqrt(end**2 - up**2)
        return np.asarray(x + slope_float32(x, x0, plan.sigmas[i]) * (down - start) + noise(x.shape) * up)

    def _advance_flow(
        self, start: float, end: float, eta: float, x: Latents, x0: Latents, noise: NoiseSource
    ) -> Latents:
        if end < 1e-8:
            return x0
        down = end * (1.0 + (end / start - 1.0) * eta)
        keep = (1.0 - end) / (1.0 - down)
        result = keep * (x0 + (down / start) * (x - x0))
        if eta == 0:
            return np.asarray(result)
        return np.asarray(result + max(end**2 - (down * keep) ** 2, 0.0) ** 0.5 * noise(x.shape))


class DDPM(Solver):
    """Ho et al. 2020 (arXiv 2006.11239), equation 7. DDPMScheduler; no noise after timestep 0."""

    name = "ddpm"
    paths = ("vp",)
    accepts = ("variance_type", "clip_sample_range")

    def _advance(self, i: int, x: Latents, x0: Latents, noise: NoiseSource) -> Latents:
        plan = self.schedule
        # the differences of neighbouring levels are small, so they are taken in diffusers' precision
        one = np.float32(1)
        now, then = np.float32(plan.alphas[i] ** 2), np.float32(plan.landing_alphas[i] ** 2)
        kept = now / then
        lost, before, after = one - kept, one - now, one - then
        self._x0 = self._clip(x0)
        mean = np.sqrt(then) * lost / before * self._x0 + np.sqrt(kept) * after / before * x
        if plan.timesteps[i] <= 0:
            return np.asarray(mean)
        variance = (
            lost if self.options["variance_type"] == "fixed_large" else max(after / before * lost, np.float32(1e-20))
        )
        return np.asarray(mean + np.sqrt(variance) * noise(x.shape))


class LCM(Solver):
    """Luo et al. 2023 (arXiv 2310.04378): the consistency function's x0, then fresh noise.

    "vp": LCMScheduler, with its boundary condition (sigma_data 0.5) and no noise on the last step.
    "flow": FlowMatchLCMScheduler, which has no boundary condition and draws noise on the last step too.
    """

    name = "lcm"
    paths = ("vp", "flow")
    accepts = ("timestep_scaling", "clip_sample_range")

    def _advance(self, i: int, x: Latents, x0: Latents, noise: NoiseSource) -> Latents:
        plan = self.schedule
        if plan.path == "flow":
            return np.asarray(plan.alphas[i + 1] * x0 + plan.sigmas[i + 1] * noise(x.shape))
        time = float(plan.timesteps[i]) * self.options["timestep_scaling"]
        skip, out = 0.25 / (time**2 + 0.25), time / (time**2 + 0.25) ** 0.5
        self._x0 = out * self._clip(x0) + skip * x
        if i == len(plan) - 1:
            return self._x0
        return np.asarray(plan.alphas[i + 1] * self._x0 + plan.sigmas[i + 1] * noise(x.shape))


class TCD(Solver):
    """Zheng et al. 2024 (arXiv 2402.19159); `eta` is the paper's gamma, 0.3 by default. TCDScheduler."""

    name = "tcd"
    paths = ("vp",)
    accepts = ("eta",)

    def _advance(self, i: int, x: Latents, x0: Latents, noise: NoiseSource) -> Latents:
        plan, eta = self.schedule, self._eta(0.3)
        if plan.table is None:
            raise self._refuse("needs a schedule made for it; call make_schedule with sampler='tcd'")
        last = i == len(plan) - 1
        following = 0 if last else int(plan.timesteps[i + 1])
        # float32, because diffusers takes the floor of a float32 product
        between = int(np.floor(np.float32(1 - eta) * np.float32(following)))
        level = float(plan.table[between])
        result = level**0.5 * x0 + (1 - level) ** 0.5 * self._epsilon(i, x, x0)
        if eta == 0 or last:
            return np.asarray(result)
        kept = float(plan.table[following]) / level
        return np.asarray(kept**0.5 * result + (1 - kept) ** 0.5 * noise(x.shape))


class SCM(Solver):
    """Lu & Song 2024 (arXiv 2410.11081): x0 on the TrigFlow path, then fresh noise. SCMScheduler, SANA-Sprint.

    Noise is drawn on the last step too, as diffusers draws it, and the last step gives x0 itself.
    """

    name = "scm"
    paths = ("trigflow",)

    def _advance(self, i: int, x: Latents, x0: Latents, noise: NoiseSource) -> Latents:
        fresh = noise(x.shape)
        if i == len(self.schedule) - 1:
            return x0
        return np.asarray(self.schedule.alphas[i + 1] * x0 + self.schedule.sigmas[i + 1] * fresh)


class DMD(Solver):
    """x0, then fresh noise up to the next level (DMD, arXiv 2311.18828; SwiftBrush, SIM); the last step gives x0."""

    name = "dmd"
    paths = ("vp", "flow", "trigflow")

    def _advance(self, i: int, x: Latents, x0: Latents, noise: NoiseSource) -> Latents:
        if i == len(self.schedule) - 1:
            return x0
        return np.asarray(self.schedule.alphas[i + 1] * x0 + self.schedule.sigmas[i + 1] * noise(x.shape))


SOLVERS: Mapping[str, type[Solver]] = {
    solver.name: solver
    for solver in (Euler, DDIM, EulerAncestral, DPMSolverPP2M, DPMSolverPP2MSDE, UniPC, Heun, DDPM, LCM, TCD, SCM, DMD)
}
"""Solvers by canonical name, the names of `edgedit.sampler_names.SAMPLERS`."""


def make_solver(name: str, schedule: Schedule, *, eta: float | None = None, **options: Any) -> Solver:
    """A fresh solver for one run over `schedule`.

    name: any spelling that `resolve_sampler` knows. eta: noise of ddim (default 0), euler_ancestral (1) and tcd (0.3).
    options: fields of the schedule object that this solver reads (`solver_order`, `solver_type`, ...); they override
    those of the manifest, which the schedule carries.

    Raises `InputError` for a name that is not known, for a solver that cannot run on the schedule's path, and for an
    option that the solver does not have.
    """
    solver = SOLVERS[resolve_sampler(name)[0]]
    scaled_twice = schedule.order != solver.order
    if schedule.path not in solver.paths or scaled_twice:
        able = ", ".join(
            key for key, kind in SOLVERS.items() if schedule.path in kind.paths and kind.order == schedule.order
        )
        raise InputError(
            f"sampler {solver.name} cannot run a {schedule.path} schedule made for {schedule.sampler}; choose: {able}"
        )
    if eta is not None:
        options["eta"] = eta
    for option, value in options.items():
        if option not in solver.accepts:
            raise InputError(f"sampler {solver.name} has no option {option}; leave it out, or choose another sampler")
        if not FIELDS[option].allows(value) or (option == "solver_order" and value > solver.highest_order):
            raise InputError(
                f"sampler {solver.name} cannot take {option} = {value!r}; leave it out for the model's own"
            )
    carried = {key: value for key, value in schedule.options.items() if key in solver.accepts}
    if "solver_order" in carried:
        carried["solver_order"] = min(carried["solver_order"], solver.highest_order)
    return solver(schedule, {**carried, **options})

"""Trajectories of every solver against the diffusers scheduler that it is named after, on a stub network."""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from schedule_rounding import EXACT_ROOTS, TIMESTEP_ROUNDING

from edgedit.errors import InputError
from edgedit.schedules import SAMPLERS_OF_PATH, Schedule, make_schedule, schedule_config_from_diffusers
from edgedit.solvers import SAMPLERS, SOLVERS, make_solver

SEED = random.SystemRandom().randrange(2**31)
SHAPE = (2, 4, 5, 3)
TOLERANCE = 1e-5
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
NO_CLIP = {"clip_sample": False}
#: Without AVX2 torch's tables differ in the last bit, which moves timesteps that diffusers truncates to whole numbers.
EXACT = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}

Case = tuple[str, dict[str, Any]]


class Network:
    """A smooth nonlinear function of (x, t), computed in float64 so that it adds no rounding of its own."""

    def __init__(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.weight, self.phase = generator.normal(size=SHAPE), generator.normal(size=SHAPE)

    def __call__(self, x: np.ndarray, timestep: float) -> np.ndarray:
        inner = np.tanh(x.astype(np.float64) * self.weight + self.phase * np.cos(timestep / 270.0))
        return np.asarray(0.7 * inner + 0.4 * np.sin(self.phase + timestep / 400.0), dtype=np.float32)


def reference_run(
    scheduler: Any, x: np.ndarray, network: Network, generator: torch.Generator, start: int = 0, **step_options: Any
) -> list[np.ndarray]:
    """The latents after every step of a diffusers scheduler whose timesteps are set."""
    if "generator" in inspect.signature(scheduler.step).parameters:
        step_options["generator"] = generator
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    latents, path = torch.from_numpy(x), []
    for t in scheduler.timesteps[start:]:
        scaled = scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
        output = torch.from_numpy(network(scaled.numpy(), float(np.float32(t))))
        latents = scheduler.step(output, t, latents, **step_options, return_dict=False)[0]
        path.append(latents.numpy())
    return path


def our_run(
    schedule: Schedule, x: np.ndarray, network: Network, generator: torch.Generator, start: int = 0, **options: Any
) -> list[np.ndarray]:
    solver = make_solver(schedule.sampler, schedule, **options)
    path = []
    for i in range(start, len(schedule)):
        output = network(x * np.float32(schedule.input_scale(i)), float(schedule.timesteps[i]))
        x = solver.step(i, x, output, lambda shape: torch.randn(shape, generator=generator).numpy())
        assert x.dtype == np.float32
        assert solver.x0.dtype == np.float32
        path.append(x)
    assert solver.evaluations == len(schedule)
    return path


def config_of(scheduler: Any) -> dict[str, Any]:
    """The schedule object, through the JSON text that diffusers writes and the JSON text that a manifest holds."""
    config = schedule_config_from_diffusers(type(scheduler).__name__, json.loads(scheduler.to_json_string()))
    return dict(json.loads(json.dumps(config)))


def assert_same_path(ours: list[np.ndarray], theirs: list[np.ndarray], note: str, tolerance: float = TOLERANCE) -> None:
    assert len(ours) == len(theirs), note
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error <= tolerance, f"{note}: relative error {error:.2e} after step {i}"


def assert_same_timesteps(schedule: Schedule, scheduler: Any, note: str) -> None:
    theirs = scheduler.timesteps.numpy().astype(np.float32)
    if schedule.timesteps_integer or np.all(theirs == np.round(theirs)):
        np.testing.assert_array_equal(schedule.timesteps, theirs, err_msg=note)
    else:
        # fractional ones come from torch's sqrt, which on x86 is now and then one unit in the last place off
        np.testing.assert_allclose(schedule.timesteps, theirs, rtol=TIMESTEP_ROUNDING, atol=0, err_msg=note)


def check(
    case: Case, steps: int, *, step_options: Mapping[str, Any] | None = None, start: int = 0, **options: Any
) -> None:
    name, settings = case
    seed = SEED + steps
    note = f"{name}({settings}), {steps} steps, seed {seed}"
    scheduler = getattr(diffusers, name)(**settings)
    scheduler.set_timesteps(steps)
    schedule = make_schedule(config_of(scheduler), steps)
    assert schedule.steps == steps, note
    assert_same_timesteps(schedule, scheduler, note)
    network = Network(seed)
    x = np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)
    scale = float(getattr(scheduler, "init_noise_sigma", 1.0))
    assert schedule.init_noise_scale == pytest.approx(scale, rel=1e-6), note
    x = x * np.float32(scale)
    streams = [torch.Generator().manual_seed(seed) for _ in range(2)]
    theirs = reference_run(scheduler, x, network, streams[0], start, **(step_options or {}))
    ours = our_run(schedule, x, network, streams[1], start, **options)
    if not np.isfinite(theirs[-1]).all():
        # UniPC's bh1 divides infinity by infinity on the step to sigma 0 in diffusers; ours is the limit
        assert settings.get("solver_type") == "bh1", note
        assert np.isfinite(ours.pop()).all(), note
        theirs.pop()
    # A scaled latent of a network that says x0 is all noise: where torch's roots are not exact, the last bit of its
    # largest sigma (157) is 2e-5 of the first step's result.
    coarse = not (EXACT and EXACT_ROOTS) and schedule.path == "ve" and schedule.prediction == "sample"
    tolerance = 5e-5 if coarse else TOLERANCE
    if not EXACT_ROOTS and schedule.path == "ve" and case[1].get("rescale_betas_zero_snr"):
        # The first level is 4096, and the first step takes all of that away again: its last bit is 5e-4.
        tolerance = 5e-4
    if not EXACT_ROOTS and str(case[1].get("algorithm_type", "")).startswith("sde"):
        tolerance = 5e-5
    assert_same_path(ours, theirs, note, tolerance)
    assert torch.equal(streams[0].get_state(), streams[1].get_state()), f"{note}: another number of noise draws"


ALL_COUNTS: list[Case] = [
    ("DDIMScheduler", NO_CLIP),
    ("DDIMScheduler", {**NO_CLIP, "timestep_spacing": "linspace"}),
    ("DDIMScheduler", {**NO_CLIP, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
    ("DDPMScheduler", NO_CLIP),
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, **STABLE_DIFFUSION}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {**FLOW, "flow_shift": 3.0}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("UniPCMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {**FLOW, "flow_shift": 3.0}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchLCMScheduler", {"shift": 3.0}),
    ("LCMScheduler", {}),
    ("TCDScheduler", {}),
]


@pytest.mark.parametrize("case", ALL_COUNTS, ids=str)
def test_trajectory_and_timesteps_match_diffusers_for_every_step_count_from_1_to_50(case: Case) -> None:
    for steps in range(1, 51):
        check(case, steps)


SPACED: tuple[Case, ...] = (
    ("DDIMScheduler", NO_CLIP),
    ("DDPMScheduler", NO_CLIP),
    ("EulerDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {}),
)
PREDICTING_SAMPLES = tuple(name for name, _ in SPACED if "Ancestral" not in name)
SPREAD = ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")

OPTIONS: list[Case] = [
    *((name, {**base, **LEADING, "prediction_type": "v_prediction", **STABLE_DIFFUSION}) for name, base in SPACED),
    *((name, {**base, "timestep_spacing": "trailing"}) for name, base in SPACED),
    *((name, {**base, "timestep_spacing": "linspace", **STABLE_DIFFUSION}) for name, base in SPACED),
    *((name, {**(NO_CLIP if name[:2] == "DD" else {}), "prediction_type": "sample"}) for name in PREDICTING_SAMPLES),
    *((name, {f"use_{kind}_sigmas": True}) for name in SPREAD for kind in ("karras", "exponential")),
    *(
        (name, {**(NO_CLIP if name[:2] == "DD" else {}), **ZERO_SNR})
        for name in ("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")
    ),
    *((name, {"final_sigmas_type": "sigma_min"}) for name in SPREAD if name[:4] != "Heun"),
    ("DDIMScheduler", {"clip_sample": True, "set_alpha_to_one": False}),
    ("DDPMScheduler", {"clip_sample": True, "variance_type": "fixed_large"}),
    ("DDPMScheduler", {**NO_CLIP, "variance_type": "fixed_small_log", "beta_schedule": "squaredcos_cap_v2"}),
    ("DDPMScheduler", {**NO_CLIP, "trained_betas": list(np.linspace(0.0002, 0.01, 500)), "num_train_timesteps": 500}),
    ("HeunDiscreteScheduler", {"clip_sample": True}),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "sigma_min": 0.02, "sigma_max": 40.0}),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    *(
        ("DPMSolverMultistepScheduler", {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, **spread})
        for spread in ({}, {"use_karras_sigmas": True})
    ),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
    ("DPMSolverMultistepScheduler", {**FLOW, "flow_shift": 2.0, "algorithm_type": "sde-dpmsolver++"}),
    ("UniPCMultistepScheduler", {"disable_corrector": [0, 1, 5]}),
    ("UniPCMultistepScheduler", {"lower_order_final": False, "final_sigmas_type": "sigma_min"}),
    ("UniPCMultistepScheduler", {**FLOW, "final_sigmas_type": "sigma_min"}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "stochastic_sampling": True}),
    *(("FlowMatchEulerDiscreteScheduler", {f"use_{kind}_sigmas": True}) for kind in ("karras", "exponential")),
    ("LCMScheduler", {"prediction_type": "v_prediction", "original_inference_steps": 100, "timestep_scaling": 0.3}),
    ("LCMScheduler", {"prediction_type": "sample", "clip_sample": True}),
    ("TCDScheduler", {"prediction_type": "sample"}),
]


def some_counts(seed: int) -> list[int]:
    return sorted({1, 2, 3, 14, 15, *random.Random(seed).sample(range(4, 51), 4)})


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_options_of_a_scheduler_match_diffusers(case: Case) -> None:
    if not EXACT and "use_exponential_sigmas" in case[1]:
        pytest.skip("diffusers itself gives other timesteps on this processor")
    for steps in some_counts(SEED):
        check(case, steps)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", ["midpoint", "heun"])
def test_dpm_solver_matches_diffusers_at_every_order_and_ending(order: int, kind: str) -> None:
    for final in range(4):
        ending = {"lower_order_final": bool(final & 1), "euler_at_final": bool(final & 2)}
        for steps in some_counts(SEED + final):
            case = ("DPMSolverMultistepScheduler", {"solver_order": order, "solver_type": kind, **ending})
            check(case, steps)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", ["bh1", "bh2"])
def test_unipc_matches_diffusers_at_every_order(order: int, kind: str) -> None:
    for end in ("zero", "sigma_min"):
        for steps in some_counts(SEED):
            settings = {"solver_order": order, "solver_type": kind, "final_sigmas_type": end}
            check(("UniPCMultistepScheduler", settings), steps)


@pytest.mark.parametrize(("name", "settings"), [("DDIMScheduler", NO_CLIP), ("TCDScheduler", {})])
def test_eta_draws_as_much_noise_as_in_diffusers(name: str, settings: dict[str, Any]) -> None:
    for eta in (0.0, round(random.Random(SEED).uniform(0.05, 0.95), 3), 1.0):
        for steps in some_counts(SEED):
            check((name, settings), steps, step_options={"eta": eta}, eta=eta)


def test_scm_matches_diffusers_and_draws_noise_on_the_last_step_too() -> None:
    for steps in range(1, 51):
        scheduler = diffusers.SCMScheduler()
        scheduler.set_timesteps(steps, max_timesteps=1.5708, intermediate_timesteps=1.3 if steps == 2 else None)
        schedule = make_schedule({**config_of(scheduler), "prediction": "trigflow"}, steps)
        told = scheduler.timesteps.numpy()[:-1]
        np.testing.assert_allclose(schedule.timesteps, told, rtol=0 if EXACT else TIMESTEP_ROUNDING, atol=0)
        network, data = Network(SEED + steps), scheduler.config.sigma_data
        x = np.random.default_rng(SEED + steps).normal(size=SHAPE).astype(np.float32)
        streams = [torch.Generator().manual_seed(SEED) for _ in range(2)]
        latents, theirs = torch.from_numpy(x) * data, []
        for t in scheduler.timesteps[:-1]:
            output = torch.from_numpy(network(latents.numpy() / data, float(t))) * data
            latents = scheduler.step(output, t, latents, generator=streams[0], return_dict=False)[0]
            theirs.append(latents.numpy() / data)
        assert_same_path(our_run(schedule, x, network, streams[1]), theirs, f"{steps} steps, seed {SEED + steps}")
        assert torch.equal(streams[0].get_state(), streams[1].get_state())


def test_sana_sprint_is_a_flow_network_on_the_trigflow_path() -> None:
    for steps, table in ((1, None), (2, None), (3, None), (4, [1.57, 1.2, 0.9, 0.4, 0.1])):
        scheduler = diffusers.SCMScheduler()
        scheduler.set_timesteps(
            steps,
            timesteps=table,
            max_timesteps=None if table else 1.5708,
            intermediate_timesteps=1.3 if steps == 2 else None,
        )
        network, data = Network(SEED), scheduler.config.sigma_data
        x = np.random.default_rng(SEED).normal(size=SHAPE).astype(np.float32)
        streams = [torch.Generator().manual_seed(SEED) for _ in range(2)]
        latents, denoised, told = torch.from_numpy(x) * data, torch.zeros(()), []
        for s in scheduler.timesteps[:-1]:
            # the change of variables of SanaSprintPipeline.__call__
            t = torch.sin(s) / (torch.cos(s) + torch.sin(s))
            norm = torch.sqrt(t**2 + (1 - t) ** 2)
            given = latents / data * norm
            told.append(float(t))
            v = torch.from_numpy(network(given.numpy(), float(t)))
            output = ((1 - 2 * t) * given + (1 - 2 * t + 2 * t**2) * v) / norm * data
            latents, denoised = scheduler.step(output, s, latents, generator=streams[0], return_dict=False)
        schedule = make_schedule(config_of(scheduler), steps, timesteps=table)
        np.testing.assert_allclose(schedule.timesteps, told, rtol=TIMESTEP_ROUNDING)
        ours = our_run(schedule, x, network, streams[1])
        assert_same_path(ours[-1:], [denoised.numpy() / data], f"{steps} steps, seed {SEED}")


def test_euler_ancestral_on_a_flow_model_matches_ltx_euler_ancestral_rf() -> None:
    for steps in range(1, 51):
        eta = random.Random(SEED + steps).choice([0.0, 0.4, 1.0])
        schedule = make_schedule(
            {"path": "flow", "prediction": "flow", "sampler": "euler", "shift": 2.5}, steps, sampler="euler a"
        )
        scheduler = diffusers.LTXEulerAncestralRFScheduler(eta=eta)
        scheduler.set_timesteps(sigmas=schedule.sigmas.tolist())
        network = Network(SEED + steps)
        x = np.random.default_rng(SEED + steps).normal(size=SHAPE).astype(np.float32)
        streams = [torch.Generator().manual_seed(SEED) for _ in range(2)]
        scheduler.timesteps = scheduler.timesteps[:-1]
        theirs = reference_run(scheduler, x, network, streams[0])
        note = f"eta {eta}, {steps} steps, seed {SEED + steps}"
        assert_same_path(our_run(schedule, x, network, streams[1], eta=eta), theirs, note)
        assert torch.equal(streams[0].get_state(), streams[1].get_state()), note


def test_one_step_dmd_gives_the_clean_estimate_that_ddpm_reports() -> None:
    scheduler = diffusers.DDPMScheduler(clip_sample=False)
    scheduler.set_timesteps(timesteps=[400])
    config = {**config_of(scheduler), "sampler": "dmd", "timesteps": [400]}
    schedule = make_schedule(config, 1)
    x = np.random.default_rng(SEED).normal(size=SHAPE).astype(np.float32)
    output = Network(SEED)(x, 400.0)
    solver = make_solver("dmd", schedule)

    def refuse(shape: tuple[int, ...]) -> np.ndarray:
        raise AssertionError(f"one step draws no noise, and {shape} was asked for")

    theirs = scheduler.step(torch.from_numpy(output), scheduler.timesteps[0], torch.from_numpy(x))
    assert_same_path([solver.step(0, x, output, refuse)], [theirs.pred_original_sample.numpy()], f"seed {SEED}")


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        ({"path": "vp", "prediction": "epsilon", "sampler": "dmd", "timesteps": [999, 749, 499, 249]}, 4),
        ({"path": "flow", "prediction": "flow", "sampler": "dmd", "shift": 3.0}, 4),
        ({"path": "trigflow", "prediction": "trigflow", "sampler": "dmd"}, 3),
    ],
)
def test_few_step_dmd_renoises_the_clean_estimate_between_steps(config: dict[str, Any], steps: int) -> None:
    schedule = make_schedule(config, steps)
    solver = make_solver("dmd", schedule)
    generator = np.random.default_rng(SEED)
    x = generator.normal(size=SHAPE).astype(np.float32)
    for i in range(steps):
        output = generator.normal(size=SHAPE).astype(np.float32)
        drawn: list[np.ndarray] = []

        def draw(shape: tuple[int, ...], drawn: list[np.ndarray] = drawn) -> np.ndarray:
            drawn.append(generator.normal(size=shape).astype(np.float32))
            return drawn[-1]

        x = solver.step(i, x, output, draw)
        assert len(drawn) == (i < steps - 1)
        expected = schedule.add_noise(solver.x0, drawn[0], i + 1) if drawn else solver.x0
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)


MIDDLE: list[Case] = [
    ("DDIMScheduler", NO_CLIP),
    ("EulerDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("DPMSolverMultistepScheduler", FLOW),
    ("UniPCMultistepScheduler", {"solver_order": 3}),
    ("UniPCMultistepScheduler", FLOW),
    ("LCMScheduler", {}),
    ("TCDScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
]


@pytest.mark.parametrize("case", MIDDLE, ids=str)
def test_a_run_that_starts_in_the_middle_matches_diffusers(case: Case) -> None:
    draw = random.Random(SEED)
    for _ in range(6):
        steps = draw.randrange(2, 51)
        order = getattr(getattr(diffusers, case[0]), "order", 1)
        check(case, steps, start=draw.randrange(steps) * order)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_every_sampler_runs_on_every_path_that_it_claims(name: str) -> None:
    betas = {"path": "vp", "prediction": "epsilon", "sampler": "euler"}
    flow = {"path": "flow", "prediction": "flow", "sampler": "euler"}
    trigflow = {"path": "trigflow", "prediction": "flow", "sampler": "scm"}
    ran = 0
    for config in (betas, flow, trigflow):
        if name not in SAMPLERS_OF_PATH[config["path"]]:
            with pytest.raises(InputError, match=f"sampler {name} cannot run .* choose one of: "):
                make_schedule(config, 4, sampler=name)
            continue
        schedule = make_schedule(config, 4, sampler=name)
        assert schedule.path in SOLVERS[name].paths
        x = np.random.default_rng(SEED).normal(size=SHAPE).astype(np.float32) * np.float32(schedule.init_noise_scale)
        path = our_run(schedule, x, Network(SEED), torch.Generator().manual_seed(SEED))
        assert np.isfinite(path[-1]).all()
        ran += 1
    assert ran, f"{name} runs on no path"


def test_a_perfect_network_brings_every_solver_to_the_picture() -> None:
    picture = np.random.default_rng(SEED).normal(size=SHAPE).astype(np.float32)
    for name in SAMPLERS:
        config: dict[str, Any] = {"path": "vp", "prediction": "sample", "sampler": "euler"}
        if name == "scm":
            config = {"path": "trigflow", "prediction": "trigflow", "sampler": "scm"}
        schedule = make_schedule(config, 5, sampler=name)
        solver = make_solver(name, schedule)
        noise = np.random.default_rng(SEED + 1)
        x = schedule.add_noise(picture, noise.normal(size=SHAPE).astype(np.float32), 0)
        for i in range(len(schedule)):
            output = picture
            if name == "scm":
                output = ((schedule.alphas[i] * x - picture) / schedule.sigmas[i]).astype(np.float32)
            x = solver.step(i, x, output, lambda shape: noise.normal(size=shape).astype(np.float32))  # noqa: B023
        # TCD ends at training timestep 0, where a hundredth of the noise is left; LCM keeps c_skip of it
        np.testing.assert_allclose(x, picture, atol=0.15 if name in ("tcd", "lcm") else 2e-4, err_msg=name)


def test_an_unknown_solver_is_refused_with_the_list_of_those_that_are_known() -> None:
    schedule = make_schedule({"path": "vp", "prediction": "epsilon", "sampler": "euler"}, 4)
    with pytest.raises(InputError, match="unknown sampler 'plms'; choose one of: euler, ddim") as caught:
        make_solver("plms", schedule)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "sampler"),
    [("scm", "euler"), ("ddim", "euler"), ("heun", "euler"), ("euler", "heun"), ("tcd", "dpmpp_2m")],
)
def test_a_solver_that_cannot_run_on_a_schedule_is_refused(name: str, sampler: str) -> None:
    schedule = make_schedule({"path": "vp", "prediction": "epsilon", "sampler": "euler"}, 4, sampler=sampler)
    if (name, sampler) == ("tcd", "dpmpp_2m"):
        x = np.zeros(SHAPE, np.float32)
        with pytest.raises(InputError, match="make_schedule with sampler='tcd'"):
            make_solver(name, schedule).step(0, x, x, lambda shape: np.zeros(shape, np.float32))
        return
    with pytest.raises(InputError, match=f"sampler {name} cannot run a ve schedule made for {sampler}; choose: "):
        make_solver(name, schedule)


def test_options_that_a_solver_does_not_have_are_refused_and_its_own_override_the_manifest() -> None:
    config = {"path": "vp", "prediction": "epsilon", "sampler": "dpmpp_2m", "solver_order": 3}
    schedule = make_schedule(config, 4)
    with pytest.raises(InputError, match="dpmpp_2m has no option eta"):
        make_solver("dpmpp_2m", schedule, eta=0.5)
    for name, option, value in (
        ("dpmpp_2m_sde", "solver_order", 3),
        ("unipc", "solver_order", 4),
        ("unipc", "solver_type", "bh3"),
        ("ddim", "eta", 1.5),
    ):
        with pytest.raises(InputError, match=f"sampler {name} cannot take {option} = {value!r}"):
            make_solver(name, make_schedule(config, 4, sampler=name), **{option: value})
    assert make_solver("dpmpp_2m_sde", schedule).options["solver_order"] == 2
    assert make_solver("dpmpp_2m", schedule).options["solver_order"] == 3
    assert make_solver("dpmpp_2m", schedule, solver_order=1).options["solver_order"] == 1


def test_steps_out_of_turn_and_wrong_shapes_are_refused() -> None:
    schedule = make_schedule({"path": "vp", "prediction": "epsilon", "sampler": "dpmpp_2m"}, 4)
    x = np.zeros(SHAPE, np.float32)
    draw: Callable[[tuple[int, ...]], np.ndarray] = lambda shape: np.zeros(shape, np.float32)  # noqa: E731
    solver = make_solver("dpmpp_2m", schedule)
    with pytest.raises(ValueError, match="no clean estimate"):
        _ = solver.x0
    with pytest.raises(ValueError, match="latents have shape"):
        solver.step(0, x, x[:1], draw)
    solver.step(1, x, x, draw)
    with pytest.raises(ValueError, match="evaluation 1 is not due; expected 2"):
        solver.step(1, x, x, draw)
    with pytest.raises(ValueError, match="evaluation 4 is not due; expected 0 to 3"):
        make_solver("euler", schedule).step(4, x, x, draw)
    heun = make_schedule({"path": "flow", "prediction": "flow", "sampler": "heun"}, 4)
    with pytest.raises(ValueError, match="second half of a step"):
        make_solver("heun", heun).step(1, x, x, draw)

"""Timesteps, noise levels and image-to-image starts against diffusers, golden numbers, and what is refused."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import Any

import diffusers
import jsonschema
import numpy as np
import pytest
import torch
from schedule_rounding import TIMESTEP_ROUNDING

from edgedit.errors import BundleError, ConversionError, InputError
from edgedit.sampler_names import SAMPLERS, resolve_sampler
from edgedit.schedule_config import FIELDS, check_schedule_config
from edgedit.schedules import make_schedule, own_steps, schedule_config_from_diffusers, schedule_json_schema
from edgedit.sigma_spacing import beta_quantile
from edgedit.solvers import make_solver
from edgedit.vp_table import alphas_cumprod

SEED = random.SystemRandom().randrange(2**31)
VP: dict[str, Any] = {"path": "vp", "prediction": "epsilon", "sampler": "dpmpp_2m"}
FLOW: dict[str, Any] = {"path": "flow", "prediction": "flow", "sampler": "euler"}
TRIGFLOW: dict[str, Any] = {"path": "trigflow", "prediction": "flow", "sampler": "scm"}


def config_of(scheduler: Any) -> dict[str, Any]:
    return schedule_config_from_diffusers(type(scheduler).__name__, json.loads(scheduler.to_json_string()))


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


def near(values: Any, text: str) -> None:
    np.testing.assert_allclose(values, numbers(text), atol=6e-6, rtol=0)


def test_golden_sana_flow_dpm_solver() -> None:
    schedule = make_schedule({**FLOW, "sampler": "dpmpp_2m", "shift": 3.0}, 20)
    near(
        schedule.sigmas,
        ".99967 .98242 .96394 .94409 .92272 .89964 .87464 .84746 .81781 .78534 "
        ".74962 .71015 .6663 .61728 .56215 .49967 .42827 .34589 .24979 .13624 0",
    )
    told = "999 982 963 944 922 899 874 847 817 785 749 710 666 617 562 499 428 345 249 136"
    assert schedule.timesteps.tolist() == numbers(told)
    assert schedule.timesteps_integer


def test_golden_scm_angles() -> None:
    for steps, text in ((1, "1.5708 0"), (2, "1.5708 1.3 0"), (4, "1.5708 1.1781 .7854 .3927 0")):
        schedule = make_schedule({**TRIGFLOW, "prediction": "trigflow"}, steps)
        near(schedule.timesteps, " ".join(text.split()[:-1]))
        near(np.arctan2(schedule.sigmas, schedule.alphas), text)


def test_golden_lcm_and_pixart_timesteps() -> None:
    assert make_schedule({**VP, "sampler": "lcm"}, 4).timesteps.tolist() == [999, 759, 499, 259]
    told = make_schedule(VP, 20).timesteps.tolist()
    assert told[:2] == [999, 949]
    assert told[9:11] == [549, 500]
    assert told[-1] == 50


@pytest.mark.parametrize(
    ("options", "steps", "tokens", "text"),
    [
        ({"base_sigmas": "unit"}, 4, None, "1 .75 .5 .25 0"),
        ({"shift": 3.0}, 4, None, "1 .85769 .60215 .00893 0"),
        ({"shift": 3.0, "base_sigmas": "unit"}, 8, None, "1 .95455 .9 .83333 .75 .64286 .5 .3 0"),
        ({"base_sigmas": "unit", "dynamic_shift": {"rule": "empirical"}}, 4, 4096, "1 .96738 .90814 .7672 0"),
        (
            {"base_sigmas": "unit", "dynamic_shift": {"rule": "fixed", "mu": 1.15}},
            8,
            None,
            "1 .95672 .90453 .84035 .75951 .65457 .51284 .3109 0",
        ),
        (
            {"base_sigmas": "unit", "dynamic_shift": {"rule": "linear", "max_shift": 1.16}},
            4,
            4096,
            "1 .90539 .76133 .51534 0",
        ),
    ],
    ids=["schnell", "sd3.5-turbo", "z-image-turbo", "klein", "krea2-turbo", "dreamlite"],
)
def test_golden_flow_sigmas(options: dict[str, Any], steps: int, tokens: int | None, text: str) -> None:
    near(make_schedule({**FLOW, **options}, steps, image_tokens=tokens).sigmas, text)


def test_golden_long_dynamic_shifts() -> None:
    flux = make_schedule({**FLOW, "base_sigmas": "unit", "dynamic_shift": {"rule": "linear"}}, 28, image_tokens=4096)
    near(flux.sigmas[:3], "1 .98841 .97622")
    near(flux.sigmas[-4:], ".27483 .19545 .10472 0")
    qwen = {"rule": "linear", "base_shift": 0.5, "max_shift": 0.9, "max_tokens": 8192}
    options = {**FLOW, "base_sigmas": "unit", "dynamic_shift": qwen, "shift_terminal": 0.02}
    schedule = make_schedule(options, 50, image_tokens=4096)
    near(schedule.sigmas[:3], "1 .9897 .97919")
    near(schedule.sigmas[-3:], ".05848 .02 0")


def test_golden_alphas_cumprod() -> None:
    linear = alphas_cumprod(check_schedule_config(VP))
    assert linear[400] == pytest.approx(0.1935720, abs=1e-7)
    assert linear[999] == pytest.approx(4.03583e-5, rel=1e-5)
    diffusion = {**VP, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    assert alphas_cumprod(check_schedule_config(diffusion))[999] == pytest.approx(0.00466010, rel=1e-5)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_training_levels_equal_those_of_diffusers_to_the_bit(kind: str) -> None:
    draw = random.Random(SEED)
    for _ in range(5):
        count, start, end = draw.randrange(50, 1200), draw.uniform(1e-5, 1e-3), draw.uniform(5e-3, 0.03)
        options = {"beta_schedule": kind, "beta_start": start, "beta_end": end, "num_train_timesteps": count}
        ours = alphas_cumprod(check_schedule_config({**VP, **options}))
        theirs = diffusers.DDIMScheduler(**options).alphas_cumprod.numpy()
        # elsewhere torch.linspace does not fuse its multiply-add
        exact = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        np.testing.assert_allclose(ours, theirs, rtol=0 if exact else 1e-6, atol=0, err_msg=f"{options}")


def test_explicit_sigmas_match_diffusers() -> None:
    draw = np.random.default_rng(SEED)
    for count in range(1, 51):
        note = f"{count} sigmas, seed {SEED}"
        flow = np.sort(draw.uniform(0.001, 1.0, count))[::-1].tolist()
        scaled = [*np.sort(draw.uniform(0.05, 150.0, count))[::-1].tolist(), 0.0]
        for cls, given in (
            (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), flow),
            (diffusers.FlowMatchLCMScheduler(shift=1.7), flow),
            (
                diffusers.UniPCMultistepScheduler(
                    use_flow_sigmas=True, flow_shift=2.0, prediction_type="flow_prediction"
                ),
                flow,
            ),
            (diffusers.EulerDiscreteScheduler(), scaled),
        ):
            cls.set_timesteps(sigmas=np.array(given))
            schedule = make_schedule(config_of(cls), None, sigmas=given)
            np.testing.assert_allclose(schedule.sigmas, cls.sigmas.numpy(), rtol=2e-7, atol=0, err_msg=note)
            np.testing.assert_allclose(
                schedule.timesteps, cls.timesteps.numpy(), rtol=TIMESTEP_ROUNDING, atol=0, err_msg=note
            )
            assert schedule.steps == count


def test_a_final_zero_may_be_given_with_the_sigmas_of_a_flow_model() -> None:
    with_zero = make_schedule(FLOW, None, sigmas=[1.0, 0.75, 0.5, 0.25, 0.0])
    without = make_schedule(FLOW, 4, sigmas=[1.0, 0.75, 0.5, 0.25])
    np.testing.assert_array_equal(with_zero.sigmas, without.sigmas)
    assert with_zero.steps == 4


def test_explicit_timesteps_match_diffusers() -> None:
    draw = random.Random(SEED)
    for count in range(1, 51):
        given: list[float] = sorted(draw.sample(range(1000), count), reverse=True)
        for cls in (
            diffusers.DDPMScheduler(clip_sample=False),
            diffusers.DPMSolverMultistepScheduler(),
            diffusers.EulerDiscreteScheduler(),
            diffusers.HeunDiscreteScheduler(),
            diffusers.LCMScheduler(),
            diffusers.TCDScheduler(),
            diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        ):
            if isinstance(cls, diffusers.FlowMatchEulerDiscreteScheduler):
                given = [max(t, 0.5) for t in given]
            cls.set_timesteps(timesteps=given)
            schedule = make_schedule(config_of(cls), count, timesteps=given)
            np.testing.assert_array_equal(schedule.timesteps, cls.timesteps.numpy(), err_msg=f"{given}")
            if schedule.path in ("ve", "flow"):
                np.testing.assert_allclose(schedule.sigmas, cls.sigmas.numpy(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("curve", ["exponential", "linear"])
@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_dynamic_shift_matches_diffusers(name: str, curve: str) -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    options: dict[str, Any] = {"use_dynamic_shifting": True, "time_shift_type": curve, "shift_terminal": 0.03}
    if name.startswith("UniPC"):
        options |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    scheduler = getattr(diffusers, name)(**options)
    draw = random.Random(SEED)
    for steps in range(2, 51):
        tokens = draw.randrange(64, 9000)
        scheduler.set_timesteps(steps, mu=calculate_shift(tokens))
        schedule = make_schedule(config_of(scheduler), steps, image_tokens=tokens)
        note = f"{steps} steps, {tokens} tokens"
        np.testing.assert_allclose(schedule.sigmas, scheduler.sigmas.numpy(), rtol=2e-7, atol=1e-8, err_msg=note)
        np.testing.assert_allclose(
            schedule.timesteps, scheduler.timesteps.numpy(), rtol=TIMESTEP_ROUNDING, err_msg=note
        )


def test_dpm_solver_with_dynamic_shift_matches_diffusers() -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    options = {"use_dynamic_shifting": True, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    scheduler = diffusers.DPMSolverMultistepScheduler(**options)
    config = config_of(scheduler)
    for steps in range(1, 51):
        tokens = random.Random(SEED + steps).randrange(64, 9000)
        scheduler.set_timesteps(steps, mu=calculate_shift(tokens))
        schedule = make_schedule(config, steps, image_tokens=tokens)
        np.testing.assert_array_equal(schedule.timesteps, scheduler.timesteps.numpy(), err_msg=f"{tokens} tokens")
        np.testing.assert_allclose(schedule.sigmas, scheduler.sigmas.numpy(), rtol=2e-7, atol=1e-8)


def test_shift_rules_of_other_pipelines_match_their_code() -> None:
    from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    from edgedit.schedules_flow import dynamic_mu

    draw = random.Random(SEED)
    sqrt = {"rule": "sqrt", "base_tokens": 256, "base_shift": 0.25, "max_shift": 0.75}
    for _ in range(50):
        tokens, steps = draw.randrange(64, 12000), draw.randrange(1, 51)
        assert dynamic_mu(sqrt, tokens, steps) == pytest.approx(calculate_shift(tokens))
        assert dynamic_mu({"rule": "empirical"}, tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps))


@pytest.mark.parametrize(
    "name",
    [
        "FlowMatchEulerDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_beta_sigmas_match_diffusers(name: str) -> None:
    pytest.importorskip("scipy")
    scheduler = getattr(diffusers, name)(use_beta_sigmas=True)
    config = config_of(scheduler)
    for steps in range(1, 51):
        scheduler.set_timesteps(steps)
        schedule = make_schedule(config, steps)
        told, note = scheduler.timesteps.numpy(), f"{name}, {steps} steps"
        # without AVX2 torch's table differs in the last bit, which can move a timestep that is truncated
        exact = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") or not schedule.timesteps_integer
        np.testing.assert_allclose(
            schedule.timesteps, told, rtol=TIMESTEP_ROUNDING, atol=1e-12 if exact else 1, err_msg=note
        )
        relative = schedule.sigmas if schedule.path != "vp" else schedule.sigmas / schedule.alphas
        np.testing.assert_allclose(relative, scheduler.sigmas.numpy(), rtol=5e-7, atol=1e-8, err_msg=note)


def test_beta_quantile_matches_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(SEED)
    for _ in range(200):
        q, a = draw.random() ** draw.choice([1, 4, 12]), draw.uniform(0.3, 3.0)
        assert beta_quantile(q, a) == pytest.approx(stats.beta.ppf(q, a, a), rel=1e-11), (q, a)
    assert [beta_quantile(q, 0.6) for q in (0.0, 0.5, 1.0)] == [0.0, pytest.approx(0.5, abs=1e-15), 1.0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDIMScheduler", {}),
        ("DDPMScheduler", {}),
        ("EulerDiscreteScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("HeunDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {}),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
        ("UniPCMultistepScheduler", {}),
        ("LCMScheduler", {}),
        ("TCDScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
        ("FlowMatchLCMScheduler", {"shift": 3.0}),
    ],
)
def test_added_noise_matches_diffusers_at_every_entry(name: str, options: dict[str, Any]) -> None:
    draw = random.Random(SEED)
    for steps in (1, 2, draw.randrange(3, 51)):
        scheduler = getattr(diffusers, name)(**options)
        scheduler.set_timesteps(steps)
        schedule = make_schedule(config_of(scheduler), steps)
        generator = np.random.default_rng(SEED)
        x0, noise = (generator.normal(size=(2, 3, 4)).astype(np.float32) for _ in range(2))
        add = getattr(scheduler, "add_noise", None) or scheduler.scale_noise
        for i in range(len(schedule)):
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(i)
                scheduler._step_index = None
            pair = (torch.from_numpy(x0), torch.from_numpy(noise))
            at = scheduler.timesteps[i : i + 1]
            theirs = add(*pair, at) if add.__name__ == "add_noise" else add(pair[0], at, pair[1])
            ours = schedule.add_noise(x0, noise, i)
            assert ours.dtype == np.float32
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-6, atol=1e-6, err_msg=f"{i} of {steps}")


def test_added_noise_of_trigflow_matches_the_sana_sprint_image_pipeline() -> None:
    schedule = make_schedule(TRIGFLOW, 4)
    generator = np.random.default_rng(SEED)
    x0, noise = (torch.from_numpy(generator.normal(size=(1, 2, 3)).astype(np.float32)) for _ in range(2))
    for i, angle in enumerate(torch.linspace(1.5708, 0, 5)):
        theirs = torch.cos(angle) * (x0 * 0.5) + torch.sin(angle) * (noise * 0.5)
        np.testing.assert_allclose(schedule.add_noise(x0.numpy(), noise.numpy(), i), theirs.numpy() / 0.5, atol=1e-6)
    with pytest.raises(InputError, match="give the same shape"):
        schedule.add_noise(x0.numpy(), noise.numpy()[:, :1], 0)


def test_image_to_image_starts_where_diffusers_pipelines_start() -> None:
    from diffusers.pipelines.sana.pipeline_sana_sprint_img2img import SanaSprintImg2ImgPipeline
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import StableDiffusionImg2ImgPipeline

    draw = random.Random(SEED)
    for scheduler, pipeline in (
        (diffusers.DPMSolverMultistepScheduler(), StableDiffusionImg2ImgPipeline),
        (diffusers.HeunDiscreteScheduler(), StableDiffusionImg2ImgPipeline),
        (diffusers.EulerDiscreteScheduler(), StableDiffusionImg2ImgPipeline),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), SanaSprintImg2ImgPipeline),
        (diffusers.FlowMatchHeunDiscreteScheduler(), SanaSprintImg2ImgPipeline),
        (diffusers.SCMScheduler(), SanaSprintImg2ImgPipeline),
    ):
        trigflow = isinstance(scheduler, diffusers.SCMScheduler)
        for steps in range(1, 51):
            strength = draw.choice([1.0, 0.5, 0.6, 0.3, 0.1, draw.uniform(0.01, 1.0)])
            arguments = {"intermediate_timesteps": None} if trigflow and steps != 2 else {}
            scheduler.set_timesteps(steps, **arguments)
            schedule = make_schedule(config_of(scheduler), steps)
            left, _ = pipeline.get_timesteps(SimpleNamespace(scheduler=scheduler), steps, strength, "cpu")
            count = len(left) - trigflow
            note = f"{type(scheduler).__name__}, {steps} steps, strength {strength}"
            if count == 0:
                with pytest.raises(InputError, match="raise the strength or the steps"):
                    schedule.start_at(strength)
                continue
            assert len(schedule) - schedule.start_at(strength) == count, note
            assert schedule.start_at(strength) == scheduler.begin_index, note


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.01, float("nan")])
def test_a_strength_outside_0_to_1_is_refused(strength: float) -> None:
    with pytest.raises(InputError, match="strength must be above 0 and at most 1"):
        make_schedule(VP, 10).start_at(strength)


def test_switching_the_sampler_equals_from_config_in_diffusers() -> None:
    first = diffusers.DPMSolverMultistepScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing")
    config = config_of(first)
    for name, sampler in (
        ("EulerDiscreteScheduler", "euler"),
        ("EulerAncestralDiscreteScheduler", "Euler a"),
        ("HeunDiscreteScheduler", "heun"),
        ("UniPCMultistepScheduler", "UniPC"),
        ("DDIMScheduler", "ddim"),
    ):
        second = getattr(diffusers, name).from_config(first.config)
        for steps in range(1, 51):
            second.set_timesteps(steps)
            schedule = make_schedule(config, steps, sampler=sampler)
            np.testing.assert_array_equal(schedule.timesteps, second.timesteps.numpy(), err_msg=f"{name}, {steps}")


def test_timesteps_and_sigmas_of_a_flow_model_may_be_given_together_as_in_diffusers() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(timesteps=[800.0, 300.0], sigmas=[0.9, 0.2])
    schedule = make_schedule(config_of(scheduler), None, timesteps=[800.0, 300.0], sigmas=[0.9, 0.2])
    np.testing.assert_array_equal(schedule.timesteps, scheduler.timesteps.numpy())
    np.testing.assert_array_equal(schedule.sigmas.astype(np.float32), scheduler.sigmas.numpy())


def test_a_single_step_keeps_pure_noise_where_there_is_nothing_to_stretch() -> None:
    assert make_schedule({**FLOW, "shift_terminal": 0.02}, 1).sigmas.tolist() == [1.0, 0.0]


def test_a_fixed_table_decides_the_steps_and_can_be_overridden() -> None:
    config = {**VP, "sampler": "dmd", "timesteps": [999, 499]}
    assert make_schedule(config, None).timesteps.tolist() == [999, 499]
    assert make_schedule(config, 2).timesteps.tolist() == [999, 499]
    with pytest.raises(InputError, match="distilled for 2 steps; ask for that, not 4"):
        make_schedule(config, 4)
    assert make_schedule(config, 1, timesteps=[400]).timesteps.tolist() == [400]


def test_a_karras_spelling_sets_the_spacing() -> None:
    spelled = make_schedule(VP, 9, sampler="DPM++ 2M Karras")
    written = make_schedule({**VP, "sigma_spacing": "karras"}, 9)
    np.testing.assert_array_equal(spelled.sigmas, written.sigmas)
    assert spelled.sampler == "dpmpp_2m"


@pytest.mark.parametrize(
    ("typed", "canonical"),
    [
        ("euler a", "euler_ancestral"),
        ("Euler-A", "euler_ancestral"),
        ("k_euler_ancestral", "euler_ancestral"),
        ("dpm++2m", "dpmpp_2m"),
        ("DPM++ 2M", "dpmpp_2m"),
        ("dpmpp-2m", "dpmpp_2m"),
        ("dpm++ 2m sde", "dpmpp_2m_sde"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("flow_dpm-solver", "dpmpp_2m"),
        ("UniPC", "unipc"),
        ("FlowMatchEulerDiscreteScheduler", "euler"),
        ("LCM", "lcm"),
        ("SCMScheduler", "scm"),
        *((name, name) for name in SAMPLERS),
    ],
)
def test_samplers_are_known_by_the_names_that_people_type(typed: str, canonical: str) -> None:
    assert resolve_sampler(typed) == (canonical, None)
    assert resolve_sampler(f"{typed} karras") == (canonical, "karras")


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (VP, {"steps": 0}, "number of steps must be a whole number, 1 or more; got 0"),
        (VP, {"steps": -3}, "number of steps must be a whole number"),
        (VP, {"steps": 2.5}, "number of steps must be a whole number"),
        (VP, {"steps": True}, "number of steps must be a whole number"),
        (VP, {"steps": None}, "give the number of steps"),
        (VP, {"steps": 1001}, "this model knows 1000 timesteps"),
        (VP, {"steps": 4, "sampler": "plms"}, "unknown sampler 'plms'"),
        (VP, {"steps": 4, "sampler": "scm"}, "sampler scm cannot run this model's vp schedule"),
        (VP, {"steps": None, "sigmas": [10.0, 1.0], "sampler": "ddim"}, "cannot use explicit sigmas"),
        (VP, {"steps": None, "sigmas": [1.0, 10.0, 0.0]}, "falling numbers"),
        (VP, {"steps": None, "sigmas": [1.0]}, "at least one step"),
        (VP, {"steps": None, "timesteps": [10, 20]}, "timesteps must fall from below 1000"),
        (VP, {"steps": None, "timesteps": [20.5, 1]}, "whole numbers"),
        (VP, {"steps": None, "timesteps": [1000, 1]}, "timesteps must fall from below 1000"),
        (VP, {"steps": None, "timesteps": [9, 1], "sampler": "dpm++ 2m karras"}, "cannot be combined with the karras"),
        (VP, {"steps": None, "timesteps": [9, 1], "sigmas": [9.0, 1.0, 0.0]}, "timesteps or sigmas, not both"),
        (VP, {"steps": 4, "sampler": "ddim karras"}, "cannot use the karras sigma spacing"),
        (VP, {"steps": 4, "sampler": "euler lu"}, "no lu sigma spacing"),
        (VP, {"steps": 4, "sampler": "unipc lu"}, "no lu sigma spacing"),
        (VP, {"steps": 51, "sampler": "lcm"}, "distilled from 50 steps"),
        ({**VP, "rescale_betas_zero_snr": True}, {"steps": 4, "sampler": "ddim"}, "pure noise"),
        (FLOW, {"steps": None, "sigmas": [1.5, 0.5]}, "must fall from at most 1"),
        (FLOW, {"steps": None, "sigmas": [0.5, 0.7]}, "must fall from at most 1"),
        (FLOW, {"steps": None, "sigmas": []}, "at least one step"),
        (FLOW, {"steps": 3, "sigmas": [1.0, 0.5]}, "makes 2 steps and 3 steps were asked for"),
        (FLOW, {"steps": None, "timesteps": [1200.0]}, "must fall from at most 1000"),
        (FLOW, {"steps": None, "timesteps": [900.0], "sampler": "dpmpp_2m"}, "takes sigmas and not timesteps"),
        (FLOW, {"steps": 4, "sampler": "dpm++ 2m karras"}, "no karras sigma spacing on a flow model"),
        (FLOW, {"steps": 4, "sampler": "tcd"}, "sampler tcd cannot run this model's flow schedule"),
        ({**FLOW, "dynamic_shift": {"rule": "linear"}}, {"steps": 4}, "give image_tokens"),
        (FLOW, {"steps": None, "sigmas": [1.0, float("nan")]}, "sigmas must be a list of numbers"),
        (FLOW, {"steps": None, "timesteps": [float("inf")]}, "timesteps must be a list of numbers"),
        (FLOW, {"steps": None, "timesteps": [900.0, 3.0], "sigmas": [0.9]}, "2 timesteps and 1 sigmas were given"),
        (FLOW, {"steps": None, "sigmas": [0.9], "sampler": "euler karras"}, "cannot be combined with the karras"),
        (FLOW, {"steps": 4, "sampler": "euler lu"}, "lu sigma spacing needs a VP model"),
        ({**FLOW, "final_sigma": "sigma_min"}, {"steps": 4}, "choose unipc to end at sigma_min"),
        ({**VP, "timestep_spacing": "leading", "steps_offset": 1}, {"steps": 1000, "sampler": "ddim"}, "ask for fewer"),
        ({**VP, "sigma_min": 0.0}, {"steps": 4, "sampler": "euler exponential"}, "needs a smallest sigma above 0"),
        (TRIGFLOW, {"steps": None, "timesteps": [1.7, 0.0]}, "TrigFlow timesteps must fall"),
        (TRIGFLOW, {"steps": None, "sigmas": [1.0, 0.0]}, "give timesteps from about 1.5708"),
        (TRIGFLOW, {"steps": 2, "sampler": "scm karras"}, "no karras sigma spacing"),
    ],
)
def test_what_a_model_cannot_do_is_refused_in_one_line(
    config: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    steps = arguments.pop("steps") if "steps" in arguments else None
    try:
        with pytest.raises(InputError, match=message) as caught:
            make_schedule(config, steps, **arguments)
    finally:
        arguments["steps"] = steps
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 20}, "unknown field 'steps'"),
        ({"prediction": "flow"}, "prediction 'flow' on the 'vp' path"),
        ({"path": "edm"}, "path = 'edm'; it may be one of"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps = '1000'; expected integer"),
        ({"beta_end": 3.0}, "beta_end = 3.0"),
        ({"beta_end": float("nan")}, "beta_end = nan"),
        ({"solver_order": True}, "solver_order = True"),
        ({"trained_betas": [0.1, 0.2]}, "2 trained_betas and 1000"),
        ({"dynamic_shift": {"rule": "cubic"}}, "rule = 'cubic'"),
        ({"dynamic_shift": {"rule": "fixed"}}, "no mu"),
        ({"dynamic_shift": {}}, "lacks 'rule'"),
        ({"trained_betas": [0.5] * 999 + [1.0]}, "ends in pure noise"),
    ],
)
def test_a_faulty_schedule_object_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        make_schedule({**VP, **change}, 4)
    assert "\n" not in str(caught.value)
    for field in ("path", "prediction", "sampler"):
        with pytest.raises(BundleError, match=f"lacks '{field}'"):
            make_schedule({key: value for key, value in VP.items() if key != field}, 4)


def test_the_json_schema_admits_what_is_read_and_refuses_what_is_not() -> None:
    schema = schedule_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(json.loads(json.dumps(schema)))
    for config in (VP, FLOW, TRIGFLOW, TABLES, {**FLOW, "dynamic_shift": {"rule": "fixed", "mu": 1.0}}):
        validator.validate(config)
    defaults = {name: field.default for name, field in FIELDS.items() if not field.required}
    validator.validate(json.loads(json.dumps({**VP, **defaults})))
    for name in ("DDIMScheduler", "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "SCMScheduler"):
        validator.validate(json.loads(json.dumps(config_of(getattr(diffusers, name)()))))
    for change in ({"steps": 20}, {"path": "edm"}, {"beta_end": "x"}, {"dynamic_shift": {"rule": "cubic"}}):
        assert not validator.is_valid({**VP, **change}), change


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("PNDMScheduler", {}, "PNDMScheduler is not supported"),
    ("DDIMScheduler", {"thresholding": True}, "thresholding = True"),
    ("DDIMScheduler", {"frobnicate": 3}, "frobnicate = 3"),
    ("DDIMScheduler", {"prediction_type": "velocity"}, "prediction_type = 'velocity'"),
    ("DDIMScheduler", {"beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid'"),
    ("DDPMScheduler", {"variance_type": "learned_range"}, "variance_type = 'learned_range'"),
    ("DDPMScheduler", {"variance_type": "fixed_large_log"}, "variance_type = 'fixed_large_log'"),
    ("DPMSolverMultistepScheduler", {"variance_type": "learned"}, "variance_type = 'learned'"),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, "algorithm_type = 'dpmsolver'"),
    ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, "prediction_type = 'flow_prediction'"),
    ("DPMSolverMultistepScheduler", {"use_dynamic_shifting": True}, "use_dynamic_shifting = True"),
    (
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "v_prediction"},
        "prediction_type = 'v_prediction'",
    ),
    (
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "use_karras_sigmas": True, "prediction_type": "flow_prediction"},
        "use_flow_sigmas = True",
    ),
    (
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "final_sigmas_type": "sigma_min", "prediction_type": "flow_prediction"},
        "final_sigmas_type = 'sigma_min'",
    ),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "solver_order = 3"),
    ("UniPCMultistepScheduler", {"predict_x0": False}, "predict_x0 = False"),
    ("UniPCMultistepScheduler", {"solver_p": {"a": 1}}, "solver_p = "),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "use_beta_sigmas": True}, "contradicts use_karras_sigmas"),
    (
        "EulerDiscreteScheduler",
        {"timestep_type": "continuous", "prediction_type": "v_prediction"},
        "timestep_type = 'continuous'",
    ),
    ("TCDScheduler", {"clip_sample": True}, "clip_sample = True"),
    ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas = True"),
    ("FlowMatchLCMScheduler", {"scale_factors": [0.5]}, "scale_factors = "),
    ("SCMScheduler", {"prediction_type": "epsilon"}, "prediction_type = 'epsilon'"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_a_scheduler_option_that_is_not_supported_is_refused_by_name(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConversionError, match=message) as caught:
        schedule_config_from_diffusers(name, {"_class_name": name, **options})
    assert "\n" not in str(caught.value)


def test_options_of_other_scheduler_classes_have_no_effect_as_in_diffusers() -> None:
    stale = {"skip_prk_steps": True, "clip_sample": False, "set_alpha_to_one": False, "interpolation_type": "linear"}
    plain = schedule_config_from_diffusers("DPMSolverMultistepScheduler", {})
    assert schedule_config_from_diffusers("DPMSolverMultistepScheduler", stale) == plain


def test_an_empty_scheduler_config_means_the_defaults_of_the_class() -> None:
    for name in (
        "DDIMScheduler",
        "DDPMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "LCMScheduler",
        "TCDScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "FlowMatchLCMScheduler",
        "SCMScheduler",
    ):
        assert schedule_config_from_diffusers(name, {}) == config_of(getattr(diffusers, name)()), name


TABLES = {**FLOW, "sampler": "lcm", "sigmas": [[1.0, 0.9, 0.7, 0.4], [1.0, 0.7], [1.0]]}


def test_a_model_with_several_tables_runs_in_as_many_steps_as_one_of_them_has() -> None:
    assert own_steps(TABLES) == (4, 2, 1)
    assert own_steps(FLOW) == ()
    for steps, told in ((None, [1000, 900, 700, 400]), (4, [1000, 900, 700, 400]), (2, [1000, 700]), (1, [1000])):
        schedule = make_schedule(TABLES, steps)
        np.testing.assert_allclose(schedule.timesteps, told, rtol=1e-6)
        np.testing.assert_allclose(schedule.sigmas, [*np.array(told) / 1000, 0], rtol=1e-6)
    with pytest.raises(InputError, match="distilled for 1 or 2 or 4 steps; ask for that, not 3"):
        make_schedule(TABLES, 3)
    assert make_schedule(TABLES, 3, sigmas=[1.0, 0.5, 0.2]).steps == 3


def test_tables_of_every_path_count_steps_without_their_end_point() -> None:
    angles = {**TRIGFLOW, "timesteps": [[1.5, 1.2, 0.0], [1.5, 0.0]]}
    assert own_steps(angles) == (2, 1)
    np.testing.assert_allclose(make_schedule(angles, 2).alphas, np.cos([1.5, 1.2, 0.0]), atol=1e-7)
    vp = {**VP, "sampler": "lcm", "timesteps": [[999, 499], [999]]}
    assert own_steps(vp) == (2, 1)
    assert make_schedule(vp, 1).timesteps.tolist() == [999]
    assert own_steps({**VP, "sampler": "euler", "sigmas": [14.6, 3.0, 0.0]}) == (2,)
    both = {**FLOW, "timesteps": [[900.0, 300.0], [900.0]], "sigmas": [[1.0], [1.0, 0.4]]}
    assert own_steps(both) == (2, 1)
    two = make_schedule(both, 2)
    assert (two.timesteps.tolist(), two.sigmas.tolist()) == ([900.0, 300.0], [1.0, pytest.approx(0.4), 0.0])


def test_the_network_is_told_its_timestep_times_the_models_scale() -> None:
    plain, scaled = (
        make_schedule({**TRIGFLOW, "timestep_scale": scale}, 2, timesteps=[1.5, 1.1, 0.0]) for scale in (1.0, 1000.0)
    )
    np.testing.assert_array_equal(plain.timesteps, scaled.timesteps)
    for i, angle in enumerate((1.5, 1.1)):
        assert scaled.told(i) == pytest.approx(1000 * np.sin(angle) / (np.cos(angle) + np.sin(angle)), rel=1e-6)
        assert plain.told(i) == pytest.approx(scaled.told(i) / 1000, rel=1e-6)


def test_trigflow_and_flow_tables_of_one_network_draw_the_same() -> None:
    """A flow network on the TrigFlow path is the same network, its input and its time named in another way."""
    angles = [1.5, 1.1, 0.0]
    sigmas = [float(np.sin(a) / (np.cos(a) + np.sin(a))) for a in angles[:-1]]
    noise = np.random.default_rng(SEED).standard_normal((2, 1, 4, 3, 5)).astype(np.float32)
    results = []
    for config in (
        {**TRIGFLOW, "timesteps": angles, "timestep_scale": 1000.0},
        {**FLOW, "sampler": "dmd", "sigmas": sigmas},
    ):
        schedule = make_schedule(config, None)
        solver = make_solver(schedule.sampler, schedule)
        start = angles[0]
        x = noise[0] if schedule.path == "trigflow" else noise[0] / np.float32(np.cos(start) + np.sin(start))
        for i in range(len(schedule)):
            seen = x * np.float32(schedule.input_scale(i))
            x = solver.step(i, x, np.tanh(seen + np.float32(schedule.told(i) / 1000)), lambda shape: noise[1])
        results.append(x)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("levels", [[[]], [], [[1.0, 0.5], [0.9, 0.4]], [[1.0], 0.5], [["a"]], [[1.0], [float("nan")]]])
def test_tables_that_cannot_be_told_apart_or_are_not_numbers_are_refused(levels: Any) -> None:
    if levels == []:
        with pytest.raises(InputError, match="at least one step"):
            make_schedule({**FLOW, "sigmas": levels}, None)
        return
    with pytest.raises(BundleError, match="has sigmas"):
        make_schedule({**FLOW, "sigmas": levels}, None)

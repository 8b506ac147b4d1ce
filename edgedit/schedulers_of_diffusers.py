"""The scheduler classes of diffusers that can be converted: our sampler, the path, every option and its default."""

from __future__ import annotations

from typing import Any

__all__ = ["FLOW_DEFAULTS", "SCHEDULER_CLASSES"]

_BETAS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
_DIFFUSION_BETAS = {**_BETAS, "beta_start": 0.00085, "beta_end": 0.012}
_CLIP: dict[str, Any] = {"clip_sample": False, "clip_sample_range": 1.0}
_THRESHOLD: dict[str, Any] = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_SPACINGS: dict[str, Any] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
_MULTISTEP: dict[str, Any] = {
    **_BETAS,
    **_THRESHOLD,
    **_SPACINGS,
    "solver_order": 2,
    "lower_order_final": True,
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "final_sigmas_type": "zero",
    "timestep_spacing": "linspace",
    "rescale_betas_zero_snr": False,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}
FLOW_DEFAULTS: dict[str, Any] = {
    **_SPACINGS,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "invert_sigmas": False,
    "shift_terminal": None,
    "time_shift_type": "exponential",
}
_CONSISTENCY: dict[str, Any] = {
    **_DIFFUSION_BETAS,
    **_CLIP,
    **_THRESHOLD,
    "beta_schedule": "scaled_linear",
    "original_inference_steps": 50,
    "set_alpha_to_one": True,
    "timestep_spacing": "leading",
    "timestep_scaling": 10.0,
    "rescale_betas_zero_snr": False,
}

SCHEDULER_CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "DDIMScheduler": (
        "ddim",
        "vp",
        {
            **_BETAS,
            **_CLIP,
            **_THRESHOLD,
            "clip_sample": True,
            "set_alpha_to_one": True,
            "timestep_spacing": "leading",
            "rescale_betas_zero_snr": False,
        },
    ),
    "DDPMScheduler": (
        "ddpm",
        "vp",
        {
            **_BETAS,
            **_CLIP,
            **_THRESHOLD,
            "clip_sample": True,
            "variance_type": "fixed_small",
            "timestep_spacing": "leading",
            "rescale_betas_zero_snr": False,
        },
    ),
    "EulerDiscreteScheduler": (
        "euler",
        "vp",
        {
            **_BETAS,
            **_SPACINGS,
            "interpolation_type": "linear",
            "sigma_min": None,
            "sigma_max": None,
            "timestep_spacing": "linspace",
            "timestep_type": "discrete",
            "rescale_betas_zero_snr": False,
            "final_sigmas_type": "zero",
        },
    ),
    "EulerAncestralDiscreteScheduler": (
        "euler_ancestral",
        "vp",
        {**_BETAS, "timestep_spacing": "linspace", "rescale_betas_zero_snr": False},
    ),
    "HeunDiscreteScheduler": (
        "heun",
        "vp",
        {**_DIFFUSION_BETAS, **_SPACINGS, **_CLIP, "timestep_spacing": "linspace"},
    ),
    "DPMSolverMultistepScheduler": (
        "dpmpp_2m",
        "vp",
        {
            **_MULTISTEP,
            "algorithm_type": "dpmsolver++",
            "solver_type": "midpoint",
            "euler_at_final": False,
            "use_lu_lambdas": False,
            "lambda_min_clipped": -float("inf"),
            "variance_type": None,
        },
    ),
    "UniPCMultistepScheduler": (
        "unipc",
        "vp",
        {
            **_MULTISTEP,
            "predict_x0": True,
            "solver_type": "bh2",
            "disable_corrector": [],
            "solver_p": None,
            "sigma_min": None,
            "sigma_max": None,
            "shift_terminal": None,
        },
    ),
    "LCMScheduler": ("lcm", "vp", _CONSISTENCY),
    "TCDScheduler": ("tcd", "vp", _CONSISTENCY),
    "FlowMatchEulerDiscreteScheduler": ("euler", "flow", {**FLOW_DEFAULTS, "stochastic_sampling": False}),
    "FlowMatchHeunDiscreteScheduler": ("heun", "flow", {"num_train_timesteps": 1000, "shift": 1.0}),
    "FlowMatchLCMScheduler": ("lcm", "flow", {**FLOW_DEFAULTS, "scale_factors": None, "upscale_mode": "bicubic"}),
    "SCMScheduler": (
        "scm",
        "trigflow",
        {"num_train_timesteps": 1000, "prediction_type": "trigflow", "sigma_data": 0.5},
    ),
}

"""From a diffusers `scheduler_config.json` to the manifest's "schedule" object.

What is absent takes the default of that scheduler class; what belongs to another scheduler class has no effect in
diffusers and is left out; what we cannot do is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edgedit.errors import ConversionError
from edgedit.schedule_config import FIELDS
from edgedit.schedulers_of_diffusers import FLOW_DEFAULTS, SCHEDULER_CLASSES

__all__ = ["schedule_config_from_diffusers"]

_FOREIGN = frozenset(
    {"skip_prk_steps", "interpolation_type", "noise_sampler_seed", "eta", "s_noise", "snr_shift_scale"}
)
_KNOWN = frozenset(name for _, _, defaults in SCHEDULER_CLASSES.values() for name in defaults) | _FOREIGN

_REFUSED: dict[str, Callable[[Any], bool]] = {
    "thresholding": bool,
    "invert_sigmas": bool,
    "scale_factors": bool,
    "solver_p": bool,
    "predict_x0": lambda value: not value,
    "interpolation_type": lambda value: value not in ("linear", "log_linear"),
    "time_shift_type": lambda value: value not in ("exponential", "linear"),
    "algorithm_type": lambda value: value not in ("dpmsolver++", "sde-dpmsolver++", "deis"),
    "beta_schedule": lambda value: value not in ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "timestep_spacing": lambda value: value not in ("linspace", "leading", "trailing"),
    "final_sigmas_type": lambda value: value not in ("zero", "sigma_min"),
    "solver_type": lambda value: value not in ("midpoint", "heun", "bh1", "bh2", "logrho"),
    "solver_order": lambda value: value not in (1, 2, 3),
}
_PLAIN = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "rescale_betas_zero_snr",
    "timestep_spacing",
    "steps_offset",
    "set_alpha_to_one",
    "original_inference_steps",
    "timestep_scaling",
    "interpolation_type",
    "sigma_min",
    "sigma_max",
    "solver_order",
    "lower_order_final",
    "euler_at_final",
    "shift",
    "shift_terminal",
)
_PREDICTIONS = {
    "epsilon": "epsilon",
    "v_prediction": "v_prediction",
    "sample": "sample",
    "original_sample": "sample",
    "flow_prediction": "flow",
    "trigflow": "trigflow",
}


def _refuse(class_name: str, option: str, value: Any, why: str = "is not supported") -> ConversionError:
    return ConversionError(
        f"{class_name} with {option} = {value!r} {why}; choose a supported scheduler in the checkpoint"
    )


def _spacing(class_name: str, values: Mapping[str, Any]) -> str:
    names = ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")
    wanted = [name for name in names if values.get(f"use_{name}")]
    if len(wanted) > 1:
        raise _refuse(class_name, f"use_{wanted[1]}", True, f"contradicts use_{wanted[0]}")
    return wanted[0].split("_")[0] if wanted else "table"


def _dynamic_shift(values: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    # The multistep classes leave mu to the pipeline, which reads the same four options with these defaults.
    merged = {**FLOW_DEFAULTS, **{name: config[name] for name in FLOW_DEFAULTS if name in config}, **values}
    return {
        "rule": "linear",
        "curve": merged["time_shift_type"],
        "base_shift": merged["base_shift"],
        "max_shift": merged["max_shift"],
        "base_tokens": merged["base_image_seq_len"],
        "max_tokens": merged["max_image_seq_len"],
    }


def _flow_options(class_name: str, values: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What a multistep scheduler with `use_flow_sigmas` adds, and what it cannot be combined with."""
    if _spacing(class_name, values) != "table":
        raise _refuse(
            class_name, "use_flow_sigmas", True, f"and {_spacing(class_name, values)} sigmas is not supported"
        )
    if class_name.startswith("DPM") and values["final_sigmas_type"] != "zero":
        raise _refuse(class_name, "final_sigmas_type", values["final_sigmas_type"], "and flow sigmas is not supported")
    options: dict[str, Any] = {"path": "flow", "shift": values["flow_shift"]}
    if values["use_dynamic_shifting"]:
        options["dynamic_shift"] = _dynamic_shift(values, config)
    return options


def _special_options(class_name: str, values: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Options that are named or shaped differently here."""
    out: dict[str, Any] = {}
    if values.get("trained_betas") is not None:
        out["trained_betas"] = [float(beta) for beta in values["trained_betas"]]
    if values.get("clip_sample"):
        if class_name == "TCDScheduler":
            raise _refuse(class_name, "clip_sample", True)
        out["clip_sample_range"] = values["clip_sample_range"]
    if "use_karras_sigmas" in values:
        out["sigma_spacing"] = _spacing(class_name, values)
    if "final_sigmas_type" in values:
        out["final_sigma"] = values["final_sigmas_type"]
    limit = values.get("lambda_min_clipped")
    if limit is not None and float(limit) != -float("inf"):
        out["lambda_min_clipped"] = float(limit)
    if values.get("disable_corrector"):
        out["disable_corrector"] = list(values["disable_corrector"])
    if "solver_type" in values:
        out["solver_type"] = {"logrho": None}.get(values["solver_type"], values["solver_type"])
    if values.get("timestep_type", "discrete") != "discrete" and values["prediction_type"] == "v_prediction":
        raise _refuse(class_name, "timestep_type", values["timestep_type"])
    variance = values.get("variance_type")
    if class_name == "DDPMScheduler":
        if variance not in ("fixed_small", "fixed_small_log", "fixed_large"):
            raise _refuse(class_name, "variance_type", variance)
        out["variance_type"] = variance.removesuffix("_log")
    elif variance is not None:
        raise _refuse(class_name, "variance_type", variance, "is not supported: drop the learned variance channels")
    if values.get("use_flow_sigmas"):
        out.update(_flow_options(class_name, values, config))
    elif "flow_shift" in values and (values["use_dynamic_shifting"] or values.get("shift_terminal")):
        name = "use_dynamic_shifting" if values["use_dynamic_shifting"] else "shift_terminal"
        raise _refuse(class_name, name, values[name], "without use_flow_sigmas is not supported")
    elif class_name.startswith("FlowMatch") and values.get("use_dynamic_shifting"):
        out["dynamic_shift"] = _dynamic_shift(values, config)
    if values.get("algorithm_type") == "sde-dpmsolver++":
        if values["solver_order"] > 2:
            raise _refuse(class_name, "solver_order", values["solver_order"], "and sde-dpmsolver++ is not supported")
        out["sampler"] = "dpmpp_2m_sde"
    if values.get("stochastic_sampling"):
        out["sampler"] = "lcm"
    return out


def schedule_config_from_diffusers(class_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's "schedule" object for a diffusers scheduler and the content of its `scheduler_config.json`.

    A `SCMScheduler` is taken to drive a flow network in TrigFlow's clothes, as SANA-Sprint's pipelines do; set
    `prediction` to "trigflow" for a network that predicts TrigFlow's own quantity. A FLUX-like pipeline that passes its
    own `sigmas=linspace(1, 1/N, N)` needs `base_sigmas` set to "unit" on top of this.

    Raises `ConversionError` for a class or an option that is not supported, naming it and its value.
    """
    if class_name not in SCHEDULER_CLASSES:
        raise ConversionError(f"scheduler {class_name} is not supported; supported are: {', '.join(SCHEDULER_CLASSES)}")
    sampler, path, defaults = SCHEDULER_CLASSES[class_name]
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    unknown = sorted(set(given) - _KNOWN)
    if unknown:
        raise _refuse(class_name, unknown[0], given[unknown[0]], "is not an option that edgedit knows")
    values = {name: given.get(name, default) for name, default in defaults.items()}
    for option, refused in _REFUSED.items():
        if option in values and refused(values[option]):
            raise _refuse(class_name, option, values[option])
    kind = values.get("prediction_type", "flow_prediction")
    if kind not in _PREDICTIONS:
        raise _refuse(class_name, "prediction_type", kind)
    out: dict[str, Any] = {"path": path, "prediction": _PREDICTIONS[kind], "sampler": sampler}
    out.update({name: values[name] for name in _PLAIN if name in values})
    out.update(_special_options(class_name, values, config))
    allowed = {
        "vp": ("epsilon", "v_prediction", "sample"),
        "flow": ("flow", "epsilon", "sample"),
        "trigflow": ("trigflow",),
    }
    if out["prediction"] not in allowed[out["path"]]:
        raise _refuse(class_name, "prediction_type", kind, f"on the {out['path']} path is not supported")
    if out["path"] == "trigflow":
        # the two numbers are the defaults of the pipelines, which hand them to the scheduler
        out.update({"prediction": "flow", "max_timestep": 1.5708, "intermediate_timestep": 1.3})
    if out["path"] == "flow":
        betas = ("beta_schedule", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr")
        for name in (*betas, "timestep_spacing", "steps_offset", "lambda_min_clipped"):
            out.pop(name, None)
    return {name: value for name, value in out.items() if value is not None or FIELDS[name].default is not None}

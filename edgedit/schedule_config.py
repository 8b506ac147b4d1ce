"""The "schedule" object of a bundle's manifest: its fields, their defaults, and the check that refuses anything else.

The object is plain JSON and is all that a runtime in any language needs to build a schedule. `FIELDS` is the list;
`schedule_json_schema()` gives it as JSON Schema. What each field means:

Always
  `path`                  "vp" (DDPM: alpha^2 + sigma^2 = 1), "flow" (alpha = 1 - sigma) or "trigflow" (cos, sin)
  `prediction`            what the network gives: "epsilon", "v_prediction", "sample" (x0), "flow" (eps - x0) or
                          "trigflow" (cos * eps - sin * x0). A "flow" network on the "trigflow" path (SANA-Sprint) is
                          told t = sin / (cos + sin) and given x / (cos + sin)
  `sampler`               default sampler, a name of `edgedit.sampler_names.SAMPLERS`
  `num_train_timesteps`   T, the number of training timesteps
  `timesteps`, `sigmas`   what a distilled model was trained for: one list of levels, or several of different lengths,
                          the first of which is used unless another number of steps is asked for. Each is what
                          `edgedit.schedules.make_schedule` takes by that name
  `timestep_scale`        the network is told its timestep times this number (SANA, TrigFlow models told 0 to 1000)
Options of solvers (each used by the samplers named)
  `solver_order`          1, 2 or 3 (dpmpp_2m, unipc; dpmpp_2m_sde 1 or 2)
  `solver_type`           "midpoint" or "heun" (dpmpp_2m), "bh1" or "bh2" (unipc); the other pair means the default
  `lower_order_final`, `euler_at_final`, `disable_corrector`   as in diffusers (dpmpp_2m, unipc)
  `eta`                   0 to 1: noise of ddim and euler_ancestral, gamma of tcd
  `variance_type`         "fixed_small" or "fixed_large" (ddpm)
  `timestep_scaling`      of the boundary condition c_skip, c_out (lcm)
  `clip_sample_range`     x0 is clipped to +- this number (ddim, ddpm, lcm, heun); null: not clipped
VP
  `beta_schedule`         "linear", "scaled_linear" or "squaredcos_cap_v2", with `beta_start`, `beta_end`
  `trained_betas`         the T betas themselves, instead
  `rescale_betas_zero_snr`  the last level is pure noise (Lin et al. 2023, algorithm 1)
  `timestep_spacing`      "linspace", "leading" or "trailing" (same paper, table 2); `steps_offset` with "leading"
  `set_alpha_to_one`      DDIM ends at alpha 1, else at the first training level
  `lambda_min_clipped`    log(alpha/sigma) below which dpmpp_2m does not start; null: no limit
  `original_inference_steps`   the teacher's steps, of which lcm and tcd take a subset
  `interpolation_type`    "linear" or "log_linear" noise levels between training timesteps (euler)
VP and flow
  `sigma_spacing`         "table", "karras", "exponential", "beta" or (dpmpp_2m) "lu"
  `sigma_min`, `sigma_max`   the range that a spacing spans; null: that of the table
  `final_sigma`           where the last step lands: "zero" or "sigma_min"
Flow
  `shift`                 s' = shift * s / (1 + (shift - 1) * s)
  `dynamic_shift`         null, or {`rule`, ...}: the shift is exp(mu) (`curve` "exponential") or mu ("linear"), mu from
                          the number of image tokens: "linear" (`base_shift`, `max_shift`, `base_tokens`, `max_tokens`),
                          "sqrt" (CogView4: sqrt(tokens / base_tokens) * max_shift + base_shift), "empirical" (FLUX.2,
                          depends on the number of steps too) or "fixed" (`mu`)
  `shift_terminal`        the last level before the end is stretched to this value; null: not
  `base_sigmas`           levels before the shift: "train_range" (from the largest to the smallest shifted training
                          level, so that the shift acts twice, as a bare FlowMatchEulerDiscreteScheduler does: SD3) or
                          "unit" (1 to 1/N, as the pipelines of FLUX, Lumina 2 and Z-Image pass them)
TrigFlow
  `max_timestep`          the first angle
  `intermediate_timestep` the second angle of a two-step schedule; null: evenly spaced
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgedit.errors import BundleError
from edgedit.sampler_names import SAMPLERS, SIGMA_SPACINGS

__all__ = ["FIELDS", "SOLVER_OPTIONS", "Field", "check_schedule_config", "schedule_json_schema"]


@dataclass(frozen=True)
class Field:
    """One field of the schedule object: JSON types, default, and what values may be."""

    types: tuple[str, ...]
    default: Any = None
    choices: tuple[Any, ...] | None = None
    minimum: float | None = None
    maximum: float | None = None
    required: bool = False

    def allows(self, value: object) -> bool:
        """Whether a value has one of the types, is one of the choices and lies in the range."""
        if not any(_has_type(value, kind) for kind in self.types) or (self.choices and value not in self.choices):
            return False
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return True
        return (self.minimum is None or value >= self.minimum) and (self.maximum is None or value <= self.maximum)


_PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow", "trigflow")

FIELDS: dict[str, Field] = {
    "path": Field(("string",), choices=("vp", "flow", "trigflow"), required=True),
    "prediction": Field(("string",), choices=_PREDICTIONS, required=True),
    "sampler": Field(("string",), choices=tuple(SAMPLERS), required=True),
    "num_train_timesteps": Field(("integer",), 1000, minimum=1),
    "timesteps": Field(("numbers", "tables", "null")),
    "sigmas": Field(("numbers", "tables", "null")),
    "timestep_scale": Field(("number",), 1.0, minimum=0),
    "solver_order": Field(("integer",), 2, choices=(1, 2, 3)),
    "solver_type": Field(("string", "null"), choices=("midpoint", "heun", "bh1", "bh2", None)),
    "lower_order_final": Field(("boolean",), True),
    "euler_at_final": Field(("boolean",), False),
    "disable_corrector": Field(("numbers",), ()),
    "eta": Field(("number", "null"), minimum=0, maximum=1),
    "variance_type": Field(("string",), "fixed_small", choices=("fixed_small", "fixed_large")),
    "timestep_scaling": Field(("number",), 10.0, minimum=0),
    "clip_sample_range": Field(("number", "null"), minimum=0),
    "beta_schedule": Field(("string",), "linear", choices=("linear", "scaled_linear", "squaredcos_cap_v2")),
    "beta_start": Field(("number",), 0.0001, minimum=0, maximum=1),
    "beta_end": Field(("number",), 0.02, minimum=0, maximum=1),
    "trained_betas": Field(("numbers", "null")),
    "rescale_betas_zero_snr": Field(("boolean",), False),
    "timestep_spacing": Field(("string",), "linspace", choices=("linspace", "leading", "trailing")),
    "steps_offset": Field(("integer",), 0, minimum=0),
    "set_alpha_to_one": Field(("boolean",), True),
    "lambda_min_clipped": Field(("number", "null")),
    "original_inference_steps": Field(("integer",), 50, minimum=1),
    "interpolation_type": Field(("string",), "linear", choices=("linear", "log_linear")),
    "sigma_spacing": Field(("string",), "table", choices=SIGMA_SPACINGS),
    "sigma_min": Field(("number", "null"), minimum=0),
    "sigma_max": Field(("number", "null"), minimum=0),
    "final_sigma": Field(("string",), "zero", choices=("zero", "sigma_min")),
    "shift": Field(("number",), 1.0, minimum=1e-6),
    "dynamic_shift": Field(("object", "null")),
    "shift_terminal": Field(("number", "null"), minimum=0, maximum=1),
    "base_sigmas": Field(("string",), "train_range", choices=("train_range", "unit")),
    "max_timestep": Field(("number",), 1.5708, minimum=1e-6, maximum=1.5709),
    "intermediate_timestep": Field(("number", "null"), 1.3, minimum=1e-6, maximum=1.5709),
}

_DYNAMIC_SHIFT: dict[str, Field] = {
    "rule": Field(("string",), "linear", choices=("linear", "sqrt", "empirical", "fixed"), required=True),
    "curve": Field(("string",), "exponential", choices=("exponential", "linear")),
    "base_shift": Field(("number",), 0.5),
    "max_shift": Field(("number",), 1.15),
    "base_tokens": Field(("integer",), 256, minimum=1),
    "max_tokens": Field(("integer",), 4096, minimum=1),
    "mu": Field(("number", "null")),
}

SOLVER_OPTIONS = (
    "solver_order",
    "solver_type",
    "lower_order_final",
    "euler_at_final",
    "disable_corrector",
    "eta",
    "variance_type",
    "timestep_scaling",
    "clip_sample_range",
)
"""Fields that a schedule hands on to its solver."""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _are_tables(rows: Sequence[object]) -> bool:
    """Whether these are lists of numbers, each of another length and none empty."""
    lengths = [len(row) for row in rows if isinstance(row, (list, tuple)) and row and _has_type(row, "numbers")]
    return 0 < len(rows) == len(lengths) == len(set(lengths))


def _has_type(value: object, kind: str) -> bool:
    if kind == "null":
        return value is None
    if kind == "string":
        return isinstance(value, str)
    if kind == "boolean":
        return isinstance(value, bool)
    if kind == "integer":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "number":
        return _is_number(value)
    if kind == "numbers":
        return isinstance(value, (list, tuple)) and all(_is_number(item) for item in value)
    if kind == "tables":
        return isinstance(value, (list, tuple)) and _are_tables(value)
    return isinstance(value, Mapping)


def _check(values: Mapping[str, Any], fields: Mapping[str, Field], where: str) -> dict[str, Any]:
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise BundleError(f"{where} has the unknown field {unknown[0]!r}; convert the model again with this version")
    checked: dict[str, Any] = {}
    for name, field in fields.items():
        if name not in values and field.required:
            raise BundleError(f"{where} lacks {name!r}; convert the model again with this version")
        value = values.get(name, field.default)
        if not field.allows(value):
            allowed = f"; it may be one of {list(field.choices)}" if field.choices else f"; expected {field.types[0]}"
            raise BundleError(f"{where} has {name} = {value!r}{allowed}")
        checked[name] = value
    return checked


def check_schedule_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule object with every default filled in.

    Raises `BundleError` for an unknown field, a missing one, a wrong type or a value that is not allowed.
    """
    checked = _check(config, FIELDS, "the manifest's schedule")
    if checked["dynamic_shift"] is not None:
        checked["dynamic_shift"] = _check(checked["dynamic_shift"], _DYNAMIC_SHIFT, "the schedule's dynamic_shift")
        if checked["dynamic_shift"]["rule"] == "fixed" and checked["dynamic_shift"]["mu"] is None:
            raise BundleError("the schedule's dynamic_shift has rule 'fixed' and no mu; give mu")
    path, prediction = checked["path"], checked["prediction"]
    allowed = {
        "vp": ("epsilon", "v_prediction", "sample"),
        "flow": ("flow", "epsilon", "sample"),
        "trigflow": ("trigflow", "flow"),
    }[path]
    if prediction not in allowed:
        raise BundleError(
            f"the manifest's schedule has prediction {prediction!r} on the {path!r} path; it may be {allowed}"
        )
    betas = checked["trained_betas"]
    if betas is not None and len(betas) != checked["num_train_timesteps"]:
        raise BundleError(
            f"the manifest's schedule has {len(betas)} trained_betas and {checked['num_train_timesteps']} "
            "num_train_timesteps; give as many of each"
        )
    return checked


def _property(field: Field) -> dict[str, Any]:
    if field.choices is not None:
        return {"enum": list(field.choices)}
    bounds = {"minimum": field.minimum, "maximum": field.maximum}
    limits = {key: value for key, value in bounds.items() if value is not None}
    kinds: list[dict[str, Any]] = []
    for kind in field.types:
        if kind == "numbers":
            kinds.append({"type": "array", "items": {"type": "number"}})
        elif kind == "tables":
            row = {"type": "array", "items": {"type": "number"}, "minItems": 1}
            kinds.append({"type": "array", "items": row, "minItems": 1})
        elif kind in ("number", "integer"):
            kinds.append({"type": kind, **limits})
        else:
            kinds.append({"type": kind})
    return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}


def _object(fields: Mapping[str, Field]) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [name for name, field in fields.items() if field.required],
        "properties": {name: _property(field) for name, field in fields.items()},
    }


def schedule_json_schema() -> dict[str, Any]:
    """The schedule object as a JSON Schema (draft 2020-12) fragment."""
    schema = _object(FIELDS)
    schema["properties"]["dynamic_shift"] = {"anyOf": [_object(_DYNAMIC_SHIFT), {"type": "null"}]}
    return schema

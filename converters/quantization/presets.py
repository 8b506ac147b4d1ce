"""Recipes that have a name. With calibration they use the methods that need to know the inputs of layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from edgedit.converters.quantization.form import Form
from edgedit.converters.quantization.recipe import Recipe, Rule, read_recipe
from edgedit.errors import ConversionError

__all__ = ["PRESETS", "SPELLINGS", "recipe_of"]

_W8, _W4, _W3, _W2 = Form(8), Form(4, 64), Form(3, 64), Form(2, format="palette")
_FP4 = Form(4, 64, format="fp4")
_EVERYTHING, _BLOCKS = "*", "*blocks.*"


def _preset(transformer: Form, blocks: Form, text_encoder: Form) -> Mapping[str, tuple[Rule, ...]]:
    """What conditions the blocks (timestep, text projection) has few rows and keeps float activations."""
    return {
        "transformer": (Rule(_EVERYTHING, transformer), Rule(_BLOCKS, blocks)),
        "text_encoder": (Rule(_EVERYTHING, text_encoder),),
        "decoder": (Rule(_EVERYTHING, _W8),),
        "encoder": (Rule(_EVERYTHING, _W8),),
        "tiny_decoder": (Rule(_EVERYTHING, _W8),),
    }


PRESETS: Mapping[str, Mapping[str, tuple[Rule, ...]]] = {
    "w8": _preset(_W8, _W8, _W8),
    "w8a8": _preset(_W8, replace(_W8, int8_activations=True), _W8),
    "w4": _preset(_W4, _W4, _W4),
    "w4a8": _preset(_W4, replace(_W4, int8_activations=True), _W4),
    "fp4": _preset(_FP4, _FP4, _FP4),
    "w3": _preset(_W4, _W3, _W4),
    "w2": _preset(_W4, _W2, _W4),
}
"""Preset to the rules of each component. Text encoders keep float activations: theirs have outliers of a thousand."""

_BALANCE = 0.5
_MIXED = re.compile(r"mixed:(?P<number>\d+(?:\.\d+)?)(?P<unit>[kMG]|dB)", re.ASCII)
_UNITS = {"k": 1e3, "M": 1e6, "G": 1e9}

#: What `dtype` may be, for messages.
SPELLINGS = f"fp32, fp16, {', '.join(PRESETS)}, mixed:SIZE (mixed:30M), mixed:DB (mixed:35dB), or a recipe's .toml file"


def recipe_of(dtype: str, *, calibrated: bool, ranges: bool = False) -> Recipe | None:
    """The recipe that `dtype` names, None for fp32 and fp16.

    Args:
        calibrated: whether inputs of layers will be known.
        ranges: whether a backend rounds inputs to ranges that calibration finds.

    Raises ConversionError for an unknown name, a file that is no recipe, or one that needs calibration when there is
    none.
    """
    if dtype in ("fp32", "fp16"):
        if calibrated:
            raise ConversionError(f"--calibration does nothing for {dtype}; choose quantized weights, or leave it out")
        return None
    if dtype in PRESETS:
        rules = PRESETS[dtype]
        if calibrated:
            rules = {
                **rules,
                "transformer": tuple(Rule(r.pattern, _with_methods(r.form)) for r in rules["transformer"]),
            }
            if any(rule.form.int8_activations for rule in rules["transformer"]):
                rules["decoder"] = (Rule(_EVERYTHING, replace(_W8, int8_activations=True)),)
            if not any(rule.form.needs_calibration for rule in rules["transformer"]):
                raise ConversionError(f"--calibration does nothing for {dtype}; leave it out")
        return Recipe(dtype, rules, strict=False)
    if dtype.startswith("mixed"):
        return _mixed(dtype, calibrated=calibrated)
    if dtype.endswith(".toml"):
        recipe = read_recipe(Path(dtype).expanduser())
        if recipe.calibrated and not calibrated:
            raise ConversionError(
                f"{dtype}: [{recipe.calibrated[0]}] asks for adaptive rounding, balancing or int8 convolutions, which "
                "need calibration; add --calibration self, or --calibration with a file of prompts"
            )
        if calibrated and not recipe.calibrated and not (ranges and recipe.computes_in_int8):
            raise ConversionError(f"{dtype}: no line asks for what needs calibration; leave --calibration out")
        return recipe
    raise ConversionError(f"unknown dtype {dtype!r}; choose from: {SPELLINGS}")


def _with_methods(form: Form) -> Form:
    """The methods that a preset uses where it can."""
    return replace(
        form,
        rounding="adaptive" if form.bits < 8 else "nearest",
        balance=_BALANCE if form.int8_activations else None,
    )


def _mixed(dtype: str, *, calibrated: bool) -> Recipe:
    found = _MIXED.fullmatch(dtype)
    if found is None or float(found["number"]) == 0:
        raise ConversionError(f"{dtype!r} is no budget; write a size as mixed:30M or a PSNR as mixed:35dB")
    if not calibrated:
        raise ConversionError(f"{dtype} measures what each layer loses; add --calibration self or a file of prompts")
    budget = float(found["number"]) * _UNITS.get(found["unit"], 1.0)
    return Recipe(dtype, PRESETS["w4"], strict=False, budget=budget, budget_unit="dB" if found["unit"] == "dB" else "B")

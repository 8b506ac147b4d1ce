"""From a recipe to what is done to each component: forms for its layers, a changed graph, and what rounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from edgedit.converters.passes.quantize import plain_encode
from edgedit.converters.quantization.assign import as_record, assign, least_loss, least_size, need_solver
from edgedit.converters.quantization.calibrate import Calibration
from edgedit.converters.quantization.form import Form
from edgedit.converters.quantization.layers import Layer, find_layers
from edgedit.converters.quantization.methods import make_encoder, needs_moments, prepare_graph
from edgedit.converters.quantization.recipe import Recipe
from edgedit.converters.quantization.record import Quantization, stored_bytes
from edgedit.converters.quantization.sensitivity import Sensitivity, measure
from edgedit.converters.quantization.statistics import InputStatistics, input_of
from edgedit.converters.quantization.workspace import Workspace
from edgedit.errors import ConversionError

__all__ = ["is_slow", "prepare"]

_SMALL = 1024
"""Weights with fewer elements stay float32 (see `StoreHalf`)."""


def is_slow(recipe: Recipe) -> bool:
    """Whether rounding takes so long that its results are kept on disk until the bundle is written. So are the results
    of calibration, whatever it is for."""
    forms = [rule.form for rules in recipe.rules.values() for rule in rules]
    return recipe.budget is not None or any(f.needs_calibration or f.format == "palette" for f in forms)


def prepare(
    recipe: Recipe,
    component: str,
    model: ir.Model,
    work: Workspace | None,
    calibration: Calibration | None,
    *,
    ranges: bool = False,
) -> tuple[Quantization, Mapping[str, Layer]]:
    """Resolve the recipe for a component and put its methods into effect in `model`.

    Args:
        work: for what `is_slow`; None otherwise.
        calibration: where the recipe needs it.
        ranges: whether the ranges of inputs that are rounded to int8 are wanted.

    Returns the quantization and the layers that it is about.
    """
    layers = find_layers(model)
    forms = recipe.resolve(component, layers)
    facts: dict[str, Any] = {}
    statistics: Mapping[str, InputStatistics] = {}
    mixed = recipe.budget is not None and component == "transformer"
    seen = {n for n, f in forms.items() if f.needs_calibration or (ranges and f.int8_activations)}
    if calibration is not None and (mixed or seen):
        matrices = {name: layer for name, layer in layers.items() if input_of(layer) is not None}
        moments = frozenset(matrices) if mixed else needs_moments(forms)
        watched = {n: layer for n, layer in matrices.items() if mixed or n in seen}
        statistics = calibration.observe(component, model, watched, moments)
        facts["calibration"] = calibration.facts()
        if mixed and work is not None:
            table = measure(
                lambda: calibration.build(component),
                watched,
                statistics,
                calibration.calls(component),
                work,
                lambda done, total: calibration.tell("measure layers", done, total),
            )
            forms, facts["sensitivity"] = _within_budget(recipe, model, layers, forms, table)
    forms = {name: _known(form, name in statistics) for name, form in forms.items()}
    prepared = prepare_graph(model, layers, forms, statistics)
    if prepared.inserted:
        facts["inserted"] = prepared.inserted
    encode = plain_encode if work is None else make_encoder(component, prepared.statistics, work)
    peaks = {
        name: float(prepared.statistics[name].peaks.max())
        for name, form in prepared.forms.items()
        if form.int8_activations and name in prepared.statistics
    }
    return Quantization(recipe, prepared.forms, encode, facts, peaks), layers


def _known(form: Form, known: bool) -> Form:
    """A form without the methods that need inputs which nobody knows (a weight that several nodes use)."""
    return form if known or not form.needs_calibration else replace(form, rounding="nearest", balance=None)


def _within_budget(
    recipe: Recipe, model: ir.Model, layers: Mapping[str, Layer], forms: Mapping[str, Form], table: Sensitivity
) -> tuple[dict[str, Form], dict[str, Any]]:
    """The best forms under the recipe's budget, and the record of how they were found."""
    need_solver()
    assert recipe.budget is not None
    fixed = _fixed_bytes(model, layers, forms, table)
    if recipe.budget_unit == "dB":
        best = table.decibels(least_loss(table))
        if recipe.budget > best:
            raise ConversionError(
                f"{recipe.name}: the prediction reaches {best:.1f} dB with the best forms; ask for less, or take fp16"
            )
        chosen = assign(table, loss=table.loss(recipe.budget))
    else:
        least = fixed + least_size(table)
        if recipe.budget < least:
            raise ConversionError(
                f"{recipe.name}: the transformer's weights take {least / 1e6:.2f} MB at least; "
                f"give mixed:{-(-least // 10_000) / 100:.2f}M or more"
            )
        chosen = assign(table, size=recipe.budget - fixed)
    return {**forms, **{name: choice.form for name, choice in chosen.items()}}, as_record(
        table, chosen, fixed, {name: math.prod(layers[name].shape) for name in chosen}
    )


def _fixed_bytes(model: ir.Model, layers: Mapping[str, Layer], forms: Mapping[str, Form], table: Sensitivity) -> int:
    """Bytes of the weights that have no choice."""
    total = sum(stored_bytes(forms[name], layer) for name, layer in layers.items() if name not in table.choices)
    matrices = {layer.value for layer in layers.values()}
    for value in model.graph.initializers.values():
        if value not in matrices and value.const_value is not None:
            total += value.const_value.nbytes // (2 if value.const_value.size >= _SMALL else 1)
    return total

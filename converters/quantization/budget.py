"""The best forms under a budget: the integer programme proposes, and what is measured decides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations_with_replacement
from typing import Any

import onnx_ir as ir

from edgedit.converters.quantization.assign import as_record, assign, least_loss, least_size, need_solver
from edgedit.converters.quantization.form import Form
from edgedit.converters.quantization.layers import Layer
from edgedit.converters.quantization.recipe import Recipe
from edgedit.converters.quantization.record import stored_bytes
from edgedit.converters.quantization.sensitivity import Choice, Meter, Sensitivity
from edgedit.errors import ConversionError

__all__ = ["within_budget"]

_SMALL = 1024
"""Weights with fewer elements stay float32 (see `StoreHalf`)."""
_TRIES = 5
_NEAR_DB = 0.3

Chosen = Mapping[str, Choice]


def within_budget(
    recipe: Recipe,
    model: ir.Model,
    layers: Mapping[str, Layer],
    forms: Mapping[str, Form],
    table: Sensitivity,
    meter: Meter,
) -> tuple[dict[str, Form], dict[str, Any]]:
    """Forms under the recipe's budget, and the record of how they were found.

    Raises ConversionError for a budget that nothing keeps.
    """
    need_solver()
    assert recipe.budget is not None
    fixed = _fixed_bytes(model, layers, forms, table)
    if recipe.budget_unit == "dB":
        chosen, lost = _smallest(recipe, table, meter)
    else:
        least = fixed + least_size(table)
        if recipe.budget < least:
            raise ConversionError(
                f"{recipe.name}: the transformer's weights take {least / 1e6:.2f} MB at least; "
                f"give mixed:{-(-least // 10_000) / 100:.2f}M or more"
            )
        chosen, lost = _best(table, meter, recipe.budget - fixed)
    record = as_record(table, chosen, fixed, {name: math.prod(layers[name].shape) for name in chosen})
    record["estimated_db"], record["psnr_db"] = record["psnr_db"], table.decibels(lost)
    return {**forms, **_forms(chosen)}, record


def _best(table: Sensitivity, meter: Meter, size: float) -> tuple[Chosen, float]:
    """Of what fits, the choice that loses least when all its layers are rounded: the programme's, once with losses
    that add up and once with errors that do (which is what happens when they point the same way), or a plain one."""
    roots = Sensitivity(
        {
            name: [Choice(c.form, c.bytes, math.sqrt(c.loss)) for c in options]
            for name, options in table.choices.items()
        },
        table.peak,
        table.energy,
    )
    proposals = [assign(table, size=size), assign(roots, size=size), *_plain(table, size)]
    measured = [meter.loss(_forms(chosen)) for chosen in proposals]
    best = min(range(len(proposals)), key=measured.__getitem__)
    return proposals[best], measured[best]


def _plain(table: Sensitivity, size: float) -> list[Chosen]:
    """The two largest uniform choices that fit: so many bits in blocks, as many or more outside, as presets have."""
    found: dict[int, Chosen] = {}
    for inside, outside in combinations_with_replacement((2, 3, 4, 8), 2):
        chosen = {}
        for name, options in table.choices.items():
            bits = inside if "blocks." in name else outside
            chosen[name] = next((c for c in options if c.form.bits >= bits), options[-1])
        total = sum(choice.bytes for choice in chosen.values())
        if total <= size:
            found[total] = chosen
    return [found[total] for total in sorted(found)[-2:]]


def _smallest(recipe: Recipe, table: Sensitivity, meter: Meter) -> tuple[Chosen, float]:
    """The smallest choice found that keeps a PSNR. The loss that the programme is allowed is drawn in by what its last
    proposal really lost over what it was thought to."""
    assert recipe.budget is not None
    allowed = table.loss(recipe.budget)
    finest = {name: min(options, key=lambda c: c.loss) for name, options in table.choices.items()}
    best: tuple[Chosen, float] = finest, meter.loss(_forms(finest))
    if best[1] > allowed:
        raise ConversionError(
            f"{recipe.name}: the prediction reaches {table.decibels(best[1]):.1f} dB with the best forms; "
            "ask for less, or take fp16"
        )
    limit = allowed
    for _ in range(_TRIES):
        limit = max(limit, least_loss(table))
        chosen = assign(table, loss=limit * (1 + 1e-9))
        lost = meter.loss(_forms(chosen))
        if lost <= allowed and _bytes(chosen) < _bytes(best[0]):
            best = chosen, lost
        missed = table.decibels(lost) - recipe.budget
        if 0 <= missed <= _NEAR_DB:
            break
        limit *= allowed / lost
    return best


def _forms(chosen: Chosen) -> dict[str, Form]:
    return {name: choice.form for name, choice in chosen.items()}


def _bytes(chosen: Chosen) -> int:
    return sum(choice.bytes for choice in chosen.values())


def _fixed_bytes(model: ir.Model, layers: Mapping[str, Layer], forms: Mapping[str, Form], table: Sensitivity) -> int:
    """Bytes of the weights that have no choice."""
    total = sum(stored_bytes(forms[name], layer) for name, layer in layers.items() if name not in table.choices)
    matrices = {layer.value for layer in layers.values()}
    for value in model.graph.initializers.values():
        if value not in matrices and value.const_value is not None:
            total += value.const_value.nbytes // (2 if value.const_value.size >= _SMALL else 1)
    return total

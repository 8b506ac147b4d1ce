"""From a recipe to what is done to each component: forms for its layers, a changed graph, and what rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgedit.converters.passes.int8_convolution import MapRanges
from edgedit.converters.passes.quantize import plain_encode
from edgedit.converters.quantization.budget import within_budget
from edgedit.converters.quantization.calibrate import Calibration
from edgedit.converters.quantization.form import Form
from edgedit.converters.quantization.layers import Layer, find_layers
from edgedit.converters.quantization.methods import make_encoder, needs_moments, prepare_graph
from edgedit.converters.quantization.probe import Probe
from edgedit.converters.quantization.ranges import measure_maps
from edgedit.converters.quantization.recipe import MAPS, Recipe
from edgedit.converters.quantization.record import Quantization
from edgedit.converters.quantization.sensitivity import Meter, measure
from edgedit.converters.quantization.statistics import InputStatistics, input_of
from edgedit.converters.quantization.tolerate import tolerate
from edgedit.converters.quantization.workspace import Workspace

__all__ = ["is_slow", "prepare"]

_MEASURED = 8
"""Calls that losses are measured on, from all over the schedule."""

Call = Mapping[str, npt.NDArray[Any]]


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
        rounding, held = _divided(calibration.calls(component), len(calibration.prompts) if mixed else 1)
        statistics = calibration.observe(component, model, watched, moments, calls=rounding)
        facts["calibration"] = calibration.facts()
        if mixed and work is not None:
            meter = Meter(
                watched,
                make_encoder(component, statistics, work),
                partial(_open_probe, calibration, watched, held, work),
                work,
            )
            table = measure(meter, lambda done, total: calibration.tell("measure layers", done, total))
            forms, facts["sensitivity"] = within_budget(recipe, model, layers, forms, table, meter)
            meter.close()
    maps: Mapping[str, MapRanges] = {}
    if component in MAPS and calibration is not None and any(form.int8_activations for form in forms.values()):
        maps, facts["maps"] = _int8_maps(calibration, component, model, layers, forms)
        forms = {n: f if n in maps else replace(f, int8_activations=False, per_token=False) for n, f in forms.items()}
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
    return Quantization(recipe, prepared.forms, encode, facts, peaks, maps), layers


def _int8_maps(
    calibration: Calibration,
    component: str,
    model: ir.Model,
    layers: Mapping[str, Layer],
    forms: Mapping[str, Form],
) -> tuple[dict[str, MapRanges], dict[str, Any]]:
    """The convolutions that compute in int8, and what the record says of them."""
    wanted = {name: layers[name] for name, form in forms.items() if form.int8_activations}
    seen = measure_maps(calibration, component, model, wanted)
    found = tolerate(
        calibration, component, {n: one.ranges for n, one in seen.items()}, {n: one.work for n, one in seen.items()}
    )
    maps = {name: seen[name].ranges for name in found.names}
    layers_said = {name: {"input": ranges.input, "output": ranges.output} for name, ranges in maps.items()}
    return maps, {"layers": layers_said, "psnr_db": found.psnr_db, "alone_db": found.alone_db}


def _divided(calls: Sequence[Call], prompts: int) -> tuple[slice, slice]:
    """Which calls rounding sees, and which ones losses are measured on: those of the last quarter of the prompts, or
    all where there is one prompt only."""
    if prompts == 1:
        return slice(None), slice(None)
    first = len(calls) // prompts * (prompts - max(1, prompts // 4))
    return slice(first), slice(first, None)


def _open_probe(calibration: Calibration, layers: Mapping[str, Layer], held: slice, work: Workspace) -> Probe:
    calls, influence = calibration.calls("transformer")[held], calibration.influence()[held]
    some = np.linspace(0, len(calls) - 1, min(_MEASURED, len(calls))).round().astype(int)
    shares = np.array([influence[i] for i in some])
    return Probe(
        calibration.build("transformer"),
        layers,
        [calls[i] for i in some],
        list(shares / shares.mean()),
        work.folder / "probe",
    )


def _known(form: Form, known: bool) -> Form:
    """A form without the methods that need inputs which nobody knows (a weight that several nodes use)."""
    return form if known or not form.needs_calibration else replace(form, rounding="nearest", balance=None)

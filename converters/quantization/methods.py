"""Puts the methods of a component's forms into effect: balanced and rotated graphs, adaptive codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgedit.converters.passes.quantize import check_finite
from edgedit.converters.quantization.balance import balance
from edgedit.converters.quantization.encode import Encoded, encode, opened
from edgedit.converters.quantization.form import Form
from edgedit.converters.quantization.layers import Layer
from edgedit.converters.quantization.rotate import rotate, rotate_statistics
from edgedit.converters.quantization.statistics import InputStatistics, input_of
from edgedit.converters.quantization.workspace import Workspace

__all__ = ["Prepared", "make_encoder", "needs_moments", "prepare_graph"]

Float = npt.NDArray[np.float32]


@dataclass
class Prepared:
    """A graph whose inputs of layers are balanced and rotated as its forms say.

    Attributes:
        forms: as given, but that what could not be done to a layer is off.
        statistics: of the inputs as they are now.
        inserted: layers whose balance or rotation took a node of its own.
    """

    forms: dict[str, Form]
    statistics: dict[str, InputStatistics]
    inserted: list[str] = field(default_factory=list)


def needs_moments(forms: Mapping[str, Form]) -> frozenset[str]:
    """Layers whose rounding minds the second moments of their inputs."""
    return frozenset(name for name, form in forms.items() if form.is_coded and form.rounding != "nearest")


def prepare_graph(
    model: ir.Model, layers: Mapping[str, Layer], forms: Mapping[str, Form], statistics: Mapping[str, InputStatistics]
) -> Prepared:
    """Balance and rotate, in place. Layers that share an input share what is done to it: the first one's form says."""
    result = Prepared(dict(forms), dict(statistics))
    groups: dict[ir.Value, list[Layer]] = {}
    for name, form in forms.items():
        value = input_of(layers[name])
        if form.balance is None and not form.rotate:
            continue
        if value is None or not form.is_coded:
            result.forms[name] = replace(form, balance=None, rotate=False)
        else:
            groups.setdefault(value, []).append(layers[name])
    for group in groups.values():
        _treat(model.graph, group, result)
    return result


def _treat(graph: ir.Graph, group: list[Layer], result: Prepared) -> None:
    names = [layer.name for layer in group]
    wanted = result.forms[names[0]]
    share, size = wanted.balance, None
    if share is not None:
        known, folded = balance(graph, group, result.statistics[names[0]], share)
        result.statistics |= dict.fromkeys(names, known)
        result.inserted += [] if folded else [f"{names[0]}: balance"]
    if wanted.rotate:
        size, folded = rotate(graph, group)
        if size is not None:
            result.inserted += [] if folded else [f"{names[0]}: rotation"]
            if names[0] in result.statistics:
                known = rotate_statistics(result.statistics[names[0]], size)
                result.statistics |= dict.fromkeys(names, known)
    for name in names:
        result.forms[name] = replace(result.forms[name], balance=share, rotate=size is not None)


def make_encoder(
    component: str, statistics: Mapping[str, InputStatistics], work: Workspace
) -> Callable[[Layer, Form, Float], Encoded]:
    """Rounds with what calibration knows. What took long is kept in the workspace, for another part of the same
    weight, or another start."""

    def encode_layer(layer: Layer, form: Form, weight: Float) -> Encoded:
        if form.rounding == "nearest" and form.format != "palette":
            check_finite(layer, weight)
            return encode(weight, form, layer.kind)
        key = f"{component} {layer.name} {form}"
        stored = work.load("codes", key)
        if stored is None:
            check_finite(layer, weight)
            known = statistics.get(layer.name)
            moments = known.moments() if known is not None and form.rounding != "nearest" else None
            found = encode(weight, form, layer.kind, moments)
            work.save("codes", key, {f"_{part}": array for part, array in found.parts.items()})
            return found
        parts = {part[1:]: array for part, array in stored.items()}
        return Encoded(parts, partial(opened, parts, form))

    return encode_layer

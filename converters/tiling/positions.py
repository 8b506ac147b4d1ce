"""Which axes of every value are positions of the picture, found by inferring shapes at two sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from edgedit.errors import ConversionError

__all__ = ["Kind", "Layout", "infer_layouts"]

#: Two sizes in units of the largest stride, without a common factor and unlike any number of channels.
_SIZES = ((7, 11), (13, 17))


class Kind(Enum):
    """What a value is to a tile.

    MAP: [1, C, h, w], a position a pixel. TOKENS: positions along one axis. GLOBAL: a sum over all positions, or made
    from such sums. FIXED: weights, constants and shapes, the same for every tile or known from it.
    """

    MAP = "map"
    TOKENS = "tokens"
    GLOBAL = "global"
    FIXED = "fixed"


@dataclass(frozen=True)
class Layout:
    """Kind, channels (elements a position), positions a pixel of the graph's input along one side, and the axis of the
    positions of tokens, counted from the last."""

    kind: Kind
    channels: int = 0
    scale: Fraction = Fraction(1)
    axis: int = 0


def infer_layouts(model: ir.Model, stride: int) -> dict[ir.Value, Layout]:
    """The layout of every value of `model`, whose first input is the map. `stride` divides the sizes that it takes.

    Raises ConversionError when shapes cannot be inferred.
    """
    first, second = (_shapes(model, h * stride, w * stride) for h, w in _SIZES)
    height, width = (side * stride for side in _SIZES[0])
    data = _data_values(model)
    layouts: dict[ir.Value, Layout] = {}
    for value, shape in first.items():
        varying = [axis for axis, (a, b) in enumerate(zip(shape, second[value], strict=True)) if a != b]
        elements = math.prod(shape)
        if value not in data or value.dtype != ir.DataType.FLOAT:
            layouts[value] = Layout(Kind.FIXED, elements)
        elif not varying:
            layouts[value] = Layout(Kind.GLOBAL, elements)
        elif len(shape) == 4 and varying == [2, 3]:
            layouts[value] = Layout(Kind.MAP, shape[1], Fraction(shape[2], height))
        elif len(varying) == 1:
            positions = shape[varying[0]]
            area = Fraction(positions, height * width)
            scale = Fraction(math.isqrt(area.numerator), math.isqrt(area.denominator))
            if scale * scale != area:
                raise ConversionError(f"{value.name}: the positions of its axis {varying[0]} are no picture's")
            layouts[value] = Layout(Kind.TOKENS, elements // positions, scale, varying[0] - len(shape))
        else:
            raise ConversionError(f"{value.name}: its shape {shape} changes with the size in a way that no tile can")
    return layouts


def _data_values(model: ir.Model) -> set[ir.Value]:
    """Values that depend on the numbers of a graph input. What only depends on shapes is not among them."""
    data = set(model.graph.inputs)
    for node in model.graph:
        if node.op_type != "Shape" and any(value in data for value in node.inputs):
            data.update(node.outputs)
    return data


def _shapes(model: ir.Model, height: int, width: int) -> dict[ir.Value, list[int]]:
    picture = model.graph.inputs[0]
    kept_input, kept_outputs = picture.shape, [value.shape for value in model.graph.outputs]
    assert kept_input is not None
    picture.shape = ir.Shape([1, kept_input[1], height, width])
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    ShapeInferencePass()(model)
    found = {}
    values = [v for node in model.graph for v in node.outputs if v.uses() or v.is_graph_output()]
    for value in [*model.graph.inputs, *values]:
        sizes = [dim for dim in value.shape or () if isinstance(dim, int)]
        if value.shape is None or len(sizes) != len(value.shape):
            raise ConversionError(f"{value.name}: its shape at {height}×{width} cannot be inferred")
        found[value] = sizes
    picture.shape = kept_input
    for value, shape in zip(model.graph.outputs, kept_outputs, strict=True):
        value.shape = shape
    return found

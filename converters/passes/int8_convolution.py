"""Convolutions of wide maps with 8-bit activations, for ONNX Runtime's CPU provider.

`QLinearConv` takes codes and gives codes, so it needs the ranges of both beforehand; around it maps are floats, since
the norms between convolutions need them. Ranges are of the whole picture's kind and not of a tile's, so that a tile
gets the codes that the whole gets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgedit.converters.passes.int8_pointwise import remove_unused
from edgedit.converters.quantization.layers import layer_name
from edgedit.converters.quantization.store import DEQUANTIZE

__all__ = ["Int8Convolution", "MapRanges"]

#: The largest float32 that is an int32.
_LARGEST = np.float32(2**31 - 128)


@dataclass(frozen=True)
class MapRanges:
    """Least and largest value of a convolution's input and of its output; zero is within both."""

    input: tuple[float, float]
    output: tuple[float, float]


class Int8Convolution(ir.passes.InPlacePass):
    """Replace convolutions of 8-bit weights by `QLinearConv` between `QuantizeLinear` and `DequantizeLinear`.

    Args:
        ranges: by layer name; a convolution without stays as it is.
    """

    def __init__(self, ranges: Mapping[str, MapRanges]) -> None:
        super().__init__()
        self.ranges = ranges
        self.changes = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for node in list(model.graph):
            if node.op_type != "Conv" or node.inputs[1] is None:
                continue
            source = node.inputs[1].producer()
            if source is None or source.op_type != "DequantizeLinear" or "block_size" in source.attributes:
                continue
            ranges = self.ranges.get(layer_name((source.name or "").removesuffix(DEQUANTIZE)))
            if ranges is not None:
                _replace(model.graph, node, source, ranges)
                self.changes += 1
        return ir.passes.PassResult(model, modified=bool(self.changes))


def _replace(graph: ir.Graph, node: ir.Node, source: ir.Node, ranges: MapRanges) -> None:
    x, bias = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
    codes, scales = source.inputs[:2]
    assert x is not None
    assert codes is not None
    assert codes.shape is not None
    count = int(codes.shape.numpy()[0])
    made: list[ir.Node] = []

    def add(operator: str, inputs: list[ir.Value | None], *attributes: ir.Attr) -> ir.Value:
        name = f"{node.name}/{operator}_{len(made)}"
        new = ir.Node("", operator, inputs, list(attributes), num_outputs=1, name=name)
        new.outputs[0].name = f"{name}:0"
        made.append(new)
        return new.outputs[0]

    def constant(value: np.generic | np.ndarray) -> ir.Value:
        return add("Constant", [], ir.AttrTensor("value", ir.tensor(np.asarray(value))))

    def affine(low: float, high: float) -> tuple[np.float32, ir.Value, ir.Value]:
        scale = np.float32((high - low) / 255 or 1.0)
        return scale, constant(scale), constant(np.uint8(np.clip(round(-low / float(scale)), 0, 255)))

    step, in_scale, in_zero = affine(*ranges.input)
    _, out_scale, out_zero = affine(*ranges.output)
    inputs = [add("QuantizeLinear", [x, in_scale, in_zero]), in_scale, in_zero, codes, scales]
    inputs += [constant(np.zeros(count, np.int8)), out_scale, out_zero]
    if bias is not None:
        units = add("Round", [add("Div", [bias, add("Mul", [scales, constant(step)])])])
        within = add("Clip", [units, constant(-_LARGEST), constant(_LARGEST)])
        inputs.append(add("Cast", [within], ir.AttrInt64("to", int(ir.DataType.INT32))))
    y = add("DequantizeLinear", [add("QLinearConv", inputs, *node.attributes.values()), out_scale, out_zero])
    made[-1].name, old = node.name, node.outputs[0]
    y.name, y.type, y.shape = old.name, old.type, old.shape
    graph.insert_before(node, made)
    ir.convenience.replace_all_uses_with(old, y, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    remove_unused(graph, source)

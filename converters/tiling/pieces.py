"""One piece of a cut graph as a model of its own, over the weights of the whole graph."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from edgedit.converters.graph import IR_VERSION, OPSET
from edgedit.converters.tiling.positions import Kind, Layout
from edgedit.errors import ConversionError

__all__ = ["attend_model", "piece_model"]


def piece_model(
    name: str,
    nodes: Sequence[ir.Node],
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    layouts: dict[ir.Value, Layout],
) -> ir.Model:
    """A model with copies of `nodes`; its initializers are the whole graph's tensors, external ones by reference."""
    values: dict[ir.Value, ir.Value] = {}
    initializers: list[ir.Value] = []
    for value in inputs:
        values[value] = ir.Value(name=value.name, type=value.type, shape=_shape(value, layouts[value]))
    copies: list[ir.Node] = []
    for node in nodes:
        taken: list[ir.Value | None] = []
        for used in node.inputs:
            if used is not None and used not in values:
                if used.const_value is None:
                    raise ConversionError(f"{node.name}: its input {used.name} is missing from the piece {name}")
                values[used] = ir.Value(name=used.name, type=used.type, shape=used.shape, const_value=used.const_value)
                initializers.append(values[used])
            taken.append(None if used is None else values[used])
        copy = ir.Node(
            node.domain,
            node.op_type,
            taken,
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            name=node.name,
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.type = old.name, old.type
            values[old] = new
        copies.append(copy)
    for value in outputs:
        values[value].shape = _shape(value, layouts[value])
    graph = ir.Graph(
        [values[v] for v in inputs],
        [values[v] for v in outputs],
        nodes=copies,
        initializers=initializers,
        opset_imports={"": OPSET},
        name=name,
    )
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="edgedit")


def _shape(value: ir.Value, layout: Layout) -> ir.Shape:
    if layout.kind == Kind.MAP:
        side = f"{layout.scale.numerator}_{layout.scale.denominator}"
        return ir.Shape([1, layout.channels, f"height_{side}", f"width_{side}"])
    if layout.kind == Kind.TOKENS:
        if layout.axis != -2:
            raise ConversionError(f"{value.name}: tokens with positions on axis {layout.axis} cannot leave a piece")
        return ir.Shape([1, "positions", layout.channels])
    assert value.shape is not None
    return value.shape


def attend_model(node: ir.Node, channels: int) -> ir.Model:
    """One block of keys of a softmax attention, with the running maximum, total and sum of Milakov and Gimelshein,
    "Online normalizer calculation for softmax" (2018).

    queries [1, n, C], keys and values [1, m, C]; maximum and total [1, heads, n, 1], sum [1, heads, n, C / heads]. The
    attention is sum / total once every block was taken in; the first block starts from maximum -inf and zeros.
    """
    heads = node.attributes["q_num_heads"].as_int()
    plain = set(node.attributes) <= {"q_num_heads", "kv_num_heads", "scale"}
    if not plain or len(node.inputs) > 3 or node.attributes["kv_num_heads"].as_int() != heads:
        raise ConversionError(f"{node.name}: only plain softmax attention without a mask can run in tiles")
    width = channels // heads
    scale = node.attributes["scale"].as_float() if "scale" in node.attributes else width**-0.5
    from onnxscript import GraphBuilder

    def value(name: str, *shape: int | str) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))

    queries, keys, values = (value(n, 1, s, channels) for n, s in (("queries", "n"), ("keys", "m"), ("values", "m")))
    maximum, total = value("maximum", 1, heads, "n", 1), value("total", 1, heads, "n", 1)
    running = value("sum", 1, heads, "n", width)
    inputs = [queries, keys, values, maximum, total, running]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": OPSET}, name=f"{node.name}.block")
    op = GraphBuilder(graph).op

    def split(x: ir.Value, perm: list[int]) -> ir.Value:
        made: ir.Value = op.Transpose(op.Reshape(x, op.Constant(value_ints=[0, 0, heads, width])), perm=perm)
        return made

    scores = op.MatMul(op.Mul(split(queries, [0, 2, 1, 3]), float(scale)), split(keys, [0, 2, 3, 1]))
    last = op.Constant(value_ints=[-1])
    new_maximum = op.Max(maximum, op.ReduceMax(scores, last, keepdims=1))
    weights = op.Exp(op.Sub(scores, new_maximum))
    kept = op.Exp(op.Sub(maximum, new_maximum))
    new_total = op.Add(op.Mul(total, kept), op.ReduceSum(weights, last, keepdims=1))
    new_sum = op.Add(op.Mul(running, kept), op.MatMul(weights, split(values, [0, 2, 1, 3])))
    for made, like in ((new_maximum, maximum), (new_total, total), (new_sum, running)):
        made.name, made.type, made.shape = f"new_{like.name}", like.type, like.shape
        graph.outputs.append(made)
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="edgedit")

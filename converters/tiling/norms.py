"""Group norm with its moments as inputs of the graph, so that a tile can be normalised by those of the whole map."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

__all__ = ["Moments", "open_norms"]


@dataclass(frozen=True)
class Moments:
    """One group norm: the map `of` whose moments it needs, and the inputs [C, 1, 1] that take their place."""

    of: ir.Value
    groups: int
    epsilon: float
    mean: ir.Value
    reciprocal_std: ir.Value


def open_norms(model: ir.Model) -> list[Moments]:
    """Rewrite each GroupNormalization of `model` in place to (x - mean) · (reciprocal_std · weight) + bias.

    Mean and reciprocal standard deviation become inputs of the graph, float32 [C, 1, 1], constant within a group.
    """
    found: list[Moments] = []
    graph = model.graph
    for node in [n for n in graph if n.op_type == "GroupNormalization"]:
        x, weight, bias = node.inputs
        assert x is not None
        assert weight is not None
        assert bias is not None
        name = node.outputs[0].name
        width = _length(weight)

        def value(label: str, width: int = width, name: str | None = name) -> ir.Value:
            return ir.Value(
                name=f"{name}.{label}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([width, 1, 1])
            )

        mean, reciprocal_std = value("mean"), value("reciprocal_std")
        graph.inputs.extend([mean, reciprocal_std])
        new: list[ir.Node] = []

        def add(op: str, *inputs: ir.Value, name: str | None = name, new: list[ir.Node] = new) -> ir.Value:
            made = ir.Node("", op, inputs, num_outputs=1, name=f"{name}/{op}_{len(new)}")
            made.outputs[0].name = f"{name}/{op}_{len(new)}"
            made.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            new.append(made)
            return made.outputs[0]

        axes = ir.Node("", "Constant", [], [ir.AttrInt64s("value_ints", [1, 2])], num_outputs=1, name=f"{name}/axes")
        axes.outputs[0].name = f"{name}/axes"
        axes.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        new.append(axes)
        scale = add("Mul", reciprocal_std, add("Unsqueeze", weight, axes.outputs[0]))
        y = add("Add", add("Mul", add("Sub", x, mean), scale), add("Unsqueeze", bias, axes.outputs[0]))
        graph.insert_before(node, new)
        ir.convenience.replace_all_uses_with(node.outputs[0], y, replace_graph_outputs=True)
        groups = node.attributes["num_groups"].as_int()
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
        found.append(Moments(x, groups, epsilon, mean, reciprocal_std))
        graph.remove(node, safe=True)
    return found


def _length(vector: ir.Value) -> int:
    """Length of a weight that is an initializer, or is cast or dequantised from one."""
    producer = vector.producer()
    if vector.shape is None and producer is not None and producer.inputs[0] is not None:
        return _length(producer.inputs[0])
    assert vector.shape is not None
    return int(vector.shape.numpy()[0])

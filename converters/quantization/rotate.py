"""Rotation of a layer's input channels by a Hadamard matrix, in groups, undone in its weight.

Ashkboos et al., "QuaRot" (2024), section 3: outliers of one channel become small parts of many. The output of an
attention is rotated by rotating its values within each head, which costs nothing; anything else is multiplied by a
small matrix, group by group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgedit.converters.quantization.layers import Layer
from edgedit.converters.quantization.statistics import InputStatistics, input_of
from edgedit.converters.quantization.transform import change_weight, constant_of, insert_constant

__all__ = ["GROUP", "group_of", "hadamard", "rotate", "rotate_statistics", "rotated"]

Float = npt.NDArray[np.float32]

GROUP = 64
"""Channels to a group at most: the multiplication then costs a small part of the layer's own."""
_LEAST = 8


def hadamard(size: int) -> Float:
    """Sylvester's Hadamard matrix of a power of two, orthonormal and symmetric."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    result: Float = (matrix / np.sqrt(size)).astype(np.float32)
    return result


def group_of(channels: int) -> int | None:
    """The largest power of two up to `GROUP` that divides the channels, None when that is below 8."""
    size = min(GROUP, channels & -channels)
    return size if size >= _LEAST else None


def rotated(array: Float, size: int) -> Float:
    """The last axis mixed in groups of `size`."""
    return (array.reshape(-1, size) @ hadamard(size)).reshape(array.shape).astype(np.float32)


def rotate(graph: ir.Graph, layers: Sequence[Layer]) -> tuple[int | None, bool]:
    """Rotate the input of layers that share it.

    Returns the size of the groups, None when the channels do not divide into any, and whether the rotation went into
    what makes the input.
    """
    value = input_of(layers[0])
    assert value is not None
    folded = _fold(value, layers)
    size = folded or group_of(layers[0].shape[0])
    if size is None:
        return None, False
    if not folded:
        _mix(graph, value, layers, size)
    for layer in layers:
        change_weight(layer.value, lambda w: np.ascontiguousarray(rotated(np.ascontiguousarray(w.T), size).T))
    return size, bool(folded)


def _fold(value: ir.Value, layers: Sequence[Layer]) -> int | None:
    """Rotate within heads in the projection of an attention's values, if it is one; the size of the groups."""
    node = value.producer()
    if (
        node is None
        or node.op_type != "Attention"
        or {u.node for u in value.uses()} - {n for x in layers for n in x.nodes}
    ):
        return None
    keys = ("q_num_heads", "kv_num_heads")
    heads = {node.attributes[key].as_int() for key in keys if key in node.attributes}
    values = node.inputs[2]
    if (
        len(heads) != 1
        or values is None
        or sum(used is values for used in node.inputs) != 1
        or len(list(values.uses())) != 1
    ):
        return None
    size = group_of(layers[0].shape[0] // heads.pop())
    weights = _projection(values)
    if size is None or not weights or any(len(list(w.uses())) != 1 for w in weights):
        return None
    for weight in weights:
        change_weight(weight, lambda w: rotated(w, size))
    return size


def _projection(values: ir.Value) -> list[ir.Value]:
    """Weight and bias of the linear layer that makes a value, none when nothing so plain makes it."""
    node, found = values.producer(), []
    if node is not None and node.op_type == "Add":
        bias = next((v for v in node.inputs if v is not None and v.is_initializer()), None)
        rest = next((v for v in node.inputs if v is not bias), None)
        if bias is None or rest is None or len(list(rest.uses())) != 1:
            return []
        found.append(bias)
        node = rest.producer()
    if node is None or node.op_type != "MatMul" or node.inputs[1] is None or constant_of(node.inputs[1]) is None:
        return []
    return [*found, node.inputs[1]]


def _mix(graph: ir.Graph, value: ir.Value, layers: Sequence[Layer], size: int) -> None:
    name = f"{layers[0].name}/rotate"

    def made(operator: str, inputs: list[ir.Value | None], label: str) -> ir.Value:
        node = ir.Node("", operator, inputs, num_outputs=1, name=f"{name}/{label}")
        node.outputs[0].name = f"{name}/{label}:0"
        graph.insert_before(first, node)
        return node.outputs[0]

    nodes = {node for layer in layers for node in layer.nodes}
    first = next(node for node in graph if node in nodes)
    matrix = insert_constant(graph, f"quantization/hadamard_{size}", hadamard(size))
    sides = insert_constant(graph, f"quantization/groups_{size}", np.array([-1, size], np.int64))
    groups = made("Reshape", [value, sides], "groups")
    mixed = made("MatMul", [groups, matrix], "mixed")
    back = made("Reshape", [mixed, made("Shape", [value], "shape")], "back")
    for node in nodes:
        node.replace_input_with(0, back)


def rotate_statistics(statistics: InputStatistics, size: int) -> InputStatistics:
    """What is known of the inputs after their rotation. Peaks are no longer: they stay those of before."""
    return statistics.then(lambda m: rotated(np.ascontiguousarray(rotated(m, size).T), size), statistics.peaks)

"""How far beside its own place a piece of a graph looks: the halo that a tile needs, computed from the graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import onnx_ir as ir

from edgedit.errors import ConversionError

__all__ = ["halo", "is_spatial"]

#: Input pixels beside its own that an output pixel of Resize is made from.
_SUPPORT = {"nearest": 0, "linear": 1, "cubic": 2}

#: Operators that act on every position by itself, or on none.
_POINTWISE = frozenset(
    """
    Add Cast Clip Concat Constant ConstantOfShape DequantizeLinear Div Equal Erf Expand Gather Gelu Identity
    LayerNormalization Less Log MatMul Max Min Mul Neg Pow RMSNormalization Range ReduceMean ReduceSum Relu Reshape
    Shape Sigmoid Slice Softmax Split Sqrt Squeeze Sub Tanh Transpose Unsqueeze Where
    """.split()
)


def is_spatial(node: ir.Node) -> bool:
    """Whether a node mixes neighbouring positions or changes their number."""
    if node.op_type == "Conv":
        return any(size > 1 for size in node.attributes["kernel_shape"].as_ints())
    return node.op_type in ("Resize", "DepthToSpace", "SpaceToDepth")


def halo(nodes: Sequence[ir.Node], outputs: Sequence[ir.Value], inputs: Sequence[ir.Value]) -> tuple[int, int]:
    """Whole pixels of the inputs that lie before and after those that map onto the outputs' own pixels.

    `nodes` are in topological order. Raises ConversionError for an operator whose reach is not known.
    """
    zero = (Fraction(0), Fraction(0))
    need: dict[ir.Value, tuple[Fraction, Fraction]] = dict.fromkeys(outputs, zero)
    for node in reversed(nodes):
        reach = [need[value] for value in node.outputs if value in need]
        if not reach:
            continue
        before, after = _through(node, max(r[0] for r in reach), max(r[1] for r in reach))
        for value in node.inputs:
            if value is not None:
                known = need.get(value, zero)
                need[value] = max(known[0], before), max(known[1], after)
    found = [need[value] for value in inputs if value in need]
    return (
        math.ceil(max((r[0] for r in found), default=Fraction(0))),
        math.ceil(max((r[1] for r in found), default=Fraction(0))),
    )


def _through(node: ir.Node, before: Fraction, after: Fraction) -> tuple[Fraction, Fraction]:
    """The reach at a node's input, in pixels of the input, given that at its output."""
    kind = node.op_type
    if kind == "Conv":
        return _convolution(node, before, after)
    if kind == "Resize":
        mode = node.attributes["mode"].as_string()
        factor, support = resize_factor(node), _SUPPORT[mode]
        return before / factor + support, after / factor + support
    if kind == "DepthToSpace":
        block = node.attributes["blocksize"].as_int()
        return before / block, after / block
    if kind == "SpaceToDepth":
        block = node.attributes["blocksize"].as_int()
        return before * block, after * block
    if kind not in _POINTWISE:
        raise ConversionError(f"{node.name}: the reach of operator {kind} is not known, so it cannot run in tiles")
    return before, after


def _convolution(node: ir.Node, before: Fraction, after: Fraction) -> tuple[Fraction, Fraction]:
    attributes = node.attributes
    kernel = attributes["kernel_shape"].as_ints()
    strides = attributes["strides"].as_ints() if "strides" in attributes else [1, 1]
    pads = attributes["pads"].as_ints() if "pads" in attributes else [0, 0, 0, 0]
    dilated = "dilations" in attributes and any(d != 1 for d in attributes["dilations"].as_ints())
    if dilated or "auto_pad" in attributes or strides[0] != strides[1]:
        raise ConversionError(f"{node.name}: a dilated or unevenly strided convolution cannot run in tiles")
    # Output o reads inputs from stride·o - pad to stride·o - pad + kernel - 1.
    stride = strides[0]
    return (
        stride * before + max(pads[0], pads[1]),
        stride * after + max(0, *(k - stride - p for k, p in zip(kernel, pads[:2], strict=True))),
    )


def resize_factor(node: ir.Node) -> int:
    """The whole number by which a Resize enlarges both sides. Raises ConversionError for any other."""
    scales = node.inputs[2] if len(node.inputs) > 2 else None
    array = None if scales is None else constant_of(scales)
    if array is None or array.size != 4 or array[2] != array[3] or array[2] < 1 or array[2] % 1:
        raise ConversionError(f"{node.name}: only Resize by one constant whole number can run in tiles")
    return int(array[2])


def constant_of(value: ir.Value) -> np.ndarray | None:
    """The array of a constant or initializer, None for anything else."""
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is None or node.op_type != "Constant":
        return None
    attribute = next(iter(node.attributes.values()))
    if attribute.name == "value":
        return attribute.as_tensor().numpy()
    return np.asarray(attribute.value)

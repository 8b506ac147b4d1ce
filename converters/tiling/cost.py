"""What a piece costs per position of its input: floating-point operations and bytes of working memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import onnx_ir as ir

from edgedit.converters.tiling.kernels import Array, kernel_steps, weight_shape
from edgedit.converters.tiling.positions import Kind, Layout

__all__ = ["Cost", "cost_of"]

_FLOAT = 4


@dataclass(frozen=True)
class Cost:
    """Per position of the piece's input: operations, and bytes beyond inputs (outputs included) at the peak."""

    flops: float
    workspace: float


def cost_of(
    nodes: Sequence[ir.Node],
    outputs: Sequence[ir.Value],
    layouts: Mapping[ir.Value, Layout],
    at: Fraction,
    *,
    frees: bool = True,
) -> Cost:
    """The cost of running `nodes` in order, where values are freed after their last use. `at` is the input's scale.

    What nothing reads, as two of three parts of a Split, is never freed. Nor is anything without `frees`: ONNX Runtime
    runs independent branches of a graph level by level, not one after the other.
    """

    def share(value: ir.Value) -> float:
        layout = layouts.get(value)
        if layout is None or layout.kind not in (Kind.MAP, Kind.TOKENS):
            return 0.0
        return layout.channels * float(layout.scale / at) ** 2

    steps = kernel_steps(nodes, outputs, lambda value: share(value) > 0)
    last = {array: i for i, step in enumerate(steps) for array in step.inputs}
    last |= dict.fromkeys([Array(value) for value in outputs], len(steps))
    owner: dict[Array, Array] = {}
    users: dict[Array, int] = {}
    size: dict[Array, float] = {}
    peak = current = 0.0

    def release(array: Array) -> None:
        nonlocal current
        root = owner.get(array)
        if root is not None:
            users[root] -= 1
            if users[root] == 0:
                current -= size[root]

    for i, step in enumerate(steps):
        dying = [array for array in dict.fromkeys(step.inputs) if last.get(array) == i]
        made: dict[Array, Array] = {}
        for array in step.outputs:
            bytes_ = share(array.value) * _FLOAT
            able = (a for a in dying if a in owner and users[owner[a]] == 1 and a not in made)
            reuse = next((a for a in able if size[owner[a]] == bytes_), None)
            if step.alias and step.inputs and step.inputs[0] in owner:
                made[array] = owner[step.inputs[0]]
            elif step.alias:
                continue
            elif reuse is not None and step.in_place:
                made[array] = owner[reuse]
            else:
                made[array] = array
                size[array] = bytes_
                current += bytes_
        peak = max(peak, current)
        for array, root in made.items():
            owner[array] = root
            users[root] = users.get(root, 0) + 1
        for array in dying if frees else ():
            release(array)
    return Cost(sum(_flops(node, share) for node in nodes), peak)


def _flops(node: ir.Node, share: Callable[[ir.Value], float]) -> float:
    out = share(node.outputs[0])
    if node.op_type == "Conv":
        weight = node.inputs[1]
        shape = weight_shape(weight)
        return 2.0 * out * math.prod(shape[1:])
    if node.op_type == "MatMul":
        right, left = weight_shape(node.inputs[1]), node.inputs[0]
        if out and right:
            return 2.0 * out * (right[-2] if len(right) > 1 else 1)
        # A contraction over positions: every element of one side meets a column of the other.
        shape = weight_shape(node.outputs[0])
        return 2.0 * (0.0 if left is None else share(left)) * (shape[-1] if shape else 1)
    return out

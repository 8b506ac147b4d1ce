"""What a piece costs per position of its input: floating-point operations and bytes of working memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import onnx_ir as ir

from edgedit.converters.tiling.positions import Kind, Layout

__all__ = ["Cost", "cost_of"]

#: Operators that ONNX Runtime does within the convolution before.
_FUSED = frozenset(["Add", "Relu"])
#: Operators that write over an input that is not needed any more, where its shape is known to be that of the output: up
#: to the first convolution or resampling, behind which sizes that vary have no names.
_IN_PLACE = frozenset("Add Clip Div Gelu Mul Neg Relu Sigmoid Sqrt Sub Tanh".split())
#: Operators that work on the blocks of channels which ONNX Runtime's convolutions take and give.
_ON_BLOCKS = frozenset("Add Clip Conv Mul Relu Resize Sigmoid Tanh".split())
#: Channels of a block on processors with AVX-512; half of that with AVX2, and none on Arm.
_BLOCK = 16
#: Operators whose output is their input's memory under another shape.
_ALIASES = frozenset("Identity Reshape Squeeze Unsqueeze".split())
_FLOAT = 4


@dataclass(frozen=True)
class Cost:
    """Per position of the piece's input: operations, and bytes beyond inputs (outputs included) at the peak."""

    flops: float
    workspace: float


def cost_of(
    nodes: Sequence[ir.Node], outputs: Sequence[ir.Value], layouts: Mapping[ir.Value, Layout], at: Fraction
) -> Cost:
    """The cost of running `nodes` in order, where values are freed after their last use. `at` is the input's scale."""

    def share(value: ir.Value) -> float:
        layout = layouts.get(value)
        if layout is None or layout.kind not in (Kind.MAP, Kind.TOKENS):
            return 0.0
        return layout.channels * float(layout.scale / at) ** 2

    last = {value: i for i, node in enumerate(nodes) for value in node.inputs if value is not None}
    last |= dict.fromkeys(outputs, len(nodes))
    owner: dict[ir.Value, ir.Value] = {}
    users: dict[ir.Value, int] = {}
    size: dict[ir.Value, float] = {}
    flops = peak = current = 0.0

    def release(value: ir.Value) -> None:
        nonlocal current
        root = owner.get(value)
        if root is not None:
            users[root] -= 1
            if users[root] == 0:
                current -= size[root]

    named = {v for node in nodes for v in node.inputs if v is not None} - {v for n in nodes for v in n.outputs}
    blocked: set[ir.Value] = set()
    for i, node in enumerate(nodes):
        placed = [v for v in node.inputs if v is not None and share(v)]
        if node.op_type in _IN_PLACE and any(v in named for v in placed):
            named.update(node.outputs)
        flops += _flops(node, share)
        dying = [v for v in dict.fromkeys(node.inputs) if v is not None and last.get(v) == i]
        extra = 0.0
        made: dict[ir.Value, ir.Value] = {}
        for value in node.outputs:
            # SiLU is one operator for ONNX Runtime, which does not work in place: the sigmoid is no map of its own.
            bytes_ = 0.0 if _is_of_silu(node) else share(value) * _FLOAT
            reuse = next(
                (
                    v
                    for v in dying
                    if v in owner and users[owner[v]] == 1 and size[owner[v]] == bytes_ and v not in made
                ),
                None,
            )
            if node.op_type in _ALIASES and node.inputs[0] in owner:
                made[value] = owner[node.inputs[0]]
            elif node.op_type in _ALIASES:
                continue
            elif reuse is not None and (
                (node.op_type in _FUSED and len(placed) == len(node.inputs))
                or (node.op_type in _IN_PLACE and value in named and not _ends_silu(node))
            ):
                made[value] = owner[reuse]
            else:
                made[value] = value
                size[value] = bytes_
                extra += bytes_
        if node.op_type == "Conv" and _takes_blocks(node):
            x = node.inputs[0]
            assert x is not None
            before = 0.0 if x in blocked else share(x) * _FLOAT
            freed = size[owner[x]] if x in dying and x in owner and users[owner[x]] == 1 else 0.0
            after = 0.0 if all(_keeps_blocks(use.node) for use in node.outputs[0].uses()) else extra
            peak = max(peak, current + before, current + before + extra - min(freed, before))
            peak = max(peak, current - freed + extra + after)
            blocked.update(node.outputs)
        elif _keeps_blocks(node) and all(value in blocked for value in placed):
            blocked.update(node.outputs)
        current += extra
        peak = max(peak, current)
        for value, root in made.items():
            owner[value] = root
            users[root] = users.get(root, 0) + 1
        for value in dying:
            release(value)
        for value in node.outputs:
            if value not in last:
                release(value)
    return Cost(flops, peak)


def _takes_blocks(convolution: ir.Node) -> bool:
    """Whether ONNX Runtime copies the map into blocks of channels before a convolution, and back behind it."""
    shape = _shape(convolution.inputs[1])
    groups = convolution.attributes["group"].as_int() if "group" in convolution.attributes else 1
    if len(shape) < 2 or shape[0] % _BLOCK:
        return False
    return shape[1] % _BLOCK == 0 if groups == 1 else groups == shape[0]


def _keeps_blocks(node: ir.Node) -> bool:
    return node.op_type in _ON_BLOCKS and not _is_of_silu(node) and not (node.op_type == "Mul" and _ends_silu(node))


def _ends_silu(node: ir.Node) -> bool:
    producers = [value.producer() for value in node.inputs if value is not None]
    return any(producer is not None and _is_of_silu(producer) for producer in producers)


def _is_of_silu(node: ir.Node) -> bool:
    """Whether `node` is the Sigmoid of x · Sigmoid(x)."""
    if node.op_type != "Sigmoid":
        return False
    users = {use.node for use in node.outputs[0].uses()}
    return len(users) == 1 and all(u.op_type == "Mul" and node.inputs[0] in u.inputs for u in users)


def _flops(node: ir.Node, share: Callable[[ir.Value], float]) -> float:
    out = share(node.outputs[0])
    if node.op_type == "Conv":
        weight = node.inputs[1]
        shape = _shape(weight)
        return 2.0 * out * math.prod(shape[1:])
    if node.op_type == "MatMul":
        right, left = _shape(node.inputs[1]), node.inputs[0]
        if out and right:
            return 2.0 * out * (right[-2] if len(right) > 1 else 1)
        # A contraction over positions: every element of one side meets a column of the other.
        shape = _shape(node.outputs[0])
        return 2.0 * (0.0 if left is None else share(left)) * (shape[-1] if shape else 1)
    return out


def _shape(value: ir.Value | None) -> list[int]:
    if value is None or value.shape is None:
        producer = None if value is None else value.producer()
        if producer is not None and producer.inputs and producer.inputs[0] is not None:
            return _shape(producer.inputs[0])
        return []
    return [dim if isinstance(dim, int) else 1 for dim in value.shape]

"""What ONNX Runtime's CPU provider makes of a graph's nodes, as far as it changes which maps are in memory.

Convolutions take and give maps in blocks of channels (NCHWc): a map that is not in that form is copied into it, and a
result that something else reads is copied back at once. SiLU becomes one kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from edgedit.converters.passes.exact_silu import is_of_silu

__all__ = ["Array", "Step", "kernel_steps", "weight_shape"]

#: Operators that are done within the convolution before.
_FUSED = frozenset(["Add", "Relu"])
#: Operators that write over an input that is not needed any more, where its shape is known to be that of the output: up
#: to the first convolution or resampling, behind which sizes that vary have no names.
_IN_PLACE = frozenset("Add Clip Div Gelu Mul Neg Relu Sigmoid Sqrt Sub Tanh".split())
#: Operators whose output is their input's memory under another shape.
_ALIASES = frozenset("Identity Reshape Squeeze Unsqueeze".split())
#: Operators beside convolutions that work on blocks of channels, if all maps that they take are in that form.
_ON_BLOCKS = frozenset("Add Clip Concat Mul Relu Resize Sigmoid Tanh".split())
#: Channels of a block on processors with AVX-512; half of that with AVX2, and none on Arm.
_BLOCK = 16


@dataclass(frozen=True)
class Array:
    """A value in memory, in its own form or in blocks of channels."""

    value: ir.Value
    blocked: bool = False


@dataclass(frozen=True)
class Step:
    """One kernel: what it reads and makes, whether it may write over its input, whether it copies nothing at all."""

    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    in_place: bool = False
    alias: bool = False


def kernel_steps(
    nodes: Sequence[ir.Node], outputs: Sequence[ir.Value], placed: Callable[[ir.Value], bool]
) -> list[Step]:
    """The kernels that run `nodes`, in order. `placed`: whether a value lies on positions; others are not followed."""
    blocked = _blocked_nodes(nodes, placed)
    made_blocked = {value for node in blocked for value in node.outputs}
    read_plain = {value for node in nodes if node not in blocked and not is_of_silu(node) for value in node.inputs}
    read_plain.update(outputs)
    named = {v for node in nodes for v in node.inputs if v is not None} - {v for n in nodes for v in n.outputs}
    steps: list[Step] = []
    copied: set[ir.Value] = set()
    for node in nodes:
        if is_of_silu(node):
            continue
        silu, on_blocks = _ends_silu(node), node in blocked
        maps = [v for v in _read(node) if placed(v)]
        for value in maps if on_blocks else ():
            if value not in made_blocked and value not in copied:
                copied.add(value)
                steps.append(Step((Array(value),), (Array(value, True),)))
        if node.op_type in _IN_PLACE and any(v in named for v in maps):
            named.update(node.outputs)
        fused = node.op_type in _FUSED and len(maps) == len(_read(node))
        in_place = fused or (node.op_type in _IN_PLACE and not silu and any(v in named for v in node.outputs))
        steps.append(
            Step(
                tuple(Array(v, on_blocks) for v in maps),
                tuple(Array(v, on_blocks) for v in node.outputs),
                in_place,
                node.op_type in _ALIASES or _is_of_product(node),
            )
        )
        for value in node.outputs if on_blocks else ():
            if value in read_plain:
                steps.append(Step((Array(value, True),), (Array(value),)))
    return steps


def _blocked_nodes(nodes: Sequence[ir.Node], placed: Callable[[ir.Value], bool]) -> set[ir.Node]:
    """Nodes that work on blocks of channels."""
    found: set[ir.Node] = set()
    made: set[ir.Value] = set()
    for node in nodes:
        maps = [v for v in _read(node) if placed(v)]
        if node.op_type == "Conv":
            able = _takes_blocks(node)
        else:
            alone = node.op_type not in ("Add", "Mul") or len(maps) == len(_read(node))
            able = node.op_type in _ON_BLOCKS and alone and bool(maps) and all(v in made for v in maps)
            able = able and not is_of_silu(node)
        if able:
            found.add(node)
            made.update(node.outputs)
    return found


def _read(node: ir.Node) -> list[ir.Value]:
    """The inputs of a node; of the product of a SiLU, what the SiLU is of."""
    inputs = [value for value in node.inputs if value is not None]
    if _ends_silu(node):
        return [v for v in inputs if (producer := v.producer()) is None or not is_of_silu(producer)]
    return inputs


def _takes_blocks(convolution: ir.Node) -> bool:
    shape = weight_shape(convolution.inputs[1])
    groups = convolution.attributes["group"].as_int() if "group" in convolution.attributes else 1
    if len(shape) < 2 or shape[0] % _BLOCK:
        return False
    return shape[1] % _BLOCK == 0 if groups == 1 else groups == shape[0]


def _is_of_product(node: ir.Node) -> bool:
    """Whether `node` swaps the last two axes for a matrix product, which does that itself."""
    if node.op_type != "Transpose" or "perm" not in node.attributes:
        return False
    perm = list(node.attributes["perm"].as_ints())
    swapped = [*range(len(perm) - 2), len(perm) - 1, len(perm) - 2]
    uses = node.outputs[0].uses()
    return perm == swapped and bool(uses) and all(use.node.op_type == "MatMul" for use in uses)


def _ends_silu(node: ir.Node) -> bool:
    """Whether `node` is the product of x · Sigmoid(x)."""
    if node.op_type != "Mul":
        return False
    producers = [value.producer() for value in node.inputs if value is not None]
    return any(producer is not None and is_of_silu(producer) for producer in producers)


def weight_shape(value: ir.Value | None) -> list[int]:
    """The shape of a weight that is an initializer, or is cast or dequantised from one; [] where it is not known."""
    if value is None or value.shape is None:
        producer = None if value is None else value.producer()
        if producer is not None and producer.inputs and producer.inputs[0] is not None:
            return weight_shape(producer.inputs[0])
        return []
    return [dim if isinstance(dim, int) else 1 for dim in value.shape]

"""Channel balancing: inputs divided, weights multiplied by one factor a channel.

Xiao et al., "SmoothQuant" (2022), equation 4, as ViDiT-Q uses it for diffusion transformers. The factor goes into what
makes the input where it can (a norm, a modulation, a projection, the values of an attention); where it cannot, one
multiplication is put in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgedit.converters.quantization.layers import Layer
from edgedit.converters.quantization.statistics import InputStatistics, input_of
from edgedit.converters.quantization.transform import change_weight, constant_of, insert_constant

__all__ = ["balance", "factors", "scale_value"]

Float = npt.NDArray[np.float32]

_LEAST, _MOST = 1e-4, 1e4


def factors(peaks: Float, weights: Float, share: float) -> Float:
    """max|X|^share / max|W|^(1 - share) by channel, 1 where either is zero; both [K]."""
    known = (peaks > 0) & (weights > 0)
    x, w = np.where(known, peaks, 1).astype(np.float64), np.where(known, weights, 1).astype(np.float64)
    return np.where(known, np.clip(x**share / w ** (1 - share), _LEAST, _MOST), 1).astype(np.float32)


def balance(
    graph: ir.Graph, layers: Sequence[Layer], statistics: InputStatistics, share: float
) -> tuple[InputStatistics, bool]:
    """Balance layers that share an input.

    Returns:
        the statistics of their new input, and whether the factor went into what makes it.
    """
    weights = np.zeros(layers[0].shape[0], np.float32)
    for layer in layers:
        tensor = layer.value.const_value
        assert tensor is not None
        weights = np.maximum(weights, np.abs(tensor.numpy()).max(1))
    factor = factors(statistics.peaks, weights, share)
    value = input_of(layers[0])
    assert value is not None
    inverse = (1 / factor).astype(np.float32)
    folded = scale_value(graph, value, inverse, [node for layer in layers for node in layer.nodes], layers[0].name)
    for layer in layers:
        change_weight(layer.value, lambda w: w * factor[:, None])
    return (
        statistics.then(lambda m: m / np.outer(factor, factor), (statistics.peaks / factor).astype(np.float32)),
        folded,
    )


@dataclass(frozen=True)
class _Plan:
    """How a value is scaled: the multiplications that it takes, what does it, and whether that is one of the value."""

    inserted: int
    apply: Callable[[], None]
    is_here: bool = False


def scale_value(graph: ir.Graph, value: ir.Value, factor: Float, users: Collection[ir.Node], name: str) -> bool:
    """Let `users`, which may be all that use it, see value · factor (its last axis). True when nothing was put in
    between the value and its users."""
    plan = _plan(graph, value, factor, set(users), name)
    plan.apply()
    return not plan.is_here


def _plan(graph: ir.Graph, value: ir.Value, factor: Float, users: set[ir.Node], name: str) -> _Plan:
    node = value.producer()
    put_in = _Plan(1, lambda: _multiply(graph, value, factor, users, name), is_here=True)
    if node is None or value.is_graph_output() or {use.node for use in value.uses()} - users:
        return put_in
    inputs = list(node.inputs)
    if node.op_type == "Add":
        parts = [_operand(graph, operand, factor, node, name) for operand in inputs]
        # Two multiplications where one does it would be none the better.
        return _both(parts) if sum(part.inserted for part in parts) <= 1 else put_in
    if node.op_type == "Mul":
        best = min((_operand(graph, operand, factor, node, name) for operand in inputs), key=lambda p: p.inserted)
        return best if best.inserted == 0 else put_in
    if node.op_type in ("LayerNormalization", "RMSNormalization"):
        return _Plan(0, lambda: _scale_norm(graph, node, factor, name))
    if node.op_type == "MatMul":
        return _matrix(node, factor) or put_in
    if node.op_type == "Attention" and _keeps_channels(node) and inputs[2] is not None:
        values = inputs[2]
        if sum(used is values for used in inputs) == 1:
            inner = _plan(graph, values, factor, {node}, name)
            return inner if inner.inserted == 0 else put_in
    return put_in


def _both(parts: Sequence[_Plan]) -> _Plan:
    def apply() -> None:
        for part in parts:
            part.apply()

    return _Plan(sum(part.inserted for part in parts), apply)


def _operand(graph: ir.Graph, operand: ir.Value | None, factor: Float, user: ir.Node, name: str) -> _Plan:
    """An input of Add or Mul: a bias of the right width, or a computed value."""
    never = _Plan(2, lambda: None)
    if operand is None:
        return never
    tensor = constant_of(operand)
    if tensor is None:
        return _plan(graph, operand, factor, {user}, name)
    if not operand.is_initializer() or tuple(tensor.shape.numpy()) != factor.shape or len(list(operand.uses())) > 1:
        return never
    return _Plan(0, lambda: change_weight(operand, lambda bias: bias * factor))


def _matrix(node: ir.Node, factor: Float) -> _Plan | None:
    weight = node.inputs[1]
    if weight is None or not weight.is_initializer() or len(list(weight.uses())) > 1:
        return None
    shape = () if weight.shape is None else tuple(weight.shape.numpy())
    if len(shape) != 2 or shape[1] != len(factor):
        return None
    return _Plan(0, lambda: change_weight(weight, lambda w: w * factor))


def _keeps_channels(node: ir.Node) -> bool:
    """Whether every output channel of an attention is a mean of that channel of its values."""
    heads = [node.attributes[key].as_int() for key in ("q_num_heads", "kv_num_heads") if key in node.attributes]
    return len(heads) == 2 and heads[0] == heads[1] and not any(o.uses() for o in node.outputs[1:])


def _scale_norm(graph: ir.Graph, node: ir.Node, factor: Float, name: str) -> None:
    for index, operand in list(enumerate(node.inputs))[1:]:
        tensor = constant_of(operand)
        assert tensor is not None
        # A new one in any case: norms of several blocks may share theirs.
        label = f"{node.name or name}/balanced_{'scale' if index == 1 else 'bias'}"
        node.replace_input_with(index, insert_constant(graph, f"{label}:{name}", tensor.numpy() * factor))
        before = None if operand is None else operand.producer()
        if before is not None and operand is not None and not operand.uses():
            graph.remove(before, safe=True)


def _multiply(graph: ir.Graph, value: ir.Value, factor: Float, users: Collection[ir.Node], name: str) -> None:
    constant = insert_constant(graph, f"{name}/balance:{value.name}", factor)
    node = ir.Node("", "Mul", [value, constant], num_outputs=1, name=f"{name}/balance:{value.name}")
    node.outputs[0].name = f"{node.name}:0"
    uses = [(use.node, use.idx) for use in value.uses() if use.node in users]
    first = next(found for found in graph if found in {used for used, _ in uses})
    graph.insert_before(first, node)
    for user, index in uses:
        user.replace_input_with(index, node.outputs[0])

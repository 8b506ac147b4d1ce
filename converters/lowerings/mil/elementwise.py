"""MIL rules: arithmetic, comparisons, activations, reductions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from edgedit.converters.lowerings.driver import NodeInfo, dense, is_static
from edgedit.converters.lowerings.mil.builder import MilBuilder, Pending, rules, shape_of
from edgedit.converters.lowerings.mil.tokens import channels_first, has_tokens, tokens

__all__: list[str] = []

_BINARY = {
    "Add": "add",
    "Sub": "sub",
    "Mul": "mul",
    "Div": "real_div",
    "Pow": "pow",
    "Max": "maximum",
    "Min": "minimum",
    "Equal": "equal",
    "Less": "less",
    "And": "logical_and",
}
_UNARY = {"Sqrt": "sqrt", "Cos": "cos", "Sin": "sin", "Tanh": "tanh", "Erf": "erf", "Relu": "relu"}


def _operands(b: MilBuilder, node: NodeInfo, *values: Any) -> list[Any]:
    """Operands of one type; a broadcast one stays small where another operand has the whole shape."""
    floats = [value for value in values if b.is_float(value)]
    real = b.real(node, *floats) if floats else None
    whole = np.broadcast_shapes(*(shape_of(value) for value in values))
    bases = [shape_of(v.base if isinstance(v, Pending) and v.kind == "broadcast" else v) for v in values]
    lean = np.broadcast_shapes(*bases) == whole
    used = [v.base if lean and isinstance(v, Pending) and v.kind == "broadcast" else v for v in values]
    return [b.var(value, real) for value in used]


@rules(*_BINARY)
def binary(b: MilBuilder, node: NodeInfo, *values: Any) -> Any:
    """Elementwise operators of two operands (Max and Min of any number)."""
    name = b.name(node.name)
    if node.op_type == "Add" and (biased := _biased_product(b, values)) is not None:
        return biased
    if node.op_type == "Mul" and (gated := _silu(b, node, values)) is not None:
        return gated
    if any(has_tokens(value) for value in values) and len(values) == 2:
        return _token_binary(b, node, values)
    operands = _operands(b, node, *values)
    operator = _BINARY[node.op_type]
    if operator == "real_div" and not any(b.is_float(value) for value in values):
        operator = "floor_div"
    result = operands[0]
    for operand in operands[1:]:
        result = getattr(b.mb, operator)(x=result, y=operand, name=name)
        name = b.name(node.name)
    return b.mb.identity(x=result, name=name) if len(operands) == 1 else result


def _token_binary(b: MilBuilder, node: NodeInfo, values: tuple[Any, ...]) -> Any:
    """Two operands with channels first, broadcast as the graph says."""
    used = [v.base if isinstance(v, Pending) and v.kind == "broadcast" and v.base is not None else v for v in values]
    shape = np.broadcast_shapes(*(shape_of(value) for value in values))
    if np.broadcast_shapes(*(shape_of(value) for value in used)) != shape:
        used = list(values)
    real = b.real(node, *(value for value in used if is_static(value)))
    if len(shape) == 2 and any(shape_of(value)[:-1] not in ((), (1,), shape[:1]) for value in used):
        return getattr(b.mb, _BINARY[node.op_type])(x=b.var(used[0], real), y=b.var(used[1], real))

    def first() -> Any:
        x, y = (channels_first(b, node.name, value, real) for value in used)
        return getattr(b.mb, _BINARY[node.op_type])(x=x, y=y, name=b.name(node.name))

    return tokens(b, node.name, shape, first)


def _unary(b: MilBuilder, node: NodeInfo, x: Any, write: Callable[[Any], Any]) -> Any:
    """A function of each element, in the layout that x has."""
    real = b.real(node)
    if has_tokens(x):
        return tokens(b, node.name, shape_of(x), lambda: write(channels_first(b, node.name, x, real)))
    return write(b.var(x, real))


def _biased_product(b: MilBuilder, values: tuple[Any, ...]) -> Any:
    """A product with a matrix plus a vector: one `linear` with a bias."""
    for product, bias in (values, values[::-1]):
        waits = isinstance(product, Pending) and product.kind == "product" and product.written is None
        if waits and is_static(bias) and shape_of(bias) == shape_of(product)[-1:]:
            return product.detail(bias)
    return None


def _silu(b: MilBuilder, node: NodeInfo, values: tuple[Any, ...]) -> Any:
    for gate, x in (values, values[::-1]):
        if isinstance(gate, Pending) and gate.kind == "sigmoid" and gate.base is x and gate.written is None:
            return _unary(b, node, x, lambda value: b.mb.silu(x=value, name=b.name(node.name)))
    return None


@rules("Sigmoid")
def sigmoid(b: MilBuilder, node: NodeInfo, x: Any) -> Pending:
    """Waits for a product with its own operand, which is SiLU."""
    real = b.real(node)
    return Pending("sigmoid", shape_of(x), x, lambda: b.mb.sigmoid(x=b.var(x, real), name=b.name(node.name)))


@rules(*_UNARY)
def unary(b: MilBuilder, node: NodeInfo, x: Any) -> Any:
    """Functions of one value."""
    operator = getattr(b.mb, _UNARY[node.op_type])
    return _unary(b, node, x, lambda value: operator(x=value, name=b.name(node.name)))


@rules("Neg")
def negative(b: MilBuilder, node: NodeInfo, x: Any) -> Any:
    """Minus one times the value, whole numbers too."""
    real = b.real(node)
    value = b.var(x, real)
    one = -1 if not b.is_float(x) else np.float16(-1) if real == "fp16" else np.float32(-1)
    return b.mb.mul(x=value, y=one, name=b.name(node.name))


@rules("Log")
def logarithm(b: MilBuilder, node: NodeInfo, x: Any) -> Any:
    """Natural logarithm, in float32: MIL adds its epsilon of 1e-45, which float16 has not."""
    return b.cast(b.mb.log(x=b.var(x, "fp32"), name=b.name(node.name)), b.real(node))


@rules("Gelu")
def gelu(b: MilBuilder, node: NodeInfo, x: Any) -> Any:
    """GELU, exact or by tanh."""
    mode = "TANH_APPROXIMATION" if node.get("approximate", "none") == "tanh" else "EXACT"
    return _unary(b, node, x, lambda value: b.mb.gelu(x=value, mode=mode, name=b.name(node.name)))


@rules("Softmax")
def softmax(b: MilBuilder, node: NodeInfo, x: Any) -> Any:
    """Softmax along one axis."""
    return b.mb.softmax(x=b.var(x, b.real(node)), axis=int(node.get("axis", -1)), name=b.name(node.name))


@rules("Where")
def where(b: MilBuilder, node: NodeInfo, condition: Any, x: Any, y: Any) -> Any:
    """Elements of x or y. MIL takes the shape of its result from x and y alone, so a condition that is larger than
    both, which chooses between two numbers, becomes a sum of products."""
    real = b.real(node, *(v for v in (x, y) if b.is_float(v)))
    shape = np.broadcast_shapes(*(shape_of(v) for v in (condition, x, y)))
    if np.broadcast_shapes(shape_of(x), shape_of(y)) != shape and b.is_float(x):
        return _chosen(b, node, b.cast(b.var(condition), real), b.var(x, real), b.var(y, real), real)
    sides = [_spread(b, b.var(v, real), shape) for v in (x, y)]
    return b.mb.select(cond=_spread(b, b.var(condition), shape), a=sides[0], b=sides[1], name=b.name(node.name))


def _chosen(b: MilBuilder, node: NodeInfo, chosen: Any, x: Any, y: Any, real: str) -> Any:
    """c x + (1 - c) y for c of zeros and ones: exact, since both are finite."""
    one = np.float16(1) if real == "fp16" else np.float32(1)
    other = b.mb.mul(x=b.mb.sub(x=one, y=chosen, name=b.name(node.name)), y=y, name=b.name(node.name))
    if x.val is not None and not np.any(x.val):
        return other
    return b.mb.add(x=b.mb.mul(x=chosen, y=x, name=b.name(node.name)), y=other, name=b.name(node.name))


def _spread(b: MilBuilder, value: Any, shape: tuple[int, ...]) -> Any:
    """`value` with ones put before its shape: MIL's select broadcasts sizes, not ranks."""
    missing = len(shape) - len(value.shape)
    if missing <= 0 or not value.shape:
        return value
    return b.mb.expand_dims(x=value, axes=list(range(missing)), name=b.name(f"{value.name}_expanded"))


@rules("Cast")
def cast(b: MilBuilder, node: NodeInfo, x: Any) -> Any:
    """To float (in the type of the node), int32 or bool; MIL has no int64."""
    to = ir.DataType(node.attributes["to"])
    if to.is_floating_point():
        return b.cast(b.var(x), b.real(node))
    if to not in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL):
        raise ValueError(f"Core ML computes with floats, int32 and bool, not {to.name}")
    return b.cast(b.var(x), "bool" if to == ir.DataType.BOOL else "int32")


@rules("Clip")
def clip(b: MilBuilder, node: NodeInfo, x: Any, low: Any = None, high: Any = None) -> Any:
    """Limits on either side."""
    real = b.real(node) if b.is_float(x) else None
    value = b.var(x, real)
    for limit, operator in ((low, b.mb.maximum), (high, b.mb.minimum)):
        if limit is not None:
            value = operator(x=value, y=b.var(limit, real), name=b.name(node.name))
    return value


@rules("ReduceSum", "ReduceMean")
def reduce(b: MilBuilder, node: NodeInfo, x: Any, axes: Any = None) -> Any:
    """Sum or mean over some axes, or all."""
    operator: Callable[..., Any] = b.mb.reduce_sum if node.op_type == "ReduceSum" else b.mb.reduce_mean
    over = list(range(len(shape_of(x)))) if axes is None else [int(axis) for axis in dense(axes)]
    keep = bool(node.get("keepdims", 1))
    return operator(x=b.var(x, b.real(node)), axes=over, keep_dims=keep, name=b.name(node.name))

"""The table: ONNX operator → MLX, for every operator of the canonical set; `mx.fast` kernels where there are any.

Where sums are long they run in float32 whatever the weights are in: products of two activations (linear attention) and
reductions; so does what is added up from block to block. `mx.fast` accumulates its norms and its softmax in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from edgedit.converters.lowerings.driver import NodeInfo, Rule, dense, is_static, reshaped
from edgedit.converters.lowerings.mlx_attention import attention, rotary_embedding
from edgedit.converters.lowerings.mlx_maps import conv, conv_transpose, depth_to_space, resize, space_to_depth
from edgedit.converters.lowerings.mlx_values import (
    Array,
    ChannelsLast,
    Packed,
    Stored,
    Values,
    is_activation,
    stored_axis,
)

__all__ = ["DTYPES", "table"]

#: ONNX element types by number, as MLX types.
DTYPES = {
    1: mx.float32,
    2: mx.uint8,
    3: mx.int8,
    4: mx.uint16,
    5: mx.int16,
    6: mx.int32,
    7: mx.int64,
    9: mx.bool_,
    10: mx.float16,
    12: mx.uint32,
    13: mx.uint64,
    16: mx.bfloat16,
}
_GELU_TANH = float(np.sqrt(2 / np.pi))


def table(values: Values) -> dict[str, Rule]:
    """The rules, over one set of constants."""
    rules: dict[str, Rule] = {name: _elementwise(values, function) for name, function in _ELEMENTWISE.items()}
    rules["Add"] = _add(values)
    for name, function in _WITH_VALUES.items():
        rules[name] = _bound(values, function)
    return rules


def _bound(values: Values, function: Callable[..., Any]) -> Rule:
    def rule(node: NodeInfo, *inputs: Any) -> Any:
        return function(values, node, *inputs)

    return rule


def _elementwise(values: Values, function: Callable[..., Array]) -> Rule:
    def rule(node: NodeInfo, *inputs: Any) -> Any:
        arrays, last = values.together(inputs)
        result = function(*arrays)
        return ChannelsLast(result) if last else result

    return rule


def _add(values: Values) -> Rule:
    """Two activations are added in float32: that is the stream that runs through all blocks and grows with them."""

    def rule(node: NodeInfo, a: Any, b: Any) -> Any:
        (x, y), last = values.together((a, b))
        if is_activation(a) and is_activation(b) and x.dtype in (mx.float16, mx.bfloat16):
            x = x.astype(mx.float32)
        return ChannelsLast(x + y) if last else x + y

    return rule


def _div(a: Array, b: Array) -> Array:
    if mx.issubdtype(a.dtype, mx.integer):
        raise ValueError("division of whole numbers that depend on the inputs")
    return a / b


_ELEMENTWISE: dict[str, Callable[..., Array]] = {
    "And": mx.logical_and,
    "Cos": mx.cos,
    "Div": _div,
    "Equal": mx.equal,
    "Erf": mx.erf,
    "Less": mx.less,
    "Log": mx.log,
    "Max": lambda *xs: _reduce(mx.maximum, xs),
    "Min": lambda *xs: _reduce(mx.minimum, xs),
    "Mul": mx.multiply,
    "Neg": mx.negative,
    "Pow": mx.power,
    "Relu": lambda x: mx.maximum(x, 0),
    "Sigmoid": mx.sigmoid,
    "Sin": mx.sin,
    "Sqrt": mx.sqrt,
    "Sub": mx.subtract,
    "Tanh": mx.tanh,
    "Where": mx.where,
}


def _reduce(function: Callable[[Array, Array], Array], arrays: Sequence[Array]) -> Array:
    result = arrays[0]
    for array in arrays[1:]:
        result = function(result, array)
    return result


def _unary(values: Values, x: Any, function: Callable[[Array], Array]) -> Any:
    return ChannelsLast(function(x.array)) if isinstance(x, ChannelsLast) else function(values.array(x))


def _cast(values: Values, node: NodeInfo, x: Any) -> Any:
    return _unary(values, x, lambda a: a.astype(DTYPES[int(node.attributes["to"])]))


def _clip(values: Values, node: NodeInfo, x: Any, low: Any = None, high: Any = None) -> Any:
    def clip(a: Array) -> Array:
        if low is None and high is None:
            return a
        return mx.clip(a, *(None if bound is None else values.array(bound).astype(a.dtype) for bound in (low, high)))

    return _unary(values, x, clip)


def _gelu(values: Values, node: NodeInfo, x: Any) -> Any:
    if node.get("approximate", "none") == "tanh":
        return _unary(values, x, lambda a: 0.5 * a * (1 + mx.tanh(_GELU_TANH * (a + 0.044715 * a * a * a))))
    return _unary(values, x, lambda a: a * (1 + mx.erf(a * 2**-0.5)) / 2)


def _matmul(values: Values, node: NodeInfo, a: Any, b: Any) -> Any:
    if is_activation(b):
        x, y = values.array(a), values.array(b)
        return x.astype(mx.float32) @ y.astype(mx.float32)
    x = values.array(a)
    if isinstance(b, Packed) and b.layout == "linear":
        x = x.astype(mx.float16 if values.half else mx.float32)
        scales, biases = b.scales, b.biases
        if biases is not None:
            scales, biases = scales.astype(x.dtype), biases.astype(x.dtype)
        return mx.quantized_matmul(x, b.codes, scales, biases, transpose=True, **b.options)
    weight = values.array(b)
    dtype = values.product_type(weight)
    return x.astype(dtype) @ weight.astype(dtype)


def _reduction(function: Callable[..., Array]) -> Callable[..., Any]:
    def rule(values: Values, node: NodeInfo, x: Any, axes: Any = None) -> Any:
        rank, keep = len(x.shape), bool(node.get("keepdims", 1))
        if axes is None and node.get("noop_with_empty_axes", 0):
            return x
        wanted = range(rank) if axes is None else [int(axis) % rank for axis in dense(axes)]
        if isinstance(x, ChannelsLast) and keep:
            return ChannelsLast(
                function(_full(x.array), axis=[stored_axis(axis, rank) for axis in wanted], keepdims=True)
            )
        return function(_full(values.array(x)), axis=list(wanted), keepdims=keep)

    return rule


def _full(array: Array) -> Array:
    return array.astype(mx.float32) if array.dtype in (mx.float16, mx.bfloat16) else array


def _normalised_last(node: NodeInfo, x: Any) -> None:
    if int(node.get("axis", -1)) % len(x.shape) != len(x.shape) - 1:
        raise ValueError("it normalises more than the last axis")


def _affine(values: Values, value: Any, x: Array) -> Array | None:
    """A norm's weight in the type of `x`; None for one that does nothing."""
    if value is None or (is_static(value) and (dense(value) == 1).all()):
        return None
    return values.array(value).astype(x.dtype)


def _layer_norm(values: Values, node: NodeInfo, x: Any, scale: Any, bias: Any = None) -> Array:
    _normalised_last(node, x)
    a = values.array(x)
    shift = None if bias is None else values.array(bias).astype(a.dtype)
    return mx.fast.layer_norm(a, _affine(values, scale, a), shift, float(node.get("epsilon", 1e-5)))


def _rms_norm(values: Values, node: NodeInfo, x: Any, scale: Any) -> Array:
    _normalised_last(node, x)
    a = values.array(x)
    return mx.fast.rms_norm(a, _affine(values, scale, a), float(node.get("epsilon", 1e-5)))


def _group_norm(values: Values, node: NodeInfo, x: Any, scale: Any, bias: Any) -> Any:
    a = values.channels_last(x, len(x.shape))
    groups, shape = int(node.attributes["num_groups"]), tuple(a.shape)
    grouped = a.reshape(shape[0], -1, groups, shape[-1] // groups).transpose(0, 2, 1, 3)
    flat = mx.fast.layer_norm(grouped.reshape(shape[0], groups, -1), None, None, float(node.get("epsilon", 1e-5)))
    normed = flat.reshape(grouped.shape).transpose(0, 2, 1, 3).reshape(shape)
    return ChannelsLast(normed * values.array(scale).astype(a.dtype) + values.array(bias).astype(a.dtype))


def _softmax(values: Values, node: NodeInfo, x: Any) -> Any:
    axis = int(node.get("axis", -1))
    return mx.softmax(values.array(x), axis=axis, precise=True)


def _reshape(values: Values, node: NodeInfo, x: Any, shape: Any) -> Any:
    wanted = reshaped(x.shape, dense(shape).tolist(), allow_zero=bool(node.get("allowzero", 0)))
    if isinstance(x, ChannelsLast) and len(wanted) > 2 and tuple(wanted[:2]) == tuple(x.shape[:2]):
        return ChannelsLast(x.array.reshape(wanted[0], *wanted[2:], wanted[1]))
    return values.array(x).reshape(wanted)


def _transpose(values: Values, node: NodeInfo, x: Any) -> Any:
    rank = len(x.shape)
    perm = [int(axis) for axis in node.get("perm", range(rank)[::-1])]
    if rank > 2 and is_activation(x):
        if isinstance(x, ChannelsLast) and perm == [0, *range(2, rank), 1]:
            return x.array
        if not isinstance(x, ChannelsLast) and perm == [0, rank - 1, *range(1, rank - 1)]:
            return ChannelsLast(x)
    return values.array(x).transpose(perm)


def _squeeze(values: Values, node: NodeInfo, x: Any, axes: Any = None) -> Array:
    wanted = [i for i, d in enumerate(x.shape) if d == 1] if axes is None else [int(i) for i in dense(axes)]
    return mx.squeeze(values.array(x), axis=wanted)


def _unsqueeze(values: Values, node: NodeInfo, x: Any, axes: Any) -> Array:
    rank = len(x.shape) + dense(axes).size
    return mx.expand_dims(values.array(x), axis=sorted(int(axis) % rank for axis in dense(axes).reshape(-1)))


def _expand(values: Values, node: NodeInfo, x: Any, shape: Any) -> Array:
    wanted = np.broadcast_shapes(tuple(x.shape), tuple(int(v) for v in dense(shape)))
    return mx.broadcast_to(values.array(x), wanted)


def _split(values: Values, node: NodeInfo, x: Any, sizes: Any = None) -> list[Any]:
    rank = len(x.shape)
    axis = int(node.get("axis", 0)) % rank
    count, length = len(node.outputs), int(x.shape[axis])
    if sizes is None:
        chunk = -(-length // count)
        ends = [min(length, chunk * i) for i in range(1, count)]
    else:
        ends = np.cumsum(dense(sizes))[:-1].tolist()
    if isinstance(x, ChannelsLast):
        return [ChannelsLast(part) for part in mx.split(x.array, ends, axis=stored_axis(axis, rank))]
    return list(mx.split(values.array(x), ends, axis=axis))


def _concat(values: Values, node: NodeInfo, *inputs: Any) -> Any:
    arrays, last = values.together(inputs)
    axis = int(node.attributes["axis"])
    if last:
        return ChannelsLast(mx.concatenate(arrays, axis=stored_axis(axis, arrays[0].ndim)))
    return mx.concatenate(arrays, axis=axis)


def _gather(values: Values, node: NodeInfo, x: Any, ids: Any) -> Any:
    axis, rank = int(node.get("axis", 0)), len(x.shape)
    index = values.array(ids)
    if isinstance(x, Packed) and x.layout == "plain" and axis % rank == 0:
        return x.rows(index)
    if isinstance(x, ChannelsLast) and index.ndim == 1:
        return ChannelsLast(mx.take(x.array, index, axis=stored_axis(axis, rank)))
    return mx.take(values.array(x), index, axis=axis)


def _slice(
    values: Values, node: NodeInfo, x: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None
) -> Array:
    array, begin, end = values.array(x), dense(starts).tolist(), dense(ends).tolist()
    where = range(len(begin)) if axes is None else dense(axes).tolist()
    stride = [1] * len(begin) if steps is None else dense(steps).tolist()
    index = [slice(None)] * array.ndim
    for axis, first, last, step in zip(where, begin, end, stride, strict=True):
        if step < 0:
            raise ValueError("it counts backwards")
        index[axis] = slice(*slice(first, last, step).indices(array.shape[axis]))
    return array[tuple(index)]


def _pad(values: Values, node: NodeInfo, x: Any, pads: Any, value: Any = None, axes: Any = None) -> Array:
    mode = str(node.get("mode", "constant"))
    if mode not in ("constant", "edge", "reflect"):
        raise ValueError(f"mode {mode!r}")
    array, amounts = values.array(x), dense(pads).tolist()
    where = range(array.ndim) if axes is None else dense(axes).tolist()
    widths = [(0, 0)] * array.ndim
    for axis, before, after in zip(where, amounts[: len(where)], amounts[len(where) :], strict=True):
        widths[axis] = (before, after)
    if min(min(pair) for pair in widths) < 0:
        raise ValueError("negative padding")
    fill = 0 if value is None else dense(value).item()
    padded: Any = mx.pad  # its stubs know modes as literals only
    return padded(array, widths, mode=mode, constant_values=fill) if mode == "constant" else padded(array, widths, mode)


def _range(values: Values, node: NodeInfo, start: Any, end: Any, step: Any) -> Array:
    raise ValueError("its length depends on what the inputs hold")


def _constant_of_shape(values: Values, node: NodeInfo, shape: Any) -> Array:
    raise ValueError("its shape depends on what the inputs hold")


def _dequantize(values: Values, node: NodeInfo, x: Any, scale: Any, zero: Any = None) -> Any:
    """Of codes that `mx.quantized_matmul` has no form for. What comes out is a weight, not an activation."""
    codes, factor, block = values.array(x), values.array(scale), int(node.get("block_size", 0))
    offset = None if zero is None else values.array(zero).astype(factor.dtype)
    axis = int(node.get("axis", 1)) % max(1, codes.ndim)

    def spread(a: Array) -> Array:
        if block:
            return mx.take(mx.repeat(a, block, axis=axis), mx.arange(codes.shape[axis]), axis=axis)
        return a if a.ndim == 0 else a.reshape([-1 if i == axis else 1 for i in range(codes.ndim)])

    array = codes.astype(factor.dtype)
    result = (array if offset is None else array - spread(offset)) * spread(factor)
    return result if is_activation(x) else Stored(result, "plain")


_WITH_VALUES: dict[str, Callable[..., Any]] = {
    "Attention": attention,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "DepthToSpace": depth_to_space,
    "DequantizeLinear": _dequantize,
    "Expand": _expand,
    "Gather": _gather,
    "Gelu": _gelu,
    "GroupNormalization": _group_norm,
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "Pad": _pad,
    "RMSNormalization": _rms_norm,
    "Range": _range,
    "ReduceMean": _reduction(mx.mean),
    "ReduceSum": _reduction(mx.sum),
    "Reshape": _reshape,
    "Resize": resize,
    "RotaryEmbedding": rotary_embedding,
    "Slice": _slice,
    "Softmax": _softmax,
    "SpaceToDepth": space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}

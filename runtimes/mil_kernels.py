"""What each MIL operator computes, in numpy. Floats are float32 here whatever the program declares.

Written from the operators' documentation (coremltools, `converters/mil/mil/ops/defs`), without its code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

__all__ = ["KERNELS", "Kernel", "attention_scores_limit"]

Kernel = Callable[..., Any]
Array = np.ndarray
KERNELS: dict[str, Kernel] = {}

#: Attention holds at most about this many bytes of scores at once.
attention_scores_limit = 64 << 20


def kernel(*names: str) -> Callable[[Kernel], Kernel]:
    """Register a function under the names of MIL operators."""

    def register(function: Kernel) -> Kernel:
        for name in names:
            KERNELS[name] = function
        return function

    return register


_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "real_div": np.divide,
    "floor_div": np.floor_divide,
    "pow": np.power,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
}
_UNARY: dict[str, Callable[[Array], Array]] = {
    "sqrt": np.sqrt,
    "square": np.square,
    "cos": np.cos,
    "sin": np.sin,
    "tanh": np.tanh,
    "exp": np.exp,
    "abs": np.abs,
    "identity": lambda x: x,
    "logical_not": np.logical_not,
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: _sigmoid(x),
    "silu": lambda x: x * _sigmoid(x),
    "erf": lambda x: _erf(x),
}


def _bind_binary(function: Callable[[Array, Array], Array]) -> Kernel:
    return lambda x, y: function(x, y)


def _bind_unary(function: Callable[[Array], Array]) -> Kernel:
    return lambda x: function(x)


KERNELS.update({name: _bind_binary(function) for name, function in _BINARY.items()})
KERNELS.update({name: _bind_unary(function) for name, function in _UNARY.items()})


def _sigmoid(x: Array) -> Array:
    small = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32))


@cache
def _erf_table() -> tuple[Array, Array, float]:
    """erf and its slope times the step, on a grid from 0 to 6: cubic interpolation is then off by less than 1e-13."""
    grid = np.linspace(0, 6, 4097)
    step = float(grid[1])
    return np.array([math.erf(v) for v in grid]), step * 2 / math.sqrt(math.pi) * np.exp(-grid * grid), step


def _erf(x: Array) -> Array:
    values, slopes, step = _erf_table()
    place = np.minimum(np.abs(x.astype(np.float64)), 5.999) / step
    i = place.astype(np.int64)
    t = place - i
    a, b = values[i], values[i + 1]
    cubic = a + t * (
        slopes[i] + t * (3 * (b - a) - 2 * slopes[i] - slopes[i + 1] + t * (2 * (a - b) + slopes[i] + slopes[i + 1]))
    )
    return np.asarray(np.copysign(cubic, x).astype(np.float32))


@kernel("gelu")
def gelu(x: Array, mode: str = "EXACT") -> Array:
    """x Φ(x), or one of its two approximations."""
    if mode == "EXACT":
        return np.asarray(x * (1 + _erf(x * np.float32(math.sqrt(0.5)))) / 2)
    if mode == "TANH_APPROXIMATION":
        inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
        return np.asarray(x * (1 + np.tanh(inner)) / 2)
    return np.asarray(x * _sigmoid(np.float32(1.702) * x))


@kernel("log")
def log(x: Array, epsilon: float = 1e-45) -> Array:
    """Natural logarithm of x + epsilon."""
    return np.log(x.astype(np.float64) + float(epsilon)).astype(np.float32)


@kernel("rsqrt")
def rsqrt(x: Array, epsilon: float = 1e-12) -> Array:
    """1 / sqrt(x + epsilon)."""
    return 1 / np.sqrt(x + np.float32(epsilon))


@kernel("inverse")
def inverse(x: Array, epsilon: float = 1e-4) -> Array:
    """1 / (x + epsilon)."""
    return 1 / (x + np.float32(epsilon))


@kernel("clip")
def clip(x: Array, alpha: Any, beta: Any) -> Array:
    """Limits on both sides."""
    return np.asarray(np.clip(x, np.float32(alpha), np.float32(beta)))


@kernel("select")
def select(cond: Array, a: Array, b: Array) -> Array:
    """a where the condition holds, else b."""
    return np.where(cond, a, b)


def _axes(axes: Any) -> tuple[int, ...] | None:
    return None if axes is None else tuple(int(axis) for axis in np.atleast_1d(axes))


def _reduction(function: Callable[..., Any], result: Any = None) -> Kernel:
    def reduce(x: Array, axes: Any = None, keep_dims: Any = False) -> Array:
        extra = {} if result is None or x.dtype.kind != "f" else {"dtype": result}
        return np.asarray(function(x, axis=_axes(axes), keepdims=bool(keep_dims), **extra), x.dtype)

    return reduce


# Sums run in float64, so that they do not depend on the order in which numpy adds.
KERNELS["reduce_sum"] = _reduction(np.sum, np.float64)
KERNELS["reduce_mean"] = _reduction(np.mean, np.float64)
KERNELS["reduce_max"] = _reduction(np.max)
KERNELS["reduce_min"] = _reduction(np.min)


@kernel("quantize")
def quantize(input: Array, scale: Any, output_dtype: str, zero_point: Any = 0, axis: Any = None) -> Array:
    """Codes: the nearest whole number of steps, plus the zero point, within the type."""
    if axis is not None:
        raise NotImplementedError("quantize along an axis")
    limits = np.iinfo(np.dtype(output_dtype))
    codes = np.rint(input / np.float32(scale)) + np.float32(zero_point)
    return np.asarray(np.clip(codes, limits.min, limits.max).astype(output_dtype))


@kernel("dequantize")
def dequantize(input: Array, scale: Any, zero_point: Any = 0, axis: Any = None) -> Array:
    """(codes - zero point) times a step."""
    if axis is not None:
        raise NotImplementedError("dequantize along an axis")
    return np.asarray((input.astype(np.float32) - np.float32(zero_point)) * np.float32(scale))


@kernel("softmax")
def softmax(x: Array, axis: Any = -1) -> Array:
    """exp(x - max) over its sum."""
    e = np.exp(x - x.max(axis=int(axis), keepdims=True))
    return np.asarray(e / e.sum(axis=int(axis), keepdims=True))


@kernel("layer_norm")
def layer_norm(x: Array, axes: Any, gamma: Any = None, beta: Any = None, epsilon: Any = 1e-5) -> Array:
    """(x - mean) / sqrt(variance + epsilon), then gamma and beta over the same axes."""
    over = _axes(axes)
    mean = x.mean(axis=over, keepdims=True, dtype=np.float64).astype(np.float32)
    centred = x - mean
    variance = np.mean(np.square(centred), axis=over, keepdims=True, dtype=np.float64)
    y = centred * (1 / np.sqrt(variance + float(epsilon))).astype(np.float32)
    y = y if gamma is None else y * gamma
    return np.asarray(y if beta is None else y + beta)


@kernel("linear")
def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x Wᵀ + bias, with W [out, in]."""
    y = x @ weight.T
    return np.asarray(y if bias is None else y + bias)


@kernel("matmul")
def matmul(x: Array, y: Array, transpose_x: Any = False, transpose_y: Any = False) -> Array:
    """Batched product."""
    left = x.swapaxes(-1, -2) if transpose_x else x
    right = y.swapaxes(-1, -2) if transpose_y else y
    return np.asarray(left @ right)


@kernel("scaled_dot_product_attention")
def attention(query: Array, key: Array, value: Array, attn_mask: Array | None = None) -> Array:
    """softmax(q kᵀ / sqrt(d) + mask) v, a part of the queries at a time."""
    scale = np.float32(1 / math.sqrt(query.shape[-1]))
    row = 4 * key.shape[-2] * int(np.prod(query.shape[:-2]))
    part = max(1, attention_scores_limit // row)
    pieces = []
    for start in range(0, query.shape[-2], part):
        scores = (query[..., start : start + part, :] * scale) @ key.swapaxes(-1, -2)
        if attn_mask is not None:
            mask = attn_mask
            if mask.shape[-2] > 1:
                mask = mask[..., start : start + part, :]
            scores = np.where(mask, scores, -np.inf) if mask.dtype == np.bool_ else scores + mask
        pieces.append(softmax(scores) @ value)
    return np.concatenate(pieces, axis=-2)


def _paddings(kind: str, pad: Any, spatial: int) -> list[tuple[int, int]]:
    if kind == "valid":
        return [(0, 0)] * spatial
    if kind != "custom":
        raise NotImplementedError(f"pad_type {kind}")
    return [(int(pad[2 * i]), int(pad[2 * i + 1])) for i in range(spatial)]


@kernel("conv")
def conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    strides: Any = None,
    dilations: Any = None,
    groups: Any = 1,
    pad_type: str = "valid",
    pad: Any = None,
) -> Array:
    """Convolution of [B, C, …] with [O, C / groups, …], summed over the places of the kernel."""
    spatial, count = x.ndim - 2, int(groups)
    step = [1] * spatial if strides is None else [int(v) for v in strides]
    apart = [1] * spatial if dilations is None else [int(v) for v in dilations]
    x = np.pad(x, [(0, 0), (0, 0), *_paddings(pad_type, pad, spatial)])
    batch, out = x.shape[0], weight.shape[0]
    kernel_shape = weight.shape[2:]
    sizes = [(x.shape[2 + i] - (kernel_shape[i] - 1) * apart[i] - 1) // step[i] + 1 for i in range(spatial)]
    places, inner = int(np.prod(sizes)), weight.shape[1]
    y = np.zeros((batch, count, out // count, places), np.float32)
    for offset in np.ndindex(*kernel_shape):
        window = tuple(
            slice(offset[i] * apart[i], offset[i] * apart[i] + (sizes[i] - 1) * step[i] + 1, step[i])
            for i in range(spatial)
        )
        part = x[(slice(None), slice(None), *window)].reshape(batch, count, inner, places)
        matrix = weight[(slice(None), slice(None), *offset)].reshape(count, out // count, inner)
        y += matrix * part if inner == 1 else matrix @ part
    y = y.reshape(batch, out, *sizes)
    return y if bias is None else y + bias.reshape(1, out, *[1] * spatial)


@kernel("conv_transpose")
def conv_transpose(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    strides: Any = None,
    dilations: Any = None,
    groups: Any = 1,
    pad_type: str = "valid",
    pad: Any = None,
    output_shape: Any = None,
) -> Array:
    """The transpose of a convolution: every input is spread over the kernel. `output_shape` is implied by the rest."""
    spatial, count = x.ndim - 2, int(groups)
    step = [1] * spatial if strides is None else [int(v) for v in strides]
    apart = [1] * spatial if dilations is None else [int(v) for v in dilations]
    batch, channels = x.shape[:2]
    inner, out = weight.shape[0] // count, weight.shape[1]
    sizes = [(x.shape[2 + i] - 1) * step[i] + (weight.shape[2 + i] - 1) * apart[i] + 1 for i in range(spatial)]
    y = np.zeros((batch, count * out, *sizes), np.float32)
    flat = x.reshape(batch, count, channels // count, -1)
    for offset in np.ndindex(*weight.shape[2:]):
        matrix = weight[(slice(None), slice(None), *offset)].reshape(count, inner, out).swapaxes(1, 2)
        part = (matrix @ flat).reshape(batch, count * out, *x.shape[2:])
        window = tuple(
            slice(offset[i] * apart[i], offset[i] * apart[i] + (x.shape[2 + i] - 1) * step[i] + 1, step[i])
            for i in range(spatial)
        )
        y[(slice(None), slice(None), *window)] += part
    cuts = tuple(
        slice(before, size - after)
        for (before, after), size in zip(_paddings(pad_type, pad, spatial), sizes, strict=True)
    )
    y = y[(slice(None), slice(None), *cuts)]
    return y if bias is None else y + bias.reshape(1, -1, *[1] * spatial)


@kernel("reshape")
def reshape(x: Array, shape: Any) -> Array:
    """A new shape."""
    return x.reshape([int(v) for v in np.atleast_1d(shape)])


@kernel("transpose")
def transpose(x: Array, perm: Any) -> Array:
    """Axes in another order."""
    return x.transpose([int(v) for v in perm])


@kernel("expand_dims")
def expand_dims(x: Array, axes: Any) -> Array:
    """Axes of size one."""
    return np.expand_dims(x, tuple(int(v) for v in np.atleast_1d(axes)))


@kernel("squeeze")
def squeeze(x: Array, axes: Any = None) -> Array:
    """Axes of size one taken away."""
    return np.squeeze(x, _axes(axes))


@kernel("concat")
def concat(values: Sequence[Array], axis: Any, interleave: Any = False) -> Array:
    """Tensors joined along an axis."""
    if interleave:
        raise NotImplementedError("interleave")
    return np.concatenate(list(values), axis=int(axis))


@kernel("split")
def split(x: Array, axis: Any, split_sizes: Any = None, num_splits: Any = None) -> list[Array]:
    """An axis cut into parts."""
    if split_sizes is None:
        return np.split(x, int(num_splits), axis=int(axis))
    return np.split(x, np.cumsum([int(v) for v in split_sizes])[:-1], axis=int(axis))


@kernel("slice_by_index")
def slice_by_index(
    x: Array,
    begin: Any,
    end: Any,
    stride: Any = None,
    begin_mask: Any = None,
    end_mask: Any = None,
    squeeze_mask: Any = None,
) -> Array:
    """Python's slices, axis by axis; a mask says which begin or end does not count."""
    places: list[Any] = []
    for i in range(x.ndim):
        if squeeze_mask is not None and bool(squeeze_mask[i]):
            places.append(int(begin[i]))
            continue
        first = None if begin_mask is not None and bool(begin_mask[i]) else int(begin[i])
        last = None if end_mask is not None and bool(end_mask[i]) else int(end[i])
        places.append(slice(first, last, 1 if stride is None else int(stride[i])))
    return np.asarray(x[tuple(places)])


@kernel("slice_by_size")
def slice_by_size(x: Array, begin: Any, size: Any) -> Array:
    """A part of each axis by its begin and its length; -1 is all that is left."""
    places = [slice(int(b), None if int(n) == -1 else int(b) + int(n)) for b, n in zip(begin, size, strict=True)]
    return np.asarray(x[tuple(places)])


@kernel("gather")
def gather(x: Array, indices: Any, axis: Any = 0, batch_dims: Any = 0, validate_indices: Any = False) -> Array:
    """Entries along an axis by number."""
    if int(batch_dims):
        raise NotImplementedError("batch_dims")
    return np.take(x, np.asarray(indices).astype(np.int64), axis=int(axis))


@kernel("pad")
def pad(x: Array, pad: Any, mode: str = "constant", constant_val: Any = 0.0) -> Array:
    """Values added before and after, for the last axes."""
    amounts = [int(v) for v in pad]
    pairs = [(0, 0)] * (x.ndim - len(amounts) // 2)
    pairs += [(amounts[i], amounts[i + 1]) for i in range(0, len(amounts), 2)]
    if mode == "constant":
        return np.pad(x, pairs, constant_values=np.asarray(constant_val).astype(x.dtype))
    return np.pad(x, pairs, mode="reflect" if mode == "reflect" else "edge")


@kernel("tile")
def tile(x: Array, reps: Any) -> Array:
    """The tensor repeated."""
    return np.tile(x, [int(v) for v in reps])


@kernel("upsample_nearest_neighbor")
def upsample(x: Array, scale_factor_height: Any = 1, scale_factor_width: Any = 1) -> Array:
    """Every element of the last two axes repeated."""
    return x.repeat(int(scale_factor_height), axis=-2).repeat(int(scale_factor_width), axis=-1)


@kernel("pixel_shuffle")
def pixel_shuffle(x: Array, upscale_factor: Any) -> Array:
    """[B, C r², H, W] → [B, C, H r, W r]; a channel's r² places lie side by side."""
    r = int(upscale_factor)
    n, c, h, w = x.shape
    return x.reshape(n, c // (r * r), r, r, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(n, c // (r * r), h * r, w * r)


@kernel("pixel_unshuffle")
def pixel_unshuffle(x: Array, downscale_factor: Any) -> Array:
    """[B, C, H r, W r] → [B, C r², H, W], the inverse of pixel_shuffle."""
    r = int(downscale_factor)
    n, c, h, w = x.shape
    return x.reshape(n, c, h // r, r, w // r, r).transpose(0, 1, 3, 5, 2, 4).reshape(n, c * r * r, h // r, w // r)

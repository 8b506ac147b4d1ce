"""Rules for maps: convolution, enlarging, and moving channels to space and back. All of them channels-last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from edgedit.converters.lowerings.driver import NodeInfo, dense
from edgedit.converters.lowerings.mlx_values import Array, ChannelsLast, Stored, Values, last_axes

__all__ = ["conv", "conv_transpose", "depth_to_space", "resize", "space_to_depth"]


def _no_auto_pad(node: NodeInfo) -> None:
    if node.get("auto_pad", "NOTSET") != "NOTSET":
        raise ValueError(f"auto_pad {node.attributes['auto_pad']!r}")


def conv(values: Values, node: NodeInfo, x: Any, weight: Any, bias: Any = None) -> ChannelsLast:
    """Conv in two dimensions; ONNX pads (all begins, all ends), MLX pads one pair per axis."""
    _no_auto_pad(node)
    if len(x.shape) != 4:
        raise ValueError("only maps are convolved")
    stored = isinstance(weight, Stored) and weight.layout == "conv"
    kernel = weight.array if stored else values.array(weight).transpose(last_axes(4))
    dtype = values.product_type(kernel)
    top, left, bottom, right = (int(v) for v in node.get("pads", (0, 0, 0, 0)))
    y = mx.conv_general(
        values.channels_last(x, 4).astype(dtype),
        kernel.astype(dtype),
        stride=[int(v) for v in node.get("strides", (1, 1))],
        padding=([top, left], [bottom, right]),
        kernel_dilation=[int(v) for v in node.get("dilations", (1, 1))],
        groups=int(node.get("group", 1)),
    )
    return ChannelsLast(y if bias is None else y + values.array(bias).astype(y.dtype))


def conv_transpose(values: Values, node: NodeInfo, x: Any, weight: Any, bias: Any = None) -> ChannelsLast:
    """ConvTranspose in two dimensions; ONNX's weight is [in, out, height, width]."""
    _no_auto_pad(node)
    if int(node.get("group", 1)) != 1 or len(x.shape) != 4 or "output_shape" in node.attributes:
        raise ValueError("groups, output_shape and other than two dimensions are not supported")
    kernel = values.array(weight).transpose(1, 2, 3, 0)
    dtype = values.product_type(kernel)
    top, left, bottom, right = (int(v) for v in node.get("pads", (0, 0, 0, 0)))
    convolve: Any = mx.conv_transpose2d  # its stubs know pairs of a fixed length only
    y = convolve(
        values.channels_last(x, 4).astype(dtype),
        kernel.astype(dtype),
        stride=tuple(int(v) for v in node.get("strides", (1, 1))),
        dilation=tuple(int(v) for v in node.get("dilations", (1, 1))),
        output_padding=tuple(int(v) for v in node.get("output_padding", (0, 0))),
    )
    y = y[:, top : y.shape[1] - bottom, left : y.shape[2] - right]
    return ChannelsLast(y if bias is None else y + values.array(bias).astype(y.dtype))


def depth_to_space(values: Values, node: NodeInfo, x: Any) -> ChannelsLast:
    """DepthToSpace, both orders of the channels."""
    a, r = values.channels_last(x, 4), int(node.attributes["blocksize"])
    n, h, w, c = a.shape
    out = c // (r * r)
    if node.get("mode", "DCR") == "CRD":
        y = a.reshape(n, h, w, out, r, r).transpose(0, 1, 4, 2, 5, 3)
    else:
        y = a.reshape(n, h, w, r, r, out).transpose(0, 1, 3, 2, 4, 5)
    return ChannelsLast(y.reshape(n, h * r, w * r, out))


def space_to_depth(values: Values, node: NodeInfo, x: Any) -> ChannelsLast:
    """SpaceToDepth."""
    a, r = values.channels_last(x, 4), int(node.attributes["blocksize"])
    n, h, w, c = a.shape
    y = a.reshape(n, h // r, r, w // r, r, c).transpose(0, 1, 3, 2, 4, 5)
    return ChannelsLast(y.reshape(n, h // r, w // r, r * r * c))


def resize(
    values: Values, node: NodeInfo, x: Any, roi: Any = None, scales: Any = None, sizes: Any = None
) -> ChannelsLast:
    """Resize of a map by a whole factor: nearest, linear and cubic, by the taps of each output row and column."""
    if scales is None or (roi is not None and dense(roi).size):
        raise ValueError("it gives sizes instead of scales")
    factors = dense(scales).tolist()
    whole = [round(factor) for factor in factors]
    if len(whole) != 4 or whole[:2] != [1, 1] or any(f != w or w < 1 for f, w in zip(factors, whole, strict=True)):
        raise ValueError(f"scales {factors}; whole factors of height and width are supported")
    if node.get("antialias", 0) or node.get("exclude_outside", 0):
        raise ValueError("antialias and exclude_outside are not supported")
    a = values.channels_last(x, 4)
    mode = str(node.get("mode", "nearest"))
    if mode == "nearest":
        _nearest_repeats(node)
        n, h, w, c = a.shape
        grown = mx.broadcast_to(a[:, :, None, :, None], (n, h, whole[2], w, whole[3], c))
        return ChannelsLast(grown.reshape(n, h * whole[2], w * whole[3], c))
    if str(node.get("coordinate_transformation_mode", "half_pixel")) != "half_pixel":
        raise ValueError("coordinate_transformation_mode other than half_pixel")
    for axis, factor in ((1, whole[2]), (2, whole[3])):
        if factor > 1:
            a = _taps(a, axis, *_interpolation(int(a.shape[axis]), factor, mode, node.get("cubic_coeff_a", -0.75)))
    return ChannelsLast(a)


def _nearest_repeats(node: NodeInfo) -> None:
    """Whether nearest neighbours at a whole factor are plain repetition: as the architectures write it."""
    coordinates, rounding = node.get("coordinate_transformation_mode", "half_pixel"), node.get("nearest_mode", "")
    if (coordinates, rounding or "round_prefer_floor") not in (
        ("asymmetric", "floor"),
        ("half_pixel", "round_prefer_floor"),
        ("half_pixel", "round_prefer_ceil"),
    ):
        raise ValueError(f"nearest neighbours by {coordinates} and {rounding}")


def _interpolation(length: int, factor: int, mode: str, a: float) -> tuple[np.ndarray, np.ndarray]:
    """Source indices [taps, length·factor] and their weights, as ONNX's Resize defines them at half pixels."""
    position = (np.arange(length * factor) + 0.5) / factor - 0.5
    first = np.floor(position)
    fraction = position - first
    if mode == "linear":
        offsets: Sequence[int] = (0, 1)
        weights = [1 - fraction, fraction]
    elif mode == "cubic":
        offsets = (-1, 0, 1, 2)
        t, s = fraction, 1 - fraction
        weights = [
            ((a * (t + 1) - 5 * a) * (t + 1) + 8 * a) * (t + 1) - 4 * a,
            ((a + 2) * t - (a + 3)) * t * t + 1,
            ((a + 2) * s - (a + 3)) * s * s + 1,
            ((a * (s + 1) - 5 * a) * (s + 1) + 8 * a) * (s + 1) - 4 * a,
        ]
    else:
        raise ValueError(f"mode {mode!r}")
    indices = np.clip([first + offset for offset in offsets], 0, length - 1).astype(np.int32)
    return indices, np.array(weights, np.float32)


def _taps(array: Array, axis: int, indices: np.ndarray, weights: np.ndarray) -> Array:
    shape = [1] * array.ndim
    shape[axis] = -1
    parts = [
        mx.take(array, mx.array(index), axis=axis) * mx.array(weight).reshape(shape).astype(array.dtype)
        for index, weight in zip(indices, weights, strict=True)
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total

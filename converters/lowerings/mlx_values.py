"""What the MLX table computes with: maps kept channels-last, weights in the layouts of `mlx.nn`, packed weights.

The canonical graph speaks of NCHW maps and [in, out] matrices; MLX convolves NHWC maps and its modules hold [out, in].
A value therefore carries its layout and shows the graph its logical shape. Moving an axis is free until somebody needs
the array itself, so maps stay channels-last from one convolution to the next, and through the reshape into tokens.

`Array` is `mlx.core.array`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from edgedit.converters.lowerings.driver import dense, is_static

__all__ = ["Array", "ChannelsLast", "Packed", "Stored", "Values", "last_axes", "stored_axis"]

Array = Any

_HALF = (mx.float16, mx.bfloat16)
_FLOATS = (*_HALF, mx.float32)


@dataclass(frozen=True, eq=False)
class ChannelsLast:
    """An activation of logical shape [N, C, ...] whose `array` is [N, ..., C]."""

    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        n, *space, c = self.array.shape
        return (n, c, *space)


@dataclass(frozen=True, eq=False)
class Stored:
    """A weight as the file holds it. `layout` is "plain", "linear" ([in, out] stored as [out, in]) or "conv" (OIHW
    stored as OHWI)."""

    array: Array
    layout: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        shape = tuple(self.array.shape)
        if self.layout == "linear":
            return shape[::-1]
        return (shape[0], shape[-1], *shape[1:-1]) if self.layout == "conv" else shape

    @property
    def logical(self) -> Array:
        """The array with its axes in logical order; nothing is copied."""
        if self.layout == "linear":
            return self.array.T
        return mx.moveaxis(self.array, -1, 1) if self.layout == "conv" else self.array


@dataclass(frozen=True, eq=False)
class Packed:
    """A quantized weight as `mx.quantize` lays it out: groups run along the last axis of what is stored.

    `layout` is "linear" ([in, out] stored as [out, in]) or "plain" (an embedding's rows).
    """

    codes: Array
    scales: Array
    biases: Array | None
    mode: str
    bits: int
    group_size: int
    layout: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        rows, words = self.codes.shape
        shape = (rows, words * 32 // self.bits)
        return shape[::-1] if self.layout == "linear" else shape

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `mx.quantized_matmul` and `mx.dequantize`."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def rows(self, ids: Array) -> Array:
        """The dequantized rows `ids` of what is stored, [..., width]."""
        biases = None if self.biases is None else self.biases[ids]
        return mx.dequantize(self.codes[ids], self.scales[ids], biases, **self.options)

    @property
    def logical(self) -> Array:
        """The dequantized weight, its axes in logical order."""
        array = mx.dequantize(self.codes, self.scales, self.biases, **self.options)
        return array.T if self.layout == "linear" else array


def stored_axis(axis: int, rank: int) -> int:
    """Where the logical `axis` of a ChannelsLast value of that rank lies in its array."""
    axis %= rank
    return axis if axis == 0 else rank - 1 if axis == 1 else axis - 1


def last_axes(rank: int) -> list[int]:
    """The permutation from logical to channels-last axes."""
    return [0, *range(2, rank), 1]


class Values:
    """Turns what the driver hands to a rule into arrays, constants into arrays once.

    `half` says that matrix products, convolutions and attention run in the type of half-precision weights; what is
    between them keeps float32 wherever a sum is taken. Without it everything runs in float32.
    """

    def __init__(self, *, half: bool) -> None:
        self.half = half
        self._constants: dict[tuple[int, str], tuple[Any, Array | None]] = {}

    def constant(self, value: Any) -> Array:
        """A static value as an array of its own type."""
        return self.derived(value, "value", lambda: dense(value))

    def derived(self, value: Any, kind: str, make: Callable[[], np.ndarray | None]) -> Array | None:
        """What `make` gives, as an array: worked out once for a static `value` and the `kind` of what is made of it.

        The array is evaluated and contiguous: an exported function writes a lazy one as the graph that makes it, and
        loses the strides of any other.
        """
        if (id(value), kind) not in self._constants:
            made = make()
            array = None if made is None else mx.array(np.require(made, requirements="C"))
            if array is not None:
                mx.eval(array)
            # The value is kept with it, so that its id stays its own.
            self._constants[id(value), kind] = (value, array)
        return self._constants[id(value), kind][1]

    def array(self, value: Any) -> Array:
        """Any value as an array with logical axes."""
        if isinstance(value, ChannelsLast):
            return mx.moveaxis(value.array, -1, 1)
        if isinstance(value, (Stored, Packed)):
            return value.logical
        return self.constant(value) if is_static(value) else value

    def channels_last(self, value: Any, rank: int) -> Array:
        """Any value that broadcasts against a map of `rank` as an array that broadcasts against [N, ..., C]."""
        if isinstance(value, ChannelsLast) and value.array.ndim == rank:
            return value.array
        array = self.array(value)
        if array.ndim == 0:
            return array
        return array.reshape((1,) * (rank - array.ndim) + tuple(array.shape)).transpose(last_axes(rank))

    def together(self, values: Sequence[Any]) -> tuple[list[Array], bool]:
        """Operands in one layout and of one floating type, and whether that layout is channels-last.

        The type is that of the activations among them: weights and constants follow.
        """
        rank = max((len(value.shape) for value in values), default=0)
        last = any(isinstance(value, ChannelsLast) and len(value.shape) == rank for value in values)
        arrays = [self.channels_last(value, rank) if last else self.array(value) for value in values]
        active = [a.dtype for a, v in zip(arrays, values, strict=True) if is_activation(v) and a.dtype in _FLOATS]
        if active and mx.float32 not in active:
            arrays = [self._follow(a, v, active[0]) for a, v in zip(arrays, values, strict=True)]
        return arrays, last

    @staticmethod
    def _follow(array: Array, value: Any, dtype: Any) -> Array:
        """A weight or constant in the half type of the activations, unless it would become 0 or infinite there."""
        if is_activation(value) or array.dtype not in _FLOATS:
            return array
        if is_static(value) and dtype == mx.float16:
            size = np.abs(dense(value))
            if size.max(initial=0.0) > 65504 or size[size > 0].min(initial=1.0) < 6e-5:
                return array
        return array.astype(dtype)

    def product_type(self, weight: Array) -> Any:
        """The type in which an activation meets a weight."""
        return weight.dtype if self.half and weight.dtype in _HALF else mx.float32


def is_activation(value: Any) -> bool:
    """Whether a value depends on the inputs of the graph."""
    return not is_static(value) and not isinstance(value, (Stored, Packed))

"""Decompression of the weights of an ML Program: MIL's `constexpr_*` operators, from their documentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["DECOMPRESS"]

Array = np.ndarray


def _spread(parts: Array, shape: tuple[int, ...]) -> Array:
    """One value per block repeated to `shape`."""
    for axis, (have, want) in enumerate(zip(parts.shape, shape, strict=True)):
        if have != want:
            parts = np.repeat(parts, want // have, axis=axis)
    return parts


def blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """(data - offset) * scale, in the type of the scale."""
    values = data.astype(np.float32)
    if offset is not None:
        values -= _spread(offset.astype(np.float32), data.shape)
    return np.asarray(values * _spread(scale.astype(np.float32), data.shape), scale.dtype)


def affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: Any) -> Array:
    """(data - zero_point) * scale, along one axis."""
    shape = [1] * quantized_data.ndim
    shape[int(axis)] = -1
    shift, factor = (np.asarray(part).astype(np.float32) for part in (zero_point, scale))
    values = quantized_data.astype(np.float32) - (shift.reshape(shape) if shift.ndim else shift)
    return (values * (factor.reshape(shape) if factor.ndim else factor)).astype(np.asarray(scale).dtype)


def lut_to_dense(indices: Array, lut: Array, vector_axis: Any = None) -> Array:
    """Entries of the palette of each block. `lut` is [blocks…, entries, vector]."""
    entries, width = lut.shape[-2:]
    block = np.zeros(indices.shape, np.int64)
    for axis, size in enumerate(indices.shape):
        shape = [1] * indices.ndim
        shape[axis] = -1
        block = block * lut.shape[axis] + (np.arange(size) // (size // lut.shape[axis])).reshape(shape)
    found = lut.reshape(-1, entries, width)[block, indices.astype(np.int64)]
    if width == 1:
        return found[..., 0]
    axis = int(vector_axis) % indices.ndim
    shape = [*indices.shape]
    shape[axis] *= width
    return np.moveaxis(found, -1, axis + 1).reshape(shape)


def sparse_to_dense(nonzero_data: Array, mask: Array) -> Array:
    """The values where the mask is one, zero elsewhere."""
    dense = np.zeros(mask.shape, nonzero_data.dtype)
    dense[mask.astype(bool)] = nonzero_data
    return dense


def lut_to_sparse(
    indices_mask: Array, indices_nonzero_data: Array, lut: Array, vector_axis: Any = None
) -> tuple[Array, Array]:
    """A palette of a sparse tensor: the mask, and the values where it is one."""
    dense = lut_to_dense(sparse_to_dense(indices_nonzero_data, indices_mask), lut, vector_axis)
    mask = indices_mask
    if lut.shape[-1] > 1:
        mask = np.repeat(mask, lut.shape[-1], axis=int(vector_axis))
    return mask, dense[mask.astype(bool)]


def sparse_blockwise_shift_scale(
    data_mask: Array, nonzero_data: Array, scale: Array, offset: Array | None = None
) -> tuple[Array, Array]:
    """Scaled codes of a sparse tensor: the mask, and the values where it is one."""
    dense = blockwise_shift_scale(sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask.astype(bool)]


def cast(source_val: Array, output_dtype: str) -> Array:
    """float16 widened to float32."""
    return source_val.astype({"fp32": np.float32, "fp16": np.float16}[output_dtype])


DECOMPRESS: dict[str, Callable[..., Any]] = {
    "const": lambda val: val,
    "constexpr_cast": cast,
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_affine_dequantize": affine_dequantize,
    "constexpr_lut_to_dense": lut_to_dense,
    "constexpr_sparse_to_dense": sparse_to_dense,
    "constexpr_lut_to_sparse": lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": sparse_blockwise_shift_scale,
}

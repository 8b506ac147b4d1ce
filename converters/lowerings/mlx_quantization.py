"""Quantized weights of MLX: which forms there are, how weights are brought into them, how codes are carried over."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from edgedit.converters.lowerings.driver import Quantized
from edgedit.errors import ConversionError

__all__ = ["GROUP_SIZES", "MlxQuantization", "carry_over", "pack"]

#: Input channels that share a scale: MLX has kernels for these.
GROUP_SIZES = (128, 64, 32)
_AFFINE_BITS = (2, 3, 4, 5, 6, 8)
#: Floating-point forms (OCP Microscaling specification 1.0; NVFP4): bits and group size.
_FLOAT_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


@dataclass(frozen=True)
class MlxQuantization:
    """A form of `mx.quantize`: `mode` "affine", "mxfp4", "mxfp8" or "nvfp4", bits a weight, weights that share a
    scale."""

    mode: str
    bits: int
    group_size: int

    @classmethod
    def parse(cls, text: str) -> MlxQuantization:
        """From "q4", "q4-g32" (2 to 6 or 8 bits; groups of 32, 64 or 128, by default 64), "mxfp4", "mxfp8", "nvfp4".

        Raises ConversionError for anything else.
        """
        if text in _FLOAT_MODES:
            return cls(text, *_FLOAT_MODES[text])
        match = re.fullmatch(r"q(\d+)(?:-g(\d+))?", text)
        if match and int(match[1]) in _AFFINE_BITS and int(match[2] or 64) in GROUP_SIZES:
            return cls("affine", int(match[1]), int(match[2] or 64))
        raise ConversionError(
            f"unknown MLX weights {text!r}; choose q2, q3, q4, q5, q6 or q8, with -g32, -g64 or -g128 after it if you "
            f"like, or one of {', '.join(_FLOAT_MODES)}"
        )

    @property
    def name(self) -> str:
        """As `parse` reads it, the group size always stated."""
        return f"q{self.bits}-g{self.group_size}" if self.mode == "affine" else self.mode

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a matrix [rows, width], whose groups run along its rows, can have this form."""
        return len(shape) == 2 and shape[1] % self.group_size == 0

    def words(self, width: int) -> int:
        """32-bit words that hold a row."""
        return width * self.bits // 32

    def apply(self, array: np.ndarray) -> list[np.ndarray]:
        """Codes, scales and, for "affine", biases of a matrix [rows, width]; scales have its type or are one byte."""
        import mlx.core as mx

        parts = mx.quantize(mx.array(array), group_size=self.group_size, bits=self.bits, mode=self.mode)
        return [np.array(part) for part in parts]


def carry_over(weight: Quantized) -> MlxQuantization | None:
    """The affine form that holds the codes of `weight` [in, out] as they are, in the fewest bits; None when there is
    none."""
    if len(weight.shape) != 2 or weight.axis != 0 or weight.bits not in (2, 4, 8) or weight.shape[0] % weight.block:
        return None
    group = next((size for size in GROUP_SIZES if weight.block % size == 0), None)
    return None if group is None else MlxQuantization("affine", _least_bits(weight), group)


def _least_bits(weight: Quantized) -> int:
    """Three-bit codes come in four bits: ONNX has no type for them."""
    if weight.bits != 4 or not weight.signed or weight.shape[0] % 32:
        return weight.bits
    return 3 if weight.codes.min(initial=0) >= -4 and weight.codes.max(initial=0) <= 3 else 4


def pack(weight: Quantized, form: MlxQuantization, dtype: str) -> list[np.ndarray]:
    """Codes, scales and biases of what `carry_over` found, scales and biases as `dtype`.

    (code - zero) · scale = scale · unsigned code + bias. Nothing is rounded but the scale and the bias to `dtype`.
    """
    offset = 1 << (form.bits - 1) if weight.signed else 0
    codes = (weight.codes.T.astype(np.int16) + offset).astype(np.uint8)
    # A row is one stream of bits, from the lowest up.
    bits = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., : form.bits]
    words = np.packbits(bits.reshape(len(codes), -1), axis=-1, bitorder="little").view("<u4")
    blocks = (weight.shape[0] // weight.block, weight.shape[1])
    zero = 0 if weight.zero_point is None else np.broadcast_to(weight.zero_point, blocks).astype(np.float32)
    scale = np.broadcast_to(weight.scale, blocks).astype(np.float32)
    parts = (scale, -(zero + offset) * scale)
    repeats = weight.block // form.group_size
    return [words, *(np.repeat(part.T, repeats, axis=1).astype(dtype) for part in parts)]

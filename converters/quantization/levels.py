"""Sets of sixteen unevenly spaced numbers that a four-bit code can stand for, and how such codes are stored.

- "fp4": e2m1, a sign, two bits of exponent and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4 and 6 (OCP Microscaling Formats
  specification 1.0, section 5.3.3; ONNX's FLOAT4E2M1, whose codes these are). Used for weights as FP4DiT does.
- "log": a power of √2 for each sign, dense where weights are dense: the twin logarithms of LRQ-DiT (2025) with the base
  chosen here, since the paper's constants are not public.

ONNX Runtime's CPU provider has no operator for FLOAT4E2M1. So a graph holds two codes to a byte, and a look-up gives
the numbers as small whole ones (e2m1 twice over); the scale beside them stands for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import ml_dtypes
import numpy as np
import numpy.typing as npt

__all__ = ["LEVELS", "Levels", "pack_pairs"]

Bytes = npt.NDArray[np.uint8]
Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Levels:
    """The whole number of each code, int8 [16]; of two codes for the same number (the zeros) the first is used."""

    of_code: npt.NDArray[np.int8]

    @cached_property
    def ordered(self) -> npt.NDArray[np.int8]:
        """The numbers from the least to the largest, each once."""
        return np.unique(self.of_code)

    @property
    def largest(self) -> int:
        """The largest number; its negative is one as well."""
        return int(self.ordered[-1])

    @cached_property
    def table(self) -> Float:
        """Byte → the numbers of the code in its low and in its high four bits, [256, 2]."""
        byte = np.arange(256)
        return np.stack([self.of_code[byte & 15], self.of_code[byte >> 4]], 1).astype(np.float32)

    def nearest(self, scaled: Float) -> npt.NDArray[np.int8]:
        """The nearest numbers."""
        ordered = self.ordered.astype(np.float32)
        found: npt.NDArray[np.int8] = self.ordered[np.searchsorted((ordered[1:] + ordered[:-1]) / 2, scaled)]
        return found


def pack_pairs(levels: Levels, numbers: npt.NDArray[np.int8]) -> Bytes:
    """Numbers [K, N], N even, as bytes [K, N / 2] of two codes, the first in the low four bits."""
    code_of = np.zeros(256, np.uint8)
    for code in reversed(range(16)):
        code_of[levels.of_code[code].view(np.uint8)] = code
    codes = code_of[numbers.view(np.uint8)]
    packed: Bytes = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
    return packed


def _float4() -> Levels:
    units = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return Levels((units * 2).astype(np.int8))


def _twin_logarithm() -> Levels:
    powers = np.rint(127 * 2.0 ** (-np.arange(6, -1, -1) / 2))
    return Levels(np.concatenate([[0], powers, [0], -powers]).astype(np.int8))


LEVELS: Mapping[str, Levels] = {"fp4": _float4(), "log": _twin_logarithm()}
"""By the format's name in a recipe."""

"""Three-bit codes on disk: a plane of their two low bits and a plane of their signs, no bit wasted.

A graph opens them with two look-ups of a byte: one gives four numbers from 0 to 3, the other eight of 0 or -4.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["LOW_TABLE", "SIGN_TABLE", "pack", "unpack"]

Bytes = npt.NDArray[np.uint8]

LOW_TABLE = np.array([[byte >> shift & 3 for shift in (0, 2, 4, 6)] for byte in range(256)], np.float32)
SIGN_TABLE = np.array([[-4 * (byte >> shift & 1) for shift in range(8)] for byte in range(256)], np.float32)


def pack(codes: npt.NDArray[np.int8]) -> tuple[Bytes, Bytes]:
    """Codes from -4 to 3, [K, N] with N a multiple of 8, as planes uint8 [K, N / 4] and [K, N / 8]."""
    raw = codes.astype(np.uint8)
    low = (raw & 3).reshape(len(raw), -1, 4) << np.array([0, 2, 4, 6], np.uint8)
    sign = (raw >> 7).reshape(len(raw), -1, 8) << np.arange(8, dtype=np.uint8)
    return low.sum(2, dtype=np.uint8), sign.sum(2, dtype=np.uint8)


def unpack(low: Bytes, sign: Bytes) -> npt.NDArray[np.int8]:
    """The codes again, as the graph's look-ups give them."""
    rows = len(low)
    return (LOW_TABLE[low].reshape(rows, -1) + SIGN_TABLE[sign].reshape(rows, -1)).astype(np.int8)

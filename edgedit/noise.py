"""Unit normal noise from a seed, the same on every machine.

`make_noise("philox", seed)` is the default and is specified here to the last step, so that any language can give the
same numbers:

* Generator: Philox4x32-10 (Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
  A block is four 32-bit words c0..c3 (counter), a key k0, k1. Ten rounds; in each, with all products in 64 bits,
      p = 0xD2511F53 * c0, q = 0xCD9E8D57 * c2
      c0, c1, c2, c3 = hi(q) ^ c1 ^ k0, lo(q), hi(p) ^ c3 ^ k1, lo(p)
  and between rounds k0 += 0x9E3779B9, k1 += 0xBB67AE85 (mod 2^32).
* Key: k0 = seed mod 2^32, k1 = seed div 2^32; the seed is from 0 to 2^64 - 1.
* Draws: the d-th call of `normal` (d = 0, 1, ...) for n numbers uses the blocks b = 0 .. ceil(n / 4) - 1 with the
  counter c0 = b mod 2^32, c1 = b div 2^32, c2 = d mod 2^32, c3 = d div 2^32. So a draw depends on how many calls came
  before it, not on how many numbers these gave, and a longer draw begins with the shorter one.
* Normals (Box & Muller 1958), in float64: the words w0, w1 of a block give
      r = sqrt(-2 ln((w0 + 0.5) / 2^32)), a = 2 pi w1 / 2^32, and the numbers r cos a, r sin a,
  then w2, w3 the next two; each is rounded to float32. Numbers 4b .. 4b + 3 of the draw, in C order, are block b's.

`make_noise("torch", seed)` equals `torch.manual_seed(seed)` followed by `torch.randn` on a CPU
(`edgedit.noise_torch`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgedit.errors import InputError

__all__ = ["KINDS", "Noise", "NoiseBatch", "PhiloxNoise", "make_noise", "philox_4x32"]

KINDS = ("philox", "torch")
"""The kinds of noise that `make_noise` knows."""

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_CHUNK = 1 << 13


class Noise(ABC):
    """A stream of unit normal noise. Successive draws differ; the same kind, seed and draws give the same numbers."""

    kind: ClassVar[str]

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @abstractmethod
    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The next draw: float32 of this shape, mean 0, standard deviation 1."""


def philox_4x32(
    counters: tuple[NDArray[np.uint64], ...], key: tuple[int, int]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]:
    """Philox4x32-10 of many counters at once: four uint64 arrays that hold 32-bit words, in and out."""
    c0, c1, c2, c3 = counters
    k0, k1 = key
    for _ in range(10):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (second >> _HALF) ^ c1 ^ np.uint64(k0), second & _LOW
        c2, c3 = (first >> _HALF) ^ c3 ^ np.uint64(k1), first & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


class PhiloxNoise(Noise):
    """Counter-based noise as specified in this module."""

    kind = "philox"

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._draws = 0

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        count = math.prod(shape)
        blocks = -(-count // 4)
        out = np.empty((blocks, 4), dtype=np.float32)
        draw = (np.uint64(self._draws & 0xFFFFFFFF), np.uint64(self._draws >> 32))
        # chunks that stay in the processor's cache: the ten rounds read and write each number dozens of times
        for start in range(0, blocks, _CHUNK):
            block = np.arange(start, min(start + _CHUNK, blocks), dtype=np.uint64)
            counters = (block & _LOW, block >> _HALF, np.full_like(block, draw[0]), np.full_like(block, draw[1]))
            words = philox_4x32(counters, (self.seed & 0xFFFFFFFF, self.seed >> 32))
            rows = out[start : start + len(block)]
            for pair in (0, 2):
                radius = np.sqrt(-2.0 * np.log((words[pair] + 0.5) * 2.0**-32))
                angle = words[pair + 1] * (2.0 * math.pi * 2.0**-32)
                rows[:, pair] = radius * np.cos(angle)
                rows[:, pair + 1] = radius * np.sin(angle)
        self._draws += 1
        return out.reshape(-1)[:count].reshape(shape)


class NoiseBatch(Noise):
    """Several streams as one: row i of a draw [B, ...] is what stream i gives for [1, ...]."""

    kind = "batch"

    def __init__(self, streams: Sequence[Noise]) -> None:
        super().__init__(streams[0].seed)
        self.streams = streams

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        if shape[0] != len(self.streams):
            raise InputError(f"a draw of {shape[0]} rows from {len(self.streams)} streams")
        return np.concatenate([stream.normal((1, *shape[1:])) for stream in self.streams])


def make_noise(kind: str, seed: int | np.integer[Any]) -> Noise:
    """A fresh noise stream. kind: "philox" or "torch". seed: from 0 to 2^64 - 1.

    Raises `InputError` for an unknown kind, and for a seed that is negative, too large or not a whole number.
    """
    from edgedit.noise_torch import TorchNoise

    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= int(seed) < 2**64:
        raise InputError(f"the seed must be a whole number from 0 to {2**64 - 1}; got {seed!r}")
    if kind == "philox":
        return PhiloxNoise(int(seed))
    if kind == "torch":
        return TorchNoise(int(seed))
    raise InputError(f"unknown noise {kind!r}; choose one of: {', '.join(KINDS)}")

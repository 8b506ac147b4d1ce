"""Vector palettes: entries of one, two, four or eight neighbouring weights, by default 256 of them, one byte each.

Van Baalen et al., "GPTVQ: The Blessing of Dimensionality for LLM Quantization" (2024), sections 3.1 and 3.2, with
vectors along the outputs, so that a row of the matrix is rounded as a whole. Entries are int8 and every output channel
has a scale: codes expand to int8 weights, which integer kernels take.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["ENTRIES", "Palette", "fit"]

Float = npt.NDArray[np.float32]

ENTRIES = 256
_SAMPLE = 1 << 16
_ROUNDS = 15
_CHUNK = 1 << 14


@dataclass(frozen=True)
class Palette:
    """Entries int8 [E, d] and one float32 scale an output channel [N]."""

    entries: npt.NDArray[np.int8]
    scales: Float

    def round_row(self, _: int, row: Float) -> tuple[npt.NDArray[np.uint8], Float]:
        """Codes uint8 [N / d] of the weights [N] of one input, and what they stand for."""
        width = self.entries.shape[1]
        scales = self.scales.reshape(-1, width)
        codes = _nearest(row.reshape(-1, width) / scales, scales**2, self.entries.astype(np.float32))
        return codes, (self.entries[codes] * scales).reshape(-1)

    def round(self, weight: Float) -> npt.NDArray[np.uint8]:
        """Codes uint8 [K, N / d] of a matrix [K, N]."""
        return np.stack([self.round_row(i, row)[0] for i, row in enumerate(weight)])

    def values(self, codes: npt.NDArray[np.uint8]) -> Float:
        """What codes [K, N / d] stand for, float32 [K, N]."""
        return (self.entries[codes].reshape(len(codes), -1) * self.scales).astype(np.float32)


def fit(
    weight: Float,
    width: int,
    importance: Float | None = None,
    *,
    entries: int = ENTRIES,
    kept: npt.NDArray[np.bool_] | None = None,
) -> Palette:
    """A palette for a matrix by k-means on its weights, each output channel divided by its spread.

    Args:
        weight: float32 [K, N]; N is a multiple of `width`.
        importance: weight of each input's errors [K], its second moment; None for all alike.
        entries: how many.
        kept: vectors [K, N / width] that the palette is for; None for all.
    """
    spread = np.sqrt((weight.astype(np.float64) ** 2).mean(0)).astype(np.float32)
    spread[spread == 0] = 1
    vectors = (weight / spread).reshape(-1, width)
    shares = np.repeat(np.ones(len(weight), np.float32) if importance is None else importance, weight.shape[1] // width)
    if kept is not None and kept.any():
        vectors, shares = vectors[kept.reshape(-1)], shares[kept.reshape(-1)]
    rng = np.random.default_rng(0)
    if len(vectors) > _SAMPLE:
        chosen = rng.choice(len(vectors), _SAMPLE, replace=False)
        vectors, shares = vectors[chosen], shares[chosen]
    shares = shares / max(float(shares.mean()), 1e-30) + 1e-3
    centres = vectors[rng.choice(len(vectors), entries, replace=len(vectors) < entries, p=shares / shares.sum())]
    ones = np.ones((1, width), np.float32)
    for _ in range(_ROUNDS):
        codes = _nearest(vectors, ones, centres)
        total = np.bincount(codes, shares, entries)
        sums = np.stack([np.bincount(codes, shares * vectors[:, j], entries) for j in range(width)], 1)
        empty = total == 0
        centres = np.where(empty[:, None], centres, sums / np.where(empty, 1, total)[:, None]).astype(np.float32)
        if empty.any():
            lost = shares * ((vectors - centres[codes]) ** 2).sum(1)
            centres[empty] = vectors[np.argsort(-lost)[: int(empty.sum())]]
    top = float(np.abs(centres).max()) or 1.0
    return Palette(np.rint(centres * (127 / top)).astype(np.int8), (spread * (top / 127)).astype(np.float32))


def _nearest(vectors: Float, shares: Float, entries: Float) -> npt.NDArray[np.uint8]:
    """Entry of least error sum_j shares_j (vector_j - entry_j)^2 for each vector; `shares` broadcasts to `vectors`."""
    codes = np.empty(len(vectors), np.uint8)
    shares = np.broadcast_to(shares, vectors.shape)
    squares = (entries**2).T
    for start in range(0, len(vectors), _CHUNK):
        part = slice(start, start + _CHUNK)
        distance = shares[part] @ squares - 2 * (shares[part] * vectors[part]) @ entries.T
        codes[part] = distance.argmin(1)
    return codes

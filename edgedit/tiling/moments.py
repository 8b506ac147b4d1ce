"""Mean and variance of groups of channels, added up over tiles without loss."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from edgedit.device import available_cores

__all__ = ["GroupMoments"]


#: Values that are taken in at once: they and their differences stay in a core's cache.
_CHUNK = 1 << 15
#: Values about whose mean the others are summed.
_SAMPLE = 1024
#: Values below which threads are not worth their start.
_ALONE = 1 << 19


def _row_moments(row: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Mean of values [n], and the sum of their squared distances from it.

    Sums are taken of the distances from the mean of a sample, so that they lose nothing to a mean that is large beside
    the deviation.
    """
    about = row[:: max(1, len(row) // _SAMPLE)].mean(dtype=np.float32)
    difference = np.empty(min(_CHUNK, len(row)), np.float32)
    total = squares = 0.0
    for start in range(0, len(row), _CHUNK):
        part = row[start : start + _CHUNK]
        near = np.subtract(part, about, out=difference[: len(part)])
        total += float(near.sum())
        squares += float(np.dot(near, near))
    shift = total / len(row)
    return float(about) + shift, squares - len(row) * shift**2


class GroupMoments:
    """Running moments by Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances" (1979): sums of squares are taken about the tile's own mean, so that a large mean loses no digits."""

    def __init__(self, groups: int) -> None:
        self._groups = groups
        self._count = 0
        self._mean = np.zeros(groups)
        self._squares = np.zeros(groups)

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Take in a tile [1, C, h, w]."""
        grouped = values.reshape(self._groups, -1)
        count = grouped.shape[1]
        if values.size < _ALONE:
            found = [_row_moments(row) for row in grouped]
        else:
            with ThreadPoolExecutor(available_cores()) as threads:
                found = list(threads.map(_row_moments, grouped))
        mean, squares = np.array(found).T
        total = self._count + count
        shift = mean - self._mean
        self._mean += shift * (count / total)
        self._squares += squares + shift**2 * (self._count * count / total)
        self._count = total

    def extrapolated(self, others: Sequence[GroupMoments], weights: Sequence[float]) -> GroupMoments:
        """Moments whose mean and mean square are the weighted sums of those of `others`.

        Where a variance came out below half of this one's own, which extrapolation cannot mean, this one's is kept.
        """
        mean = sum((w * o._mean for w, o in zip(weights, others, strict=True)), np.zeros(self._groups))
        own = self._squares / self._count
        square = sum(
            (w * (o._squares / o._count + o._mean**2) for w, o in zip(weights, others, strict=True)),
            np.zeros(self._groups),
        )
        variance = square - mean**2
        made = GroupMoments(self._groups)
        made._count, made._mean, made._squares = 1, mean, np.where(variance > own / 2, variance, own)
        return made

    def result(self, channels: int, epsilon: float) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """(mean, 1 / sqrt(variance + epsilon)), each float32 [channels, 1, 1]."""
        repeats = channels // self._groups
        reciprocal = 1.0 / np.sqrt(self._squares / self._count + epsilon)
        mean, std = (np.repeat(v, repeats).astype(np.float32)[:, None, None] for v in (self._mean, reciprocal))
        return mean, std

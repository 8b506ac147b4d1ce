"""Codes for weights: the nearest ones, or those that change a layer's output least.

Adaptive rounding is algorithm 1 of Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers" (2022), in the order of falling second moments (`act_order` of its reference implementation).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from edgedit.converters.quantization.levels import Levels

__all__ = ["adaptive", "code_range", "codes_and_scales", "descend", "largest_code", "nearest"]

Float = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int8]

_CLIPS = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85, 0.8)}
"""Shares of a channel's largest weight that are tried as the largest code."""
_LEVEL_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_WIDE_CLIPS = tuple(float(c) for c in np.linspace(1.0, 0.4, 13))
_DAMPING = 0.01
_BATCH = 128
_SWEEPS = 4


def code_range(bits: int) -> tuple[int, int]:
    """Least and largest code: symmetric for 8 and 4 bits, all of them for 3 and 2, where one more is worth much."""
    top = 2 ** (bits - 1) - 1
    return (-top if bits >= 4 else -top - 1), top


def largest_code(bits: int, levels: Levels | None = None) -> int:
    """The code furthest from zero."""
    return -code_range(bits)[0] if levels is None else levels.largest


def nearest(weight: Float, scales: Float, bits: int, levels: Levels | None = None) -> Codes:
    """Nearest codes, or numbers of `levels`; `scales` broadcasts against `weight`."""
    if levels is not None:
        return levels.nearest(weight / scales)
    low, high = code_range(bits)
    codes: Codes = np.clip(np.rint(weight / scales), low, high).astype(np.int8)
    return codes


def codes_and_scales(weight: Float, bits: int, axis: int, levels: Levels | None = None) -> tuple[Codes, Float]:
    """Codes of `weight` with one scale for each slice along all axes but `axis`, the one of least squared error.

    Args:
        weight: float32, any shape.
        bits: 8, 4, 3 or 2.
        axis: the axis, or axes merged by the caller, over which a scale is shared.
        levels: numbers that codes stand for, where these are not whole ones in a row.

    Returns:
        int8 codes in [-127, 127], [-7, 7], [-4, 3] or [-2, 1], and float32 scales with that axis kept at length 1. A
        scale of 3 or 2 bits may be negative, so that the longer side of the codes is where the largest weight is.
    """
    low, high = code_range(bits) if levels is None else (-levels.largest, levels.largest)
    peak = np.abs(weight).max(axis=axis, keepdims=True)
    signs: tuple[int, ...] = (1,) if low == -high else (1, -1)
    best_error = np.full(peak.shape, np.inf, np.float32)
    best_scale = np.ones(peak.shape, np.float32)
    for clip in _CLIPS.get(bits, _WIDE_CLIPS) if levels is None else _LEVEL_CLIPS:
        for sign in signs:
            scale = np.where(peak > 0, peak * (clip / float(-low)) * sign, 1).astype(np.float32)
            codes = nearest(weight, scale, bits, levels)
            error = ((codes * scale - weight) ** 2).sum(axis=axis, keepdims=True)
            better = error < best_error
            best_error, best_scale = np.where(better, error, best_error), np.where(better, scale, best_scale)
    return nearest(weight, best_scale, bits, levels), best_scale


RoundRow = Callable[[int, Float], tuple[npt.NDArray[np.generic], Float]]
"""(number of the input, its weights [N]) → their codes, and what these stand for [N]."""


def adaptive(weight: Float, moments: Float, round_row: RoundRow) -> npt.NDArray[np.generic]:
    """Round a matrix input by input; weights not yet rounded take up the error of those that are.

    Args:
        weight: float32 [K, N].
        moments: second moments of the layer's inputs, X^T X, float32 [K, K].
        round_row: how one row is rounded.

    Returns: the codes of all rows, in the order of `weight`.
    """
    order = np.argsort(-np.diag(moments), kind="stable")
    factor = _inverse_factor(moments[np.ix_(order, order)])
    work = weight[order].astype(np.float32)
    rows: list[npt.NDArray[np.generic] | None] = [None] * len(work)
    for start in range(0, len(work), _BATCH):
        stop = min(start + _BATCH, len(work))
        errors = np.empty((stop - start, work.shape[1]), np.float32)
        for i in range(start, stop):
            codes, value = round_row(int(order[i]), work[i])
            rows[order[i]] = codes
            errors[i - start] = (work[i] - value) / factor[i, i]
            work[i + 1 : stop] -= np.outer(factor[i, i + 1 : stop], errors[i - start])
        work[stop:] -= factor[start:stop, stop:].T @ errors
    return np.stack([row for row in rows if row is not None])


def descend(
    weight: Float, moments: Float, codes: npt.NDArray[np.generic], values: Float, round_row: RoundRow
) -> npt.NDArray[np.generic]:
    """Round inputs again, one after the other, to what is best beside the others as they are now rounded.

    Coordinate descent (Behdin et al., "QuantEase", 2023, algorithm 1): nothing is kept that makes the layer's output
    worse on the calibration inputs, so the result is never worse than `codes`.

    Args:
        weight, moments, round_row: as in `adaptive`.
        codes, values: where to begin, and what it stands for [K, N].
    """
    damped = moments.astype(np.float32).copy()
    diagonal = np.einsum("ii->i", damped)
    diagonal += _DAMPING * (float(diagonal.mean()) or 1.0)
    codes, values = codes.copy(), values.astype(np.float32).copy()
    width = weight.shape[1] // codes.shape[1]
    pull = damped @ (values - weight)
    for _ in range(_SWEEPS):
        for row in range(len(weight)):
            new, value = round_row(row, values[row] - pull[row] / diagonal[row])
            change = value - values[row]
            gain = (change * (2 * pull[row] + change * diagonal[row])).reshape(-1, width).sum(1)
            taken = gain < 0
            if taken.any():
                codes[row] = np.where(taken, new, codes[row])
                change = np.where(np.repeat(taken, width), change, 0)
                values[row] += change
                pull += np.outer(damped[:, row], change)
    return codes


def _inverse_factor(moments: Float) -> Float:
    """Upper triangular U with U^T U the inverse of the damped moments. A dead input is taken to be white."""
    matrix = moments.astype(np.float64)
    diagonal = np.einsum("ii->i", matrix)
    mean = float(diagonal.mean()) or 1.0
    diagonal[diagonal == 0] = mean
    diagonal += _DAMPING * mean
    inverse = np.linalg.inv(matrix)
    return np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)

"""Figures that say how far one tensor is from another."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

__all__ = ["Agreement", "compare"]


@dataclass(frozen=True)
class Agreement:
    """How `value` agrees with `reference`.

    Attributes:
        cosine: cosine similarity of the flattened tensors, -1 to 1.
        psnr_db: peak signal-to-noise ratio in decibels, the peak being the reference's range; 200 when they are equal.
        max_abs: largest absolute difference.
        relative_l2: |value - reference| / |reference|.
    """

    cosine: float
    psnr_db: float
    max_abs: float
    relative_l2: float

    def as_dict(self) -> dict[str, float]:
        """For a manifest or a JSON report."""
        return asdict(self)


def compare(value: np.ndarray, reference: np.ndarray) -> Agreement:
    """Compare two tensors of one shape; not-a-number in `value` gives infinite errors, never a pass."""
    if value.shape != reference.shape:
        raise ValueError(f"shapes differ: {value.shape} and {reference.shape}")
    a, b = value.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    if not np.isfinite(a).all():
        return Agreement(cosine=-1.0, psnr_db=-200.0, max_abs=float("inf"), relative_l2=float("inf"))
    difference = a - b
    norm_a, norm_b = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    error = float(np.linalg.norm(difference))
    cosine = float(a @ b / (norm_a * norm_b)) if norm_a and norm_b else float(norm_a == norm_b)
    peak, mse = float(b.max() - b.min()) if b.size else 0.0, float((difference**2).mean()) if b.size else 0.0
    psnr = 200.0 if mse == 0 else min(200.0, 10.0 * float(np.log10(max(peak, 1e-12) ** 2 / mse)))
    return Agreement(
        cosine=cosine,
        psnr_db=psnr,
        max_abs=float(np.abs(difference).max(initial=0.0)),
        relative_l2=error / norm_b if norm_b else float(error > 0),
    )

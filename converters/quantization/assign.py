"""Which layer gets which form under a budget: an integer programme, solved to the optimum by HiGHS (SciPy)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgedit.converters.quantization.sensitivity import Choice, Sensitivity
from edgedit.errors import ConversionError, RuntimeUnavailableError

__all__ = ["as_record", "assign", "curve", "least_loss", "least_size", "need_solver"]


def need_solver() -> None:
    """Raises RuntimeUnavailableError when SciPy is not installed."""
    try:
        import scipy.optimize  # noqa: F401
    except ImportError:
        raise RuntimeUnavailableError(
            "mixed precision solves an integer programme and needs SciPy; run: pip install 'edgedit[quantize]'"
        ) from None


def least_size(table: Sensitivity) -> int:
    """Bytes with every layer in its smallest form."""
    return sum(min(choice.bytes for choice in options) for options in table.choices.values())


def least_loss(table: Sensitivity) -> float:
    """Loss with every layer in its best form."""
    return sum(min(choice.loss for choice in options) for options in table.choices.values())


def assign(table: Sensitivity, *, size: float | None = None, loss: float | None = None) -> dict[str, Choice]:
    """The least loss within `size` bytes, or the least size within a `loss`; one of the two is given.

    Raises ConversionError when nothing fits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    flat = [(name, choice) for name, options in table.choices.items() for choice in options]
    rows = {name: row for row, name in enumerate(table.choices)}
    one_each = csr_array(
        (np.ones(len(flat)), ([rows[name] for name, _ in flat], np.arange(len(flat)))), shape=(len(rows), len(flat))
    )
    sizes, losses = (np.array([getattr(choice, key) for _, choice in flat], float) for key in ("bytes", "loss"))
    minimised, limited, limit = (losses, sizes, size) if size is not None else (sizes, losses, loss)
    if limit is None or limit <= 0:
        raise ValueError("give a size or a loss above zero")
    found = milp(
        minimised / (minimised.max() or 1.0),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint((limited / limit)[None], ub=1)],
        options={"mip_rel_gap": 1e-6},
    )
    if found.x is None:
        raise ConversionError("no choice of forms keeps the budget; allow a larger size, or fewer decibels")
    return {name: choice for (name, choice), taken in zip(flat, found.x, strict=True) if taken > 0.5}


def curve(table: Sensitivity, points: int = 17) -> list[tuple[int, float]]:
    """(bytes, decibels) of the best choices from the smallest size to the largest."""
    low, high = least_size(table), sum(max(c.bytes for c in options) for options in table.choices.values())
    found = []
    for size in np.linspace(low, high, points):
        chosen = assign(table, size=float(np.ceil(size)))
        loss = sum(choice.loss for choice in chosen.values())
        found.append((sum(choice.bytes for choice in chosen.values()), table.decibels(loss)))
    return found


def as_record(
    table: Sensitivity, chosen: Mapping[str, Choice], fixed: int, weights: Mapping[str, int]
) -> dict[str, Any]:
    """The table for a bundle's record; `fixed` are bytes of weights that have no choice, `weights` counts by layer."""
    points: Sequence[tuple[int, float]] = curve(table)
    return {
        "bytes": fixed + sum(choice.bytes for choice in chosen.values()),
        "psnr_db": table.decibels(sum(choice.loss for choice in chosen.values())),
        "average_bits": sum(weights[n] * c.form.bits for n, c in chosen.items()) / sum(weights[n] for n in chosen),
        "curve": [[fixed + size, decibels] for size, decibels in points],
        "layers": {
            name: {
                "chosen": chosen[name].form.bits,
                "choices": [{"bits": c.form.bits, "bytes": c.bytes, "loss": c.loss} for c in options],
            }
            for name, options in table.choices.items()
        },
    }

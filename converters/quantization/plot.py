"""The curve of loss against size as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["plot"]


def plot(sensitivity: Mapping[str, Any], path: Path) -> bool:
    """Write the curve of a record's "sensitivity" as a PNG; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.5, 3.8))
    sizes, decibels = zip(*sensitivity["curve"], strict=True)
    axes.plot([size / 1e6 for size in sizes], decibels, marker=".")
    axes.plot([sensitivity["bytes"] / 1e6], [sensitivity["psnr_db"]], "o", label="this bundle")
    axes.set(xlabel="weights of the transformer, MB", ylabel="PSNR of the prediction, dB (curve: estimate)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True

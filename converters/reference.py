"""Reference inputs and outputs of a component: what its canonical fp32 graph gives for known inputs.

They travel in the bundle (`reference/COMPONENT.npz`, a few hundred kilobytes at most), so that `verify` can say on
another machine, for another backend or precision, how far it is from the fp32 graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgedit.converters.graph import Component
from edgedit.example_inputs import example_inputs

__all__ = ["reference_inputs", "save"]


def reference_inputs(
    component: Component, *, tokens: tuple[int, int] = (6, 4), length: int = 9
) -> dict[str, np.ndarray]:
    """Small inputs, never square unless fixed sizes are: a map of 6×4 tokens, 9 text tokens of which two are masked."""
    return example_inputs(component.name, component.inputs, component.runtime, tokens=tokens, length=length)


def save(
    path: Path,
    inputs: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.ndarray],
    own: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> None:
    """Write inputs and outputs as one `.npz` (the same bytes for the same arrays); `own` are outputs of compressed
    forms by backend."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {**{f"in.{k}": v for k, v in inputs.items()}, **{f"out.{k}": v for k, v in outputs.items()}}
    for backend, values in (own or {}).items():
        arrays |= {f"own.{backend}.{k}": v for k, v in values.items()}
    np.savez(path, **arrays)  # type: ignore[arg-type]

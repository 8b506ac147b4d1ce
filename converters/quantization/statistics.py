"""What calibration knows of a layer's inputs, and how it follows the layer when its inputs are scaled or mixed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgedit.converters.quantization.layers import Layer
from edgedit.converters.quantization.workspace import Workspace
from edgedit.errors import ConversionError

__all__ = ["InputStatistics", "Observer", "input_of"]

Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class InputStatistics:
    """Of a layer's inputs X [samples, K], as the graph has them now.

    Attributes:
        peaks: largest absolute value by channel [K].
        rows: how many rows of X were seen.
        distinct: how many of them differ: what depends on the timestep alone has one a step.
        load: reads X^T X [K, K] as it was measured, None where it was not.
        change: what turns these into those of the inputs as they are now.
    """

    peaks: Float
    rows: int
    distinct: int
    load: Callable[[], Float] | None
    change: Callable[[Float], Float] | None = None

    def moments(self) -> Float:
        """X^T X of the inputs as they are now, float32 [K, K], shrunk towards its diagonal where few rows differ.

        Ten inputs say nothing of how 256 channels go together: rounding would fit those ten and fail at the next. The
        share of the diagonal, K / (K + distinct), is near one for such layers and near zero for those that see tokens
        (shrinkage as in Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices").
        """
        if self.load is None:
            raise ValueError("second moments were not measured")
        found = self.load()
        share = np.float32(len(found) / (len(found) + self.distinct))
        diagonal = np.diag(found).copy()
        found = found * (1 - share)
        np.fill_diagonal(found, diagonal)
        return found if self.change is None else self.change(found)

    def then(self, change: Callable[[Float], Float], peaks: Float) -> InputStatistics:
        """After a further change of the inputs."""
        before = self.change
        return replace(self, change=change if before is None else (lambda m: change(before(m))), peaks=peaks)


def input_of(layer: Layer) -> ir.Value | None:
    """The value that a matrix is multiplied with; None for other layers and for a matrix that is used twice."""
    nodes = layer.nodes
    return nodes[0].inputs[0] if layer.kind == "matrix" and len(nodes) == 1 else None


class Observer:
    """Sums statistics of watched values over the samples of a run and keeps them in the workspace.

    Args:
        component: for messages and as the name of the group in the workspace.
        layers: those whose inputs are wanted.
        moments: names of layers of which X^T X is wanted as well.
    """

    def __init__(self, component: str, layers: Mapping[str, Layer], moments: frozenset[str], work: Workspace) -> None:
        self.component, self.work = component, work
        self.groups: dict[ir.Value, list[str]] = {}
        for name, layer in layers.items():
            value = input_of(layer)
            if value is not None:
                self.groups.setdefault(value, []).append(name)
        self.with_moments = {value for value, names in self.groups.items() if moments.intersection(names)}
        self.widths = {value: layers[names[0]].shape[0] for value, names in self.groups.items()}
        self._sums: dict[ir.Value, dict[str, npt.NDArray[Any]]] = {}
        self._seen: dict[ir.Value, set[float]] = {}

    def _key(self, value: ir.Value) -> str:
        return f"{self.component} {self.groups[value][0]} {value in self.with_moments}"

    @property
    def missing(self) -> list[ir.Value]:
        """Values that the workspace has no statistics of."""
        return [value for value in self.groups if not self.work.has("statistics", self._key(value))]

    def cost(self, value: ir.Value) -> int:
        """Bytes that watching a value takes."""
        return 4 * self.widths[value] ** 2 if value in self.with_moments else 0

    def add(self, index: int, value: ir.Value, array: npt.NDArray[np.float32]) -> None:
        """Takes in one sample's value. Raises ConversionError when it is not finite."""
        rows = array.reshape(-1, array.shape[-1])
        peaks = np.abs(rows).max(0)
        if not np.isfinite(peaks).all():
            raise ConversionError(
                f"{self.component}: the input of layer {self.groups[value][0]} holds values that are not numbers "
                f"in calibration (call {index + 1}); check the checkpoint, or convert without --calibration"
            )
        sums = self._sums.setdefault(value, {"peaks": np.zeros_like(peaks), "rows": np.zeros((), np.int64)})
        # Rows are told apart by one projection of each: exact equality is what repeated inputs have.
        projected = rows @ np.random.default_rng(0).standard_normal(rows.shape[1], dtype=np.float32)
        self._seen.setdefault(value, set()).update(np.unique(projected).tolist())
        sums["peaks"] = np.maximum(sums["peaks"], peaks)
        sums["rows"] += len(rows)
        if value in self.with_moments:
            product = rows.T @ rows
            sums["moments"] = product if "moments" not in sums else np.add(sums["moments"], product, sums["moments"])

    def keep(self) -> None:
        """Everything that was taken in since the last call is complete."""
        for value, sums in self._sums.items():
            if "moments" in sums:
                self.work.save("moments", self._key(value), {"moments": sums.pop("moments")})
            distinct = np.array(len(self._seen.pop(value)))
            self.work.save("statistics", self._key(value), {**sums, "distinct": distinct})
        self._sums.clear()

    def statistics(self) -> dict[str, InputStatistics]:
        """By layer. Second moments stay on disk until they are asked for."""
        found = {}
        for value, names in self.groups.items():
            key = self._key(value)
            stored = self.work.load("statistics", key)
            assert stored is not None
            load = self._loader(key) if value in self.with_moments else None
            one = InputStatistics(stored["peaks"], int(stored["rows"]), int(stored["distinct"]), load)
            found.update(dict.fromkeys(names, one))
        return found

    def _loader(self, key: str) -> Callable[[], Float]:
        def load() -> Float:
            stored = self.work.load("moments", key)
            assert stored is not None
            moments: Float = stored["moments"]
            return moments

        return load

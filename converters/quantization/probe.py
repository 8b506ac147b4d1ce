"""The float32 network with weights that can be replaced call by call: what reaches the prediction is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgedit.converters.lowerings import onnx as onnx_lowering
from edgedit.converters.quantization.layers import Layer
from edgedit.errors import ConversionError

__all__ = ["Probe"]

Float = npt.NDArray[np.float32]


class Probe:
    """A session of the transformer that takes its matrices as optional inputs.

    Args:
        model: a fresh fp32 graph with lazy weights.
        layers: the matrices, of any graph with the same names.
        calls: inputs of the network.
        influence: how much an error of each call's prediction counts, mean 1.
        place: a folder for the graph and its weights.

    Attributes:
        peak: range of the predictions.
        energy: mean of their squares, each call counted by its influence.
    """

    def __init__(
        self,
        model: ir.Model,
        layers: Mapping[str, Layer],
        calls: Sequence[Mapping[str, npt.NDArray[Any]]],
        influence: Sequence[float],
        place: Path,
    ) -> None:
        import onnxruntime

        written = onnx_lowering.write(model, place, "transformer", dtype="fp32")
        graph = ir.load(place / written.graph)
        self._inputs = {name: layer.value.name or name for name, layer in layers.items()}
        for name in self._inputs.values():
            # An initializer that is an input as well is a default that a call may override.
            graph.graph.inputs.append(graph.graph.initializers[name])
        path = (place / written.graph).with_name("probe.onnx")
        ir.save(graph, path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._place, self._calls, self._influence = place, calls, np.asarray(influence, np.float64)
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._predictions = [self._session.run(None, dict(call))[0] for call in calls]
        self.energy = self._mean([p.astype(np.float64) for p in self._predictions])
        self.peak = float(max(p.max() for p in self._predictions) - min(p.min() for p in self._predictions))
        if not np.isfinite(self.energy) or self.energy == 0:
            raise ConversionError("the transformer predicts nothing but zeros or values that are not numbers")

    def loss(self, weights: Mapping[str, Float]) -> float:
        """Mean square error of the prediction with other weights, by layer, as a share of the prediction's energy."""
        given = {self._inputs[name]: weight for name, weight in weights.items()}
        errors = [
            (self._session.run(None, {**call, **given})[0] - prediction).astype(np.float64)
            for call, prediction in zip(self._calls, self._predictions, strict=True)
        ]
        return self._mean(errors) / self.energy

    def _mean(self, arrays: Sequence[npt.NDArray[np.float64]]) -> float:
        return float(np.mean([w * np.mean(a**2) for w, a in zip(self._influence, arrays, strict=True)]))

    def close(self) -> None:
        """Free the weights, on disk as well."""
        del self._session
        for path in sorted(self._place.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        self._place.rmdir()

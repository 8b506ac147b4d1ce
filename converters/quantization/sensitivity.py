"""What every layer loses in every form it could have, measured where it counts: in the prediction.

A layer's own error is exact: tr(D^T M D) for the change D of its weight and the second moments M of its inputs. How
much of it reaches the prediction is measured once a layer, by running the whole network with that layer alone rounded.
Errors of different layers are taken to add up, as ViDiT-Q (section 4.3) and its integer programme do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgedit.converters.lowerings import onnx as onnx_lowering
from edgedit.converters.quantization.encode import encode
from edgedit.converters.quantization.form import Form
from edgedit.converters.quantization.layers import Layer, fitted
from edgedit.converters.quantization.record import stored_bytes
from edgedit.converters.quantization.statistics import InputStatistics
from edgedit.converters.quantization.workspace import Workspace
from edgedit.errors import ConversionError

__all__ = ["CANDIDATES", "Choice", "Sensitivity", "measure"]

Float = npt.NDArray[np.float32]

CANDIDATES = (
    Form(2, format="palette", rounding="adaptive"),
    Form(3, 64, rounding="adaptive"),
    Form(4, 64, rounding="adaptive"),
    Form(8),
)
"""Forms among which mixed precision chooses for every matrix."""

_PROBE = Form(3, 64)
_CALLS = 4


@dataclass(frozen=True)
class Choice:
    """A form that a layer could have: its bytes, and the error of the prediction, as a share of its energy."""

    form: Form
    bytes: int
    loss: float


@dataclass(frozen=True)
class Sensitivity:
    """Choices by layer, smallest first, and what turns a loss into decibels.

    Attributes:
        peak: range of the predictions.
        energy: mean of their squares.
    """

    choices: Mapping[str, Sequence[Choice]]
    peak: float
    energy: float

    def decibels(self, loss: float) -> float:
        """PSNR of the prediction for a loss, 200 at most."""
        return min(200.0, 10 * float(np.log10(self.peak**2 / max(loss * self.energy, 1e-30))))

    def loss(self, decibels: float) -> float:
        """The loss that a PSNR allows."""
        return float(self.peak**2 / 10 ** (decibels / 10) / self.energy)


def measure(
    build: Callable[[], ir.Model],
    layers: Mapping[str, Layer],
    statistics: Mapping[str, InputStatistics],
    calls: Sequence[Mapping[str, npt.NDArray[Any]]],
    work: Workspace,
    on_step: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """Measure every matrix of the transformer.

    Args:
        build: a fresh fp32 graph with lazy weights.
        layers: matrices whose inputs are known.
        statistics: of their inputs, with second moments.
        calls: inputs of the network; a few of them are used, from all over the schedule.
        work: keeps what was measured, layer by layer.
    """
    chosen = [calls[i] for i in np.linspace(0, len(calls) - 1, min(_CALLS, len(calls))).round().astype(int)]
    missing = [name for name in layers if not work.has("loss", name)]
    if missing or not work.has("loss", "/prediction"):
        place = work.folder / "probe"
        probe = _Probe(build(), [layers[name] for name in layers], chosen, place)
        work.save("loss", "/prediction", {"peak": np.array(probe.peak), "energy": np.array(probe.energy)})
        for index, name in enumerate(missing):
            work.save("loss", name, {"losses": _losses(layers[name], statistics[name], probe)})
            if on_step is not None:
                on_step(len(layers) - len(missing) + index + 1, len(layers))
        probe.close()
    known = work.load("loss", "/prediction")
    assert known is not None
    choices = {}
    for name, layer in layers.items():
        stored = work.load("loss", name)
        assert stored is not None
        options: dict[Form, Choice] = {}
        for candidate, loss in zip(CANDIDATES, stored["losses"], strict=True):
            form = fitted(candidate, layer)
            options[form] = Choice(form, stored_bytes(form, layer), float(loss))
        choices[name] = sorted(options.values(), key=lambda choice: choice.bytes)
    return Sensitivity(choices, float(known["peak"]), float(known["energy"]))


def _losses(layer: Layer, statistics: InputStatistics, probe: _Probe) -> npt.NDArray[np.float64]:
    """Loss in the prediction for each candidate."""
    tensor = layer.value.const_value
    assert tensor is not None
    weight, moments = tensor.numpy().astype(np.float32), statistics.moments()

    def own_error(value: Float) -> float:
        change = (value - weight).astype(np.float64)
        return float(np.einsum("kn,kn->", change, moments @ change))

    rounded = encode(weight, fitted(_PROBE, layer), layer.kind).value()
    reached, own = probe.loss(layer, rounded), own_error(rounded)
    gain = reached / own if own > 0 else 0.0
    losses = []
    for candidate in CANDIDATES:
        form = fitted(candidate, layer)
        losses.append(gain * own_error(encode(weight, form, layer.kind, moments).value()))
    return np.array(losses)


class _Probe:
    """The fp32 network with weights that can be replaced call by call."""

    def __init__(
        self, model: ir.Model, layers: Sequence[Layer], calls: Sequence[Mapping[str, npt.NDArray[Any]]], place: Path
    ) -> None:
        import onnxruntime

        written = onnx_lowering.write(model, place, "transformer", dtype="fp32")
        graph = ir.load(place / written.graph)
        for layer in layers:
            name = layer.value.name
            assert name is not None
            # An initializer that is an input as well is a default that a call may override.
            graph.graph.inputs.append(graph.graph.initializers[name])
        path = (place / written.graph).with_name("probe.onnx")
        ir.save(graph, path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.place, self.calls = place, calls
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.predictions = [self._session.run(None, dict(call))[0] for call in calls]
        self.energy = float(np.mean([(p.astype(np.float64) ** 2).mean() for p in self.predictions]))
        self.peak = float(max(p.max() for p in self.predictions) - min(p.min() for p in self.predictions))
        if not np.isfinite(self.energy) or self.energy == 0:
            raise ConversionError("the transformer predicts nothing but zeros or values that are not numbers")

    def loss(self, layer: Layer, weight: Float) -> float:
        """Mean square error of the prediction with another weight, as a share of the prediction's energy."""
        name = layer.value.name
        assert name is not None
        errors = []
        for call, prediction in zip(self.calls, self.predictions, strict=True):
            found = self._session.run(None, {**call, name: weight})[0]
            errors.append(((found - prediction).astype(np.float64) ** 2).mean())
        return float(np.mean(errors)) / self.energy

    def close(self) -> None:
        """Free the weights, on disk as well."""
        del self._session
        for path in sorted(self.place.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()

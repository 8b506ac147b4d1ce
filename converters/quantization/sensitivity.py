"""What every layer loses in every form it could have, measured where it counts: in the prediction.

The whole network is run with one layer rounded as the bundle would have it, on calls that rounding has not seen. An
error counts as much as the step that it is made in moves the picture. Losses of layers are taken to add up, as ViDiT-Q
(section 4.3) and its integer programme do; what comes of a choice is measured with all its layers rounded at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgedit.converters.quantization.encode import Encoded
from edgedit.converters.quantization.form import Form
from edgedit.converters.quantization.layers import Layer, fitted
from edgedit.converters.quantization.probe import Probe
from edgedit.converters.quantization.record import stored_bytes
from edgedit.converters.quantization.workspace import Workspace

__all__ = ["CANDIDATES", "Choice", "Meter", "Sensitivity", "measure"]

Float = npt.NDArray[np.float32]

CANDIDATES = (
    Form(2, format="palette", rounding="adaptive"),
    Form(3, 64, rounding="adaptive"),
    Form(4, 64, rounding="adaptive"),
    Form(8),
)
"""Forms among which mixed precision chooses for every matrix."""


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


@dataclass
class Meter:
    """Measures forms of layers in the prediction, and keeps what it found.

    Args:
        layers: the matrices of the transformer.
        encode: rounds a weight as the bundle will have it.
        open_probe: the network; opened when it is first needed.
        work: keeps what was measured.
    """

    layers: Mapping[str, Layer]
    encode: Callable[[Layer, Form, Float], Encoded]
    open_probe: Callable[[], Probe]
    work: Workspace
    _probe: Probe | None = None

    def loss(self, forms: Mapping[str, Form]) -> float:
        """Of the prediction with these layers rounded at once."""
        key = " ".join(f"{name} {form}" for name, form in sorted(forms.items(), key=lambda item: item[0]))
        stored = self.work.load("loss", key)
        if stored is None:
            stored = {"loss": np.array(self.probe.loss({name: self._value(name, f) for name, f in forms.items()}))}
            self.work.save("loss", key, stored)
        return float(stored["loss"])

    def scale(self) -> tuple[float, float]:
        """Range and mean square of the predictions."""
        stored = self.work.load("loss", "/prediction")
        if stored is None:
            stored = {"peak": np.array(self.probe.peak), "energy": np.array(self.probe.energy)}
            self.work.save("loss", "/prediction", stored)
        return float(stored["peak"]), float(stored["energy"])

    @property
    def probe(self) -> Probe:
        """The network."""
        if self._probe is None:
            self._probe = self.open_probe()
        return self._probe

    def close(self) -> None:
        """Free the network."""
        if self._probe is not None:
            self._probe.close()
        self._probe = None

    def _value(self, name: str, form: Form) -> Float:
        tensor = self.layers[name].value.const_value
        assert tensor is not None
        return self.encode(self.layers[name], form, tensor.numpy().astype(np.float32)).value()


def measure(meter: Meter, on_step: Callable[[int, int], None] | None = None) -> Sensitivity:
    """Measure every matrix by itself in every form that it could have."""
    peak, energy = meter.scale()
    choices = {}
    for number, (name, layer) in enumerate(meter.layers.items()):
        forms = dict.fromkeys(fitted(candidate, layer) for candidate in CANDIDATES)
        options = [Choice(form, stored_bytes(form, layer), meter.loss({name: form})) for form in forms]
        choices[name] = sorted(options, key=lambda choice: choice.bytes)
        if on_step is not None:
            on_step(number + 1, len(meter.layers))
    return Sensitivity(choices, peak, energy)

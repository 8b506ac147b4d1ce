"""What calibration sees of the maps that convolutions take and give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgedit.converters.passes.int8_convolution import MapRanges
from edgedit.converters.quantization.calibrate import Calibration
from edgedit.converters.quantization.layers import Layer
from edgedit.converters.quantization.stream import run_in_segments
from edgedit.errors import ConversionError

__all__ = ["SeenMaps", "measure_maps"]


@dataclass(frozen=True)
class SeenMaps:
    """Ranges of a convolution's maps, and the multiplications that its largest output took."""

    ranges: MapRanges
    work: float


def measure_maps(
    calibration: Calibration, component: str, model: ir.Model, layers: Mapping[str, Layer]
) -> dict[str, SeenMaps]:
    """Of the convolutions `layers` of `model`, by name; those whose weight several nodes use are left out.

    Raises ConversionError, with the layer's name, for maps that are not finite.
    """
    nodes = {name: layer.nodes[0] for name, layer in layers.items() if len(layer.nodes) == 1}
    watched: dict[ir.Value, str] = {}
    for name, node in nodes.items():
        for value in (node.inputs[0], node.outputs[0]):
            assert value is not None
            watched.setdefault(value, name)
    key = f"{component} {sorted(nodes)}"
    stored = calibration.work.load("ranges", key)
    if stored is None:
        found = {value: [0.0, 0.0, 0.0] for value in watched}

        def see(index: int, value: ir.Value, array: npt.NDArray[Any]) -> None:
            low, high = float(array.min()), float(array.max())
            if not np.isfinite([low, high]).all():
                raise ConversionError(
                    f"{component}: the maps of layer {watched[value]} hold values that are not numbers in calibration "
                    f"(picture {index + 1}); check the checkpoint, or convert without --calibration"
                )
            before = found[value]
            found[value] = [min(low, before[0]), max(high, before[1]), max(array[0, 0].size, before[2])]

        run_in_segments(
            model,
            calibration.calls(component),
            calibration.work.folder / "segment",
            watched=watched,
            on_value=see,
            on_segment=lambda done, total: calibration.tell(f"calibrate {component}", done, total),
        )
        stored = {name: np.array([found[node.inputs[0]], found[node.outputs[0]]]) for name, node in nodes.items()}  # type: ignore[index]
        calibration.work.save("ranges", key, stored)
    return {name: _seen(pair, layers[name]) for name, pair in stored.items()}


def _seen(pair: npt.NDArray[Any], layer: Layer) -> SeenMaps:
    taken, given = pair.tolist()
    ranges = MapRanges((taken[0], taken[1]), (given[0], given[1]))
    return SeenMaps(ranges, float(np.prod(layer.shape)) * given[2])

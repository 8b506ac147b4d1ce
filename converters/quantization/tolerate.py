"""Which of a decoder's convolutions compute in int8: most of the work, as long as the picture keeps its likeness."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgedit.converters.lowerings import onnx as onnx_lowering
from edgedit.converters.passes.int8_convolution import Int8Convolution, MapRanges
from edgedit.converters.passes.quantize import QuantizeWeights
from edgedit.converters.quantization.calibrate import Calibration
from edgedit.converters.quantization.form import Form
from edgedit.runtimes.onnx import CPU, OnnxSession

__all__ = ["LEAST_DB", "Tolerated", "tolerate"]

#: PSNR that pictures keep, of a range of 2.
LEAST_DB = 45.0
#: Pictures that it is measured on.
_PICTURES = 2
#: Side of the part of the first picture on which layers are measured one by one: a large decoder has seventy of them.
_SIDE = 256

Floats = npt.NDArray[np.float32]
Call = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Tolerated:
    """The convolutions that are taken, the PSNR of pictures with all of them (None: none is taken) and with each of
    the candidates alone."""

    names: tuple[str, ...]
    psnr_db: float | None
    alone_db: Mapping[str, float]


def tolerate(
    calibration: Calibration, component: str, ranges: Mapping[str, MapRanges], work: Mapping[str, float]
) -> Tolerated:
    """Measure each convolution in int8 by itself, and take those with most work for their error while `LEAST_DB` holds.

    Args:
        ranges: of the candidates, by layer name.
        work: what each of them costs, in any unit.

    The errors of different layers add up, near enough to begin with; what is taken is measured together, and the
    layer with the least work for its error is given back until it holds.
    """
    if not ranges:
        return Tolerated((), None, {})
    meter = _Meter(calibration, component, ranges)
    alone = {}
    for number, name in enumerate(ranges):
        alone[name] = meter.error([name], part=True)
        calibration.tell(f"measure {component}", number + 1, len(ranges))
    least = 4 / 10 ** (LEAST_DB / 10)
    taken: list[str] = []
    for name in sorted(ranges, key=lambda name: alone[name] / work[name]):
        if sum(alone[other] for other in taken) + alone[name] <= least:
            taken.append(name)
    together = meter.error(taken)
    while taken and together > least:
        taken.pop()
        together = meter.error(taken)
    meter.close()
    order = tuple(name for name in ranges if name in taken)
    return Tolerated(order, _decibels(together) if taken else None, {name: _decibels(e) for name, e in alone.items()})


def _decibels(error: float) -> float:
    return round(10 * float(np.log10(4 / max(error, 1e-12))), 2)


def _middle(latents: npt.NDArray[Any], side: int) -> npt.NDArray[Any]:
    """The middle of maps (1, C, H, W), at most `side` wide and high."""
    top, left = (max(0, size - side) // 2 for size in latents.shape[-2:])
    return latents[..., top : top + side, left : left + side]


class _Meter:
    """Mean squared errors of the pictures of a decoder, some of whose convolutions compute in int8."""

    def __init__(self, calibration: Calibration, component: str, ranges: Mapping[str, MapRanges]) -> None:
        self.work, self.component, self.ranges = calibration.work, component, ranges
        self.build = calibration.build
        self.calls = calibration.calls(component)[:_PICTURES]
        self._graph: Path | None = None
        self._wanted: list[Floats] = []
        self._part: Call = {}
        self._wanted_part: list[Floats] = []

    def error(self, names: Collection[str], *, part: bool = False) -> float:
        """With the convolutions `names` in int8; of `part`, of the middle of the first picture."""
        if not names:
            return 0.0
        key = f"{self.component} {part} {sorted(names)} {[self.ranges[name] for name in sorted(names)]}"
        stored = self.work.load("errors", key)
        if stored is None:
            found = self._measured(names, part)
            self.work.save("errors", key, {"error": np.array(found)})
            return found
        return float(stored["error"])

    def _measured(self, names: Collection[str], part: bool) -> float:
        graph = self._graph or self._write()
        model = ir.load(graph)
        QuantizeWeights(dict.fromkeys(names, Form(8)))(model)
        Int8Convolution({name: self.ranges[name] for name in names})(model)
        # Beside the float graph, whose weights it shares.
        path = graph.with_name("int8.onnx")
        ir.save(model, path)
        found = self._run(path, [self._part] if part else self.calls)
        wanted = self._wanted_part if part else self._wanted
        return float(np.mean([np.square(a - b).mean() for a, b in zip(found, wanted, strict=True)]))

    def _write(self) -> Path:
        """The float graph, and what it gives."""
        place = self.work.folder / "maps"
        written = onnx_lowering.write(self.build(self.component), place, self.component, dtype="fp32")
        self._graph = place / written.graph
        self._wanted = self._run(self._graph, self.calls)
        ((name, latents),) = self.calls[0].items()
        scale = self._wanted[0].shape[-1] // latents.shape[-1]
        self._part = {name: _middle(latents, max(1, _SIDE // scale))}
        self._wanted_part = self._run(self._graph, [self._part])
        return self._graph

    def _run(self, path: Path, calls: list[Call]) -> list[Floats]:
        session = OnnxSession(path, [CPU], None, None, self.component, arena="shared")
        (output,) = session.outputs
        found: list[Floats] = [session.run(call)[output] for call in calls]
        session.close()
        return found

    def close(self) -> None:
        """Remove what was written."""
        if self._graph is not None:
            for path in self._graph.parent.iterdir():
                path.unlink()

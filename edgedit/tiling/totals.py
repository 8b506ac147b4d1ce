"""What tiles add up to while a pass runs: reductions, and the rows of the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgedit.tiling.moments import GroupMoments
from edgedit.tiling.pieces import Gather, Moments, Sums
from edgedit.tiling.regions import Region
from edgedit.tiling.stores import Tokens

__all__ = ["Band", "GatherTotal", "MomentsTotal", "OnRows", "PieceSession", "SumsTotal"]

Floats = npt.NDArray[np.float32]
#: Called with the first row and a band of rows [1, C, rows, width] of the result, from the top to the bottom.
OnRows = Callable[[int, Floats], None]


class PieceSession(Protocol):
    """One piece, open in a backend."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Evaluate the piece."""
        ...

    def close(self) -> None:
        """Free its weights."""
        ...


@dataclass
class MomentsTotal:
    part: Moments
    moments: GroupMoments

    def add(self, values: Mapping[str, Floats]) -> None:
        self.moments.add(values[self.part.of])


@dataclass
class SumsTotal:
    part: Sums
    session: PieceSession
    totals: dict[str, npt.NDArray[np.float64]] | None = None

    def add(self, values: Mapping[str, Floats]) -> None:
        found = self.session.run({name: values[name] for name in self.part.inputs})
        if self.totals is None:
            self.totals = {name: found[name].astype(np.float64) for name in self.part.outputs}
        else:
            for name in self.part.outputs:
                self.totals[name] += found[name]

    def result(self) -> dict[str, Floats]:
        """The sums, by the names of the graph inputs that take them."""
        assert self.totals is not None
        return {name: total.astype(np.float32) for name, total in self.totals.items()}


@dataclass
class GatherTotal:
    part: Gather
    keys: Tokens
    values: Tokens

    def add(self, values: Mapping[str, Floats]) -> None:
        self.keys.append(values[self.part.keys])
        self.values.append(values[self.part.values])


class Band:
    """Collects the tiles of one band of rows and hands it over when it is complete."""

    def __init__(self, channels: int, width: int, on_rows: OnRows | None) -> None:
        self._channels, self._width, self._on_rows = channels, width, on_rows
        self._rows: Floats | None = None

    def add(self, core: Region, values: Floats) -> None:
        if self._on_rows is None:
            return
        if core.width == self._width:
            self._on_rows(core.top, values)
            return
        if self._rows is None:
            self._rows = np.empty((1, self._channels, core.height, self._width), np.float32)
        self._rows[:, :, :, core.left : core.right] = values
        if core.right == self._width:
            rows, self._rows = self._rows, None
            self._on_rows(core.top, rows)

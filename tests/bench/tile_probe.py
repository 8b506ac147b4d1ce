"""One tile of every pass of a decode: what it takes in memory without the hours that it takes.

Tiles of one pass are alike. What is kept between passes is filled whole, so that it takes what it would. Of passes that
are planned to take less than `NEAR` of the peak, which plans within 15 % then cannot make the peak, the tile is small.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from edgedit.device import cache_dir
from edgedit.tiling.memory import pass_cost, weights_of
from edgedit.tiling.pieces import Gather, Pieces, Reduction
from edgedit.tiling.program import Pass, Program
from edgedit.tiling.regions import Extent, Region, tiles
from edgedit.tiling.run import TileRunner
from edgedit.tiling.stores import FileMap, Map, MemoryMap
from edgedit.tiling.totals import Band, GatherTotal, MomentsTotal, OnRows, PieceSession, SumsTotal

__all__ = ["inner", "run_one_tile"]

#: Tokens that are appended at once.
TOKENS = 4096
#: Share of the planned peak from which a pass is run with a tile of its own size, and the side of the others' tiles.
NEAR, SMALL = 0.85, 32


def inner(whole: Region, tile: int) -> Region:
    """One of the largest tiles, with neighbours on as many sides as there are: it has the widest halo."""
    rows: dict[int, list[Region]] = {}
    for core in tiles(whole, tile):
        rows.setdefault(core.top, []).append(core)
    some = [core for row in list(rows.values())[:2] for core in row[:2]]
    return max(some, key=lambda core: (core.area, (core.top > 0) + (core.left > 0)))


class _FullBand(Band):
    """A band whose other tiles seem to be there."""

    def add(self, core: Region, values: np.ndarray) -> None:
        if self._rows is None and core.width < self._width:
            self._rows = np.ones((1, self._channels, core.height, self._width), np.float32)
        super().add(core, values)


def near_the_peak(pieces: Pieces, program: Program, extent: Extent) -> set[Pass]:
    """The passes that are planned to take at least `NEAR` of what the most expensive one takes."""
    gathers = [b for b, parts in pieces.reductions.items() for part in parts if isinstance(part, Gather)]
    keys = max((extent.at(pieces.scale_at(b)).area for b in gathers), default=0)
    peaks = {
        step: pass_cost(pieces, step, extent, keys).peak + weights_of(pieces, step.start, step.stop)
        for step in program.passes
    }
    return {step for step, peak in peaks.items() if peak >= NEAR * max(peaks.values())}


class _Probe(TileRunner):
    def run(self, picture: np.ndarray, program: Program, on_rows: Callable[[int, np.ndarray], None]) -> None:
        self._extent = Extent(picture.shape[2], picture.shape[3])
        self._near = near_the_peak(self._pieces, program, self._extent)
        super().run(picture, program, on_rows)

    def _cores(self, step: Pass, whole: Region) -> Iterable[Region]:
        core = inner(whole, step.tile)
        if step not in self._near:
            core = Region(core.top, min(core.bottom, core.top + SMALL), core.left, min(core.right, core.left + SMALL))
        return [core]

    def _band(self, whole: Region, on_rows: OnRows | None) -> Band:
        return _FullBand(self._pieces.values[self._pieces.output].channels, whole.width, on_rows)

    def _store(self, channels: int, whole: Region, step: Pass) -> Map:
        store = super()._store(channels, whole, step)
        if isinstance(store, MemoryMap):
            store.write(whole, np.zeros((), np.float32))
        elif isinstance(store, FileMap):
            os.truncate(store._file.fileno(), store._bytes * store._across * -(-whole.height // store._block))
        return store

    def _begin(self, part: Reduction, step: Pass) -> MomentsTotal | SumsTotal | GatherTotal:
        total = super()._begin(part, step)
        if isinstance(total, GatherTotal):
            whole = self._extent.at(self._pieces.scale_at(step.stop))
            missing = whole.area - sum(core.area for core in self._cores(step, whole))
            for tokens in (total.keys, total.values):
                for start in range(0, missing, TOKENS):
                    tokens.append(np.zeros((1, min(TOKENS, missing - start), tokens._channels), np.float32))
        return total


def run_one_tile(
    pieces: Pieces, open_graph: Callable[[str], PieceSession], picture: np.ndarray, program: Program
) -> None:
    """Run `program` on `picture` [1, C, h, w] as a `TileRunner` does, but one tile of every pass only."""
    with tempfile.TemporaryDirectory(dir=cache_dir() if cache_dir().exists() else None) as scratch:
        _Probe(pieces, open_graph, Path(scratch)).run(picture, program, lambda top, rows: None)

"""Runs a component's pieces over a picture, pass by pass and tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgedit.errors import EdgeditError
from edgedit.tiling.moments import GroupMoments
from edgedit.tiling.pieces import Local, Moments, Pieces, Reduction, Stage, Sums
from edgedit.tiling.program import Pass, Program
from edgedit.tiling.regions import Extent, Region, needs, tiles
from edgedit.tiling.stores import BLOCK, FileMap, Map, MemoryMap, SubsampledMap, Tokens
from edgedit.tiling.totals import Band, GatherTotal, MomentsTotal, OnRows, PieceSession, SumsTotal

__all__ = ["KEYS_AT_ONCE", "TileRunner", "TilesStoppedError"]

Floats = npt.NDArray[np.float32]
#: Called with (tiles done, tiles in all); returning False stops the run.
OnTile = Callable[[int, int], bool | None]

#: Keys of softmax attention that are scored at once.
KEYS_AT_ONCE = 1024


class TilesStoppedError(EdgeditError):
    """The callback asked to stop between two tiles."""


class TileRunner:
    """The pieces of one component, and what is known of one picture so far."""

    def __init__(
        self,
        pieces: Pieces,
        open_graph: Callable[[str], PieceSession],
        scratch: Path,
        on_tile: OnTile | None = None,
    ) -> None:
        self._pieces, self._open, self._scratch, self._on_tile = pieces, open_graph, scratch, on_tile
        self._sessions: dict[str, PieceSession] = {}
        self._sums: dict[str, Floats] = {}
        self._gathered: dict[str, tuple[Tokens, Tokens]] = {}
        self._moments: dict[Moments, GroupMoments] = {}
        self._spare: list[Floats] = []
        self._done = self._total = 0

    def run(self, picture: Floats, program: Program, on_rows: OnRows) -> None:
        """Run the component on `picture` [1, C, h, w] and hand its result over in bands of rows.

        Raises:
            TilesStoppedError: `on_tile` returned False.
            InputError: the disk with the scratch files is full.
        """
        extent = Extent(picture.shape[2], picture.shape[3])
        kept: dict[str, Map] = {self._pieces.input: MemoryMap.of(picture)}
        self._done, self._total = 0, self._count(program, extent)
        try:
            for number, step in enumerate(program.passes):
                if program.coarse and number == program.coarse_at:
                    self._coarse(program, kept, extent)
                following = program.passes[number + 1 :]
                kept = self._pass(step, kept, extent, on_rows, following)
        finally:
            for store in kept.values():
                store.close()
            self._spare.clear()
            self._close(())
            for tokens in self._gathered.values():
                for part in tokens:
                    part.close()
            self._gathered.clear()

    def _coarse(self, program: Program, kept: Mapping[str, Map], extent: Extent) -> None:
        """Moments from subsampled maps. Every step runs with the extrapolated moments of the norms before."""
        maps: list[dict[str, Map]] = [
            {name: SubsampledMap(store, step) for name, store in kept.items()} for step in program.steps
        ]
        sizes = self._coarse_sizes(program, extent)
        try:
            for number, step in enumerate(program.coarse):
                found: list[dict[Moments, GroupMoments]] = []
                for i, size in enumerate(sizes):
                    self._moments = {}
                    maps[i] = self._pass(step, maps[i], size, None, program.coarse[number + 1 :])
                    found.append(self._moments)
                for part, first in found[0].items():
                    moments = first.extrapolated([other[part] for other in found], program.weights)
                    self._know_moments(part, moments)
        finally:
            for group in maps:
                for store in group.values():
                    store.close()

    def _coarse_sizes(self, program: Program, extent: Extent) -> list[Extent]:
        scale = self._pieces.scale_at(program.coarse[0].start)
        whole = extent.at(scale)
        return [Extent(-(-whole.height // step), -(-whole.width // step), scale) for step in program.steps]

    def _count(self, program: Program, extent: Extent) -> int:
        def count(step: Pass, size: Extent) -> int:
            whole = size.at(self._pieces.scale_at(step.stop))
            return -(-whole.height // step.tile) * -(-whole.width // step.tile)

        total = sum(count(step, extent) for step in program.passes)
        if program.coarse:
            total += sum(count(step, size) for step in program.coarse for size in self._coarse_sizes(program, extent))
        return total

    def _know_moments(self, part: Moments, moments: GroupMoments) -> None:
        self._moments[part] = moments
        mean, reciprocal_std = moments.result(self._pieces.values[part.of].channels, part.epsilon)
        self._sums.update({part.mean: mean, part.reciprocal_std: reciprocal_std})

    def _pass(
        self,
        step: Pass,
        kept: dict[str, Map],
        extent: Extent,
        on_rows: OnRows | None,
        following: Sequence[Pass],
    ) -> dict[str, Map]:
        """One pass. Returns the maps that are kept after it, some of which it began with; closes the others."""
        pieces = self._pieces
        last = step.stop == len(pieces.stages)
        reductions = pieces.reductions.get(step.stop, ()) if step.reduce else ()
        whole = extent.at(pieces.scale_at(step.stop))
        new: dict[str, Map] = {}
        carried: dict[str, Map] = {}
        wanted = [name for part in reductions for name in part.inputs]
        if step.keep and last:
            wanted.append(pieces.output)
        elif step.keep:
            for name in pieces.live(step.stop):
                if name in kept and isinstance(kept[name], FileMap) == step.in_file:
                    carried[name] = kept[name]
                    continue
                new[name] = self._store(pieces.values[name].channels, whole, step)
                wanted.append(name)
        self._spare.clear()
        wanted = list(dict.fromkeys(wanted))
        totals = [self._begin(part, step) for part in reductions]
        band = self._band(whole, on_rows) if step.keep and last else None
        try:
            for core in self._cores(step, whole):
                values = self._tile(step, wanted, core, kept, extent)
                for total in totals:
                    total.add(values)
                for name, store in new.items():
                    store.write(core, values[name])
                if band is not None:
                    band.add(core, values[pieces.output])
                del values
                self._finished_tile()
        except BaseException:
            for store in new.values():
                store.close()
            raise
        for total in totals:
            if isinstance(total, MomentsTotal):
                self._know_moments(total.part, total.moments)
            elif isinstance(total, SumsTotal):
                self._sums.update(total.result())
        self._close({graph for other in following for graph in self._graphs(other)})
        if not step.keep:
            return kept
        for name, store in kept.items():
            if name in carried:
                continue
            memory = store.reusable() if isinstance(store, MemoryMap) else None
            if memory is not None:
                self._spare.append(memory)
            store.close()
        return {**carried, **new}

    def _cores(self, step: Pass, whole: Region) -> Iterable[Region]:
        return tiles(whole, step.tile)

    def _band(self, whole: Region, on_rows: OnRows | None) -> Band:
        return Band(self._pieces.values[self._pieces.output].channels, whole.width, on_rows)

    def _store(self, channels: int, whole: Region, step: Pass) -> Map:
        if not step.in_file:
            shape = (1, channels, whole.height, whole.width)
            index = next((i for i, memory in enumerate(self._spare) if memory.shape == shape), None)
            return MemoryMap(*shape[1:], memory=None if index is None else self._spare.pop(index))
        block = BLOCK if step.tile % BLOCK == 0 else step.tile
        return FileMap(channels, whole.height, whole.width, self._scratch, block)

    def _finished_tile(self) -> None:
        self._done += 1
        if self._on_tile is not None and self._on_tile(self._done, self._total) is False:
            raise TilesStoppedError("stopped between two tiles")

    def _tile(
        self, step: Pass, wanted: Sequence[str], core: Region, kept: Mapping[str, Map], extent: Extent
    ) -> dict[str, Floats]:
        """The values `wanted` on the tile `core`."""
        pieces = self._pieces
        plan = needs(pieces, step.start, step.stop, wanted, core, extent)
        last_use = {name: number for number in sorted(plan.runs) for name in pieces.stages[number].inputs}
        held: dict[str, tuple[Floats, Region]] = {}

        def fetch(name: str, region: Region) -> Floats:
            if name not in held:
                return kept[name].read(region)
            array, place = held[name]
            if region == place:
                return array
            return np.ascontiguousarray(array[:, :, *region.within(place)])

        for number in sorted(plan.runs):
            stage, region = pieces.stages[number], plan.runs[number]
            inputs = {name: fetch(name, region) for name in stage.inputs}
            for name in [n for n in held if last_use.get(n) == number and n not in wanted]:
                del held[name]
            outputs = self._run(stage, inputs)
            del inputs
            for name in stage.outputs:
                if name not in plan.values:
                    continue
                array = outputs.pop(name)
                value = pieces.values[name]
                place = region.scaled(value.scale / pieces.values[stage.inputs[0]].scale)
                needed = plan.values[name]
                if value.is_map and needed != place:
                    array, place = np.ascontiguousarray(array[:, :, *needed.within(place)]), needed
                held[name] = (array, place)
            del outputs
        scale = pieces.scale_at(step.stop)
        return {
            name: fetch(name, core.scaled(pieces.values[name].scale / scale))
            if pieces.values[name].is_map
            else held[name][0]
            for name in wanted
        }

    def _run(self, stage: Stage, inputs: dict[str, Floats]) -> dict[str, Floats]:
        if isinstance(stage, Local):
            return self._session(stage.graph).run({**inputs, **{name: self._sums[name] for name in stage.sums}})
        queries = inputs[stage.queries]
        heads, count, channels = stage.heads, queries.shape[1], queries.shape[2]
        state = {
            "maximum": np.full((1, heads, count, 1), -np.inf, np.float32),
            "total": np.zeros((1, heads, count, 1), np.float32),
            "sum": np.zeros((1, heads, count, channels // heads), np.float32),
        }
        session = self._session(stage.graph)
        keys, values = self._gathered[stage.gathered]
        for k, v in zip(keys.blocks(KEYS_AT_ONCE), values.blocks(KEYS_AT_ONCE), strict=True):
            new = session.run({"queries": queries, "keys": k, "values": v, **state})
            state = {name: new[f"new_{name}"] for name in state}
        attended = (state["sum"] / state["total"]).transpose(0, 2, 1, 3).reshape(1, count, channels)
        return {stage.output: np.ascontiguousarray(attended)}

    def _session(self, graph: str) -> PieceSession:
        if graph not in self._sessions:
            self._sessions[graph] = self._open(graph)
        return self._sessions[graph]

    def _graphs(self, step: Pass) -> set[str]:
        graphs = {stage.graph for stage in self._pieces.stages[step.start : step.stop]}
        return graphs | {part.graph for part in self._pieces.reductions.get(step.stop, ()) if isinstance(part, Sums)}

    def _close(self, needed: set[str] | tuple[()]) -> None:
        for graph in [g for g in self._sessions if g not in needed]:
            self._sessions.pop(graph).close()

    def _begin(self, part: Reduction, step: Pass) -> MomentsTotal | SumsTotal | GatherTotal:
        if isinstance(part, Moments):
            return MomentsTotal(part, GroupMoments(part.groups))
        if isinstance(part, Sums):
            return SumsTotal(part, self._session(part.graph))
        folder = self._scratch if step.in_file else None
        for old in self._gathered.pop(part.name, ()):
            old.close()
        made = [Tokens(self._pieces.values[name].channels, folder) for name in (part.keys, part.values)]
        self._gathered[part.name] = (made[0], made[1])
        return GatherTotal(part, made[0], made[1])

"""Which maps to keep, and how large the tiles of every pass are: the quickest program that fits a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgedit.tiling.memory import FIXED, PassCost, pass_cost, weights_of
from edgedit.tiling.pieces import Attend, Gather, Local, Moments, Pieces
from edgedit.tiling.program import Pass, Program
from edgedit.tiling.regions import Extent, needs, tiles

__all__ = ["Budget", "Schedule", "make_schedule"]

#: Sides of tiles that are tried, in pixels of a pass's own maps, the largest that fits first.
TILES = (1024, 768, 512, 384, 256, 192, 128, 96, 64, 32, 16, 8)
#: Operations and bytes a second that passes are compared with: what two cores and a plain disk do.
SPEED, DISK = 1e11, 8e8
#: Share of the memory that kept maps may take before they go to files.
KEPT_SHARE = 0.3
#: Steps of the coarse passes of `fast`, and the weights that extrapolate their moments to step 1.
COARSE_STEPS, COARSE_WEIGHTS = (2, 4), (1.5, -0.5)
#: A coarse map with a shorter side tells nothing of the whole.
SMALLEST_COARSE = 16
#: Norms whose moments may be coarse: with more, the error depends too much on the decoder.
MOST_COARSE = 1


@dataclass(frozen=True)
class Budget:
    """Bytes of memory for sessions and tiles, bytes of scratch files; a tile's side and the widest halo in pixels of
    the picture (the component's output or input, whichever is larger), None for any."""

    memory: float
    scratch: float
    tile: int | None = None
    overlap: int | None = None


@dataclass(frozen=True)
class Schedule:
    """A program with what it is expected to take: bytes of memory at the peak, bytes of scratch files, seconds by the
    comparison speeds, the widest halo and the last pass's tile in pixels of the picture."""

    program: Program
    peak: float
    scratch: float
    seconds: float
    halo: int
    tile: int
    mode: str


@dataclass(frozen=True)
class _Leg:
    """The way from one kept boundary to the next."""

    passes: tuple[Pass, ...]
    peak: float
    seconds: float


def make_schedule(pieces: Pieces, extent: Extent, mode: str, budget: Budget) -> Schedule | None:
    """The quickest schedule within `budget`, None when there is none. `mode` is "exact" or "fast"."""
    search = _Search(pieces, extent, budget)
    exact = search.path(0, len(pieces.stages), final=True)
    best = None if exact is None else exact.schedule("exact")
    if mode == "exact":
        return best
    for boundary in reversed(pieces.boundaries[1:-1]):
        found = _fast(search, boundary)
        if found is not None and (best is None or found.seconds < best.seconds):
            return found
    return best


def _fast(search: _Search, boundary: int) -> Schedule | None:
    """Exact up to `boundary`, coarse moments beyond; None where that cannot be, or would not come close.

    On random decoders at 512×512, 1 to 4 norms behind the map came to 55, 51, 53 and 50 dB with four levels and 1 to 3
    to 50, 47 and 48 dB with three; a map of less than the finest scale came to as little as 33.
    """
    pieces, extent, budget = search.pieces, search.extent, search.budget
    beyond = {b: parts for b, parts in pieces.reductions.items() if b > boundary}
    if not beyond or any(not isinstance(part, Moments) for parts in beyond.values() for part in parts):
        return None
    if sum(map(len, beyond.values())) > MOST_COARSE:
        return None
    scale = pieces.scale_at(boundary)
    whole = extent.at(scale)
    if min(whole.height, whole.width) // max(COARSE_STEPS) < SMALLEST_COARSE or scale < search.finest:
        return None
    head = search.path(0, boundary, final=False)
    tail = search.path(boundary, len(pieces.stages), final=True, reduce=False)
    if head is None or tail is None:
        return None
    coarse: list[_Path] = []
    for step in COARSE_STEPS:
        small = Extent(-(-whole.height // step), -(-whole.width // step), scale)
        part = _Search(pieces, small, replace(budget, tile=None, overlap=None)).path(
            boundary, max(beyond), final=False, keep_last=False
        )
        if part is None:
            return None
        coarse.append(part)
    passes = (*head.passes, *tail.passes)
    program = Program(passes, coarse[0].passes, len(head.passes), COARSE_STEPS, COARSE_WEIGHTS)
    whole_path = [head, tail, *coarse]
    scratch = max(head.scratch, tail.scratch, head.left + sum(part.scratch for part in coarse))
    if scratch > budget.scratch:
        return None
    return Schedule(
        program,
        peak=max(part.peak for part in whole_path),
        scratch=scratch,
        seconds=sum(part.seconds for part in whole_path),
        halo=max(head.halo, tail.halo),
        tile=search.in_picture(passes[-1].tile, passes[-1].stop),
        mode="fast",
    )


@dataclass(frozen=True)
class _Path:
    passes: tuple[Pass, ...]
    peak: float
    scratch: float
    left: float
    seconds: float
    halo: int
    tile: int

    def schedule(self, mode: str) -> Schedule:
        return Schedule(Program(self.passes), self.peak, self.scratch, self.seconds, self.halo, self.tile, mode)


class _Search:
    def __init__(self, pieces: Pieces, extent: Extent, budget: Budget) -> None:
        self.pieces, self.extent, self.budget = pieces, extent, budget
        self.finest = max(value.scale for value in pieces.values.values())
        gathers = [(b, part) for b, parts in pieces.reductions.items() for part in parts if isinstance(part, Gather)]
        self.keys = max((extent.at(pieces.scale_at(b)).area for b, _ in gathers), default=0)
        self.tokens = [
            (b, 4.0 * extent.at(pieces.scale_at(b)).area * sum(pieces.values[n].channels for n in part.inputs))
            for b, part in gathers
        ]
        self._before = [0.0]
        for stage in pieces.stages:
            area = extent.at(pieces.values[stage.inputs[0]].scale).area
            channels = pieces.values[stage.inputs[0]].channels
            flops = stage.flops if isinstance(stage, Local) else 4.0 * self.keys * channels
            self._before.append(self._before[-1] + flops * area)
        self._costs: dict[tuple[int, int, int, bool, bool], PassCost] = {}
        self.attends = {s.gathered: i for i, s in enumerate(pieces.stages) if isinstance(s, Attend)}

    def path(self, start: int, stop: int, *, final: bool, reduce: bool = True, keep_last: bool = True) -> _Path | None:
        """The quickest passes from boundary `start` to `stop`, with maps kept wherever that pays."""
        inner = [b for b in self.pieces.boundaries if start < b < stop]
        nodes = [start, *inner, stop]
        best: dict[int, tuple[float, float, float, int, _Leg | None]] = {start: (0.0, 0.0, 0.0, start, None)}
        for j, b in enumerate(nodes[1:], 1):
            for a in reversed(nodes[:j]):
                known = best.get(b, (math.inf,))[0]
                if a not in best or best[a][0] + self._least(a, b, reduce=reduce) >= known:
                    continue
                room_memory, room_scratch, in_file = self._room(a, b, last=final and b == stop)
                if room_memory <= 0 or room_scratch > self.budget.scratch:
                    continue
                leg = self._leg(a, b, room_memory, in_file, reduce=reduce, keep=keep_last or b != stop)
                if leg is None:
                    continue
                seconds = best[a][0] + leg.seconds
                if seconds < known:
                    peak = max(best[a][1], leg.peak + self.budget.memory - room_memory)
                    best[b] = (seconds, peak, max(best[a][2], room_scratch), a, leg)
        if stop not in best:
            return None
        legs: list[_Leg] = []
        place = stop
        while place != start:
            leg = best[place][4]
            assert leg is not None
            legs.append(leg)
            place = best[place][3]
        legs.reverse()
        passes = tuple(p for leg in legs for p in leg.passes)
        left = sum(self._kept(stop).values()) if not final and passes[-1].in_file else 0.0
        return _Path(
            passes,
            best[stop][1],
            best[stop][2],
            left,
            best[stop][0],
            max(self._reach(step) for step in passes),
            self.in_picture(passes[-1].tile, passes[-1].stop),
        )

    def _least(self, a: int, b: int, *, reduce: bool) -> float:
        """Seconds below which no way from `a` to `b` without kept maps can come: its operations without halos."""
        stops = [e for e in range(a + 1, b) if e in self.pieces.reductions] if reduce else []
        return sum(self._before[stop] - self._before[a] for stop in [*stops, b]) / SPEED

    def in_picture(self, tile: int, stop: int) -> int:
        """A side at boundary `stop` in pixels of the picture."""
        return int(tile * self.finest / self.pieces.scale_at(stop))

    def _kept(self, boundary: int) -> dict[str, float]:
        """Bytes of the maps kept at a boundary; what the caller passed in, at the first, costs nothing."""
        if boundary in (0, len(self.pieces.stages)):
            return {}
        values = {name: self.pieces.values[name] for name in self.pieces.live(boundary)}
        return {name: 4.0 * v.channels * self.extent.at(v.scale).area for name, v in values.items()}

    def _room(self, a: int, b: int, *, last: bool) -> tuple[float, float, bool]:
        """(bytes of memory left for tiles, bytes in files, whether maps go to files) on the way from `a` to `b`."""
        # A map that goes on unchanged is there once.
        kept = sum((self._kept(a) if last else self._kept(a) | self._kept(b)).values())
        tokens = sum(size for place, size in self.tokens if a < place and any(a <= i for i in self.attends.values()))
        tokens += sum(size for place, size in self.tokens if place <= a and any(a <= i for i in self.attends.values()))
        held = kept + tokens
        in_file = held > KEPT_SHARE * self.budget.memory
        room = self.budget.memory - FIXED - weights_of(self.pieces, a, b)
        if last:
            room -= self._band()
        return (room, held, True) if in_file else (room - held, 0.0, False)

    def _band(self) -> float:
        whole = self.extent.at(self.pieces.scale_at(len(self.pieces.stages)))
        return 4.0 * self.pieces.values[self.pieces.output].channels * whole.width * min(256, whole.height)

    def _leg(self, a: int, b: int, room: float, in_file: bool, *, reduce: bool, keep: bool) -> _Leg | None:
        passes: list[Pass] = []
        peak = seconds = 0.0
        inner = [e for e in range(a + 1, b) if e in self.pieces.reductions] if reduce else []
        for stop in [*inner, b]:
            step = self._largest(a, stop, room, in_file, keep=keep and stop == b, reduce=reduce)
            if step is None:
                return None
            made, cost = step
            new = {name: size for name, size in self._kept(b).items() if name not in self._kept(a)}
            written = sum(new.values()) if stop == b else 0.0
            passes.append(made)
            peak = max(peak, cost.peak)
            seconds += cost.flops / SPEED + (cost.read + written) / DISK
        return _Leg(tuple(passes), peak, seconds)

    def _largest(
        self, a: int, stop: int, room: float, in_file: bool, *, keep: bool, reduce: bool
    ) -> tuple[Pass, PassCost] | None:
        """The pass with the largest tiles that fits."""
        whole = self.extent.at(self.pieces.scale_at(stop))
        side = max(whole.height, whole.width)
        sizes: Sequence[int] = (
            [t for t in TILES if t < side] if side > TILES[0] else [side, *(t for t in TILES if t < side)]
        )
        if self.budget.tile is not None:
            sizes = [max(1, int(self.budget.tile * self.pieces.scale_at(stop) / self.finest))]
        for tile in sizes:
            step = Pass(a, stop, tile, keep, reduce, in_file)
            key = (a, stop, tile, keep, reduce)
            if key not in self._costs:
                self._costs[key] = pass_cost(self.pieces, step, self.extent, self.keys)
            cost = self._costs[key]
            if cost.peak > room:
                continue
            if self.budget.overlap is not None and self._reach(step) > self.budget.overlap:
                return None
            return step, cost
        return None

    def _reach(self, step: Pass) -> int:
        """Pixels of the picture that a tile of `step` reads beyond itself."""
        whole = self.extent.at(self.pieces.scale_at(step.stop))
        for core in tiles(whole, step.tile):
            if core.top and core.left:
                break
        wanted = [self.pieces.output] if step.stop == len(self.pieces.stages) else list(self.pieces.live(step.stop))
        wanted += [n for part in self.pieces.reductions.get(step.stop, ()) for n in part.inputs]
        plan = needs(self.pieces, step.start, step.stop, list(dict.fromkeys(wanted)), core, self.extent)
        reach = 0.0
        for number, region in plan.runs.items():
            scale = self.pieces.values[self.pieces.stages[number].inputs[0]].scale
            ratio = scale / self.pieces.scale_at(step.stop)
            own = core.scaled(ratio)
            reach = max(reach, max(own.top - region.top, own.left - region.left) * float(self.finest / scale))
        return math.ceil(reach)

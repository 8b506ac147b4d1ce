"""What a pass takes: bytes at its peak and operations, from the sizes of everything that is alive at each stage."""

from __future__ import annotations

from dataclasses import dataclass

from edgedit.tiling.pieces import Attend, Local, Pieces, Sums
from edgedit.tiling.program import Pass
from edgedit.tiling.regions import Extent, Region, needs
from edgedit.tiling.run import KEYS_AT_ONCE

__all__ = ["FIXED", "WEIGHTS_COPIES", "PassCost", "pass_cost", "weights_of", "whole_peak"]

FLOAT = 4
#: Bytes that a runtime takes besides weights and maps.
FIXED = 24 << 20
#: Bytes that an open session holds for each of its weights, packed for the kernels.
WEIGHTS_COPIES = 1.1


@dataclass(frozen=True)
class PassCost:
    """Bytes of one tile at the peak, floating-point operations of all tiles, bytes read from kept maps."""

    peak: float
    flops: float
    read: float


def pass_cost(pieces: Pieces, step: Pass, extent: Extent, keys: int) -> PassCost:
    """The cost of `step`, from its tile with the widest halo. `keys` is the number of gathered positions."""
    stop_scale = pieces.scale_at(step.stop)
    whole = extent.at(stop_scale)
    core = _inner_tile(whole, step.tile)
    reductions = pieces.reductions.get(step.stop, ()) if step.reduce else ()
    wanted = [name for part in reductions for name in part.inputs]
    if step.keep and step.stop == len(pieces.stages):
        wanted.append(pieces.output)
    elif step.keep:
        wanted += [name for name in pieces.live(step.stop) if name not in pieces.live(step.start)]
    wanted = list(dict.fromkeys(wanted))
    plan = needs(pieces, step.start, step.stop, wanted, core, extent)
    last_use = {name: number for number in sorted(plan.runs) for name in pieces.stages[number].inputs}
    held: dict[str, float] = {}
    peak = flops = read = 0.0
    for number in sorted(plan.runs):
        stage, region = pieces.stages[number], plan.runs[number]
        fed = 0.0
        for name in stage.inputs:
            size = _bytes(pieces, name, region)
            if name not in held:
                read += size
                fed += size
            elif held[name] != size or last_use[name] == number:
                # A cut copy; and what is used for the last time is held by the feed alone.
                fed += size
                if last_use[name] == number and name not in wanted:
                    peak = max(peak, sum(held.values()) + fed if held[name] != size else 0.0)
                    del held[name]
        work, operations = _stage(pieces, stage, region, keys)
        flops += operations
        ratio = float(pieces.values[stage.outputs[0]].scale / pieces.values[stage.inputs[0]].scale) ** 2
        made = sum(pieces.values[name].channels for name in stage.outputs) * region.area * ratio * FLOAT
        # What a session returns is copied out of it.
        peak = max(peak, sum(held.values()) + fed + max(work, 2 * made))
        for name in stage.outputs:
            if name in plan.values:
                held[name] = _bytes(pieces, name, plan.values[name])
    for name in wanted:
        if pieces.values[name].is_map and name not in held:
            # A kept map that is summed over as it is: its tile is read beside what was computed.
            held[name] = _bytes(pieces, name, core.scaled(pieces.values[name].scale / stop_scale))
            read += held[name]
    for part in reductions:
        if isinstance(part, Sums):
            peak = max(peak, sum(held.values()) + part.workspace * core.area)
    peak = max(peak, sum(held.values()) + (held.get(pieces.output, 0.0)))
    count = -(-whole.height // step.tile) * -(-whole.width // step.tile)
    share = whole.area / (count * core.area)
    return PassCost(peak, flops * count * share, read * count * share)


def weights_of(pieces: Pieces, start: int, stop: int) -> float:
    """Bytes that the open sessions of these stages hold."""
    return WEIGHTS_COPIES * sum(s.weights for s in pieces.stages[start:stop] if isinstance(s, Local))


def whole_peak(pieces: Pieces, height: int, width: int) -> float:
    """Bytes that the component takes when it runs in one on an input of height × width."""
    channels = pieces.values[pieces.input].channels
    area = height * width
    return FIXED + WEIGHTS_COPIES * pieces.whole.weights + pieces.whole.workspace * area + channels * area * FLOAT


def _stage(pieces: Pieces, stage: Local | Attend, region: Region, keys: int) -> tuple[float, float]:
    """(bytes, operations) of one stage on one tile."""
    if isinstance(stage, Local):
        return stage.workspace * region.area, stage.flops * region.area
    # Scores and their exponentials of one block of keys, and old, new and scaled sums.
    channels = pieces.values[stage.queries].channels
    work = FLOAT * region.area * (2.0 * stage.heads * KEYS_AT_ONCE + 5.0 * channels)
    return work, 4.0 * region.area * keys * channels


def _bytes(pieces: Pieces, name: str, region: Region) -> float:
    return float(pieces.values[name].channels * region.area * FLOAT)


def _inner_tile(whole: Region, tile: int) -> Region:
    top = tile if whole.height >= 2 * tile else 0
    left = tile if whole.width >= 2 * tile else 0
    return Region(top, min(top + tile, whole.bottom), left, min(left + tile, whole.right))

"""What a runner is told to do: passes over all tiles."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Pass", "Program"]


@dataclass(frozen=True)
class Pass:
    """All tiles once, from boundary `start` to boundary `stop`.

    Attributes:
        tile: side of a tile in pixels of the maps at `stop`.
        keep: whether what goes on at `stop` is kept (or, at the end, is the result).
        reduce: whether the reductions at `stop` are computed; False where they are known already.
        in_file: whether kept maps go to scratch files.
    """

    start: int
    stop: int
    tile: int
    keep: bool
    reduce: bool = True
    in_file: bool = False


@dataclass(frozen=True)
class Program:
    """What to run: `passes`, and before pass number `coarse_at` the passes `coarse` for moments that later ones use.

    The coarse passes run on every `steps[i]`-th pixel of the maps that are kept then. An error of such moments grows
    with step - 1, since edges weigh more the coarser the map is; so moments of several steps are extrapolated to step 1
    by `weights` (Richardson's deferred approach to the limit).
    """

    passes: tuple[Pass, ...]
    coarse: tuple[Pass, ...] = ()
    coarse_at: int = 0
    steps: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()

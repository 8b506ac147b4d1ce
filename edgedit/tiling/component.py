"""A component of an open bundle run whole or in tiles, whichever fits the memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedit.bundle import Bundle
from edgedit.device import available_memory, cache_dir, parse_memory, resident_memory
from edgedit.errors import BundleError, InputError
from edgedit.tiling.memory import whole_peak
from edgedit.tiling.pieces import Pieces, read_pieces
from edgedit.tiling.regions import Extent
from edgedit.tiling.run import TileRunner
from edgedit.tiling.schedule import Budget, Schedule, make_schedule

__all__ = ["MODES", "Tiling", "choose", "run"]

Floats = npt.NDArray[np.float32]
MODES = ("auto", "off", "exact", "fast")
#: Share of the free memory that is used when the user names no limit.
FREE_SHARE = 0.8
#: Share of a limit that is planned for: plans are off by up to 15 %, and the limit holds all the same.
SAFE_SHARE = 0.87
#: What an arena takes at most, measured over the peak without one.
ARENA = 1.6
#: Scratch files take at most this much, and half of what is free on their disk.
LARGEST_SCRATCH = 24 << 30


@dataclass(frozen=True)
class Tiling:
    """How a picture is to be decoded or encoded.

    Attributes:
        mode: "auto" runs whole what fits and `exact` what does not; "off" runs whole; "exact" gives the whole's picture
            but for float32 rounding; "fast" estimates moments where the exact ones would have to be computed by running
            parts twice.
        tile_size: side of a tile in pixels of the picture; None takes the largest that fits.
        tile_overlap: most pixels of the picture that a tile may read beyond itself; None leaves that open.
        max_memory: bytes (or "3G") that the process may hold at its peak; None takes what the machine has free.
        on_tile: called with (tiles done, tiles in all); returning False stops with TilesStoppedError.
    """

    mode: str = "auto"
    tile_size: int | None = None
    tile_overlap: int | None = None
    max_memory: int | str | None = None
    on_tile: Callable[[int, int], bool | None] | None = None

    def check(self) -> None:
        """Raises InputError for a setting that means nothing."""
        if self.mode not in MODES:
            raise InputError(f"unknown tiling {self.mode!r}; choose one of: {', '.join(MODES)}")
        for name, value in (("tile size", self.tile_size), ("tile overlap", self.tile_overlap)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"a {name} is a whole number of pixels of at least 1, not {value!r}")
        if self.mode == "off" and (self.tile_size or self.tile_overlap):
            raise InputError("a tile size or overlap does nothing with tiling off; leave it out")
        if self.max_memory is not None:
            parse_memory(self.max_memory)


def choose(
    bundle: Bundle, runtime: Any, component: str, height: int, width: int, tiling: Tiling
) -> tuple[Pieces | None, Schedule | None]:
    """The schedule for an input of height × width pixels; None as schedule to run whole.

    Raises:
        InputError: no schedule fits the memory; the message names the least that does. Or a tile smaller than its halo.
        BundleError: tiles are asked for and the component has none for this backend.
    """
    tiling.check()
    pieces = _pieces(bundle, runtime, component)
    held = resident_memory()
    asked = None if tiling.max_memory is None else parse_memory(tiling.max_memory)
    free = available_memory()
    room = float("inf") if free is None else FREE_SHARE * free
    if asked is not None:
        room = SAFE_SHARE * asked - held
    if pieces is None:
        needs_tiles = tiling.mode in ("exact", "fast") or tiling.tile_size or tiling.tile_overlap or asked is not None
        if needs_tiles:
            raise BundleError(
                f"{bundle.path.name}: its {component} has no tiles for the backend {runtime.name}; convert the model "
                "again, or leave the tiling and the memory limit out"
            )
        return None, None
    whole = whole_peak(pieces, height, width)
    explicit = tiling.tile_size is not None or tiling.tile_overlap is not None
    if tiling.mode == "off" or (tiling.mode == "auto" and not explicit and whole <= room):
        if asked is not None and whole > room:
            raise InputError(
                f"{_size(asked)} do not suffice to run the {component} whole, which takes "
                f"{_size((whole + held) / SAFE_SHARE)}; "
                "choose tiling auto or allow more"
            )
        return pieces, None
    extent = Extent(height, width)
    mode = "fast" if tiling.mode == "fast" else "exact"
    budget = Budget(room, _scratch_room(), tiling.tile_size, tiling.tile_overlap)
    found = make_schedule(pieces, extent, mode, budget)
    if found is None:
        raise _refusal(pieces, extent, mode, budget, tiling, held)
    if tiling.tile_size is not None and tiling.tile_size < found.halo:
        raise InputError(
            f"a tile of {tiling.tile_size} pixels is smaller than its halo of {found.halo}; "
            f"choose a tile size of at least {found.halo}, better {-(-8 * found.halo // 64) * 64}"
        )
    return pieces, found


def run(
    bundle: Bundle,
    runtime: Any,
    component: str,
    picture: Floats,
    tiling: Tiling,
    on_rows: Callable[[int, Floats], None],
    whole: Callable[[bool], Any],
    begin: Callable[[], None] = lambda: None,
) -> Schedule | None:
    """Run `component` on one input [1, C, h, w] and hand over bands of rows of its output, from the top.

    Args:
        whole: opens the session of the whole component, and is called only to run whole; told whether to take the
            least memory rather than the least time.
        begin: called once everything is open and the work begins.

    Returns the schedule, None when it ran whole. Raises what `choose` does, and TilesStoppedError.
    """
    height, width = picture.shape[2:]
    pieces, schedule = choose(bundle, runtime, component, height, width, tiling)
    lean = tiling.max_memory is not None or not _roomy(pieces, schedule, height, width)
    if schedule is None:
        session = whole(lean)
        begin()
        (name,) = [spec.name for spec in bundle.component(component).inputs]
        (output,) = session.run({name: picture}).values()
        on_rows(0, output)
        return None
    assert pieces is not None
    runner = TileRunner(
        pieces, lambda graph: runtime.open_piece(component, graph, lean=lean), cache_dir() / "scratch", tiling.on_tile
    )
    begin()
    runner.run(picture, schedule.program, on_rows)
    return schedule


def _pieces(bundle: Bundle, runtime: Any, component: str) -> Pieces | None:
    artefact = bundle.artefact(component, runtime.name)
    if artefact.tiles is None or not hasattr(runtime, "open_piece"):
        return None
    return read_pieces(bundle.file(artefact.tiles))


def _roomy(pieces: Pieces | None, schedule: Schedule | None, height: int, width: int) -> bool:
    """Whether what is free suffices for maps out of an arena."""
    free = available_memory()
    if pieces is None or free is None:
        return False
    peak = whole_peak(pieces, height, width) if schedule is None else schedule.peak
    return ARENA * peak <= FREE_SHARE * free


def _scratch_room() -> float:
    folder = cache_dir()
    while not folder.exists() and folder != folder.parent:
        folder = Path(folder.parent)
    try:
        return float(min(LARGEST_SCRATCH, shutil.disk_usage(folder).free // 2))
    except OSError:
        return 0.0


def _refusal(pieces: Pieces, extent: Extent, mode: str, budget: Budget, tiling: Tiling, held: int) -> InputError:
    """What to say when nothing fits: the least memory that does, or that the overlap cannot be."""
    low, high = max(0.0, budget.memory), 64e6
    while make_schedule(pieces, extent, mode, Budget(high, budget.scratch, budget.tile, budget.overlap)) is None:
        low, high = high, high * 2
        if high > 1e15:
            if tiling.tile_overlap is not None:
                return InputError(
                    f"a tile overlap of {tiling.tile_overlap} pixels is less than this model's tiles need; allow more"
                )
            return InputError("no tiling of this picture fits on the scratch disk; free some room there")
    while high - low > 8e6:
        middle = (low + high) / 2
        fits = make_schedule(pieces, extent, mode, Budget(middle, budget.scratch, budget.tile, budget.overlap))
        low, high = (low, middle) if fits else (middle, high)
    least = (held + high) / SAFE_SHARE
    given = "the free memory does" if tiling.max_memory is None else f"{_size(parse_memory(tiling.max_memory))} do"
    return InputError(
        f"{given} not suffice for this picture; it needs at least {_size(-(-least // 1e7) * 1e7)}"
        + (" with this tile size" if tiling.tile_size is not None else "")
    )


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"

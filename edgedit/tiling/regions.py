"""Rectangles of maps, and which rectangle of every value a tile needs: halos followed back through the stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from edgedit.tiling.pieces import Local, Pieces

__all__ = ["Extent", "Needs", "Region", "needs", "tiles"]


@dataclass(frozen=True)
class Region:
    """Rows top to bottom and columns left to right of a map, the ends excluded."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def height(self) -> int:
        """Rows."""
        return self.bottom - self.top

    @property
    def width(self) -> int:
        """Columns."""
        return self.right - self.left

    @property
    def area(self) -> int:
        """Pixels."""
        return self.height * self.width

    def hull(self, other: Region) -> Region:
        """The smallest rectangle around both."""
        return Region(
            min(self.top, other.top),
            max(self.bottom, other.bottom),
            min(self.left, other.left),
            max(self.right, other.right),
        )

    def within(self, outer: Region) -> tuple[slice, slice]:
        """Slices that cut this rectangle out of an array that holds `outer`."""
        return (
            slice(self.top - outer.top, self.bottom - outer.top),
            slice(self.left - outer.left, self.right - outer.left),
        )

    def scaled(self, ratio: Fraction) -> Region:
        """The same rectangle on a map of `ratio` times the scale, rounded outwards."""
        up, down = ratio.numerator, ratio.denominator
        if up == down:
            return self
        return Region(
            self.top * up // down, -(-self.bottom * up // down), self.left * up // down, -(-self.right * up // down)
        )


@dataclass(frozen=True)
class Extent:
    """The size of a picture, as height and width of its map of scale `scale`."""

    height: int
    width: int
    scale: Fraction = Fraction(1)

    def at(self, scale: Fraction) -> Region:
        """The whole map of `scale`."""
        up = scale.numerator * self.scale.denominator
        down = scale.denominator * self.scale.numerator
        return Region(0, self.height * up // down, 0, self.width * up // down)


@dataclass(frozen=True)
class Needs:
    """For one tile: the rectangle that each stage runs on, by its number, and the one that is needed of each value."""

    runs: Mapping[int, Region]
    values: Mapping[str, Region]


def needs(pieces: Pieces, start: int, stop: int, wanted: Sequence[str], core: Region, extent: Extent) -> Needs:
    """Which rectangles stages start … stop - 1 run on, so that the values `wanted` are right on `core`.

    `core` is a rectangle of the maps of scale `pieces.scale_at(stop)`.
    """
    scale = pieces.scale_at(stop)
    values: dict[str, Region] = {name: core.scaled(pieces.values[name].scale / scale) for name in wanted}
    runs: dict[int, Region] = {}
    for number in range(stop - 1, start - 1, -1):
        stage = pieces.stages[number]
        asked = [values[name] for name in stage.outputs if name in values]
        if not asked:
            continue
        region = asked[0]
        for other in asked[1:]:
            region = region.hull(other)
        if isinstance(stage, Local):
            region = _input_region(pieces, stage, region, extent)
        runs[number] = region
        for name in stage.inputs:
            values[name] = region.hull(values[name]) if name in values else region
    return Needs(runs, values)


def _input_region(pieces: Pieces, stage: Local, region: Region, extent: Extent) -> Region:
    inner, outer = pieces.values[stage.inputs[0]].scale, pieces.values[stage.outputs[0]].scale
    ratio = inner / outer
    step = max(1, int(ratio))
    before, after = stage.halo
    source = region.scaled(ratio)
    limit = extent.at(inner)

    def span(low: int, high: int, end: int) -> tuple[int, int]:
        low, high = low - before, high + after
        return max(0, low // step * step), min(end, -(-high // step) * step)

    top, bottom = span(source.top, source.bottom, limit.bottom)
    left, right = span(source.left, source.right, limit.right)
    return Region(top, bottom, left, right)


def tiles(whole: Region, tile: int) -> Iterator[Region]:
    """`whole` in squares of side `tile`, row by row; those at the right and the bottom may be smaller."""
    for top in range(whole.top, whole.bottom, tile):
        for left in range(whole.left, whole.right, tile):
            yield Region(top, min(top + tile, whole.bottom), left, min(left + tile, whole.right))

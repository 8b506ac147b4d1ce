"""Maps and tokens kept between passes: in memory, or in a scratch file that is gone when it is closed.

A file is read and written, not mapped, so that what is kept never counts towards the memory of the process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import numpy.typing as npt

from edgedit.errors import InputError
from edgedit.tiling.regions import Region

__all__ = ["FileMap", "Map", "MemoryMap", "SubsampledMap", "Tokens"]

Floats = npt.NDArray[np.float32]
#: Side of the squares in which a file keeps a map.
BLOCK = 32


class Map(Protocol):
    """A map [1, channels, height, width] of which rectangles are read and written."""

    height: int
    width: int

    def read(self, region: Region) -> Floats:
        """[1, channels, rows, columns], contiguous."""
        ...

    def write(self, region: Region, values: Floats) -> None:
        """Put a rectangle in its place."""
        ...

    def close(self) -> None:
        """Free the memory or the file."""
        ...


class MemoryMap:
    """A map in memory."""

    def __init__(self, channels: int, height: int, width: int, memory: Floats | None = None) -> None:
        """`memory`: [1, channels, height, width] that nothing else uses any more; mapping new pages takes longer."""
        self.height, self.width = height, width
        self._array = np.empty((1, channels, height, width), np.float32) if memory is None else memory
        self._own = True

    @classmethod
    def of(cls, array: Floats) -> MemoryMap:
        """A map that is there already, and is not written to."""
        _, channels, height, width = array.shape
        made = cls(channels, height, width, array)
        made._own = False
        return made

    def read(self, region: Region) -> Floats:
        rows = self._array[:, :, region.top : region.bottom, region.left : region.right]
        return np.ascontiguousarray(rows)

    def write(self, region: Region, values: Floats) -> None:
        if values.shape == self._array.shape and not isinstance(values.base, np.ndarray):
            # The whole map in one, and no part of another: it is the map.
            self._array, self._own = values, False
            return
        self._array[:, :, region.top : region.bottom, region.left : region.right] = values

    def reusable(self) -> Floats | None:
        """Its memory, where no one else can hold it. Call `close` next."""
        return self._array if self._own else None

    def close(self) -> None:
        self._array = np.empty((1, 0, 0, 0), np.float32)


class FileMap:
    """A map in a scratch file of `folder`, in squares of `block` pixels one after the other.

    Rectangles that are written begin at multiples of `block` and end there or at the map's edge. Raises InputError when
    the disk is full.
    """

    def __init__(self, channels: int, height: int, width: int, folder: Path, block: int = BLOCK) -> None:
        self.height, self.width = height, width
        self._channels, self._block = channels, block
        self._across = -(-width // block)
        self._bytes = channels * block * block * 4
        self._file = _scratch(folder)

    def read(self, region: Region) -> Floats:
        result = np.empty((1, self._channels, region.height, region.width), np.float32)
        buffer = np.empty((self._channels, self._block, self._block), np.float32)
        for row, column, part in self._parts(region):
            self._file.seek((row * self._across + column) * self._bytes)
            _read(self._file, buffer)
            square = Region(
                row * self._block, (row + 1) * self._block, column * self._block, (column + 1) * self._block
            )
            result[0][:, *part.within(region)] = buffer[:, *part.within(square)]
        return result

    def write(self, region: Region, values: Floats) -> None:
        buffer = np.zeros((self._channels, self._block, self._block), np.float32)
        for row, column, part in self._parts(region):
            square = Region(
                row * self._block, (row + 1) * self._block, column * self._block, (column + 1) * self._block
            )
            buffer[:, *part.within(square)] = values[0][:, *part.within(region)]
            _write(self._file, (row * self._across + column) * self._bytes, buffer)

    def _parts(self, region: Region) -> Iterator[tuple[int, int, Region]]:
        size = self._block
        for row in range(region.top // size, -(-region.bottom // size)):
            for column in range(region.left // size, -(-region.right // size)):
                yield (
                    row,
                    column,
                    Region(
                        max(region.top, row * size),
                        min(region.bottom, (row + 1) * size),
                        max(region.left, column * size),
                        min(region.right, (column + 1) * size),
                    ),
                )

    def close(self) -> None:
        self._file.close()


class SubsampledMap:
    """Every `step`-th row and column of another map, from the first."""

    def __init__(self, whole: Map, step: int) -> None:
        self.height, self.width = -(-whole.height // step), -(-whole.width // step)
        self._whole, self._step = whole, step

    def read(self, region: Region) -> Floats:
        step = self._step
        source = Region(
            region.top * step, (region.bottom - 1) * step + 1, region.left * step, (region.right - 1) * step + 1
        )
        return np.ascontiguousarray(self._whole.read(source)[:, :, ::step, ::step])

    def write(self, region: Region, values: Floats) -> None:
        raise NotImplementedError("a subsampled map is read only")

    def close(self) -> None:
        """The map behind it stays open."""


class Tokens:
    """Tokens [1, n, channels] that are appended and read back in blocks; in a file where `folder` is given."""

    def __init__(self, channels: int, folder: Path | None) -> None:
        self._channels = channels
        self._parts: list[Floats] = []
        self._file = None if folder is None else _scratch(folder)
        self.count = 0

    def append(self, values: Floats) -> None:
        """Add tokens [1, n, channels]. Raises InputError when the disk is full."""
        if self._file is None:
            self._parts.append(np.array(values))
        else:
            _write(self._file, self.count * self._channels * 4, np.ascontiguousarray(values))
        self.count += values.shape[1]

    def blocks(self, size: int) -> Iterator[Floats]:
        """All tokens, at most `size` at a time, always in the same parts."""
        if self._file is None:
            for part in self._parts:
                for start in range(0, part.shape[1], size):
                    yield part[:, start : start + size]
            return
        for start in range(0, self.count, size):
            block = np.empty((1, min(size, self.count - start), self._channels), np.float32)
            self._file.seek(start * self._channels * 4)
            _read(self._file, block)
            yield block

    def close(self) -> None:
        """Free the memory or the file."""
        self._parts.clear()
        if self._file is not None:
            self._file.close()


def _scratch(folder: Path) -> IO[bytes]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=folder, prefix="tiles-", buffering=0)
    except OSError as error:
        raise InputError(
            f"{folder}: no scratch file for the tiles ({error.strerror}); set EDGEDIT_CACHE to a folder with room"
        ) from error


def _read(file: IO[bytes], into: Floats) -> None:
    data = into.reshape(-1).view(np.uint8).data
    if file.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise InputError("the scratch file of the tiles is shorter than it was written; check the disk")


def _write(file: IO[bytes], place: int, values: Floats) -> None:
    data = values.reshape(-1).view(np.uint8).data
    try:
        file.seek(place)
        done = 0
        while done < len(data):
            done += file.write(data[done:])
    except OSError as error:
        raise InputError(
            f"the scratch file of the tiles cannot be written ({error.strerror}); "
            "free some room, set EDGEDIT_CACHE to a folder with room, or allow more with --max-memory"
        ) from error

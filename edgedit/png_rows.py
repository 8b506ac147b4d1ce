"""A PNG written row by row, so that a picture of any height never stands in memory whole.

Portable Network Graphics specification, third edition (W3C, 2025), sections 5 (chunks), 9 (filters), 10 (compression).
The same pixels and recipe give the same bytes, in whatever bands they come.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from edgedit.errors import InputError
from edgedit.files import atomic_file
from edgedit.image import rows_to_pixels
from edgedit.metadata import png_chunks

__all__ = ["PngRows", "png_rows"]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {1: 0, 3: 2, 4: 6}
_CHUNK = 1 << 18


class PngRows:
    """Takes bands [1, C, rows, width] in [-1, 1] from the top; call it like `Pipeline.decode_rows` does."""

    def __init__(self, file: IO[bytes], width: int, height: int, recipe: Mapping[str, object] | None) -> None:
        self._file, self.width, self.height = file, width, height
        self._recipe = recipe
        self._rows = 0
        self._above: npt.NDArray[np.uint8] | None = None
        self._compressor = zlib.compressobj(6)
        self._pending = bytearray()

    def __call__(self, top: int, rows: npt.NDArray[np.floating]) -> None:
        """Append a band. Raises InputError for one that does not follow, or with values that are not finite."""
        self.pixels(top, rows_to_pixels(rows)[0])

    def pixels(self, top: int, pixels: npt.NDArray[np.uint8]) -> None:
        """Append a band of pixels [rows, width, C]. Raises InputError for one that does not follow."""
        count, width, channels = pixels.shape
        if top != self._rows or width != self.width or top + count > self.height:
            raise InputError(f"rows {top} to {top + count} of {width} pixels do not follow row {self._rows} of the PNG")
        if self._above is None:
            self._begin(channels)
        flat = pixels.reshape(count, width * channels)
        assert self._above is not None
        for row in flat:
            self._compress(_filtered(row, self._above, channels))
            self._above = row
        self._above = self._above.copy()
        self._rows += count

    def finish(self) -> None:
        """Write what remains. Raises InputError when rows are missing."""
        if self._rows != self.height:
            raise InputError(f"the picture has {self._rows} rows of {self.height}; decode it again")
        self._pending += self._compressor.flush()
        self._emit(_CHUNK)
        if self._pending:
            self._chunk(b"IDAT", bytes(self._pending))
        self._chunk(b"IEND", b"")

    def _begin(self, channels: int) -> None:
        self._file.write(_SIGNATURE)
        header = struct.pack(">IIBBBBB", self.width, self.height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
        self._chunk(b"IHDR", header)
        for name, data, *_ in png_chunks(self._recipe).chunks:
            self._chunk(name, data)
        self._above = np.zeros(self.width * channels, np.uint8)

    def _compress(self, data: bytes) -> None:
        self._pending += self._compressor.compress(data)
        self._emit(_CHUNK)

    def _emit(self, size: int) -> None:
        while len(self._pending) >= size:
            self._chunk(b"IDAT", bytes(self._pending[:size]))
            del self._pending[:size]

    def _chunk(self, name: bytes, data: bytes) -> None:
        self._file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))


def _filtered(row: npt.NDArray[np.uint8], above: npt.NDArray[np.uint8], channels: int) -> bytes:
    """The row behind the filter, of None, Sub and Up, whose bytes are smallest as signed numbers (section 12.8)."""
    left = np.zeros_like(row)
    left[channels:] = row[:-channels]
    choices = (row, row - left, row - above)
    sums = [int(np.abs(choice.view(np.int8).astype(np.int16)).sum()) for choice in choices]
    best = sums.index(min(sums))
    return bytes([best]) + choices[best].tobytes()


@contextmanager
def png_rows(path: str | Path, width: int, height: int, recipe: Mapping[str, object] | None) -> Iterator[PngRows]:
    """A `PngRows` whose file becomes `path` when the block ends, and is gone when it raises.

    Raises InputError when the file cannot be written or rows are missing at the end.
    """
    with atomic_file(path) as file:
        writer = PngRows(file, width, height, recipe)
        yield writer
        writer.finish()

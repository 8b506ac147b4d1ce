"""A tensor that stays on disk until it is asked for, and the careful reading beneath it."""

from __future__ import annotations

import math
import stat
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np

from edgedit.errors import CheckpointError

__all__ = [
    "MAX_DIMENSIONS",
    "TensorRef",
    "byte_size",
    "crc32_of",
    "numpy_dtype",
    "quoted",
    "read_bytes",
    "regular_file_size",
    "rows_of",
]

MAX_DIMENSIONS = 32
"""The most axes a tensor may have here; numpy stops at 64 and no weight comes near either."""

_CHUNK = 1 << 26

_EXTENSION_DTYPES = {
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
}


def numpy_dtype(name: str) -> np.dtype[np.generic]:
    """The numpy dtype called `name`: numpy's own ("float32") or one of ml_dtypes ("bfloat16", "float8_e4m3fn")."""
    dtype: np.dtype[np.generic] = np.dtype(_EXTENSION_DTYPES.get(name, name))
    return dtype


@dataclass(frozen=True)
class TensorRef:
    """A named tensor in a checkpoint, not yet read.

    Attributes:
        name: the key in the checkpoint, after any renaming.
        dtype: numpy's or ml_dtypes' name ("float32", "bfloat16", "float8_e4m3fn", "int64", "bool" …).
        shape: the axes, outermost first; `()` for a scalar.
        load: reads the tensor from disk at each call and returns a fresh C-contiguous array of that dtype and shape.
            Nothing is kept between calls. Raises CheckpointError when the file has changed or cannot be read.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size of the loaded array in bytes."""
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize

    def renamed(self, name: str) -> TensorRef:
        """The same tensor under another name."""
        return replace(self, name=name)


def byte_size(shape: tuple[int, ...] | list[int], itemsize: int) -> int | None:
    """Bytes of an array of `shape`, or None when no machine can address it (an axis of 0 excuses no other axis)."""
    count = itemsize
    for size in shape:
        count *= max(size, 1)
    if count >= 1 << 62:
        return None
    return 0 if 0 in shape else count


def rows_of(ref: TensorRef, name: str, start: int, stop: int) -> TensorRef:
    """Rows `start:stop` along the first axis of `ref`, cut when loaded, as a tensor of its own called `name`."""

    def load() -> np.ndarray:
        return ref.load()[start:stop].copy()

    return TensorRef(name, ref.dtype, (stop - start, *ref.shape[1:]), load)


def quoted(text: object, limit: int = 120) -> str:
    """`text` from an untrusted file, safe to show on a terminal: escaped, in quotes and cut to `limit` characters."""
    shown = ascii(text) if isinstance(text, str) else repr(text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def regular_file_size(path: Path) -> int:
    """Size in bytes of `path`.

    Raises CheckpointError unless it is a plain file that can be looked at: a pipe or a device would never end.
    """
    try:
        info = path.stat()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}): check the path and its permissions."
        ) from None
    if not stat.S_ISREG(info.st_mode):
        raise CheckpointError(f"{path} is not a plain file: give the weights file itself.")
    return info.st_size


def read_bytes(path: Path, offset: int, nbytes: int) -> np.ndarray:
    """Reads `nbytes` bytes at `offset` of `path` into a fresh uint8 array.

    Plain reads and not a memory map: pages of a map count as this process's memory for as long as it lives, and a
    file that is cut short under a map kills the process. Raises CheckpointError when the bytes are not there.
    """
    try:
        data = np.empty(nbytes, dtype=np.uint8)
        view = data.data
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < nbytes:
                count = file.readinto(view[done : done + _CHUNK])
                if not count:
                    raise CheckpointError(f"{path} ends {nbytes - done} bytes too early: download or copy it again.")
                done += count
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check the disk and try again.") from None
    except MemoryError:
        raise CheckpointError(f"{path} holds a tensor of {nbytes} bytes, more than this machine's memory.") from None
    return data


def crc32_of(path: Path, offset: int, nbytes: int) -> int:
    """CRC-32 of `nbytes` bytes at `offset` of `path`, read in pieces."""
    crc = 0
    for start in range(0, nbytes, _CHUNK):
        crc = zlib.crc32(read_bytes(path, offset + start, min(_CHUNK, nbytes - start)).data, crc)
    return crc

"""Writes `.safetensors` one tensor at a time, so that a file may be larger than memory.

Format of https://github.com/huggingface/safetensors (README, "Format"); the library itself takes all tensors at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

__all__ = ["TensorPlace", "write_safetensors"]

_CODES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int8": "I8",
    "uint32": "U32",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass(frozen=True)
class TensorPlace:
    """A tensor to come: name, numpy's or ml_dtypes' type name, and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        width = np.dtype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype).itemsize
        return math.prod(self.shape) * width


def write_safetensors(
    path: Path, places: Sequence[TensorPlace], arrays: Iterable[np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write `arrays`, which come in the order of `places`; each is dropped once it is written.

    Raises ValueError when an array is not what its place says, OSError when the file cannot be written.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for place in places:
        header[place.name] = {
            "dtype": _CODES[place.dtype],
            "shape": list(place.shape),
            "data_offsets": [end, end + place.size],
        }
        end += place.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for place, array in zip(places, arrays, strict=True):
            if array.dtype.name != place.dtype or array.shape != place.shape:
                raise ValueError(f"{place.name} is {array.dtype} {list(array.shape)}, not {place}")
            file.write(np.ascontiguousarray(array).tobytes())

"""Reader for `.safetensors`, the format of https://github.com/huggingface/safetensors (README, "Format").

A file is 8 bytes (header length, little-endian), a JSON header and the data. Nothing of it is trusted: the header must
describe exactly the bytes that are there, each once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgedit.converters.strict_json import parse_object
from edgedit.converters.tensors import (
    MAX_DIMENSIONS,
    TensorRef,
    byte_size,
    numpy_dtype,
    quoted,
    read_bytes,
    regular_file_size,
)
from edgedit.errors import CheckpointError

__all__ = ["MAX_HEADER_BYTES", "looks_like_safetensors", "read_safetensors"]

MAX_HEADER_BYTES = 100_000_000
"""The longest header that the format admits."""

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_AGAIN = "download or export it again"


def looks_like_safetensors(start: bytes, size: int) -> bool:
    """Whether a file of `size` bytes that begins with `start` (9 bytes or more) could be a safetensors file."""
    return len(start) >= 9 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8


def read_safetensors(path: Path) -> dict[str, TensorRef]:
    """The tensors of a safetensors file by name, none of them read yet.

    Raises CheckpointError, naming the file and what is wrong, unless the header is sound: its length within the file,
    JSON without a key twice, known dtypes, sizes >= 0, and data offsets that cover the rest of the file exactly,
    without gap or overlap.
    """
    size = regular_file_size(path)
    if size < 8:
        raise CheckpointError(f"{path} has {size} bytes, too few for a safetensors file: {_AGAIN}.")
    start = read_bytes(path, 0, min(size, 64)).tobytes()
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer and not the weights: run `git lfs pull` in its folder.")
    length = int.from_bytes(start[:8], "little")
    if length > size - 8:
        raise CheckpointError(
            f"{path} is truncated or not safetensors: it announces a header of {length} bytes and has {size - 8} in "
            f"all: {_AGAIN}."
        )
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path} has a header of {length} bytes, above the format's 100 MB: {_AGAIN}.")
    if start[8:9] != b"{":
        raise CheckpointError(f"{path} is not safetensors (its header is not JSON): give the right file.")
    header = parse_object(read_bytes(path, 8, length).tobytes(), f"the header of {path}", strict=True)
    _check_metadata(path, header.pop("__metadata__", {}))
    return _tensors(path, header, 8 + length, size - 8 - length)


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path} has __metadata__ that is not text by name: {_AGAIN}.")


def _tensors(path: Path, header: dict[str, Any], base: int, data_size: int) -> dict[str, TensorRef]:
    refs: dict[str, TensorRef] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        dtype, shape, start, stop = _entry(path, name, entry)
        spans.append((start, stop, name))
        refs[name] = _ref(path, name, dtype, shape, base + start)
    position = 0
    for start, stop, name in sorted(spans):
        if start != position:
            kind = (
                "overlaps another tensor" if start < position else f"leaves a gap of {start - position} bytes before it"
            )
            raise CheckpointError(f"{path}: {quoted(name)} {kind}: {_AGAIN}.")
        position = stop
    if position > data_size:
        raise CheckpointError(f"{path} is truncated: {position - data_size} bytes of tensors are missing: {_AGAIN}.")
    if position < data_size:
        raise CheckpointError(f"{path} has {data_size - position} bytes that belong to no tensor: {_AGAIN}.")
    return refs


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    where = f"{path}: {quoted(name)}"
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise CheckpointError(f"{where} is not a name that text can hold: {_AGAIN}.") from None
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must have dtype, shape and data_offsets and nothing else: {_AGAIN}.")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = _DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise CheckpointError(f"{where} has the dtype {quoted(code)}, unknown here: export it as F32, F16 or BF16.")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        nbytes = None
    else:
        nbytes = byte_size(shape, numpy_dtype(dtype).itemsize)
    if nbytes is None:
        raise CheckpointError(f"{where} has the impossible shape {quoted(shape)}: {_AGAIN}.")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has the impossible data_offsets {quoted(offsets)}: {_AGAIN}.")
    if nbytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where} needs {nbytes} bytes for {code} {shape} and is given {offsets[1] - offsets[0]}: {_AGAIN}."
        )
    return dtype, tuple(shape), offsets[0], offsets[1]


def _are_sizes(values: Any) -> bool:
    # `type` and not `isinstance`: True is an int to Python and not to JSON.
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _ref(path: Path, name: str, dtype: str, shape: tuple[int, ...], offset: int) -> TensorRef:
    def load() -> np.ndarray:
        data = read_bytes(path, offset, ref.nbytes)
        # Any byte but 0 is true; numpy misbehaves with a bool that is neither 0 nor 1.
        flat: np.ndarray = data != 0 if dtype == "bool" else data.view(numpy_dtype(dtype))
        return flat.reshape(shape)

    ref = TensorRef(name, dtype, shape, load)
    return ref

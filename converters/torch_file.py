"""Reader for torch's zip format (`.pth`, `.pt`, `.bin`, `.ckpt`; torch 1.6 and later) without torch.

The archive holds `NAME/data.pkl`, a pickle of the object tree, and `NAME/data/0`, `NAME/data/1` …, the raw storages
(torch/serialization.py, `_save`). The pickle goes through `torch_pickle`, which runs no code; storages are read when a
tensor is.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgedit.converters.tensors import (
    TensorRef,
    byte_size,
    crc32_of,
    numpy_dtype,
    quoted,
    read_bytes,
    regular_file_size,
)
from edgedit.converters.torch_globals import PickledTensor
from edgedit.converters.torch_pickle import unpickle
from edgedit.errors import CheckpointError

__all__ = ["TorchFile", "is_legacy_torch", "read_torch"]

_MAX_PICKLE = 64 << 20
_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_STATE_DICT_KEYS = ("state_dict", "model", "module", "model_state_dict", "params", "net")
_EMA_KEYS = ("state_dict_ema", "ema_state_dict", "ema", "model_ema", "params_ema")
_AGAIN = "download or save it again"


@dataclass(frozen=True)
class TorchFile:
    """What a torch file holds.

    Attributes:
        tensors: the chosen state dict, none of it read yet.
        dropped: entries of the state dict that are not tensors, with the reason.
        notes: what was chosen where there was a choice, for the user.
    """

    tensors: dict[str, TensorRef]
    dropped: dict[str, str]
    notes: tuple[str, ...]


def is_legacy_torch(start: bytes) -> bool:
    """Whether a file that begins with `start` is in torch's format of before 1.6, which is not a zip archive."""
    return start.startswith(_LEGACY_MAGIC)


def read_torch(path: Path) -> TorchFile:
    """Reads the state dict of a torch file: tensors at the top level, or under `state_dict` and its like.

    Of several, `state_dict` wins over an average (`state_dict_ema`), as in the reference inference code of PixArt
    (scripts/inference.py) and SANA; the note says so. Raises CheckpointError for anything that is not an archive of
    plain tensors: other code asked for, compressed, encrypted or overlapping records, tensors beyond their storage,
    big-endian data, TorchScript, the format of before torch 1.6.
    """
    size = regular_file_size(path)
    start = read_bytes(path, 0, min(size, 512)).tobytes()
    if is_legacy_torch(start) or start[257:262] == b"ustar":
        raise CheckpointError(
            f"{path} is in torch's format of before 1.6: save it again with "
            "torch.save(torch.load(OLD, weights_only=True), NEW)."
        )
    archive = _Archive(path, size)
    tree = unpickle(archive.read(archive.pickle_name, _MAX_PICKLE), str(path))
    where, state, notes = _state_dict(path, tree)
    tensors: dict[str, TensorRef] = {}
    dropped: dict[str, str] = {}
    for key, value in state.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{path}: the weights{where} have a key that is not text: save the state_dict again.")
        if isinstance(value, PickledTensor):
            tensors[key] = archive.tensor(key, value)
        else:
            dropped[key] = "not a tensor"
    return TorchFile(tensors, dropped, notes)


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(item, PickledTensor) for item in value.values())


def _state_dict(path: Path, tree: Any) -> tuple[str, dict[Any, Any], tuple[str, ...]]:
    if not isinstance(tree, dict):
        kind = "tensor" if isinstance(tree, PickledTensor) else type(tree).__name__
        raise CheckpointError(f"{path} holds a {kind} and no dict of weights: save a state_dict.")
    named = [key for key in (*_STATE_DICT_KEYS, *_EMA_KEYS) if _is_state_dict(tree.get(key))]
    if named:
        chosen, others = named[0], named[1:]
        note = f"{path.name}: took the weights under {chosen!r}"
        if others:
            note += f", not those under {', '.join(map(repr, others))}"
        return f" under {chosen!r}", tree[chosen], (note,)
    if _is_state_dict(tree):
        return "", tree, ()
    keys = ", ".join(quoted(key) for key in list(tree)[:8]) or "nothing"
    raise CheckpointError(f"{path} holds no dict of weights (it has {keys}): save a state_dict.")


@dataclass
class _Record:
    """One stored member of the archive."""

    name: str
    offset: int
    size: int
    crc: int
    checked: bool = False

    def check(self, path: Path, crc: int) -> None:
        # torch writes 0 when told not to compute checksums (torch.serialization.set_crc32_options).
        if self.crc not in (0, crc):
            raise CheckpointError(f"{path} is damaged (checksum of {quoted(self.name)}): {_AGAIN}.")
        self.checked = True


class _Archive:
    """The records of a torch zip archive, each stored plain and inside the file."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.records = self._records(size)
        roots = [
            name[: -len("/data.pkl")] for name in self.records if name.count("/") == 1 and name.endswith("/data.pkl")
        ]
        if len(roots) != 1:
            raise CheckpointError(f"{path} is a zip archive but not one of torch's: give the weights file itself.")
        self.root = roots[0]
        self.pickle_name = f"{self.root}/data.pkl"
        if f"{self.root}/byteorder" in self.records and self.read(f"{self.root}/byteorder", 16) != b"little":
            raise CheckpointError(f"{path} was written on a big-endian machine: save it again on another.")

    def _records(self, size: int) -> dict[str, _Record]:
        path = self.path
        try:
            with path.open("rb") as file, zipfile.ZipFile(file) as archive:
                infos, data_end = archive.infolist(), archive.start_dir
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}): check the disk and try again.") from None
        except (zipfile.BadZipFile, ValueError, struct.error, OverflowError, NotImplementedError, MemoryError):
            raise CheckpointError(f"{path} is not a whole torch file: {_AGAIN}.") from None
        if any(name.endswith("/constants.pkl") or "/code/" in name for name in (info.filename for info in infos)):
            raise CheckpointError(f"{path} is a TorchScript program and not weights: save the model's state_dict.")
        records: dict[str, _Record] = {}
        for info in infos:
            if info.filename in records:
                raise CheckpointError(f"{path} holds {quoted(info.filename)} twice: {_AGAIN}.")
            records[info.filename] = self._record(info, min(size, data_end))
        position = 0
        for record in sorted(records.values(), key=lambda record: record.offset):
            if record.offset < position:
                raise CheckpointError(f"{path} has overlapping records: {_AGAIN}.")
            position = record.offset + record.size
        return records

    def _record(self, info: zipfile.ZipInfo, data_end: int) -> _Record:
        name = quoted(info.filename)
        if info.flag_bits & 0x1:
            raise CheckpointError(f"{self.path}: {name} is encrypted: save it again without a password.")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise CheckpointError(
                f"{self.path}: {name} is compressed, as a zip bomb would be and torch's never are: "
                "save it again with torch."
            )
        damaged = CheckpointError(f"{self.path} is damaged (record {name}): {_AGAIN}.")
        if not 0 <= info.header_offset <= data_end - _LOCAL_HEADER.size:
            raise damaged
        header = read_bytes(self.path, info.header_offset, _LOCAL_HEADER.size).tobytes()
        signature, _, flags, method, _, _, _, _, _, name_size, extra_size = _LOCAL_HEADER.unpack(header)
        start = info.header_offset + _LOCAL_HEADER.size + name_size + extra_size
        if signature != b"PK\x03\x04" or method != zipfile.ZIP_STORED or start + info.file_size > data_end:
            raise damaged
        raw = read_bytes(self.path, info.header_offset + _LOCAL_HEADER.size, name_size).tobytes()
        if raw.decode("utf-8" if flags & 0x800 else "cp437", "replace") != info.orig_filename:
            raise damaged
        return _Record(info.filename, start, info.file_size, info.CRC)

    def read(self, name: str, limit: int) -> bytes:
        """The small record `name`, checked."""
        record = self.records[name]
        if record.size > limit:
            raise CheckpointError(f"{self.path}: {quoted(name)} has {record.size} bytes, far too many: {_AGAIN}.")
        data = read_bytes(self.path, record.offset, record.size).tobytes()
        record.check(self.path, zlib.crc32(data))
        return data

    def tensor(self, key: str, tensor: PickledTensor) -> TensorRef:
        """A lazy tensor over its storage's record; refuses a view that reaches beyond it."""
        where = f"{self.path}: {quoted(key)}"
        record = self.records.get(f"{self.root}/data/{tensor.storage.key}")
        if record is None:
            raise CheckpointError(f"{where} has no data in the file: {_AGAIN}.")
        dtype = numpy_dtype(tensor.dtype)
        unit = numpy_dtype(tensor.storage.dtype).itemsize if tensor.storage.dtype else 1
        if record.size != tensor.storage.count * unit:
            raise CheckpointError(
                f"{where} is promised {tensor.storage.count * unit} bytes and its record has {record.size}: {_AGAIN}."
            )
        nbytes = byte_size(tensor.shape, dtype.itemsize)
        # Strides of 0 let a small storage pose as a tensor of any size.
        if nbytes is None or nbytes > max(2 * record.size, 1 << 20):
            raise CheckpointError(f"{where} claims the shape {tensor.shape} on {record.size} bytes: {_AGAIN}.")
        extent = 0 if nbytes == 0 else 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride, strict=True))
        if nbytes and (tensor.offset + extent) * dtype.itemsize > record.size:
            raise CheckpointError(f"{where} reaches beyond its storage: {_AGAIN}.")
        return TensorRef(key, tensor.dtype, tensor.shape, lambda: _load(self.path, record, tensor, dtype, extent))


def _load(path: Path, record: _Record, tensor: PickledTensor, dtype: np.dtype[np.generic], extent: int) -> np.ndarray:
    whole = tensor.offset == 0 and extent * dtype.itemsize == record.size
    if not record.checked and not whole:
        record.check(path, crc32_of(path, record.offset, record.size))
    data = read_bytes(path, record.offset + tensor.offset * dtype.itemsize, extent * dtype.itemsize)
    if not record.checked:
        record.check(path, zlib.crc32(data.data))
    # Any byte but 0 is true; numpy misbehaves with a bool that is neither 0 nor 1.
    buffer = (data != 0).data if tensor.dtype == "bool" else data.data
    if extent == 0:
        return np.empty(tensor.shape, dtype)
    # The constructor checks the strides against the buffer once more, which as_strided would not.
    view = np.ndarray(tensor.shape, dtype, buffer, strides=[step * dtype.itemsize for step in tensor.stride])
    return view if view.flags.c_contiguous else view.copy(order="C")

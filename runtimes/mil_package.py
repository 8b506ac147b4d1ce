"""Reads an `.mlpackage` with an ML Program: operations, types and weights, without coremltools, on any OS.

The formats are those of coremltools' `MIL.proto` and `Model.proto` (Protocol Buffers, read field by field here) and of
its `weight.bin`: 64 bytes of header, then for every tensor 64 bytes of metadata (0xDEADBEEF, type, size, place) and the
values, packed from the lowest bit up where they are narrower than a byte.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgedit.errors import BundleError

__all__ = ["BITS", "Blob", "MilFunction", "MilOperation", "MilPackage", "MilType", "read_package", "unpack"]

#: MIL.DataType → name.
_TYPES = {
    1: "bool", 2: "string", 10: "fp16", 11: "fp32", 12: "fp64", 21: "int8", 22: "int16", 23: "int32", 24: "int64",
    25: "int4", 31: "uint8", 32: "uint16", 33: "uint32", 34: "uint64", 35: "uint4", 36: "uint2", 37: "uint1",
    38: "uint6", 39: "uint3",
}  # fmt: skip
_NUMPY = {
    "bool": np.bool_, "fp16": np.float16, "fp32": np.float32, "fp64": np.float64, "int8": np.int8, "int16": np.int16,
    "int32": np.int32, "int64": np.int64, "uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32,
    "uint64": np.uint64,
}  # fmt: skip
#: Types narrower than a byte.
BITS = {"int4": 4, "uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6}
#: Type of a tensor in weight.bin, as its metadata state it.
_BLOB_TYPES = {
    1: "fp16", 2: "fp32", 3: "uint8", 4: "int8", 6: "int16", 7: "uint16", 8: "int4", 9: "uint1", 10: "uint2",
    11: "uint4", 12: "uint3", 13: "uint6", 14: "int32", 15: "uint32",
}  # fmt: skip
_SENTINEL = 0xDEADBEEF


@dataclass(frozen=True)
class MilType:
    """Element type and shape; -1 is a size that is not known before the model runs."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Blob:
    """A tensor in weight.bin, read when it is asked for."""

    type: MilType
    offset: int
    file: Path

    @property
    def nbytes(self) -> int:
        """Bytes that its values take in the file."""
        count = int(np.prod(self.type.shape, dtype=np.int64))
        bits = BITS.get(self.type.dtype) or 8 * np.dtype(_NUMPY[self.type.dtype]).itemsize
        return -(-count * bits // 8)

    def load(self) -> np.ndarray:
        """Its values; integers narrower than a byte as int8 or uint8. Raises BundleError when it is damaged."""
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            head = stream.read(24)
            if len(head) < 24:
                raise BundleError(f"{self.file}: ends before the tensor at byte {self.offset}; convert the model again")
            sentinel, kind, size, start = struct.unpack("<IIQQ", head)
            wrong = sentinel != _SENTINEL or _BLOB_TYPES.get(kind) != self.type.dtype or size != self.nbytes
            stream.seek(start)
            data = b"" if wrong else stream.read(size)
        if wrong or len(data) != size:
            raise BundleError(
                f"{self.file}: the tensor at byte {self.offset} is not what the model says; convert the model again"
            )
        return unpack(data, self.type)


def unpack(data: bytes, kind: MilType) -> np.ndarray:
    """Bytes as they are stored → an array."""
    count = int(np.prod(kind.shape, dtype=np.int64))
    if kind.dtype not in BITS:
        return np.frombuffer(data, _NUMPY[kind.dtype], count).reshape(kind.shape)
    width = BITS[kind.dtype]
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[: count * width].reshape(count, width)
    values = (bits << np.arange(width, dtype=np.uint8)).sum(1, dtype=np.uint8)
    if kind.dtype == "int4":
        values = ((values ^ 8).astype(np.int8) - 8).astype(np.int8)
    return np.asarray(values).reshape(kind.shape)


@dataclass(frozen=True)
class MilOperation:
    """One operation. An input is the name of a value, a value itself, or a list of either."""

    kind: str
    name: str
    inputs: dict[str, Any]
    outputs: tuple[tuple[str, MilType], ...]


@dataclass(frozen=True)
class MilFunction:
    """Inputs by name, operations in the order in which they run, names of the outputs."""

    name: str
    opset: str
    inputs: dict[str, MilType]
    operations: tuple[MilOperation, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class MilPackage:
    """A package as it is on disk; weights are not read. `default` is the function that runs when none is named,
    `metadata` what its writer noted."""

    path: Path
    specification: int
    functions: dict[str, MilFunction]
    default: str
    weights: Path
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass
class _Message:
    """Fields of one Protocol Buffers message: number → raw values."""

    fields: dict[int, list[Any]] = field(default_factory=dict)

    def messages(self, number: int) -> Iterator[_Message]:
        return (_parse(value) for value in self.fields.get(number, ()))

    def message(self, number: int) -> _Message:
        found = self.fields.get(number)
        return _parse(found[-1]) if found else _Message()

    def has(self, number: int) -> bool:
        return number in self.fields

    def text(self, number: int) -> str:
        return bytes(self.fields[number][-1]).decode() if number in self.fields else ""

    def number(self, number: int) -> int:
        return int(self.fields[number][-1]) if number in self.fields else 0

    def entries(self, number: int) -> Iterator[tuple[str, _Message]]:
        """A map of strings to messages."""
        return ((entry.text(1), entry.message(2)) for entry in self.messages(number))


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _parse(data: memoryview) -> _Message:
    message, at, end = _Message(), 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        value: Any
        if wire == 0:
            value, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            value, at = data[at : at + size], at + size
        elif wire == 2:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
            if len(value) != size:
                raise ValueError("a message ends early")
        else:
            raise ValueError(f"wire type {wire}")
        message.fields.setdefault(number, []).append(value)
    return message


def _type(message: _Message) -> MilType:
    if message.has(5):
        return _type(message.message(5).message(1))
    tensor = message.message(1)
    sizes = [dim.message(1).number(1) if dim.has(1) else -1 for dim in tensor.messages(3)]
    return MilType(_TYPES.get(tensor.number(1), f"type {tensor.number(1)}"), tuple(sizes))


def _packed(message: _Message, kind: str) -> np.ndarray:
    """Values of RepeatedFloats, RepeatedInts …, packed or one by one."""
    found: list[Any] = []
    for raw in message.fields.get(1, ()):
        if isinstance(raw, int):
            found.append(raw)
        elif kind in ("f", "d"):
            found.extend(np.frombuffer(raw, "<f4" if kind == "f" else "<f8"))
        else:
            at = 0
            while at < len(raw):
                value, at = _varint(raw, at)
                found.append(value)
    if kind in ("f", "d"):
        return np.array(found, np.float32 if kind == "f" else np.float64)
    return np.array([v - (1 << 64) if v >= 1 << 63 else v for v in found], np.int64)


def _tensor(message: _Message, kind: MilType) -> Any:
    if message.has(4):
        texts = [bytes(raw).decode() for raw in message.message(4).fields.get(1, ())]
        return texts[0] if not kind.shape else texts
    if message.has(7):
        raws = message.message(7).fields.get(1, [b""])
        return unpack(bytes(raws[-1]), kind)
    for number, code in ((1, "f"), (2, "i"), (3, "i"), (5, "i"), (6, "d")):
        if message.has(number):
            values = _packed(message.message(number), code)
            return values.astype(_NUMPY[kind.dtype]).reshape(kind.shape)
    return np.zeros(kind.shape, _NUMPY[kind.dtype]) if kind.dtype != "string" else ""


def _value(message: _Message, weights: Path) -> Any:
    kind = _type(message.message(2))
    if message.has(5):
        return Blob(kind, message.message(5).number(2), weights)
    immediate = message.message(3)
    for number in (2, 3):
        if immediate.has(number):
            return [_value(item, weights) for item in immediate.message(number).messages(1)]
    return _tensor(immediate.message(1), kind)


def _operation(message: _Message, weights: Path) -> MilOperation:
    if message.has(4):
        raise ValueError(f"operation {message.text(1)} has blocks")
    inputs: dict[str, Any] = {}
    name = ""
    for key, value in message.entries(5):
        if key == "name":
            name = str(_value(value, weights))
        else:
            inputs[key] = _value(value, weights)
    for key, argument in message.entries(2):
        bound = [
            binding.text(1) if binding.has(1) else _value(binding.message(2), weights)
            for binding in argument.messages(1)
        ]
        inputs[key] = bound[0] if len(bound) == 1 and key != "values" else bound
    outputs = tuple((output.text(1), _type(output.message(2))) for output in message.messages(3))
    return MilOperation(message.text(1), name or (outputs[0][0] if outputs else ""), inputs, outputs)


def _function(name: str, message: _Message, weights: Path) -> MilFunction:
    opset = message.text(2)
    block = dict(message.entries(3))[opset]
    return MilFunction(
        name=name,
        opset=opset,
        inputs={value.text(1): _type(value.message(2)) for value in message.messages(1)},
        operations=tuple(_operation(operation, weights) for operation in block.messages(3)),
        outputs=tuple(bytes(raw).decode() for raw in block.fields.get(2, ())),
    )


def read_package(path: str | Path) -> MilPackage:
    """The ML Program in the package at `path`.

    Raises BundleError, one line, when it is missing, damaged, or not an ML Program.
    """
    folder = Path(path)
    try:
        manifest = json.loads((folder / "Manifest.json").read_text(encoding="utf-8"))
        root = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
        model = folder / "Data" / root
        weights = model.parent / "weights" / "weight.bin"
        message = _parse(memoryview(model.read_bytes()))
        if not message.has(502):
            raise ValueError("it holds no ML Program")
        functions = {name: _function(name, function, weights) for name, function in message.message(502).entries(2)}
        default = message.message(2).text(21) or next(iter(functions))
        noted = {entry.text(1): entry.text(2) for entry in message.message(2).message(100).messages(100)}
        return MilPackage(folder, message.number(1), functions, default, weights, noted)
    except FileNotFoundError as error:
        raise BundleError(f"{folder}: {error.filename} is missing; convert the model again") from error
    except (OSError, ValueError, KeyError, IndexError, TypeError, StopIteration, struct.error) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BundleError(f"{folder}: not a whole Core ML package ({reason}); convert the model again") from error

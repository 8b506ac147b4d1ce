"""What the names in a torch pickle stand for. A name is only ever text here: nothing is imported and nothing called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgedit.converters.tensors import MAX_DIMENSIONS

__all__ = [
    "STORAGE_DTYPES",
    "UNTYPED_STORAGES",
    "DamageError",
    "Global",
    "Opaque",
    "PickledTensor",
    "Storage",
    "apply",
    "is_admitted",
]

STORAGE_DTYPES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.ComplexFloatStorage": "complex64",
    "torch.ComplexDoubleStorage": "complex128",
}
UNTYPED_STORAGES = {"torch.storage.UntypedStorage", "torch.UntypedStorage"}
_TORCH_DTYPES = {
    "torch.float64": "float64",
    "torch.float32": "float32",
    "torch.float16": "float16",
    "torch.bfloat16": "bfloat16",
    "torch.float8_e4m3fn": "float8_e4m3fn",
    "torch.float8_e4m3fnuz": "float8_e4m3fnuz",
    "torch.float8_e5m2": "float8_e5m2",
    "torch.float8_e5m2fnuz": "float8_e5m2fnuz",
    "torch.float8_e8m0fnu": "float8_e8m0fnu",
    "torch.int64": "int64",
    "torch.int32": "int32",
    "torch.int16": "int16",
    "torch.int8": "int8",
    "torch.uint64": "uint64",
    "torch.uint32": "uint32",
    "torch.uint16": "uint16",
    "torch.uint8": "uint8",
    "torch.bool": "bool",
    "torch.complex64": "complex64",
    "torch.complex128": "complex128",
}
_DICTIONARIES = {"collections.OrderedDict", "collections.defaultdict", "builtins.dict"}
_TENSOR_TYPES = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
_REBUILDERS = {
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._tensor._rebuild_from_type_v2",
}
_PLAIN = {"torch.Size", "builtins.list", "builtins.tuple"}
_INERT = {
    "argparse.Namespace",
    "types.SimpleNamespace",
    "collections.Counter",
    "collections.deque",
    "builtins.set",
    "builtins.frozenset",
    "builtins.slice",
    "builtins.complex",
    "builtins.bytearray",
    "_codecs.encode",
    "torch.device",
    "torch.serialization._get_layout",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.numeric._frombuffer",
    "numpy._core.numeric._frombuffer",
    "datetime.datetime",
    "datetime.timedelta",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "mmengine.config.config.ConfigDict",
    "mmcv.utils.config.ConfigDict",
    "addict.addict.Dict",
}
_ADMITTED = frozenset(
    {*STORAGE_DTYPES, *UNTYPED_STORAGES, *_TORCH_DTYPES} | _DICTIONARIES | _TENSOR_TYPES | _REBUILDERS | _PLAIN | _INERT
)


def is_admitted(name: str) -> bool:
    """Whether a pickle may name `name` ("module.attribute"). It is never imported, whatever the answer."""
    return name in _ADMITTED


@dataclass(frozen=True)
class Storage:
    """A run of bytes in the archive: record `data/<key>`; `dtype` is None where the pickle leaves it open."""

    key: str
    dtype: str | None
    count: int


@dataclass(frozen=True)
class PickledTensor:
    """A view of a storage; `offset` and `stride` count elements of `dtype`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Opaque:
    """Stands for a value of the type `name`, which was neither imported nor made."""

    name: str


@dataclass(frozen=True)
class Global:
    """A name that the pickle mentions and has not called."""

    name: str


class DamageError(Exception):
    """The pickle breaks pickle's own rules."""


def apply(name: str, arguments: tuple[Any, ...]) -> Any:
    """What calling the admitted `name` with `arguments` stands for.

    Raises DamageError where torch would not write such a call.
    """
    if name in _REBUILDERS:
        return _rebuild(name, arguments)
    if name in _DICTIONARIES:
        return _dictionary(name, arguments)
    if name in _PLAIN:
        values = arguments[0] if arguments else ()
        if len(arguments) > 1 or not isinstance(values, list | tuple):
            raise DamageError(f"{name} made of something else")
        return list(values) if name.endswith(".list") else tuple(values)
    if name in _INERT:
        return Opaque(name)
    raise DamageError(f"a call of {name}")


def _dictionary(name: str, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    pairs: Any = () if name.endswith("defaultdict") or not arguments else arguments[0]
    if isinstance(pairs, dict):
        return dict(pairs)
    result: dict[Any, Any] = {}
    if not isinstance(pairs, list | tuple):
        raise DamageError(f"{name} made of something else")
    for pair in pairs:
        match pair:
            case [str() | int() as key, value] | (str() | int() as key, value):
                result[key] = value
            case _:
                raise DamageError(f"{name} with a pair that is none")
    return result


def _rebuild(name: str, arguments: tuple[Any, ...]) -> PickledTensor:
    match name.rpartition(".")[2], arguments:
        case "_rebuild_tensor", (Storage() as storage, offset, shape, stride):
            return _view(storage, storage.dtype or "uint8", offset, shape, stride)
        case "_rebuild_tensor_v2", (Storage() as storage, offset, shape, stride, _, _, *_):
            return _view(storage, storage.dtype or "uint8", offset, shape, stride)
        case "_rebuild_tensor_v3", (Storage() as storage, offset, shape, stride, _, _, Global(dtype), *_):
            if dtype not in _TORCH_DTYPES:
                raise DamageError(f"a tensor of the type {dtype}")
            return _view(storage, _TORCH_DTYPES[dtype], offset, shape, stride)
        case "_rebuild_parameter", (PickledTensor() as tensor, _, _):
            return tensor
        case "_rebuild_parameter_with_state", (PickledTensor() as tensor, _, _, _):
            return tensor
        case "_rebuild_from_type_v2", (Global(function), Global(kind), tuple(inner), _):
            # One level is all that torch writes; more would be a way to recurse without end.
            if function in _REBUILDERS and not function.endswith("_rebuild_from_type_v2") and kind in _TENSOR_TYPES:
                return _rebuild(function, inner)
    raise DamageError("a tensor that torch would not write")


def _view(storage: Storage, dtype: str, offset: Any, shape: Any, stride: Any) -> PickledTensor:
    for values in ((offset,), shape, stride):
        if not isinstance(values, tuple) or not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
            raise DamageError("a tensor of impossible size")
    if len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS:
        raise DamageError("a tensor of impossible size")
    return PickledTensor(storage, dtype, offset, shape, stride)

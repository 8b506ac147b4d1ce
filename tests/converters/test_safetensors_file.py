"""The safetensors reader against the safetensors package, and against files that lie."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file

from edgedit.converters.safetensors_file import MAX_HEADER_BYTES, read_safetensors
from edgedit.converters.tensors import TensorRef
from edgedit.errors import CheckpointError

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.bool, torch.complex64),
]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if dtype is torch.bool:
        return torch.rand(shape) > 0.5
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return torch.from_numpy(np.frombuffer(os.urandom(count), np.uint8).copy()).view(dtype).reshape(shape)


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_as_safetensors_reads_it(dtype: torch.dtype, tmp_path: Path) -> None:
    rng = random.Random()
    shapes = [(), (0, 3), (1,), *(tuple(rng.randint(1, 5) for _ in range(rng.randint(1, 4))) for _ in range(4))]
    save_file({f"t{i}": random_tensor(dtype, shape) for i, shape in enumerate(shapes)}, tmp_path / "x.safetensors")
    expected = load_file(tmp_path / "x.safetensors")
    refs = read_safetensors(tmp_path / "x.safetensors")
    assert refs.keys() == expected.keys()
    for name, tensor in expected.items():
        array = refs[name].load()
        assert array.shape == tuple(tensor.shape) == refs[name].shape, (name, shapes)
        assert refs[name].dtype == str(tensor.dtype).removeprefix("torch.") == array.dtype.name
        assert array.tobytes() == raw(tensor), (name, shapes)
        assert array.nbytes == refs[name].nbytes


def test_values_of_bfloat16_and_float8_are_those_of_torch(tmp_path: Path) -> None:
    values = torch.randn(257) * 10
    tensors = {str(dtype): values.to(dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)}
    save_file(tensors, tmp_path / "x.safetensors")
    for name, ref in read_safetensors(tmp_path / "x.safetensors").items():
        np.testing.assert_array_equal(ref.load().astype(np.float32), tensors[name].float().numpy())


def test_metadata_is_allowed_and_is_no_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert list(read_safetensors(tmp_path / "x.safetensors")) == ["a"]


LIES: dict[str, tuple[Any, bytes, int | None]] = {
    "is truncated or not safetensors": ({"a": entry()}, bytes(8), 1 << 60),
    "is not valid JSON": (b'{"a": ', b"", None),
    "header is not JSON": (b"[]", bytes(8), None),
    "above the format's 100 MB": (b"{" + b" " * MAX_HEADER_BYTES, b"", None),
    "twice": (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', b"", None),
    "overlaps another": ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), None),
    "leaves a gap of 4": ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20), None),
    "leaves a gap of 2": ({"a": entry(offsets=(2, 10))}, bytes(10), None),
    "belong to no tensor": ({"a": entry()}, bytes(9), None),
    "is truncated: 1 bytes": ({"a": entry()}, bytes(7), None),
    "unknown here": ({"a": entry(dtype="F4")}, bytes(8), None),
    "dtype 7, unknown": ({"a": entry(dtype=7)}, bytes(8), None),
    "shape [-2]": ({"a": entry(shape=[-2])}, bytes(8), None),
    "shape [True, 2]": ({"a": entry(shape=[True, 2])}, bytes(8), None),
    "shape [2.0]": ({"a": entry(shape=[2.0])}, bytes(8), None),
    "shape [1, 1": ({"a": entry(shape=[1] * 70, offsets=[0, 4])}, bytes(4), None),
    "shape [0, 9223": ({"a": entry(shape=[0, 2**63 - 1, 2**63 - 1], offsets=[0, 0])}, b"", None),
    "shape [92233720368547758080": ({"a": entry(shape=[2**63 * 10], offsets=[0, 0])}, b"", None),
    "needs 12 bytes": ({"a": entry(shape=[3])}, bytes(8), None),
    "data_offsets [8, 0]": ({"a": entry(offsets=[8, 0])}, bytes(8), None),
    "data_offsets [-8, 0]": ({"a": entry(offsets=[-8, 0])}, bytes(8), None),
    "data_offsets [0]": ({"a": entry(offsets=[0])}, bytes(8), None),
    "must have dtype": ({"a": entry() | {"code": "x"}}, bytes(8), None),
    "must have dtype, shape": ({"a": {"dtype": "F32"}}, bytes(8), None),
    "must have dtype, shape and": ({"a": [1]}, bytes(8), None),
    "__metadata__": ({"__metadata__": {"a": 1}}, b"", None),
    "not a name that text": (b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"", None),
    "NaN": (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}', b"", None),
    "RecursionError": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"", None),
    "UnicodeDecodeError": (b'{"\xff":1}', b"", None),
    "ValueError": (b'{"a":' + b"9" * 5000 + b"}", b"", None),
}


@pytest.mark.parametrize("message", LIES)
def test_a_lying_header_is_refused_in_one_line(message: str, tmp_path: Path) -> None:
    header, data, length = LIES[message]
    path = write(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(CheckpointError) as caught:
        read_safetensors(path)
    assert message.removesuffix(" ") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_lfs_pointer_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_safetensors(path)


def test_a_name_meant_for_the_terminal_is_escaped(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"\x1b[2J\n": entry(dtype="?")}, bytes(8))
    with pytest.raises(CheckpointError) as caught:
        read_safetensors(path)
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_shrinks_after_opening_is_refused_at_load(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(100)}, path)
    ref = read_safetensors(path)["a"]
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="1 bytes too early"):
        ref.load()


def test_a_pipe_or_a_missing_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a plain file"):
        read_safetensors(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="No such file"):
        read_safetensors(tmp_path / "none")


def test_loading_keeps_nothing_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    each, count = 16 << 20, 24
    header = {f"t{i}": entry([each], [i * each, (i + 1) * each], "U8") for i in range(count)}
    write(path, header)
    os.truncate(path, path.stat().st_size + each * count)
    refs = read_safetensors(path)
    process = psutil.Process()
    before = process.memory_info().rss
    peak = 0
    for ref in refs.values():
        array = ref.load()
        assert not array[:: 1 << 12].any()
        peak = max(peak, process.memory_info().rss - before)
        del array
    assert peak < 3 * each, f"{peak >> 20} MiB for tensors of {each >> 20} MiB"


@pytest.fixture(scope="module")
def sound() -> bytes:
    tensors = {
        "a.weight": torch.randn(3, 4),
        "a.bias": torch.randn(3).bfloat16(),
        "flag": torch.tensor([True, False]),
        "empty": torch.zeros(0, 2),
    }
    return save(tensors, metadata={"format": "pt"})


def contents(refs: dict[str, TensorRef]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (ref.dtype, ref.shape, ref.load().tobytes()) for name, ref in refs.items()}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_as_safetensors_reads_it(
    data: st.DataObject, sound: bytes, tmp_path: Path
) -> None:
    body = bytearray(sound)
    header_end = 8 + int.from_bytes(sound[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        # Most of the damage in the header: the data has no structure to damage.
        place = data.draw(st.one_of(st.integers(0, header_end - 1), st.integers(0, len(body) - 1)))
        body[place] = data.draw(st.integers(0, 255))
    del body[data.draw(st.one_of(st.just(len(body)), st.integers(0, len(body)))) :]
    path = tmp_path / "x.safetensors"
    path.write_bytes(body)
    try:
        found = contents(read_safetensors(path))
    except CheckpointError:
        return
    # What is accepted here, the package accepts too, and reads the same.
    try:
        expected = load(bytes(body))
    except SafetensorError as error:
        pytest.fail(f"accepted what safetensors refuses: {error}")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        dtype, shape, stored = found[name]
        assert (dtype, shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        assert stored == raw(tensor) or tensor.dtype is torch.bool

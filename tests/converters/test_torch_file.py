"""The torch reader against torch itself, and against pickles and archives that mean harm."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgedit.converters.torch_file import read_torch
from edgedit.converters.torch_pickle import unpickle
from edgedit.errors import CheckpointError

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.bool, torch.complex64, torch.complex128),
]


def raw(tensor: torch.Tensor) -> bytes:
    tensor = tensor.detach().contiguous().reshape(-1)
    return tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    if dtype is torch.bool:
        return torch.rand(shape) > 0.5
    values = np.frombuffer(os.urandom(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize), np.uint8).copy()
    return torch.from_numpy(values).view(dtype).reshape(shape)


def assert_read_as_torch_reads(path: Path, expected: dict[str, torch.Tensor]) -> None:
    refs = read_torch(path).tensors
    assert list(refs) == list(expected)
    for name, tensor in expected.items():
        array = refs[name].load()
        assert array.shape == refs[name].shape == tuple(tensor.shape), name
        assert array.dtype.name == refs[name].dtype == str(tensor.dtype).removeprefix("torch."), name
        assert array.tobytes() == raw(tensor), name
        assert array.flags.c_contiguous, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_as_torch_reads_it(dtype: torch.dtype, tmp_path: Path) -> None:
    rng = random.Random()
    tensors = {f"t{i}": random_tensor(dtype, *(rng.randint(1, 5) for _ in range(i))) for i in range(4)}
    tensors["empty"] = torch.empty(0, 3, dtype=dtype)
    torch.save(tensors, tmp_path / "x.pth")
    assert_read_as_torch_reads(tmp_path / "x.pth", torch.load(tmp_path / "x.pth", weights_only=True))


def test_views_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    base = torch.randn(6, 7, 8)
    views = {
        "transposed": torch.randn(3, 5).T,
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
        "stepped": base[1::2, ::3, 2:7],
        "slice of the same storage": base[2],
        "the whole storage": base,
        "row": base[5, 6],
        "expanded": torch.randn(3, 1).expand(3, 4),
        "overlapping": torch.randn(9).unfold(0, 4, 2),
        "scalar of a storage": base[1, 2, 3],
        "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "empty": base[0:0],
    }
    torch.save(views, tmp_path / "x.pth")
    assert_read_as_torch_reads(tmp_path / "x.pth", views)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_lies_beside_the_weights_is_neither_imported_nor_in_the_way(protocol: int, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    moments = {"step": torch.tensor(7.0), "exp_avg": torch.randn(4, 3), "exp_avg_sq": torch.rand(4, 3)}
    marked = torch.ones(2)
    marked.mark = "a tensor with an attribute"
    checkpoint = {
        "state_dict": model.state_dict(),
        "optimizer": {"state": {0: moments}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0]}]},
        "args": argparse.Namespace(lr=1e-4, path=Path("x"), nested=argparse.Namespace(a=[1, (2, 3)])),
        "epoch": 3,
        "loss": np.float32(0.1),
        "history": np.arange(3.0),
        "ids": {1, 2},
        "frozen": frozenset([1]),
        "device": torch.device("cpu"),
        "size": torch.Size([1, 2]),
        "big": 1 << 70,
        "bytes": b"abc",
        "other": OrderedDict(a=marked, b=torch.nn.Parameter(torch.ones(1))),
        "rng": torch.get_rng_state(),
    }
    torch.save(checkpoint, tmp_path / "x.pth", pickle_protocol=protocol)
    assert_read_as_torch_reads(tmp_path / "x.pth", model.state_dict())


def test_parameters_and_tensors_with_attributes_are_plain_tensors(tmp_path: Path) -> None:
    marked = torch.randn(2)
    marked.mark = 1
    tensors = {"p": torch.nn.Parameter(torch.randn(3)), "marked": marked, "buffer": torch.nn.Buffer(torch.randn(2))}
    torch.save(tensors, tmp_path / "x.pth")
    assert_read_as_torch_reads(tmp_path / "x.pth", tensors)


def test_the_weights_that_reference_code_takes_are_taken_and_named(tmp_path: Path) -> None:
    plain, average = {"w": torch.randn(2)}, {"w": torch.randn(2)}
    torch.save({"state_dict_ema": average, "state_dict": plain, "epoch": 1}, tmp_path / "x.pth")
    assert_read_as_torch_reads(tmp_path / "x.pth", plain)
    (note,) = read_torch(tmp_path / "x.pth").notes
    assert "'state_dict', not those under 'state_dict_ema'" in note
    torch.save({"state_dict_ema": average, "epoch": 1}, tmp_path / "ema.pth")
    assert_read_as_torch_reads(tmp_path / "ema.pth", average)
    assert "'state_dict_ema'" in read_torch(tmp_path / "ema.pth").notes[0]


def test_values_that_are_no_tensors_are_dropped_by_name(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1), "step": 3, "extra": None}, tmp_path / "x.pth")
    file = read_torch(tmp_path / "x.pth")
    assert list(file.tensors) == ["w"]
    assert file.dropped == {"step": "not a tensor", "extra": "not a tensor"}


class Calls:
    """Pickles to a call of any function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def archive(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/byteorder", b"little")
        for name, content in records.items():
            file.writestr("archive/" + name.replace("_", "/"), content)
    return path


def hostile_pickles(marker: str) -> dict[str, bytes]:
    touch = f"open({marker!r}, 'w')"
    stolen = Calls(eval, touch)
    text = marker.encode()
    return {
        "os.system": b"\x80\x02cos\nsystem\n(X" + struct.pack("<I", len(text) + 6) + b"touch " + text + b"tR.",
        "reduce": pickle.dumps(stolen, protocol=2),
        "stack global": pickle.dumps(stolen, protocol=4),
        "beside the weights": pickle.dumps({"state_dict": {}, "x": stolen}, protocol=2),
        "as a key": pickle.dumps({(stolen,): 1}, protocol=2),
        "instance opcode": b"\x80\x02(X" + struct.pack("<I", len(touch)) + touch.encode() + b"i__builtin__\neval\n.",
        "object opcode": b"\x80\x02(c__builtin__\neval\nX" + struct.pack("<I", len(touch)) + touch.encode() + b"o.",
        "new object": pickle.dumps(Calls(exec, touch), protocol=5),
        "getattr": b"\x80\x02cos\npopen\n.",
        "torch's own loader": pickle.dumps(Calls(torch.hub.load, "a/b", "c"), protocol=2),
        "numpy's own loader": pickle.dumps(Calls(np.load, marker, None, True), protocol=2),
    }


@pytest.mark.parametrize("kind", hostile_pickles("x"))
def test_a_pickle_that_calls_code_is_refused_and_the_code_does_not_run(kind: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    data = hostile_pickles(str(marker))[kind]
    path = archive(tmp_path / "x.pth", data)
    with pytest.raises(CheckpointError) as caught:
        read_torch(path)
    assert not marker.exists()
    assert "asks to run" in str(caught.value) or "opcode" in str(caught.value)
    assert "\n" not in str(caught.value)
    if kind == "os.system":
        assert "asks to run os.system; it was not run" in str(caught.value)
    if "opcode" not in kind and "loader" not in kind and kind != "getattr":
        # The pickle is a real one: Python's own unpickler does run it.
        subprocess.run([sys.executable, "-c", f"import pickle; pickle.loads({data!r})"], check=False, timeout=60)
        assert marker.exists()


def test_nothing_is_imported_for_a_name_in_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "omegaconf.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "argparse.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    data = b"\x80\x02cargparse\nNamespace\n)\x81comegaconf.dictconfig\nDictConfig\n)R\x86."
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from edgedit.converters.torch_pickle import unpickle; "
        f"before = set(sys.modules); print(unpickle({data!r}, 'x')); assert set(sys.modules) == before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()
    assert done.stdout.count("Opaque") == 2


def test_reading_imports_no_torch(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pth")
    code = (
        "import sys; from pathlib import Path; from edgedit.converters.torch_file import read_torch; "
        f"assert read_torch(Path({str(tmp_path / 'x.pth')!r})).tensors['w'].load().sum() == 2; "
        "assert not {'torch', 'safetensors', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def repacked(path: Path, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> Path:
    """A copy of the archive with each record through `change`; None leaves it out."""
    target = path.with_name("changed.pth")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w", compression) as file:
        for name in source.namelist():
            content = change(name, source.read(name))
            if content is not None:
                file.writestr(name, content)
    return target


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.save({"a": torch.randn(40), "b": torch.randn(6)}, tmp_path / "x.pth")
    return tmp_path / "x.pth"


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_torch(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_compressed_archive_is_refused_before_it_is_inflated(saved: Path) -> None:
    bomb = repacked(saved, lambda name, data: bytes(1 << 24) if "data/" in name else data, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1 << 20
    assert "is compressed" in refused(bomb)


def test_archives_that_are_not_weights_are_told_apart(saved: Path, tmp_path: Path) -> None:
    assert "big-endian" in refused(repacked(saved, lambda n, d: b"big" if n.endswith("byteorder") else d))
    assert "has no data" in refused(repacked(saved, lambda n, d: None if n.endswith("data/1") else d))
    assert "its record has 3" in refused(repacked(saved, lambda n, d: d[:3] if n.endswith("data/1") else d))
    assert "not one of torch's" in refused(repacked(saved, lambda n, d: None if n.endswith(".pkl") else d))
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "script.pt")
    assert "TorchScript" in refused(tmp_path / "script.pt")
    torch.save({"a": torch.ones(1)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert "torch's format of before 1.6: save it again" in refused(tmp_path / "old.pth")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pth")
    assert "asks to run torch.nn.modules.linear.Linear" in refused(tmp_path / "module.pth")
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "sparse.pth")
    assert "_rebuild_sparse_tensor" in refused(tmp_path / "sparse.pth")
    for value in (torch.ones(1), [torch.ones(1)], 3, {"a": 1}, {"deep": {"deeper": {"w": torch.ones(1)}}}):
        torch.save(value, tmp_path / "value.pth")
        assert "no dict of weights" in refused(tmp_path / "value.pth")
    torch.save({1: torch.ones(1)}, tmp_path / "numbered.pth")
    assert "not text" in refused(tmp_path / "numbered.pth")


def rebuild(count: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], key: str = "0") -> bytes:
    """The pickle of {"w": a float32 view} as torch writes it, with numbers that torch would not."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, key, "cpu", count) if isinstance(obj, Storage) else None

    view = Calls(torch._utils._rebuild_tensor_v2, Storage(), offset, shape, stride, False, OrderedDict())
    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({"w": view})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("count", "offset", "shape", "stride", "message"),
    [
        (4, 0, (5,), (1,), "beyond its storage"),
        (4, 1, (4,), (1,), "beyond its storage"),
        (4, 0, (2, 2), (3, 1), "beyond its storage"),
        (4, 1 << 61, (1,), (1,), "beyond its storage"),
        (4, 0, (1 << 40,), (0,), "claims the shape"),
        (4, 0, (1 << 61, 1 << 61), (0, 0), "claims the shape"),
        (4, 0, (0, 1 << 61, 1 << 61), (1, 1, 1), "claims the shape"),
        (5, 0, (4,), (1,), "is promised 20 bytes"),
        (4, -1, (1,), (1,), "impossible size"),
        (4, 0, (-1,), (1,), "impossible size"),
        (4, 3, (2,), (-1,), "impossible size"),
        (4, 0, (2,), (1, 1), "impossible size"),
        (4, 0, (1,) * 70, (1,) * 70, "impossible size"),
        (4, 0, (True,), (1,), "impossible size"),
        (-4, 0, (1,), (1,), "storage that torch would not write"),
    ],
)
def test_a_view_beyond_its_storage_is_refused(
    count: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    sound = archive(tmp_path / "sound.pth", rebuild(4, 0, (4,), (1,)), data_0=bytes(16))
    assert read_torch(sound).tensors["w"].load().tolist() == [0, 0, 0, 0]
    assert message in refused(archive(tmp_path / "x.pth", rebuild(count, offset, shape, stride), data_0=bytes(16)))


def test_a_storage_key_is_no_path(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(16))
    for key in ("../../secret", str(tmp_path / "secret"), "..\\..\\secret", ""):
        path = archive(tmp_path / "x.pth", rebuild(4, 0, (4,), (1,), key), data_0=bytes(16))
        assert "has no data in the file" in refused(path)


def test_overlapping_and_repeated_records_are_refused(tmp_path: Path) -> None:
    plain = archive(tmp_path / "x.pth", rebuild(4, 0, (4,), (1,)), data_0=bytes(16), data_1=bytes(16))
    body = plain.read_bytes()
    (tmp_path / "twice.pth").write_bytes(body.replace(b"archive/data/1", b"archive/data/0"))
    assert "twice" in refused(tmp_path / "twice.pth")
    # The record data/1 lies, header and all, inside the data of data/0, where the directory is made to point to it.
    header = body[body.rindex(b"PK\x03\x04") : body.index(b"PK\x01\x02")]
    assert b"archive/data/1" in header
    nested = archive(tmp_path / "x.pth", rebuild(4, 0, (4,), (1,)), data_0=bytes(16) + header, data_1=bytes(16))
    changed = bytearray(nested.read_bytes())
    entry = changed.rindex(b"PK\x01\x02")
    changed[entry + 42 : entry + 46] = struct.pack("<I", changed.index(header))
    (tmp_path / "overlap.pth").write_bytes(changed)
    assert "overlapping records" in refused(tmp_path / "overlap.pth")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02N" + b"(" * 5 + b".",
        b"\x80\x02}K\x01s.",
        b"\x80\x02K\x01K\x02.",
        b"\x80\x02h\x05.",
        b"\x80\x02.",
        b"\x80\x02N",
        b"\x80\x02N.N.",
        b"",
        b"garbage",
        b"\x80\x02K\x01K\x02R.",
        b"\x80\x02]K\x01K\x02s.",
        b"\x80\x02}]K\x01s.",
        b"\x80\x02N}b.",
        b"\x80\x02X\xff\xff\xff\x7fabc.",
        b"\x80\x05\x8e" + b"\xff" * 7 + b"\x7f.",
        b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x02NU\x01aQ.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.",
        b"\x80\x02Nr\xff\xff\xff\xff.x",
    ],
)
def test_a_pickle_that_is_not_one_is_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"x\.pth"):
        unpickle(data, "x.pth")


def test_a_pickle_that_explodes_when_it_is_walked_or_hashed_is_harmless() -> None:
    doubling = b"\x80\x02)" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(200))
    assert isinstance(unpickle(doubling + b".", "x"), tuple)
    with pytest.raises(CheckpointError, match="a key of the type tuple"):
        unpickle(b"\x80\x02}" + doubling[2:] + b"Ns.", "x")
    deep = b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b"."
    assert isinstance(unpickle(deep, "x"), list)


def test_a_huge_memo_index_costs_nothing() -> None:
    assert unpickle(b"\x80\x02Nr\xff\xff\xff\xff.", "x") is None


def test_checksums_that_torch_was_told_to_leave_out_are_not_missed(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(5), "v": torch.randn(5)[1:3]}
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_read_as_torch_reads(tmp_path / "x.pth", tensors)


def test_a_flipped_byte_in_the_weights_is_found(tmp_path: Path) -> None:
    base = torch.randn(50)
    torch.save({"whole": base, "part": base[3:9]}, tmp_path / "x.pth")
    body = bytearray((tmp_path / "x.pth").read_bytes())
    place = body.index(base.numpy().tobytes()) + random.randrange(200)
    body[place] ^= 1 << random.randrange(8)
    (tmp_path / "x.pth").write_bytes(body)
    refs = read_torch(tmp_path / "x.pth").tensors
    for name in refs:
        with pytest.raises(CheckpointError, match="checksum"):
            refs[name].load()


FUZZED: dict[str, torch.Tensor] = {
    "a.weight": torch.randn(3, 4),
    "a.bias": torch.randn(3).bfloat16(),
    "view": torch.randn(4, 5).T[1:],
    "flag": torch.tensor([True, False]),
    "eight": torch.randn(4).to(torch.float8_e4m3fn),
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_archive_gives_the_right_tensors_or_a_refusal(data: st.DataObject, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"state_dict": FUZZED}, buffer)
    body = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(0, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    del body[data.draw(st.one_of(st.just(len(body)), st.integers(0, len(body)))) :]
    path = tmp_path / "x.pth"
    path.write_bytes(body)
    try:
        found = {name: ref.load() for name, ref in read_torch(path).tensors.items()}
    except CheckpointError:
        return
    assert list(found) == list(FUZZED)
    for name, array in found.items():
        assert array.tobytes() == raw(FUZZED[name]), name


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_pickle_with_a_right_checksum_is_read_within_bounds_or_refused(
    data: st.DataObject, tmp_path: Path
) -> None:
    buffer = io.BytesIO()
    torch.save({"state_dict": FUZZED, "args": argparse.Namespace(a=1)}, buffer)
    with zipfile.ZipFile(buffer) as source:
        records = {name.partition("/")[2]: source.read(name) for name in source.namelist()}
    body = bytearray(records.pop("data.pkl"))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(body) - 1))
        if data.draw(st.booleans()):
            body[place] = data.draw(st.integers(0, 255))
        else:
            del body[place : place + data.draw(st.integers(1, 9))]
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", bytes(body))
        for name, content in records.items():
            file.writestr(f"x/{name}", content)
    try:
        refs = read_torch(path).tensors
        arrays = {name: ref.load() for name, ref in refs.items()}
    except CheckpointError:
        return
    for name, array in arrays.items():
        assert array.shape == refs[name].shape
        assert array.dtype.name == refs[name].dtype

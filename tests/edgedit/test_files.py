from __future__ import annotations

import hashlib
import os
import random
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from edgedit.errors import InputError
from edgedit.files import atomic_write_bytes, sha256_file


def test_sha256_is_that_of_the_standard_library_and_of_sha256sum(tmp_path: Path, rng: random.Random) -> None:
    for size in (0, 1, 63, 64, 65, rng.randrange(1, 3_000_000)):
        data = rng.randbytes(size)
        (tmp_path / "data").write_bytes(data)
        found = sha256_file(tmp_path / "data")
        assert found == hashlib.sha256(data).hexdigest()
    shown = subprocess.run(["sha256sum", tmp_path / "data"], capture_output=True, text=True, check=True).stdout
    assert shown.split()[0] == found


def test_a_file_is_written_and_replaced_and_nothing_lies_beside_it(tmp_path: Path, rng: random.Random) -> None:
    path = tmp_path / "picture.png"
    for _ in range(3):
        data = rng.randbytes(rng.randrange(10_000))
        atomic_write_bytes(path, data)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    atomic_write_bytes(tmp_path / "atomic", b"")
    assert stat.S_IMODE((tmp_path / "atomic").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    atomic_write_bytes(tmp_path / ("n" * 255), b"x")


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    atomic_write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


def test_a_failed_write_is_one_line_and_keeps_the_old_file(tmp_path: Path) -> None:
    child = (
        "import resource, sys; from edgedit.errors import InputError; from edgedit.files import atomic_write_bytes\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, -1))\n"
        "try: atomic_write_bytes(sys.argv[1], bytes(2000))\n"
        "except InputError as error: print(error)"
    )
    (tmp_path / "old").write_bytes(b"old")
    run = subprocess.run([sys.executable, "-c", child, tmp_path / "old"], capture_output=True, text=True, check=True)
    assert "cannot be written (File too large)" in run.stdout
    assert run.stdout.count("\n") == 1
    assert (tmp_path / "old").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [tmp_path / "old"]


@pytest.mark.parametrize("name", ["no/such/folder/x", "file/x", "folder", "pipe", "n" * 300])
def test_a_place_that_cannot_be_written_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError) as caught:
        atomic_write_bytes(tmp_path / name, b"x")
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "pipe"]


def test_a_device_is_not_replaced_by_a_file() -> None:
    with pytest.raises(InputError, match="not a regular file"):
        atomic_write_bytes("/dev/null", b"x")
    assert Path("/dev/null").is_char_device()

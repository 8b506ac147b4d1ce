from __future__ import annotations

import errno
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgedit.bundle import open_bundle
from edgedit.bundle_writer import BundleWriter
from edgedit.errors import BundleError, ConversionError, EdgeditError

Manifests = Callable[[random.Random], dict[str, Any]]
Fill = Callable[[random.Random, dict[str, Any], Path], None]

CHILD = """
import resource, sys
from pathlib import Path
from edgedit.bundle_writer import BundleWriter
from edgedit.errors import ConversionError
if sys.argv[2] != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
try:
    with BundleWriter(sys.argv[1]) as writer:
        with (writer.root / "weights").open("wb") as file:
            for _ in range(64):
                file.write(b"x" * 4096)
except ConversionError as error:
    print(error)
    sys.exit(2)
"""


@pytest.fixture
def write(
    rng: random.Random, random_manifest: Manifests, fill_bundle: Fill
) -> Callable[[Path, bool], dict[str, bytes]]:
    """A function that writes a random bundle and returns what was put into it."""

    def write(path: Path, overwrite: bool = False) -> dict[str, bytes]:
        manifest = random_manifest(rng)
        with BundleWriter(path, overwrite=overwrite) as writer:
            fill_bundle(rng, manifest, writer.root)
            contents = {name: (writer.root / name).read_bytes() for name in manifest["files"]}
            writer.finish(manifest)
        return contents

    return write


def contents(path: Path) -> dict[str, bytes]:
    files = (file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files if file.name != "manifest.json"}


def message(error: pytest.ExceptionInfo[EdgeditError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_finished_bundle_holds_what_was_written_and_nothing_lies_beside_it(
    tmp_path: Path, write: Callable[..., dict[str, bytes]]
) -> None:
    path = tmp_path / "cat.edgedit"
    written = write(path)
    assert contents(path) == written
    assert {name: entry.size for name, entry in open_bundle(path, verify=True).manifest.files.items()} == {
        name: len(data) for name, data in written.items()
    }
    assert list(tmp_path.iterdir()) == [path]


def test_a_bundle_has_the_permissions_of_any_new_folder(tmp_path: Path, write: Callable[..., dict[str, bytes]]) -> None:
    (tmp_path / "plain").mkdir()
    write(tmp_path / "cat.edgedit")
    assert stat.S_IMODE((tmp_path / "cat.edgedit").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_names_are_relative_to_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., dict[str, bytes]]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("cat.edgedit"))
    open_bundle("cat.edgedit", verify=True)


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1), BundleError("x")])
def test_an_exception_inside_leaves_nothing_and_passes_through(tmp_path: Path, error: BaseException) -> None:
    def convert() -> None:
        with BundleWriter(tmp_path / "cat.edgedit") as writer:
            (writer.root / "onnx").mkdir()
            (writer.root / "onnx" / "weights").write_bytes(b"x" * 1000)
            raise error

    with pytest.raises(type(error)) as caught:
        convert()
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_finish_leaves_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "cat.edgedit") as writer:
        (writer.root / "weights").write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="with block"):
        _ = writer.root


def test_a_bundle_that_is_there_is_replaced_only_when_asked(
    tmp_path: Path, write: Callable[..., dict[str, bytes]]
) -> None:
    path = tmp_path / "cat.edgedit"
    old = write(path)
    with pytest.raises(BundleError) as caught:
        write(path)
    assert "exists already" in message(caught)
    assert contents(path) == old
    new = write(path, overwrite=True)
    assert contents(path) == new
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_to_a_bundle_stays_a_link(tmp_path: Path, write: Callable[..., dict[str, bytes]]) -> None:
    write(tmp_path / "cat.edgedit")
    (tmp_path / "link").symlink_to("cat.edgedit")
    new = write(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "cat.edgedit") == new


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_is_not_a_bundle_is_never_touched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    (tmp_path / "folder" / "manifest.json").write_text('{"name": "another kind of manifest"}')
    (tmp_path / "empty").mkdir()
    for name in ("file", "folder", "empty"):
        with pytest.raises(BundleError) as caught, BundleWriter(tmp_path / name, overwrite=overwrite):
            pass
        assert "is not a bundle, so it is left alone" in message(caught)
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "folder"]


def test_something_that_appears_during_the_conversion_is_not_replaced(
    tmp_path: Path, rng: random.Random, random_manifest: Manifests, fill_bundle: Fill
) -> None:
    path, manifest = tmp_path / "cat.edgedit", random_manifest(rng)

    def convert() -> None:
        with BundleWriter(path) as writer:
            fill_bundle(rng, manifest, writer.root)
            path.mkdir()
            writer.finish(manifest)

    with pytest.raises(BundleError, match="left alone"):
        convert()
    assert list(tmp_path.iterdir()) == [path]
    assert list(path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError) as caught, BundleWriter(tmp_path / "no" / "cat.edgedit"):
        pass
    assert f"the folder {tmp_path / 'no'} does not exist" in message(caught)


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder that this process may enter but not write to, also when the tests run as root."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_folder_that_cannot_be_written_is_named(read_only: Path) -> None:
    with pytest.raises(BundleError) as caught, BundleWriter(read_only / "cat.edgedit"):
        pass
    assert "cannot be written (Permission denied); choose a folder" in message(caught)


def test_a_manifest_that_is_wrong_keeps_the_old_bundle(
    tmp_path: Path,
    rng: random.Random,
    random_manifest: Manifests,
    fill_bundle: Fill,
    write: Callable[..., dict[str, bytes]],
) -> None:
    path = tmp_path / "cat.edgedit"
    old = write(path)
    manifest = random_manifest(rng)

    def convert(change: Callable[[Path], None]) -> None:
        with BundleWriter(path, overwrite=True) as writer:
            fill_bundle(rng, manifest, writer.root)
            change(writer.root)
            writer.finish(manifest)

    component = next(iter(manifest["components"].values()))
    needed = next(iter(component["artefacts"].values()))["files"][0]
    with pytest.raises(BundleError, match=f"{needed} is not listed"):
        convert(lambda root: (root / needed).unlink())
    del manifest["provenance"]
    with pytest.raises(BundleError, match="provenance: missing"):
        convert(lambda root: None)
    assert contents(path) == old
    assert list(tmp_path.iterdir()) == [path]


def test_links_and_awkward_names_do_not_get_into_a_bundle(
    tmp_path: Path, rng: random.Random, random_manifest: Manifests, fill_bundle: Fill
) -> None:
    manifest = random_manifest(rng)

    def convert(change: Callable[[Path], None]) -> None:
        with BundleWriter(tmp_path / "cat.edgedit") as writer:
            fill_bundle(rng, manifest, writer.root)
            change(writer.root)
            writer.finish(manifest)

    with pytest.raises(BundleError, match="plain files only"):
        convert(lambda root: (root / "link").symlink_to("/etc/passwd"))
    with pytest.raises(BundleError, match="plain files only"):
        convert(lambda root: os.mkfifo(root / "pipe"))
    with pytest.raises(BundleError, match="not a name for a file of a bundle"):
        convert(lambda root: (root / "two words").touch())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [OSError(errno.EBUSY, "Device busy"), KeyboardInterrupt()])
def test_a_failed_rename_puts_the_old_bundle_back(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[..., dict[str, bytes]],
    failing: int,
    error: BaseException,
) -> None:
    path = tmp_path / "cat.edgedit"
    old = write(path)
    real, calls = Path.rename, [0]

    def rename(self: Path, target: Path) -> Path:
        calls[0] += 1
        if calls[0] == failing:
            raise error
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(BundleError if isinstance(error, OSError) else KeyboardInterrupt):
        write(path, overwrite=True)
    assert contents(path) == old
    open_bundle(path, verify=True)
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_right_after_the_last_rename_puts_the_old_bundle_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., dict[str, bytes]]
) -> None:
    path = tmp_path / "cat.edgedit"
    old = write(path)
    real, calls = Path.rename, [0]

    def rename(self: Path, target: Path) -> Path:
        calls[0] += 1
        result = real(self, target)
        if calls[0] == 2:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        write(path, overwrite=True)
    assert contents(path) == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_device_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    def convert() -> None:
        with BundleWriter(tmp_path / "cat.edgedit") as writer:
            (writer.root / "weights").symlink_to("/dev/full")
            (writer.root / "weights").write_bytes(b"x" * 100_000)

    with pytest.raises(ConversionError) as caught:
        convert()
    assert "the disk is full (No space left on device), nothing was written; free some space" in message(caught)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_seen_behind_another_exception(tmp_path: Path) -> None:
    def convert() -> None:
        with BundleWriter(tmp_path / "cat.edgedit"):
            try:
                raise OSError(errno.EDQUOT, "Disk quota exceeded")
            except OSError as error:
                raise ValueError("could not save") from error

    with pytest.raises(ConversionError, match="Disk quota exceeded"):
        convert()


def test_an_os_error_of_another_kind_passes_through(tmp_path: Path) -> None:
    def convert() -> None:
        with BundleWriter(tmp_path / "cat.edgedit"):
            (tmp_path / "checkpoint").read_bytes()

    with pytest.raises(FileNotFoundError):
        convert()


def test_a_file_size_limit_is_reported_like_a_full_disk(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", CHILD, tmp_path / "cat.edgedit", "20000"], capture_output=True, text=True
    )
    assert (run.returncode, run.stdout.count("\n")) == (2, 1), run.stderr
    assert "the disk is full (File too large)" in run.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_really_fills_up_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    script = 'mount -t tmpfs -o size=128k tmpfs "$1" || exit 77; shift; "$@"; code=$?; ls -A "$DISK"; exit $code'
    child = [sys.executable, "-c", CHILD, str(tmp_path / "cat.edgedit"), "0"]
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(tmp_path), *child]
    try:
        run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DISK": str(tmp_path)})
    except FileNotFoundError:
        pytest.skip("needs unshare (Linux)")
    if run.returncode in (1, 77):
        pytest.skip(f"may not mount a tmpfs here: {run.stderr.strip()}")
    assert run.returncode == 2, run.stderr
    assert "the disk is full (No space left on device)" in run.stdout
    assert run.stdout.count("\n") == 1, run.stdout


def test_the_manifest_on_disk_is_json_with_every_file(tmp_path: Path, write: Callable[..., dict[str, bytes]]) -> None:
    written = write(tmp_path / "cat.edgedit")
    raw = json.loads((tmp_path / "cat.edgedit" / "manifest.json").read_text(encoding="utf-8"))
    assert raw["files"].keys() == written.keys()
    assert raw["format_version"] == 1

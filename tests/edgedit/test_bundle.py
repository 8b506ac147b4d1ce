from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgedit.bundle import Bundle, is_bundle, open_bundle
from edgedit.bundle_writer import BundleWriter
from edgedit.errors import BundleError

Manifests = Callable[[random.Random], dict[str, Any]]
Fill = Callable[[random.Random, dict[str, Any], Path], None]


@pytest.fixture
def bundle(tmp_path: Path, rng: random.Random, random_manifest: Manifests, fill_bundle: Fill) -> Bundle:
    manifest = random_manifest(rng)
    with BundleWriter(tmp_path / "cat.edgedit") as writer:
        fill_bundle(rng, manifest, writer.root)
        return writer.finish(manifest)


def refused(path: Path, **options: bool) -> str:
    """The message with which a bundle is refused; it must be one line."""
    with pytest.raises(BundleError) as caught:
        open_bundle(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(bundle: Bundle, change: Callable[[dict[str, Any]], None]) -> None:
    raw = json.loads((bundle.path / "manifest.json").read_text())
    change(raw)
    (bundle.path / "manifest.json").write_text(json.dumps(raw))


def test_a_sound_bundle_opens_and_verifies(bundle: Bundle) -> None:
    seen: list[str] = []
    again = open_bundle(str(bundle.path), verify=True)
    again.verify(seen.append)
    assert again.manifest == bundle.manifest
    assert seen == list(bundle.manifest.files)


def test_one_flipped_bit_in_any_file_is_found_and_the_file_is_named(bundle: Bundle, rng: random.Random) -> None:
    for relative in bundle.manifest.files:
        path = bundle.file(relative)
        sound = path.read_bytes()
        damaged = bytearray(sound)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        open_bundle(bundle.path)
        assert f"{relative} is damaged" in refused(bundle.path, verify=True)
        with pytest.raises(BundleError, match="damaged"):
            bundle.verify()
        path.write_bytes(sound)
    bundle.verify()


def test_a_file_of_another_size_is_found_without_reading_it(bundle: Bundle, rng: random.Random) -> None:
    relative = rng.choice(list(bundle.manifest.files))
    with bundle.file(relative).open("ab") as file:
        file.write(b"x")
    assert f"{relative} is damaged" in refused(bundle.path)


def test_a_missing_file_is_named(bundle: Bundle, rng: random.Random) -> None:
    relative = rng.choice(list(bundle.manifest.files))
    bundle.file(relative).unlink()
    assert f"{relative} is missing" in refused(bundle.path)


def test_a_folder_in_place_of_a_file_is_refused(bundle: Bundle, rng: random.Random) -> None:
    relative = rng.choice(list(bundle.manifest.files))
    path = bundle.file(relative)
    path.unlink()
    path.mkdir()
    assert f"{relative} is not a file" in refused(bundle.path)


def test_a_bundle_of_a_newer_format_says_to_upgrade(bundle: Bundle) -> None:
    edit(bundle, lambda raw: raw.update(format_version=2))
    assert "upgrade edgedit" in refused(bundle.path)


@pytest.mark.parametrize("path", ["../secret", "onnx/../../secret", "/etc/passwd", "onnx\\x", "./x", "C:/x", ""])
def test_a_manifest_path_that_leaves_the_bundle_is_refused(bundle: Bundle, path: str) -> None:
    (bundle.path.parent / "secret").write_text("x")

    def listed(raw: dict[str, Any]) -> None:
        raw["files"][path] = {"size": 1, "sha256": "0" * 64}

    def used(raw: dict[str, Any]) -> None:
        component = next(iter(raw["components"].values()))
        next(iter(component["artefacts"].values()))["files"].append(path)

    sound = (bundle.path / "manifest.json").read_text()
    for change in (listed, used):
        (bundle.path / "manifest.json").write_text(sound)
        edit(bundle, change)
        assert "plain path inside the bundle" in refused(bundle.path)
    with pytest.raises(BundleError, match="not a plain path"):
        bundle.file(path)


def test_a_symbolic_link_may_stay_inside_the_bundle_but_not_leave_it(bundle: Bundle, rng: random.Random) -> None:
    relative = rng.choice(list(bundle.manifest.files))
    path = bundle.file(relative)
    inside = bundle.path / "elsewhere"
    path.rename(inside)
    path.symlink_to(inside)
    open_bundle(bundle.path, verify=True)

    outside = bundle.path.parent / "outside"
    inside.rename(outside)
    path.unlink()
    path.symlink_to(outside)
    assert f"{relative} is a link out of the bundle" in refused(bundle.path)

    path.unlink()
    path.symlink_to(path)
    assert f"{relative} is missing" in refused(bundle.path)


def test_a_linked_folder_that_leaves_the_bundle_is_refused(bundle: Bundle) -> None:
    relative = next(path for path in bundle.manifest.files if "/" in path)
    folder = bundle.path / relative.split("/")[0]
    folder.rename(bundle.path.parent / "moved")
    folder.symlink_to(bundle.path.parent / "moved")
    assert "is a link out of the bundle" in refused(bundle.path)


def test_a_bundle_can_be_opened_through_a_link_to_it(bundle: Bundle) -> None:
    link = bundle.path.parent / "link"
    link.symlink_to(bundle.path)
    open_bundle(link, verify=True)


def test_only_listed_files_and_their_folders_are_handed_out(bundle: Bundle) -> None:
    (bundle.path / "extra").write_text("x")
    with pytest.raises(BundleError, match="not listed"):
        bundle.file("extra")
    with pytest.raises(BundleError, match="not listed"):
        bundle.file("manifest.json")
    relative = next(path for path in bundle.manifest.files if "/" in path)
    assert bundle.file(relative.rpartition("/")[0]).is_dir()


def test_what_is_not_a_bundle_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    assert "there is no such bundle" in refused(tmp_path / "nothing")
    assert "a bundle is a folder" in refused(tmp_path / "file")
    assert "no manifest.json" in refused(tmp_path / "folder")
    (tmp_path / "folder" / "manifest.json").mkdir()
    assert "cannot be read" in refused(tmp_path / "folder")
    assert not any(is_bundle(path) for path in tmp_path.iterdir())


def test_a_manifest_cut_short_anywhere_is_refused(bundle: Bundle, rng: random.Random) -> None:
    path = bundle.path / "manifest.json"
    sound = path.read_bytes().rstrip()
    for _ in range(50):
        path.write_bytes(sound[: rng.randrange(len(sound))])
        assert "not JSON" in refused(bundle.path)


def test_an_enormous_manifest_is_refused_without_being_parsed(bundle: Bundle) -> None:
    with (bundle.path / "manifest.json").open("r+b") as file:
        file.truncate((64 << 20) + 1)
    assert "far too large" in refused(bundle.path)


def test_asking_for_what_the_bundle_lacks_names_what_it_has(bundle: Bundle) -> None:
    name, component = next(iter(bundle.manifest.components.items()))
    assert bundle.component(name) is component
    backend = next(iter(component.artefacts))
    assert bundle.artefact(name, backend) is component.artefacts[backend]
    with pytest.raises(BundleError, match=f"has no upscaler .*{name}"):
        bundle.component("upscaler")
    with pytest.raises(BundleError, match=f"only: .*{backend}.*--to tpu"):
        bundle.artefact(name, "tpu")
    assert bundle.need(bundle.manifest.provenance, "provenance") is bundle.manifest.provenance
    with pytest.raises(BundleError, match="has no prompt recipe"):
        bundle.need(None, "prompt recipe")


def test_the_model_hash_is_the_same_for_every_copy_and_changes_with_any_file(
    bundle: Bundle, tmp_path: Path, rng: random.Random
) -> None:
    shutil.copytree(bundle.path, tmp_path / "copy")
    copy = open_bundle(tmp_path / "copy")
    assert copy.model_hash == bundle.model_hash
    listed = "".join(
        f"{hashlib.sha256(copy.file(p).read_bytes()).hexdigest()}  {p}\n" for p in sorted(copy.manifest.files)
    )
    assert copy.model_hash == hashlib.sha256(listed.encode()).hexdigest()

    path = rng.choice(list(copy.manifest.files))
    edit(copy, lambda raw: raw["files"][path].update(sha256="0" * 64))
    assert open_bundle(copy.path).model_hash != bundle.model_hash

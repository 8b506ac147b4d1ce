"""What an app ships: whole, sound, and nothing that it does not load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgedit
from edgedit.api import BUILTIN
from edgedit.app_export import export_app
from edgedit.bundle import open_bundle
from edgedit.errors import BundleError

pytest.importorskip("coremltools")


@pytest.fixture(scope="module")
def bundle_path(
    saved_pipeline: Callable[[str], tuple[Any, Path, int]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "x.edgedit"
    edgedit.convert(
        saved_pipeline("pixart-sigma")[1],
        path,
        to=("onnx", "coreml"),
        sizes=[(16, 16)],
        components=("transformer", "text_encoder", "decoder"),
        measure=False,
    )
    return path


def test_an_export_is_a_bundle_of_packages_and_tokenizer_alone(bundle_path: Path, tmp_path: Path) -> None:
    report = export_app(bundle_path, tmp_path / "app")
    exported = open_bundle(tmp_path / "app", verify=True)
    files = {path.relative_to(tmp_path / "app").as_posix() for path in (tmp_path / "app").rglob("*") if path.is_file()}
    assert files == {*exported.manifest.files, "manifest.json", "report.json"}
    assert all(path.startswith(("coreml/", "tokenizer/")) for path in exported.manifest.files)
    assert all(list(part.artefacts) == ["coreml"] for part in exported.manifest.components.values())
    assert report.systems == {"iOS": "18.0", "macOS": "15.0", "visionOS": "2.0"}
    assert report.pictures == [(16, 16)]
    assert set(report.components) == {"transformer", "text_encoder", "decoder"}
    written = json.loads((tmp_path / "app" / "report.json").read_text())
    assert written["components"] == report.components
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_export_is_replaced_only_when_asked_and_only_if_it_is_one(bundle_path: Path, tmp_path: Path) -> None:
    export_app(bundle_path, tmp_path / "app")
    with pytest.raises(BundleError, match="exists already"):
        export_app(bundle_path, tmp_path / "app")
    export_app(bundle_path, tmp_path / "app", overwrite=True)
    (tmp_path / "other").mkdir()
    with pytest.raises(BundleError, match="exists already"):
        export_app(bundle_path, tmp_path / "other", overwrite=True)
    with pytest.raises(BundleError, match="does not exist; make it first"):
        export_app(bundle_path, tmp_path / "no" / "app")


def test_a_bundle_without_packages_and_a_damaged_one_leave_nothing(bundle_path: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="has no Core ML package; convert it again with --to coreml"):
        export_app(BUILTIN, tmp_path / "app")
    import shutil

    copy = Path(shutil.copytree(bundle_path, tmp_path / "copy.edgedit"))
    weights = next(copy.rglob("Transformer.mlpackage/**/weight.bin"))
    data = bytearray(weights.read_bytes())
    data[100] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BundleError, match="is damaged"):
        export_app(copy, tmp_path / "app")
    assert [path.name for path in tmp_path.iterdir()] == ["copy.edgedit"]

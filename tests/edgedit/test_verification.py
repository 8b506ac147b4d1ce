from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgedit
from edgedit.errors import BundleError
from edgedit.files import sha256_file

Saved = Callable[[str], tuple[Any, Path, int]]


@pytest.fixture(scope="module")
def bundle_path(saved_pipeline: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "x.edgedit"
    edgedit.convert(saved_pipeline("pixart-sigma")[1], path, dtype="fp16")
    return path


def test_a_whole_bundle_passes_and_tells_how_far_each_component_is(bundle_path: Path) -> None:
    report = edgedit.verify(bundle_path)
    assert report.passed
    assert {check.name for check in report.components} == {"transformer", "text_encoder", "decoder", "encoder"}
    assert all(check.agreement is not None and 0 < check.agreement.relative_l2 < 1e-2 for check in report.components)
    assert json.loads(json.dumps(report.as_dict()))["passed"] is True


def test_one_flipped_byte_anywhere_is_found(bundle_path: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng()
    files = [p.relative_to(bundle_path) for p in bundle_path.rglob("*") if p.is_file() and p.name != "manifest.json"]
    for relative in files:
        copy = Path(shutil.copytree(bundle_path, tmp_path / str(relative).replace("/", "_")))
        data = bytearray((copy / relative).read_bytes())
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        (copy / relative).write_bytes(data)
        with pytest.raises(BundleError, match=relative.as_posix()):
            edgedit.verify(copy)


def test_weights_that_were_swapped_with_their_hash_still_fail(bundle_path: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle_path, tmp_path / "copy.edgedit"))
    data = copy / "onnx" / "transformer.onnx.data"
    weights = np.fromfile(data, np.float16)
    weights[::2] = 0
    weights.tofile(data)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["onnx/transformer.onnx.data"]["sha256"] = sha256_file(data)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    report = edgedit.verify(copy)
    assert not report.passed
    assert [check.name for check in report.components if not check.passed] == ["transformer"]


def test_without_recorded_outputs_the_graphs_of_the_bundle_are_compared(saved_pipeline: Saved, tmp_path: Path) -> None:
    edgedit.convert(saved_pipeline("pixart-sigma")[1], tmp_path / "x.edgedit", measure=False)
    report = edgedit.verify(tmp_path / "x.edgedit")
    assert report.passed
    assert all("this bundle" in check.against for check in report.components)

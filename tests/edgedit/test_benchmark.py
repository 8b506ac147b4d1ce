from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgedit
from edgedit.benchmark import benchmark
from edgedit.errors import BundleError, InputError

Saved = Callable[[str], tuple[Any, Path, int]]


@pytest.fixture(scope="module")
def bundle_path(saved_pipeline: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "x.edgedit"
    edgedit.convert(saved_pipeline("sana-sprint")[1], path)
    return path


def test_every_component_is_timed_at_the_size_that_was_asked_for(bundle_path: Path) -> None:
    report = benchmark(bundle_path, width=16, height=24, length=11, repeat=2)
    found = {item.name: item for item in report.components}
    assert set(found) == {"transformer", "text_encoder", "decoder", "encoder"}
    assert found["transformer"].shapes["latents"] == [1, 4, 12, 8]
    assert found["transformer"].shapes["encoder_hidden_states"][1] == 11
    assert found["encoder"].shapes["image"] == [1, 3, 24, 16]
    assert all(0 < item.best_seconds <= item.median_seconds for item in report.components)
    assert json.loads(json.dumps(report.as_dict()))["width"] == 16


def test_a_transformer_alone_can_be_timed(saved_pipeline: Saved, tmp_path: Path) -> None:
    edgedit.convert(saved_pipeline("pixart-sigma")[1] / "transformer", tmp_path / "x.edgedit")
    report = benchmark(tmp_path / "x.edgedit", width=64, height=64, repeat=1)
    assert [item.name for item in report.components] == ["transformer"]
    assert report.components[0].shapes["latents"] == [1, 4, 8, 8]


def test_what_cannot_be_timed_is_refused(bundle_path: Path) -> None:
    with pytest.raises(InputError, match="repeat"):
        benchmark(bundle_path, repeat=0)
    with pytest.raises(InputError, match="17×16 does not divide"):
        benchmark(bundle_path, width=17, height=16)
    with pytest.raises(BundleError, match="unet"):
        benchmark(bundle_path, components=["unet"])

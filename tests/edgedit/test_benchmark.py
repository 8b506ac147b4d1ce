from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import edgedit
from edgedit.bench import contenders
from edgedit.benchmark import benchmark
from edgedit.errors import BundleError, CheckpointError, EdgeditError, InputError, RuntimeUnavailableError

Saved = Callable[[str], tuple[Any, Path, int]]


@pytest.fixture(scope="module")
def bundle_path(saved_pipeline: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "x.edgedit"
    edgedit.convert(saved_pipeline("sana-sprint")[1], path)
    return path


def test_every_component_is_timed_at_the_size_that_was_asked_for(bundle_path: Path) -> None:
    report = benchmark(bundle_path, width=16, height=24, length=11, batch=2, repeat=2, threads=1)
    found = {item.name: item for item in report.components}
    assert set(found) == {"transformer", "text_encoder", "decoder", "encoder"}
    assert found["transformer"].shapes["latents"] == [2, 4, 12, 8]
    assert found["transformer"].shapes["encoder_hidden_states"][:2] == [2, 11]
    assert found["encoder"].shapes["image"] == [2, 3, 24, 16]
    for item in report.components:
        assert 0 < item.best_seconds <= item.median_seconds
        assert min(item.cold_seconds, item.warm_seconds, item.first_seconds) > 0
        assert len(item.seconds) == 2
        assert item.ratio == 1.0
        assert item.agreement is None
    assert report.reference is None
    assert json.loads(json.dumps(report.as_dict()))["components"][0]["median_seconds"] > 0


def test_a_transformer_alone_can_be_timed(saved_pipeline: Saved, tmp_path: Path) -> None:
    edgedit.convert(saved_pipeline("pixart-sigma")[1] / "transformer", tmp_path / "x.edgedit")
    report = benchmark(tmp_path / "x.edgedit", width=64, height=64, repeat=1, threads=1)
    assert [item.name for item in report.components] == ["transformer"]
    assert report.components[0].shapes["latents"] == [1, 4, 8, 8]


@pytest.mark.parametrize(
    ("kind", "names", "rounds"),
    [("pixart-alpha", ["transformer"], 1), ("sana-sprint", ["transformer", "text_encoder", "decoder", "encoder"], 2)],
    ids=["pixart-alpha", "sana-sprint"],
)
def test_torch_beside_the_bundle_computes_the_same_from_the_same_inputs(
    saved_pipeline: Saved, tmp_path: Path, kind: str, names: list[str], rounds: int
) -> None:
    edgedit.convert(saved_pipeline(kind)[1], tmp_path / "x.edgedit")
    report = benchmark(
        tmp_path / "x.edgedit",
        vs=["diffusers"],
        components=names,
        width=16,
        height=16,
        length=5,
        repeat=1,
        rounds=rounds,
        threads=1,
    )
    ours, theirs = report.contenders
    assert report.reference == theirs.label == "diffusers"
    assert "torch" in theirs.runtime
    assert [part.name for part in ours.components] == names
    for part, other in zip(ours.components, theirs.components, strict=True):
        assert part.agreement is not None
        assert part.agreement.relative_l2 < 1e-4, part.name
        assert other.agreement is None
        assert len(part.seconds) == len(other.seconds) == rounds
        assert other.ratio == pytest.approx(other.median_seconds / part.median_seconds)


@pytest.mark.parametrize(
    ("name", "packages", "tolerance"),
    [
        ("ort-export", ("onnxscript",), 1e-4),
        ("openvino", ("openvino",), 1e-4),
        pytest.param("openvino-w8a8", ("openvino", "nncf"), 0.5, marks=pytest.mark.full),
    ],
    ids=["ort-export", "openvino", "openvino-w8a8"],
)
def test_what_others_export_is_timed_on_the_same_inputs(
    saved_pipeline: Saved, tmp_path: Path, name: str, packages: tuple[str, ...], tolerance: float
) -> None:
    for package in packages:
        pytest.importorskip(package)
    edgedit.convert(saved_pipeline("pixart-sigma")[1], tmp_path / "x.edgedit", components=["transformer"])
    report = benchmark(
        tmp_path / "x.edgedit",
        vs=[name],
        source=saved_pipeline("pixart-sigma")[1],
        components=["transformer"],
        width=32,
        height=32,
        length=5,
        repeat=1,
        rounds=1,
        threads=1,
    )
    agreement = report.contenders[0 if report.reference == name else 1].components[0].agreement
    assert agreement is not None
    assert agreement.relative_l2 < tolerance


def test_another_bundle_can_be_the_contender(saved_pipeline: Saved, bundle_path: Path, tmp_path: Path) -> None:
    edgedit.convert(saved_pipeline("sana-sprint")[1], tmp_path / "x.edgedit", dtype="fp16", components=["transformer"])
    options: dict[str, Any] = {"components": ["transformer"], "width": 16, "height": 16, "repeat": 1, "threads": 1}
    report = benchmark(bundle_path, vs=[str(tmp_path / "x.edgedit")], rounds=1, **options)
    assert [item.label for item in report.contenders] == ["x.edgedit", "x.edgedit (2)"]
    fit = report.contenders[1].components[0].agreement
    assert fit is not None
    assert 0 < fit.relative_l2 < 1e-2
    edgedit.convert(saved_pipeline("pixart-sigma")[1], tmp_path / "p.edgedit", components=["decoder"])
    with pytest.raises(BundleError, match="has no transformer"):
        benchmark(bundle_path, vs=[str(tmp_path / "p.edgedit")], rounds=1, **options)


def test_what_cannot_be_timed_is_refused(bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="repeat"):
        benchmark(bundle_path, repeat=0)
    with pytest.raises(InputError, match="17×16 does not divide"):
        benchmark(bundle_path, width=17, height=16)
    with pytest.raises(BundleError, match="unet"):
        benchmark(bundle_path, components=["unet"])
    with pytest.raises(InputError, match="--vs ollama: choose one of diffusers, ort-export, openvino"):
        benchmark(bundle_path, vs=["ollama"])
    with pytest.raises(InputError, match="there is no such folder"):
        benchmark(bundle_path, vs=["diffusers"], source=tmp_path / "none")
    with pytest.raises(CheckpointError, match="torch finds no transformer there"):
        benchmark(bundle_path, vs=["diffusers"], source=tmp_path, components=["transformer"], width=16, height=16)
    monkeypatch.setattr(contenders, "find_spec", lambda name: None if name == "nncf" else find_spec(name))
    with pytest.raises(RuntimeUnavailableError, match="--vs openvino-w8a8 needs nncf, not installed here; run: pip"):
        benchmark(bundle_path, vs=["openvino-w8a8"])


def test_a_process_that_breaks_down_is_one_line(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setattr("edgedit.bench.spawn.sys.executable", "/bin/false")
    with pytest.raises(EdgeditError, match="the process broke down: it ended with status 1"):
        benchmark(bundle_path, width=16, height=16)

"""A tiny pipeline converted for Core ML: what the bundle says, draws and refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgedit
from edgedit.bundle import open_bundle
from edgedit.converters.coreml import CoremlOptions
from edgedit.converters.fixed_sizes import fixed_sizes
from edgedit.errors import ConversionError, InputError, RuntimeUnavailableError
from edgedit.runtimes.base import RuntimeOptions, open_runtime

pytest.importorskip("coremltools")

Saved = Callable[[str], tuple[Any, Path, int]]
SIZES = [(16, 16), (24, 8)]


@pytest.fixture(scope="module")
def bundle_path(saved_pipeline: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "x.edgedit"
    edgedit.convert(saved_pipeline("sana")[1], path, to=("onnx", "coreml"), sizes=SIZES)
    return path


def test_the_manifest_lists_every_size_and_says_how_the_package_agrees(bundle_path: Path) -> None:
    manifest = open_bundle(bundle_path, verify=True).manifest
    for name, component in manifest.components.items():
        artefact = component.artefacts["coreml"]
        assert artefact.parity is not None
        assert artefact.parity.relative_l2 < 1e-5
        assert artefact.graph.startswith("coreml/")
        assert artefact.graph.endswith(".mlpackage")
        assert not component.artefacts["onnx"].functions
        pictures = {(f.sizes.get("image_width"), f.sizes.get("image_height")) for f in artefact.functions}
        if name == "text_encoder":
            assert [f.name for f in artefact.functions] == [None]
        else:
            assert pictures == set(SIZES)
            assert [f.name for f in artefact.functions] == ["size_16x16", "size_24x8"]
    assert manifest.provenance.options["coreml"] == {
        "target": "iOS18",
        "attention": "fused",
        "weights": None,
        "compute_units": "all",
        "chunk_bytes": 4 << 30,
        "sizes": [[16, 16], [24, 8]],
    }


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_core_ml_draws_the_picture_that_onnx_runtime_draws(bundle_path: Path, width: int, height: int) -> None:
    pictures = []
    for backend, options in (("onnx", {}), ("coreml", {"interpreter": True})):
        with edgedit.load(bundle_path, backend, **options) as pipe:
            result = pipe.generate("a red cat", seed=5, steps=2, width=width, height=height)
            pictures.append(np.asarray(result.images[0]).astype(int))
    assert pictures[0].shape == (height, width, 3)
    assert np.abs(pictures[0] - pictures[1]).max() <= 2


def test_verify_checks_all_backends_and_their_pictures(bundle_path: Path) -> None:
    report = edgedit.verify(bundle_path, backend="all", interpreter=True)
    assert report.passed
    assert {check.backend for check in report.components} == {"onnx", "coreml"}
    assert len(report.components) == 8
    assert all(check.agreement is not None for check in report.components)


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML is there")
def test_off_a_mac_core_ml_runs_only_where_the_interpreter_is_asked_for(bundle_path: Path) -> None:
    with pytest.raises(RuntimeUnavailableError, match="add --interpreter"):
        edgedit.load(bundle_path, "coreml")
    assert edgedit.load(bundle_path).runtime.name == "onnx"
    report = edgedit.verify(bundle_path, backend="all")
    assert {check.backend for check in report.components} == {"onnx"}
    assert any("coreml: not checked" in note for note in report.notes)


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("onnx", {"interpreter": True}, "--interpreter goes with --backend coreml only"),
        ("onnx", {"compute_units": "cpu"}, "--compute-units goes with"),
        ("coreml", {"emulate_fp16": True}, "add --interpreter"),
        ("coreml", {"interpreter": True, "compute_units": "cpu"}, "has no compute units"),
        ("coreml", {"interpreter": True, "threads": 2}, "--threads does not go with"),
        ("coreml", {"interpreter": True, "providers": ("cpu",)}, "--provider does not go with"),
    ],
)
def test_options_of_another_backend_are_refused(
    backend: str, options: dict[str, Any], message: str, bundle_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        open_runtime(open_bundle(bundle_path), backend, RuntimeOptions(**options))


def test_half_precision_without_onnx_has_a_preview_and_agrees(saved_pipeline: Saved, tmp_path: Path) -> None:
    report = edgedit.convert(
        saved_pipeline("pixart-sigma")[1], tmp_path / "x.edgedit", to=("coreml",), dtype="fp16", sizes=[(16, 16)]
    )
    assert all(c.parity is not None and 0 < c.parity["relative_l2"] < 2e-2 for c in report.components)
    bundle = open_bundle(tmp_path / "x.edgedit")
    assert bundle.manifest.latents is not None
    assert bundle.manifest.latents.preview is not None
    assert not (tmp_path / "x.edgedit" / "onnx").exists()
    with edgedit.load(tmp_path / "x.edgedit", "coreml", interpreter=True, emulate_fp16=True) as pipe:
        assert pipe.generate("a cat", seed=1, steps=2).images[0].size == (16, 16)


def test_a_component_over_the_limit_becomes_chunks_that_run_as_one(saved_pipeline: Saved, tmp_path: Path) -> None:
    source, path = saved_pipeline("sana")[1], tmp_path / "x.edgedit"
    chosen = CoremlOptions(chunk_bytes=60_000)
    report = edgedit.convert(
        source, path, to=("onnx", "coreml"), sizes=SIZES, coreml=chosen, components=("transformer", "decoder")
    )
    parities = [a.parity["relative_l2"] for c in report.components for a in c.artefacts if a.parity is not None]
    assert len(parities) == 4
    assert max(parities) < 1e-5
    bundle = open_bundle(path, verify=True)
    artefact = bundle.artefact("transformer", "coreml")
    assert len(artefact.chunks) >= 2
    assert artefact.graph == artefact.chunks[0]
    for chunk in artefact.chunks:
        assert (path / chunk / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size < 2 * 60_000
    assert edgedit.verify(path, backend="coreml", interpreter=True).passed
    with pytest.raises(ConversionError, match="store it in fewer bits"):
        edgedit.convert(source, tmp_path / "y", to=("coreml",), sizes=SIZES, coreml=CoremlOptions(chunk_bytes=500))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": ("coreml",), "sizes": [(18, 16)]}, "size 18x16: both sides must be multiples of"),
        ({"to": ("onnx",), "sizes": [(16, 16)]}, "need the target coreml or mlx"),
        ({"to": ("tpu",)}, "unknown target 'tpu'; choose from: onnx, coreml"),
        ({"to": ("coreml",), "sizes": [(16, 16)], "components": ("transformer",)}, "need the autoencoder"),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(
    options: dict[str, Any], message: str, saved_pipeline: Saved, tmp_path: Path
) -> None:
    with pytest.raises(ConversionError, match=message) as caught:
        edgedit.convert(saved_pipeline("pixart-sigma")[1], tmp_path / "x.edgedit", **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConversionError, match="iOS18, iOS26"):
        CoremlOptions(target="iOS3")


def test_lengths_come_from_the_prompt_recipe_and_sizes_from_the_model() -> None:
    prompt = {
        "positive": {"max_length": 310, "select": {"first": 1, "last": 299}},
        "negative": {"max_length": 300, "select": None},
    }
    runtime = {"transformer": {"patch_size": 2, "sample_size": 64}, "decoder": {"scale_factor": 8}}
    sizes = fixed_sizes(None, runtime, prompt, max_length=300)
    assert sizes.pictures == ((512, 512),)
    assert (sizes.encoder_length, sizes.text_length) == (310, 300)
    (function,) = sizes.functions("transformer")
    assert function.dims == {
        "batch": 1,
        "length": 300,
        "height": 64,
        "width": 64,
        "tokens": 1024,
        "image_height": 512,
        "image_width": 512,
    }
    assert sizes.functions("text_encoder")[0].dims == {"batch": 1, "length": 310}
    assert fixed_sizes([(64, 32), (32, 64), (64, 32)], runtime, None, max_length=120).pictures == ((64, 32), (32, 64))

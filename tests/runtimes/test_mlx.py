from __future__ import annotations

import builtins
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_blas  # noqa: F401  (before MLX)
import numpy as np
import pytest

import edgedit
from edgedit.bundle import open_bundle
from edgedit.converters.architectures.layers import Linear, Module, silu
from edgedit.converters.graph import Component, TensorSpec, bind, build
from edgedit.converters.lowerings import mlx as lowering
from edgedit.converters.tensors import TensorRef
from edgedit.errors import BundleError, ConversionError, InputError, RuntimeUnavailableError
from edgedit.runtimes import mlx as runtime_module
from edgedit.runtimes.base import RuntimeOptions, choose_backend, open_runtime

mx = pytest.importorskip("mlx.core")

Saved = Callable[[str], tuple[Any, Path, int]]


@pytest.fixture(scope="module")
def bundle_path(saved_pipeline: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "x.edgedit"
    edgedit.convert(saved_pipeline("pixart-sigma")[1], path, to=("mlx", "onnx"))
    return path


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng().standard_normal(shape).astype(np.float32)


def ids(length: int = 7) -> dict[str, np.ndarray]:
    values = np.random.default_rng().integers(0, 30, (1, length))
    return {"input_ids": values, "attention_mask": np.ones_like(values)}


def test_a_session_agrees_with_onnx_runtime_and_takes_every_size(bundle_path: Path) -> None:
    bundle = open_bundle(bundle_path)
    here, there = (open_runtime(bundle, name).open("text_encoder") for name in ("mlx", "onnx"))
    for length in (7, 3, 7, 11):
        inputs = ids(length)
        found, wanted = here.run(inputs)["hidden_states"], there.run(inputs)["hidden_states"]
        assert found.dtype == np.float32
        assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted)


def test_a_program_is_made_once_for_each_set_of_shapes_and_old_ones_are_let_go(
    bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session: Any = open_runtime(open_bundle(bundle_path), "mlx").open("text_encoder")
    made: list[int] = []
    program = session._program
    monkeypatch.setattr(session, "_program", lambda *a: made.append(1) or program(*a))
    monkeypatch.setattr(runtime_module, "_PROGRAMS", 2)
    for length in (3, 4, 3, 4, 5, 4, 5, 3):
        session.run(ids(length))
    assert len(made) == 4
    assert len(session._functions) == 2


def test_weights_are_read_when_they_are_first_used_and_freed_on_close(saved_pipeline: Saved, bundle_path: Path) -> None:
    session: Any = open_runtime(open_bundle(bundle_path), "mlx").open("decoder")
    mx.clear_cache()
    before = mx.get_active_memory()
    session.run({"latents": np.zeros((1, 4, 4, 4), np.float32)})
    size = next(iter(session._weights.values())).nbytes
    assert mx.get_active_memory() >= before + size
    session.close()
    mx.clear_cache()
    assert mx.get_active_memory() <= before
    with pytest.raises(BundleError, match="closed"):
        session.run({"latents": np.zeros((1, 4, 4, 4), np.float32)})


class Small(Module):
    """A product and an activation: one kernel to fuse."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = Linear(6, 5)

    def forward(self, op: Any, x: Any) -> Any:
        return silu(op, self.proj(op, x))


def test_compiled_programs_compute_what_replayed_ones_compute(tmp_path: Path) -> None:
    spec = TensorSpec("x", "float32", ("batch", 6)), TensorSpec("y", "float32", ("batch", 5))
    model = build(Component("decoder", "Small", Small(), spec[:1], spec[1:]))
    arrays = {"proj.weight": noise(5, 6), "proj.bias": noise(5)}
    bind(model, {key: TensorRef(name=key, dtype="float32", shape=a.shape, load=a.copy) for key, a in arrays.items()})
    files = [tmp_path / path for path in lowering.write(model, tmp_path, "decoder", dtype="fp32").files]
    plain, compiled = (
        runtime_module.MlxSession(*files, device="cpu", compiled=flag, label="x") for flag in (False, True)
    )
    for batch in (2, 3, 2):
        x = noise(batch, 6)
        wanted = x @ arrays["proj.weight"].T + arrays["proj.bias"]
        wanted = wanted / (1 + np.exp(-wanted))
        for session in (plain, compiled):
            assert np.allclose(session.run({"x": x})["y"], wanted, rtol=1e-5, atol=1e-5)


def test_the_same_picture_on_both_backends(saved_pipeline: Saved, bundle_path: Path) -> None:
    pictures = []
    for backend in ("onnx", "mlx"):
        with edgedit.load(bundle_path, backend, use_cache=False) as pipe:
            result = pipe.generate("a red cat", seed=5, steps=3)
            pictures.append(np.asarray(result.images[0], np.int16))
    assert result.recipe["backend"] == "mlx"
    assert np.abs(pictures[0] - pictures[1]).max() <= 2


def test_auto_takes_the_gpu_where_there_is_one_and_says_why(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(bundle_path)
    monkeypatch.setattr(runtime_module, "has_gpu", lambda: False)
    choice = choose_backend(bundle)
    assert (choice.backend, choice.reason) == ("onnx", "the fastest on a CPU")
    assert open_runtime(bundle).name == "onnx"
    monkeypatch.setattr(runtime_module, "has_gpu", lambda: True)
    assert choose_backend(bundle).backend == "mlx"
    assert "GPU" in choose_backend(bundle).reason


def test_a_bundle_for_mlx_alone_runs_anywhere_that_mlx_does(saved_pipeline: Saved, tmp_path: Path) -> None:
    report = edgedit.convert(
        saved_pipeline("sana")[1], tmp_path / "x.edgedit", to=("mlx",), dtype="fp16", sizes=[(32, 64)]
    )
    assert {artefact.backend for part in report.components for artefact in part.artefacts} == {"mlx"}
    bundle = open_bundle(tmp_path / "x.edgedit", verify=True)
    assert not list((tmp_path / "x.edgedit").rglob("onnx/*"))
    choice = choose_backend(bundle)
    assert choice.backend == "mlx"
    exported = bundle.artefact("transformer", "mlx").exported
    assert exported is not None
    latents = bundle.manifest.latents
    assert latents is not None
    assert exported.sizes[0]["width"] == 32 // latents.scale_factor
    assert {size["batch"] for size in exported.sizes} == {1, 2}
    report = edgedit.verify(tmp_path / "x.edgedit")
    assert report.passed
    assert {check.precision for check in report.components} == {"fp16"}


def test_verify_compares_every_backend_component_by_component_and_in_a_picture(bundle_path: Path) -> None:
    report = edgedit.verify(bundle_path, backend="all", pictures=True)
    assert report.passed
    assert {(check.name, check.backend) for check in report.components} == {
        (name, backend) for name in ("transformer", "text_encoder", "decoder", "encoder") for backend in ("onnx", "mlx")
    }
    (picture,) = report.pictures
    assert (picture.backend, picture.against, picture.passed) == ("mlx", "onnx", True)
    assert picture.levels <= 2
    alone = edgedit.verify(bundle_path, backend="mlx")
    assert {check.backend for check in alone.components} == {"mlx"}
    assert not alone.pictures


def test_verify_finds_mlx_weights_that_were_swapped(bundle_path: Path, tmp_path: Path) -> None:
    import json

    from edgedit.files import sha256_file

    copy = Path(shutil.copytree(bundle_path, tmp_path / "copy.edgedit"))
    file = copy / "mlx" / "decoder.safetensors"
    weights = dict(mx.load(str(file)))
    mx.eval(weights)
    mx.save_safetensors(str(file), {name: value * 1.01 for name, value in weights.items()})
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["mlx/decoder.safetensors"] = {"size": file.stat().st_size, "sha256": sha256_file(file)}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    report = edgedit.verify(copy, backend="all")
    assert [(c.name, c.backend) for c in report.components if not c.passed] == [("decoder", "mlx")]
    assert not report.passed


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (RuntimeOptions(threads=2), InputError, "leave --threads out"),
        (RuntimeOptions(graph_cache=Path("x")), InputError, "leave --graph-cache out"),
        (RuntimeOptions(providers=("cuda",)), InputError, "runs on one of gpu or cpu, not on cuda"),
        (RuntimeOptions(providers=("gpu", "cpu")), InputError, "name one"),
        (RuntimeOptions(memory_limit=0), InputError, "at least 1 byte"),
    ],
    ids=["threads", "graph-cache", "provider", "providers", "memory"],
)
def test_an_option_that_mlx_does_not_have_is_refused(
    bundle_path: Path, options: RuntimeOptions, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        open_runtime(open_bundle(bundle_path), "mlx", options)
    assert "\n" not in str(caught.value)


def test_a_gpu_that_is_not_there_is_refused(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_module, "has_gpu", lambda: False)
    with pytest.raises(RuntimeUnavailableError, match="this MLX has no GPU"):
        open_runtime(open_bundle(bundle_path), "mlx", RuntimeOptions(providers=("gpu",)))


def test_memory_limits_reach_mlx_and_are_refused_where_there_are_none(bundle_path: Path) -> None:
    memory, cache = mx.set_memory_limit(1 << 40), mx.set_cache_limit(1 << 40)
    try:
        with edgedit.load(bundle_path, "mlx", memory_limit=3 << 30):
            assert mx.get_memory_limit() == 3 << 30
            assert mx.set_cache_limit(0) == (3 << 30) // 4
    finally:
        mx.set_memory_limit(memory)
        mx.set_cache_limit(cache)
    with pytest.raises(InputError, match="ONNX Runtime has no memory limit"):
        edgedit.load(bundle_path, "onnx", memory_limit=3 << 30)


def test_without_mlx_there_is_one_clear_line(
    bundle_path: Path, tmp_path: Path, saved_pipeline: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    for call in (
        lambda: open_runtime(open_bundle(bundle_path), "mlx"),
        lambda: edgedit.convert(saved_pipeline("pixart-sigma")[1], tmp_path / "x.edgedit", to=("mlx",)),
    ):
        with pytest.raises(RuntimeUnavailableError, match="pip install") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert open_runtime(open_bundle(bundle_path)).name == "onnx"
    report = edgedit.verify(bundle_path, backend="all")
    assert report.passed
    assert {check.backend for check in report.components} == {"onnx"}
    assert any("mlx: not checked: MLX cannot be imported" in note for note in report.notes)


def test_damaged_files_are_one_line(bundle_path: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle_path, tmp_path / "copy.edgedit"))
    weights, graph = copy / "mlx" / "decoder.safetensors", copy / "mlx" / "encoder.onnx"
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    graph.write_bytes(b"\0" * graph.stat().st_size)
    shutil.copy(copy / "mlx" / "text_encoder.safetensors", copy / "mlx" / "other")
    runtime = open_runtime(open_bundle(copy), "mlx")
    for component, message in (("decoder", "cannot be read"), ("encoder", "not a graph for MLX")):
        with pytest.raises(BundleError, match=message) as caught:
            runtime.open(component)
        assert "\n" not in str(caught.value)


def test_weights_of_another_component_are_refused(bundle_path: Path) -> None:
    bundle = open_bundle(bundle_path)
    with pytest.raises(BundleError, match="disagree on"):
        runtime_module.MlxSession(
            bundle.file("mlx/decoder.onnx"),
            bundle.file("mlx/encoder.safetensors"),
            device="cpu",
            compiled=False,
            label="x",
        )


def test_wrong_inputs_are_named(bundle_path: Path) -> None:
    session = open_runtime(open_bundle(bundle_path), "mlx").open("text_encoder")
    with pytest.raises(InputError, match=r"takes \['attention_mask', 'input_ids'\]; got \['input_ids'\]"):
        session.run({"input_ids": ids()["input_ids"]})
    with pytest.raises(InputError):
        session.run({**ids(), "attention_mask": np.ones((1, 3), np.int64)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": ("onnx",), "mlx_weights": "q4"}, "MLX weights need the target mlx"),
        ({"to": ("onnx",), "sizes": [(64, 64)]}, "need the target coreml or mlx"),
        ({"to": ("mlx",), "mlx_weights": "q1"}, "unknown MLX weights 'q1'"),
        ({"to": ("mlx",), "sizes": [(22, 64)]}, "size 22x64: both sides must be multiples of 4"),
        ({"to": ("mlx",), "dtype": "w4", "mlx_weights": "q4"}, "dtype w4 says how weights are stored; leave"),
        ({"to": ()}, "no target given"),
    ],
    ids=["weights", "sizes", "form", "multiple", "dtype", "nothing"],
)
def test_conversions_that_make_no_sense_are_refused_and_write_nothing(
    saved_pipeline: Saved, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConversionError, match=message) as caught:
        edgedit.convert(saved_pipeline("pixart-sigma")[1], tmp_path / "x.edgedit", **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_quantized_components_are_told_apart_in_the_report(saved_pipeline: Saved, tmp_path: Path) -> None:
    report = edgedit.convert(
        saved_pipeline("pixart-sigma")[1], tmp_path / "x.edgedit", to=("onnx", "mlx"), mlx_weights="q8-g32"
    )
    found = {(part.name, form.backend): form.precision for part in report.components for form in part.artefacts}
    assert found["transformer", "mlx"] == found["text_encoder", "mlx"] == "q8-g32"
    assert found["decoder", "mlx"] == found["transformer", "onnx"] == "fp32"
    checks = edgedit.verify(tmp_path / "x.edgedit", backend="all").components
    assert all(check.passed for check in checks)
    # Not a bound that any numbers pass: about as far off as they were at conversion.
    quantized = [check for check in checks if check.precision == "q8-g32"]
    assert quantized
    assert all(check.tolerance < 0.2 for check in quantized)


def test_importing_the_runtime_imports_no_mlx() -> None:
    code = "import sys, edgedit.runtimes.mlx, edgedit.runtimes.base, edgedit.converters.convert; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "mlx.core" not in loaded
    assert "edgedit.runtimes.mlx" in loaded
    assert builtins.__name__ in loaded

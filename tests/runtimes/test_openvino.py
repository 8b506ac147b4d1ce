"""OpenVINO draws what ONNX Runtime draws, from the same files."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx_ir as ir
import pytest
from tiny_pipelines import randomize

import edgedit
from edgedit.bundle import Bundle, open_bundle
from edgedit.errors import BundleError, InputError, RuntimeUnavailableError
from edgedit.example_inputs import example_inputs
from edgedit.runtimes.base import RuntimeOptions, open_runtime
from edgedit.runtimes.openvino import OpenVinoSession, group_size, open_session
from edgedit.runtimes.prompt_static import PromptStaticSession

pytest.importorskip("openvino")

Saved = Callable[[str], tuple[Any, Path, int]]
OPTIONS = RuntimeOptions(engine="openvino", threads=1)


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def outputs_of(bundle: Bundle, component: str, **options: Any) -> np.ndarray:
    entry = bundle.component(component)
    inputs = example_inputs(component, entry.inputs, entry.config, tokens=(6, 8), batch=2)
    session = open_runtime(bundle, "onnx", RuntimeOptions(threads=1, **options)).open(component)
    (found,) = session.run(inputs).values()
    session.close()
    return found


@pytest.fixture(scope="module")
def wide_transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PixArt transformer whose matrices are large enough to be quantized."""
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        num_layers=2,
        cross_attention_dim=64,
        caption_channels=72,
        sample_size=8,
        use_additional_conditions=False,
    )
    randomize(model, 5)
    folder = tmp_path_factory.mktemp("wide") / "transformer"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(wide_transformer: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    place, made = tmp_path_factory.mktemp("quantized"), {}

    def get(dtype: str) -> Bundle:
        if dtype not in made:
            edgedit.convert(wide_transformer, place / f"{dtype}.edgedit", dtype=dtype)
            made[dtype] = open_bundle(place / f"{dtype}.edgedit")
        return made[dtype]

    return get


@pytest.mark.parametrize("kind", ["pixart-alpha", "pixart-sigma", "sana", "sana-sprint"])
def test_every_component_agrees_with_onnxruntime(saved_pipeline: Saved, tmp_path: Path, kind: str) -> None:
    edgedit.convert(saved_pipeline(kind)[1], tmp_path / "x.edgedit")
    bundle = open_bundle(tmp_path / "x.edgedit")
    for name in bundle.manifest.components:
        found, wanted = outputs_of(bundle, name, engine="openvino"), outputs_of(bundle, name)
        assert relative(found, wanted) < 2e-5, name


@pytest.mark.parametrize("dtype", ["fp16", "w8", "w4"])
def test_stored_weights_are_read_exactly(quantized: Callable[[str], Bundle], dtype: str) -> None:
    bundle = quantized(dtype)
    found, wanted = outputs_of(bundle, "transformer", engine="openvino"), outputs_of(bundle, "transformer")
    assert relative(found, wanted) < 1e-5


def test_eight_bit_arithmetic_is_as_near_to_its_weights_as_that_of_onnxruntime(
    quantized: Callable[[str], Bundle],
) -> None:
    session = open_runtime(quantized("w8a8"), "onnx", OPTIONS).open("transformer")
    assert isinstance(session, PromptStaticSession)
    assert len(session._values) == 5  # keys and values of both blocks, and the bias of the mask
    exact = outputs_of(quantized("w8"), "transformer")
    found = outputs_of(quantized("w8a8"), "transformer", engine="openvino")
    other = outputs_of(quantized("w8a8"), "transformer")
    assert 1e-4 < relative(found, exact) < 1.5 * relative(other, exact)


def test_the_group_of_dynamic_quantization_is_one_that_divides_every_matrix(
    quantized: Callable[[str], Bundle],
) -> None:
    import openvino

    def group(dtype: str) -> int:
        bundle = quantized(dtype)
        return group_size(openvino.Core().read_model(bundle.file(bundle.artefact("transformer", "onnx").graph)))

    assert group("w8") == 64
    assert group("w4") == 64
    assert group("fp32") == 0


def test_ranges_written_into_the_graph_are_computed_in_int8(tmp_path: Path) -> None:
    """The standard form: QuantizeLinear and DequantizeLinear around the activations, as codes with zero point 128."""
    random = np.random.default_rng()
    weight, x = random.standard_normal((64, 96), np.float32), random.standard_normal((1, 40, 64), np.float32)
    scale = np.abs(weight).max(axis=0) / 127
    codes = np.rint(weight / scale).astype(np.int8)
    step = np.float32(np.abs(x).max() / 127)

    def constant(name: str, value: np.ndarray) -> ir.Value:
        return ir.Value(name=name, const_value=ir.tensor(value, name=name))

    values = [constant("codes", codes), constant("scale", scale), constant("step", step)]
    values.append(constant("zero", np.uint8(128)))
    start = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((1, "n", 64)))
    quantize = ir.Node("", "QuantizeLinear", [start, values[2], values[3]], name="q")
    back = ir.Node("", "DequantizeLinear", [quantize.outputs[0], values[2], values[3]], name="dq")
    matrix = ir.Node("", "DequantizeLinear", values[:2], [ir.AttrInt64("axis", 1)], name="w")
    product = ir.Node("", "MatMul", [back.outputs[0], matrix.outputs[0]], name="product")
    for node in (quantize, back, matrix, product):
        node.outputs[0].name = f"{node.name}_out"
    product.outputs[0].type, product.outputs[0].shape = start.type, ir.Shape((1, "n", 96))
    graph = ir.Graph(
        [start], product.outputs, nodes=[quantize, back, matrix, product], initializers=values, opset_imports={"": 23}
    )
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "g.onnx")
    session = open_session(tmp_path / "g.onnx", 1, None, "g")
    assert isinstance(session, OpenVinoSession)
    found = session.run({"x": x})["product_out"]
    rounded = np.clip(np.rint(x / step), -128, 127) * step
    assert relative(found, rounded @ (codes * scale)) < 1e-5
    nodes = session.executed()
    assert [kind for kind, name in nodes if "FullyConnected" in kind or "MatMul" in kind]
    assert all(name.lower().endswith("i8") for kind, name in nodes if kind in ("FullyConnected", "MatMul"))


def test_a_picture_is_that_of_onnxruntime(saved_pipeline: Saved, tmp_path: Path) -> None:
    edgedit.convert(saved_pipeline("pixart-sigma")[1], tmp_path / "x.edgedit")

    def draw(engine: str) -> Any:
        with edgedit.load(tmp_path / "x.edgedit", engine=engine, threads=1, use_cache=False) as pipe:
            return pipe.generate("a red cat", seed=3, steps=2, width=16, height=16)

    found, wanted = draw("openvino"), draw("onnxruntime")
    assert relative(found.latents, wanted.latents) < 1e-4
    assert found.recipe["engine"] == "openvino"
    assert np.abs(np.asarray(found.images[0], np.int16) - np.asarray(wanted.images[0], np.int16)).max() <= 1


def test_tiles_run_too(saved_pipeline: Saved, tmp_path: Path) -> None:
    edgedit.convert(saved_pipeline("pixart-sigma")[1], tmp_path / "x.edgedit")
    latents = np.random.default_rng(0).standard_normal((1, 4, 16, 16), np.float32)
    with edgedit.load(tmp_path / "x.edgedit", engine="openvino", threads=1) as pipe:
        whole = pipe.decode(latents, output="array", tiling="off")
        tiled = pipe.decode(latents, output="array", tiling="exact", tile_size=24)
    assert np.abs(whole - tiled).max() < 1e-4


def test_a_cached_graph_gives_the_same_values_and_is_made_once(
    quantized: Callable[[str], Bundle], tmp_path: Path
) -> None:
    cache = tmp_path / "graphs"
    first = outputs_of(quantized("w8"), "transformer", engine="openvino", graph_cache=cache)
    entries = sorted(cache.rglob("*"))
    assert len(entries) == 4  # a folder and a file for each part
    assert np.array_equal(first, outputs_of(quantized("w8"), "transformer", engine="openvino", graph_cache=cache))
    assert sorted(cache.rglob("*")) == entries


def test_what_cannot_be_run_is_one_line(
    quantized: Callable[[str], Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = quantized("fp16")
    with pytest.raises(InputError, match="unknown engine 'tpu'; choose one of: auto, onnxruntime, openvino"):
        open_runtime(bundle, options=RuntimeOptions(engine="tpu"))
    with pytest.raises(InputError, match="providers are ONNX Runtime's"):
        open_runtime(bundle, options=RuntimeOptions(engine="openvino", providers=("cpu",)))
    with pytest.raises(InputError, match="threads must be at least 1"):
        open_runtime(bundle, options=RuntimeOptions(engine="openvino", threads=0))
    with pytest.raises(InputError, match="goes with --backend onnx, not with coreml"):
        open_runtime(bundle, "coreml", RuntimeOptions(engine="openvino"))
    copy = Path(shutil.copytree(bundle.path, tmp_path / "copy.edgedit"))
    graph = copy / "onnx" / "transformer.onnx"
    graph.write_bytes(b"\0" * graph.stat().st_size)
    with pytest.raises(BundleError, match=r"OpenVINO refuses the graph: .*--engine onnxruntime") as caught:
        open_runtime(open_bundle(copy), options=OPTIONS).open("transformer")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(RuntimeUnavailableError, match=r"run: pip install 'edgedit\[openvino\]'"):
        open_runtime(bundle, options=OPTIONS)


def test_wrong_inputs_and_closed_sessions_are_named(quantized: Callable[[str], Bundle]) -> None:
    bundle = quantized("fp16")
    entry = bundle.component("transformer")
    inputs = example_inputs("transformer", entry.inputs, entry.config)
    session = open_runtime(bundle, options=OPTIONS).open("transformer")
    with pytest.raises(InputError, match=r"takes \[.*'latents'.*\]; got \['latents'\]"):
        session.run({"latents": inputs["latents"]})
    with pytest.raises(InputError, match="takes latents as float32; got float64"):
        session.run({**inputs, "latents": inputs["latents"].astype(np.float64)})
    with pytest.raises(InputError, match=r"takes latents as .*; got \[1, 9, 12, 8\]"):
        session.run({**inputs, "latents": np.zeros((1, 9, 12, 8), np.float32)})
    session.close()
    with pytest.raises(BundleError, match="closed"):
        session.run(inputs)

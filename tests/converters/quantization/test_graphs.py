"""What methods and forms do to graphs: nothing, in float32; and codes that open to what was rounded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import scipy.linalg
from quantizable import fresh_graph, outputs_of

from edgedit.converters.passes.quantize import Int8MatMul, QuantizeWeights
from edgedit.converters.quantization.balance import factors
from edgedit.converters.quantization.encode import encode
from edgedit.converters.quantization.form import Form
from edgedit.converters.quantization.layers import find_layers
from edgedit.converters.quantization.methods import prepare_graph
from edgedit.converters.quantization.rotate import group_of, hadamard
from edgedit.converters.quantization.statistics import InputStatistics
from edgedit.converters.quantization.stream import run_in_segments
from edgedit.converters.quantization.workspace import Workspace
from edgedit.errors import InputError


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def some_statistics(width: int, rng: np.random.Generator) -> InputStatistics:
    x = (rng.standard_normal((300, width)) * np.exp(rng.normal(size=width))).astype(np.float32)
    return InputStatistics(np.abs(x).max(0), len(x), 10**9, lambda: x.T @ x)


@pytest.mark.parametrize("methods", [{"balance": 0.5}, {"rotate": True}, {"balance": 0.3, "rotate": True}], ids=str)
def test_methods_leave_the_float32_graph_what_it_was(
    methods: dict[str, Any], quantizable: Path, rng: np.random.Generator, tmp_path: Path
) -> None:
    model, inputs = fresh_graph(quantizable)
    before = outputs_of(model, inputs, tmp_path)
    layers = find_layers(model)
    weights = {name: layer.value.const_value.numpy().copy() for name, layer in layers.items()}  # type: ignore[union-attr]
    known = {name: some_statistics(layer.shape[0], rng) for name, layer in layers.items()}
    prepared = prepare_graph(model, layers, dict.fromkeys(layers, Form(8, **methods)), known)
    after = outputs_of(model, inputs, tmp_path)
    assert np.linalg.norm(after - before) / np.linalg.norm(before) < 1e-5
    changed = [n for n, layer in layers.items() if np.abs(layer.value.const_value.numpy() - weights[n]).max() > 1e-3]  # type: ignore[union-attr]
    assert len(changed) == len(layers)
    # Of a block's seven inputs, norms take those of attention and feed-forward, values those of output projections.
    own_nodes = {line.split(":")[0].removeprefix("transformer_blocks.0.") for line in prepared.inserted}
    if methods == {"balance": 0.5}:
        assert not own_nodes & {"attn1.to_q", "ff.net.0.proj", "attn1.to_out.0", "attn2.to_out.0"}
        assert {"attn2.to_q", "ff.net.2"} <= own_nodes
    if methods == {"rotate": True}:
        assert not own_nodes & {"attn1.to_out.0", "attn2.to_out.0"}
        assert {"attn1.to_q", "ff.net.2"} <= own_nodes


@pytest.mark.parametrize("methods", [{"balance": 0.5}, {"rotate": True}, {"balance": 0.3, "rotate": True}], ids=str)
def test_second_moments_follow_what_is_done_to_the_inputs(
    methods: dict[str, Any], quantizable: Path, tmp_path: Path
) -> None:
    """The moments of the changed inputs, computed from the old ones, are those that the changed graph shows."""
    name = "transformer_blocks.1.ff.net.2"
    found = []
    known = {}
    for changed in (False, True):
        model, inputs = fresh_graph(quantizable)
        layers = find_layers(model)
        if changed:
            prepared = prepare_graph(model, {name: layers[name]}, {name: Form(8, **methods)}, known)
        value = layers[name].nodes[0].inputs[0]
        assert value is not None
        model.graph.outputs.append(value)
        value.type = ir.TensorType(ir.DataType.FLOAT)
        ir.save(model, tmp_path / "m.onnx")
        session = ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
        x = session.run([value.name], inputs)[0]
        x = x.reshape(-1, x.shape[-1])
        found.append(x.T @ x)
        known[name] = InputStatistics(np.abs(x).max(0), len(x), 10**9, lambda: found[0])
    moments = prepared.statistics[name].moments()
    assert np.linalg.norm(moments - found[1]) / np.linalg.norm(found[1]) < 1e-4
    if not methods.get("rotate"):
        np.testing.assert_allclose(prepared.statistics[name].peaks ** 2, known[name].peaks ** 2, rtol=1e-3)


def test_few_different_inputs_say_little_of_how_channels_go_together(rng: np.random.Generator) -> None:
    x = np.tile(rng.standard_normal((10, 64)).astype(np.float32), (40, 1))
    for distinct, share in ((10, 64 / 74), (64 * 99, 0.01)):
        moments = InputStatistics(np.abs(x).max(0), len(x), distinct, lambda: x.T @ x).moments()
        whole = x.T @ x
        np.testing.assert_allclose(np.diag(moments), np.diag(whole), rtol=1e-5)
        np.testing.assert_allclose(moments[0, 1:], (1 - share) * whole[0, 1:], rtol=1e-3, atol=1e-3)


def test_factors_are_smoothquants_and_one_where_nothing_is_known() -> None:
    found = factors(np.array([4.0, 9.0, 0.0, 1e30]), np.array([1.0, 4.0, 1.0, 1.0]), 0.5)
    np.testing.assert_allclose(found, [2.0, 1.5, 1.0, 1e4], rtol=1e-6)


@pytest.mark.parametrize("size", [8, 16, 64])
def test_the_hadamard_matrix_is_scipys(size: int) -> None:
    np.testing.assert_allclose(hadamard(size), scipy.linalg.hadamard(size) / size**0.5, atol=1e-7)
    assert [group_of(width) for width in (1152, 72, 100, 256)] == [64, 8, None, 64]


FORMS = [
    Form(8),
    Form(4, 32),
    Form(3, 64),
    Form(2, 64),
    Form(2, format="palette"),
    Form(4, format="palette"),
    Form(4, 64, int8_activations=True),
    Form(3, 32, int8_activations=True),
    Form(2, 32, int8_activations=True),
]


def one_matrix(weight: np.ndarray, name: str = "blocks.0.w.weight") -> ir.Model:
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", name], ["y"])],
        "g",
        [value("x", onnx.TensorProto.FLOAT, ["n", weight.shape[0]])],
        [value("y", onnx.TensorProto.FLOAT, ["n", weight.shape[1]])],
        [onnx.numpy_helper.from_array(weight, name)],
    )
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.describe())
def test_a_stored_weight_opens_to_what_was_rounded(form: Form, rng: np.random.Generator, tmp_path: Path) -> None:
    weight = rng.standard_normal((128, 8 * int(rng.integers(5, 12)))).astype(np.float32)
    model = one_matrix(weight)
    assert QuantizeWeights(form)(model).modified
    opened = outputs_of(model, {"x": np.eye(128, dtype=np.float32)}, tmp_path)
    np.testing.assert_allclose(opened, encode(weight, form, "matrix").value(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "form", [f for f in FORMS if f.int8_activations or f.block is None], ids=lambda f: f.describe()
)
def test_int8_arithmetic_uses_the_same_codes(form: Form, rng: np.random.Generator, tmp_path: Path) -> None:
    weight = rng.standard_normal((128, 96)).astype(np.float32)
    model = one_matrix(weight)
    form = replace(form, int8_activations=True)
    QuantizeWeights(form)(model)
    ir.save(model, tmp_path / "q.onnx")
    cpu = ir.load(tmp_path / "q.onnx")
    assert Int8MatMul(["blocks.0.w"])(cpu).modified
    operators = [node.op_type for node in cpu.graph]
    assert operators.count("DynamicQuantizeMatMul") == 1
    assert "DequantizeLinear" not in operators
    # Whole numbers up to 255 are uint8 codes as they are, so that only the weights' rounding is left.
    x = rng.integers(0, 256, (5, 128)).astype(np.float32)
    x[0, 0] = 255
    found = outputs_of(cpu, {"x": x}, tmp_path)
    expected = x @ encode(weight, form, "matrix").value()
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-5


@pytest.mark.parametrize("limit", [1, 100_000, 1 << 30])
def test_segments_give_what_the_whole_graph_gives(limit: int, quantizable: Path, tmp_path: Path) -> None:
    model, inputs = fresh_graph(quantizable)
    other = {key: value * np.float32(0.5) if key == "latents" else value for key, value in inputs.items()}
    expected = [outputs_of(model, sample, tmp_path) for sample in (inputs, other)]
    model, _ = fresh_graph(quantizable)
    watched = find_layers(model)["transformer_blocks.1.ff.net.0.proj"].nodes[0].inputs[0]
    assert watched is not None
    seen: list[int] = []
    counts: list[tuple[int, int]] = []
    found = run_in_segments(
        model,
        [inputs, other],
        tmp_path / "segment",
        watched=[watched],
        on_value=lambda index, value, array: seen.append(index),
        on_segment=lambda done, total: counts.append((done, total)),
        limit=limit,
    )
    for one, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(one["prediction"], wanted, rtol=1e-4, atol=1e-5)
    assert seen == [0, 1]
    assert counts[-1][0] == counts[-1][1]
    assert (counts[-1][1] > 5) == (limit < 1 << 30)


def test_a_workspace_takes_up_its_own_work_only(tmp_path: Path) -> None:
    work = Workspace(tmp_path / "a.edgedit", {"dtype": "w4"})
    work.save("codes", "layer", {"x": np.arange(3)})
    again = Workspace(tmp_path / "a.edgedit", {"dtype": "w4"})
    stored = again.load("codes", "layer")
    assert stored is not None
    np.testing.assert_array_equal(stored["x"], np.arange(3))
    assert again.load("codes", "other") is None
    with pytest.raises(InputError, match="unfinished run with other options"):
        Workspace(tmp_path / "a.edgedit", {"dtype": "w3"})
    again.remove()
    assert not again.folder.exists()

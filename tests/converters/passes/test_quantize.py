"""Quantized weights: codes against torch's, and graphs against graphs with the same rounded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from tiny_pipelines import build_pipeline

import edgedit
from edgedit.converters.passes.quantize import Form, Int8MatMul, QuantizeWeights, codes_and_scales
from edgedit.converters.quantization.presets import PRESETS


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


@pytest.mark.filterwarnings("ignore:torch.quantize_per")
def test_eight_bit_codes_are_those_of_torch(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((37, 20), dtype=np.float32) * np.exp(rng.normal(size=(1, 20))).astype(np.float32)
    codes, scales = codes_and_scales(weight, 8, axis=0)
    np.testing.assert_allclose(scales[0], np.abs(weight).max(0) / 127, rtol=1e-6)
    zeros = torch.zeros(20, dtype=torch.int64)
    expected = torch.quantize_per_channel(torch.from_numpy(weight), torch.from_numpy(scales[0]), zeros, 1, torch.qint8)
    # A weight that lies half way between two codes may fall on either side of it.
    assert (codes != expected.int_repr().numpy()).mean() < 0.005
    assert np.abs(codes.astype(int) - expected.int_repr().numpy()).max() <= 1


def test_searched_scales_are_never_worse_than_the_largest_weight(rng: np.random.Generator) -> None:
    weight = rng.standard_t(3, (16, 64, 8)).astype(np.float32)
    codes, scales = codes_and_scales(weight, 4, axis=1)
    assert codes.min() >= -7
    assert codes.max() <= 7
    plain = np.abs(weight).max(1, keepdims=True) / 7
    rounded = np.clip(np.rint(weight / plain), -7, 7) * plain
    error, plain_error = (((x - weight) ** 2).sum(1) for x in (codes * scales, rounded))
    assert (error <= plain_error * (1 + 1e-5)).all()
    assert error.sum() < 0.98 * plain_error.sum()


def test_a_channel_of_zeros_stays_zero() -> None:
    codes, scales = codes_and_scales(np.zeros((8, 3), np.float32), 8, axis=0)
    assert not codes.any()
    assert np.isfinite(scales).all()


def graph(
    weights: dict[str, np.ndarray], nodes: list[onnx.NodeProto], inputs: list[Any], outputs: list[Any]
) -> ir.Model:
    made = onnx.helper.make_graph(
        nodes, "g", inputs, outputs, [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
    )
    return ir.from_proto(onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11))


def run(model: ir.Model, feeds: dict[str, np.ndarray], place: Path) -> np.ndarray:
    ir.save(model, place)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return ort.InferenceSession(str(place), options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def floats(name: str, *shape: Any) -> Any:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)


@pytest.mark.parametrize("form", [Form(8), Form(4, 64), Form(4, 32)], ids=lambda form: f"{form.bits}-{form.block}")
def test_a_matrix_computes_with_its_rounded_weights(form: Form, rng: np.random.Generator, tmp_path: Path) -> None:
    rows, columns = 64 * int(rng.integers(1, 4)), int(rng.integers(65, 200))
    weight = rng.standard_normal((rows, columns), dtype=np.float32)
    model = graph(
        {"blocks.0.w": weight},
        [onnx.helper.make_node("MatMul", ["x", "blocks.0.w"], ["y"])],
        [floats("x", "n", rows)],
        [floats("y", "n", columns)],
    )
    x = rng.standard_normal((9, rows), dtype=np.float32)
    changes = QuantizeWeights(form)
    assert changes(model).modified
    block = form.block or rows
    folded = weight.reshape(rows // block, block, columns)
    codes, scales = codes_and_scales(folded, form.bits, axis=1)
    rounded = (codes * scales).reshape(rows, columns)
    found = run(model, {"x": x}, tmp_path / "m.onnx")
    assert np.linalg.norm(found - x @ rounded) / np.linalg.norm(x @ rounded) < 1e-5
    assert changes.changes == {"blocks.0.w": "8 bits per channel" if form.bits == 8 else f"4 bits, blocks of {block}"}


def test_int8_arithmetic_rounds_activations_to_the_range_of_the_tensor(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    weight = rng.standard_normal((96, 80), dtype=np.float32)
    model = graph(
        {"transformer_blocks.0.w": weight},
        [onnx.helper.make_node("MatMul", ["x", "transformer_blocks.0.w"], ["y"])],
        [floats("x", "n", 96)],
        [floats("y", "n", 80)],
    )
    QuantizeWeights(Form(8, int8_activations=True))(model)
    assert Int8MatMul()(model).modified
    assert [node.op_type for node in model.graph] == ["DynamicQuantizeMatMul"]
    x = rng.standard_normal((7, 96), dtype=np.float32) + 0.3
    found = run(model, {"x": x}, tmp_path / "m.onnx")
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    step = (high - low) / 255
    zero = np.clip(np.rint(-low / step), 0, 255)
    rounded = (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step
    codes, scales = codes_and_scales(weight, 8, axis=0)
    expected = rounded @ (codes * scales)
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 2e-3
    assert np.linalg.norm(found - x @ weight) / np.linalg.norm(x @ weight) < 0.03


def test_convolutions_and_look_up_tables_are_quantized_too(rng: np.random.Generator, tmp_path: Path) -> None:
    kernel = rng.standard_normal((24, 24, 3, 3), dtype=np.float32)
    model = graph(
        {"k": kernel},
        [onnx.helper.make_node("Conv", ["x", "k"], ["y"], pads=[1] * 4)],
        [floats("x", 1, 24, "h", "w")],
        [floats("y", 1, 24, "h", "w")],
    )
    QuantizeWeights(Form(8))(model)
    x = rng.standard_normal((1, 24, 6, 5), dtype=np.float32)
    codes, scales = codes_and_scales(kernel.reshape(24, -1), 8, axis=1)
    rounded = torch.from_numpy((codes * scales).reshape(kernel.shape))
    expected = torch.nn.functional.conv2d(torch.from_numpy(x), rounded, padding=1).numpy()
    np.testing.assert_allclose(run(model, {"x": x}, tmp_path / "c.onnx"), expected, rtol=1e-3, atol=1e-3)

    table = rng.standard_normal((300, 40), dtype=np.float32)
    ids = onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["b", "n"])
    model = graph(
        {"t": table}, [onnx.helper.make_node("Gather", ["t", "ids"], ["y"])], [ids], [floats("y", "b", "n", 40)]
    )
    QuantizeWeights(Form(8))(model)
    wanted = rng.integers(300, size=(2, 5))
    codes, scales = codes_and_scales(table, 8, axis=1)
    np.testing.assert_allclose(
        run(model, {"ids": wanted}, tmp_path / "t.onnx"), (codes * scales)[wanted], rtol=1e-6, atol=1e-7
    )
    assert not any(node.op_type == "DequantizeLinear" for node in model.graph), "the table is never expanded whole"


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("kind", ["pixart-sigma", "sana"])
def test_a_quantized_bundle_draws_and_verifies(kind: str, preset: str, tmp_path: Path) -> None:
    build_pipeline(kind, 5).save_pretrained(tmp_path / "source")
    report = edgedit.convert(tmp_path / "source", tmp_path / "q.edgedit", dtype=preset)
    assert {component.precision for component in report.components} == {preset}
    assert edgedit.verify(tmp_path / "q.edgedit").passed
    with edgedit.load(tmp_path / "q.edgedit") as pipeline:
        result = pipeline.generate("a red circle", steps=2, seed=1)
    assert np.isfinite(result.latents).all()


def test_the_transformer_of_the_embedded_model_shrinks_as_promised(tmp_path: Path) -> None:
    source = Path(__file__).parents[3] / "models" / "scenes"
    sizes = {}
    for dtype in ("fp32", "w8", "w4"):
        report = edgedit.convert(
            source, tmp_path / f"{dtype}.edgedit", dtype=dtype, components=("transformer",), measure=False
        )
        sizes[dtype] = report.size
    assert sizes["w8"] <= 0.27 * sizes["fp32"]
    assert sizes["w4"] <= 0.16 * sizes["fp32"]

"""Weights that a recipe has rounded: Core ML opens the quantizer's codes to the quantizer's values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from quantizable import fresh_graph, outputs_of

from edgedit.converters.graph import TensorSpec
from edgedit.converters.lowerings import coreml
from edgedit.converters.lowerings.coreml import CoremlFunction, CoremlOptions
from edgedit.converters.passes.quantize import QuantizeWeights, plain_encode
from edgedit.converters.quantization.encode import Encoded
from edgedit.converters.quantization.form import Form
from edgedit.converters.quantization.layers import Layer, find_layers, fitted
from edgedit.converters.quantization.presets import PRESETS, recipe_of
from edgedit.converters.quantization.recipe import Recipe
from edgedit.converters.quantization.record import Quantization, stored_bytes
from edgedit.metrics import compare
from edgedit.runtimes.mil_interpreter import MilInterpreter
from edgedit.runtimes.mil_report import report

library = pytest.importorskip("coremltools")

INPUTS, OUTPUTS = 64, 72
HALF = {"sparsity": 0.5}
PALETTES = [
    Form(bits, format="palette", vector=vector)
    for bits, vector in [(8, 1), (6, 1), (4, 1), (4, 2), (3, 1), (3, 2), (2, 1), (2, 4), (1, 4), (1, 8)]
]
MATRICES = [
    Form(8), Form(4, 64), Form(4, 32, int8_activations=True), Form(3, 64), Form(2, 32), *PALETTES,
    Form(16, **HALF), Form(8, **HALF), Form(4, format="palette", **HALF), Form(2, format="palette", vector=2, **HALF),
]  # fmt: skip


def graph_of(kind: str, shape: tuple[int, ...], x: np.ndarray) -> ir.Model:
    weight = np.random.default_rng().standard_normal(shape).astype(np.float32)
    names = ["w.weight", "x"] if kind == "Gather" else ["x", "w.weight"]
    proto = onnx.helper.make_graph(
        [onnx.helper.make_node(kind, names, ["y"], name="blocks/7")],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)],
        [onnx.helper.make_tensor_value_info("y", 1, None)],
        [onnx.numpy_helper.from_array(weight, "w.weight")],
    )
    return ir.from_proto(onnx.helper.make_model(proto, opset_imports=[onnx.helper.make_opsetid("", 23)]))


def quantization(model: ir.Model, form: Form, **more: Any) -> Quantization:
    layers = find_layers(model)
    return Quantization(Recipe("mine", {}), {name: fitted(form, layer) for name, layer in layers.items()}, **more)


def package(model: ir.Model, x: np.ndarray, chosen: Quantization, folder: Path, **options: Any) -> Path:
    artefact = coreml.write(
        model,
        folder,
        "part",
        inputs=[TensorSpec("x", str(x.dtype), x.shape)],
        functions=[CoremlFunction("main", {})],
        options=CoremlOptions(quantization=chosen, **options),
    )
    assert artefact.precision == "mine"
    return folder / artefact.graph


@pytest.mark.parametrize("form", MATRICES, ids=Form.describe)
def test_a_matrix_in_any_form_is_what_the_quantizer_made_of_it(form: Form, tmp_path: Path) -> None:
    x = np.random.default_rng().standard_normal((1, 3, INPUTS)).astype(np.float32)
    model = graph_of("MatMul", (INPUTS, OUTPUTS), x)
    (layer,) = find_layers(model).values()
    weight = layer.value.const_value.numpy()  # type: ignore[union-attr]
    rounded = plain_encode(layer, form, weight).value()
    if form.sparsity is not None:
        assert abs(float(np.mean(rounded == 0)) - 0.5) < 0.06
    half = form.bits == 16
    path = package(model, x, quantization(model, form), tmp_path, precision="fp16" if half else "fp32")
    assert compare(MilInterpreter(path).run({"x": x})["y"], x @ rounded).relative_l2 < (1e-3 if half else 1e-6)
    # No more than what the recipe's record says, scales as float32 here, and 64 bytes of head for each array.
    stored = next(path.rglob("weight.bin")).stat().st_size
    assert stored <= stored_bytes(form, layer) + 2 * OUTPUTS * INPUTS // (form.block or INPUTS) + 1024
    library.models.MLModel(str(path), skip_model_load=True)


@pytest.mark.parametrize("form", [f for f in MATRICES if f.sparsity is None], ids=Form.describe)
def test_coremltools_decompresses_codes_to_the_same_values(form: Form, tmp_path: Path) -> None:
    from coremltools.converters.mil.frontend.milproto.load import load

    x = np.zeros((1, 3, INPUTS), np.float32)
    model = graph_of("MatMul", (INPUTS, OUTPUTS), x)
    (layer,) = find_layers(model).values()
    rounded = plain_encode(layer, form, layer.value.const_value.numpy()).value()  # type: ignore[union-attr]
    path = package(model, x, quantization(model, form), tmp_path)
    spec = library.utils.load_spec(str(path))
    program = load(spec, spec.specificationVersion, str(path / "Data/com.apple.CoreML/weights"))
    (linear,) = (op for op in program.functions["main"].operations if op.op_type == "linear")
    opened = linear.weight.op.materialized_val_inference()
    np.testing.assert_allclose(opened, rounded.T, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", [Form(8), Form(8, **HALF), Form(16, **HALF)], ids=Form.describe)
def test_kernels_and_tables_keep_their_codes(form: Form, tmp_path: Path) -> None:
    random = np.random.default_rng()
    for kind, shape, x in (
        ("Conv", (24, 32, 3, 3), random.standard_normal((1, 32, 5, 6)).astype(np.float32)),
        ("Gather", (300, 32), random.integers(0, 300, (1, 9)).astype(np.int32)),
    ):
        model = graph_of(kind, shape, x)
        (layer,) = find_layers(model).values()
        encoded = plain_encode(layer, fitted(form, layer), layer.value.const_value.numpy())  # type: ignore[union-attr]
        path = package(model, x, quantization(model, form), tmp_path / kind)
        found = MilInterpreter(path).run({"x": x})["y"]
        if kind == "Gather":
            np.testing.assert_allclose(found, encoded.value()[x], rtol=1e-6)
            continue
        plain = graph_of(kind, shape, x)
        plain.graph.initializers["w.weight"].const_value = ir.tensor(encoded.value(), name="w.weight")
        assert compare(found, outputs_of(plain, {"x": x}, tmp_path)).relative_l2 < 1e-6


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_int8_arithmetic_rounds_the_input_to_its_calibrated_range(precision: str, tmp_path: Path) -> None:
    x = (3 * np.random.default_rng().standard_normal((1, 3, INPUTS))).astype(np.float16).astype(np.float32)
    model = graph_of("MatMul", (INPUTS, OUTPUTS), x)
    (layer,) = find_layers(model).values()
    form, peak = Form(8, int8_activations=True), 4.0
    rounded = plain_encode(layer, form, layer.value.const_value.numpy()).value()  # type: ignore[union-attr]
    path = package(model, x, quantization(model, form, input_peaks={"w": peak}), tmp_path, precision=precision)
    step = np.float32(np.float16(peak / 127) if precision == "fp16" else peak / 127)
    expected = np.clip(np.rint(x / step), -128, 127) * step @ rounded
    assert compare(MilInterpreter(path).run({"x": x})["y"], expected).relative_l2 < 2e-3
    assert compare(x @ rounded, expected).relative_l2 > 1e-2
    assert {"quantize", "dequantize"} <= set(report(path).operators)


def test_a_layer_of_32_bits_is_a_float32_island(tmp_path: Path) -> None:
    x = np.random.default_rng().standard_normal((1, 3, INPUTS)).astype(np.float32)
    model = graph_of("MatMul", (INPUTS, OUTPUTS), x)
    artefact = coreml.write(
        model,
        tmp_path,
        "part",
        inputs=[TensorSpec("x", "float32", x.shape)],
        functions=[CoremlFunction("main", {})],
        options=CoremlOptions(quantization=quantization(model, Form(32)), precision="fp16"),
    )
    assert artefact.islands == {"blocks/7": "the recipe keeps its weight in 32 bits"}
    assert set(report(tmp_path / artefact.graph).weights) == {"fp32"}


@pytest.mark.parametrize("preset", [name for name in PRESETS if not name.endswith("a8") and name != "fp4"])
def test_every_backend_computes_with_the_codes_of_a_preset(preset: str, quantizable: Path, tmp_path: Path) -> None:
    recipe = recipe_of(preset, calibrated=False)
    assert recipe is not None
    model, inputs = fresh_graph(quantizable)
    forms = recipe.resolve("transformer", find_layers(model))
    encoded: dict[str, Encoded] = {}

    def encode_once(layer: Layer, form: Form, weight: np.ndarray) -> Encoded:
        if layer.name not in encoded:
            encoded[layer.name] = plain_encode(layer, form, weight)
        return encoded[layer.name]

    chosen = Quantization(recipe, forms, encode_once)
    QuantizeWeights(forms, encode_once)(model)
    expected = outputs_of(model, inputs, tmp_path)
    model, inputs = fresh_graph(quantizable)
    shapes = [TensorSpec(name, str(value.dtype), value.shape) for name, value in inputs.items()]
    artefact = coreml.write(
        model,
        tmp_path,
        "transformer",
        inputs=shapes,
        functions=[CoremlFunction("main", {})],
        options=CoremlOptions(quantization=chosen),
    )
    (found,) = MilInterpreter(tmp_path / artefact.graph).run(inputs).values()
    assert compare(found, expected).relative_l2 < 1e-5
    if preset == "w2":
        return
    mlx = pytest.importorskip("edgedit.converters.lowerings.mlx")
    from edgedit.runtimes.mlx import MlxSession

    written = mlx.write(fresh_graph(quantizable)[0], tmp_path, "transformer", dtype="fp32", recipe=chosen)
    graph, weights = (tmp_path / path for path in written.files)
    (found,) = MlxSession(graph, weights, device="cpu", compiled=False, label="x").run(inputs).values()
    assert compare(found, expected).relative_l2 < 1e-5
    bits = {form.quantization.bits for form in mlx.read(graph).forms.values() if form.quantization is not None}
    assert bits == {int(preset[1]), 4 if preset == "w3" else int(preset[1])}


def test_three_bit_codes_take_three_bits_in_mlx() -> None:
    mx = pytest.importorskip("mlx.core")
    from edgedit.converters.lowerings.driver import Quantized
    from edgedit.converters.lowerings.mlx_quantization import carry_over, pack

    random = np.random.default_rng()
    codes = random.integers(-4, 4, (128, 24)).astype(np.int8)
    weight = Quantized("w", codes, random.uniform(0.01, 0.1, (2, 24)).astype(np.float32), None, 0, 64, 4)
    form = carry_over(weight)
    assert form is not None
    assert form.name == "q3-g64"
    parts = [mx.array(part) for part in pack(weight, form, "float32")]
    opened = mx.dequantize(*parts, group_size=64, bits=3)
    np.testing.assert_allclose(np.array(opened), weight.numpy().T, rtol=1e-5, atol=1e-6)
    assert carry_over(replace(weight, codes=codes * np.int8(2))) == replace(form, bits=4)

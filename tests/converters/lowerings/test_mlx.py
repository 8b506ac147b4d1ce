"""Components on MLX against ONNX Runtime: every architecture, its weights in every form, its exported functions."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import mlx_blas  # before MLX
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from tiny_graphs import ARCHITECTURES, TinyGraph

from edgedit.converters.architectures import gemma2, pixart, t5
from edgedit.converters.architectures.layers import Linear, Module
from edgedit.converters.graph import IR_VERSION, OPSET, Component, TensorSpec, bind, build
from edgedit.converters.lowerings import mlx as lowering
from edgedit.converters.lowerings.mlx_functions import export
from edgedit.converters.lowerings.mlx_quantization import MlxQuantization
from edgedit.converters.tensors import TensorRef
from edgedit.errors import BundleError, ConversionError
from edgedit.metrics import compare

mx = pytest.importorskip("mlx.core")

SIZES: tuple[dict[str, Any], ...] = (
    {"tokens": (6, 4), "length": 9, "batch": 1},
    {"tokens": (4, 6), "length": 5, "batch": 2},
)


class OnMlx:
    """A tiny graph written for MLX in a folder and read back."""

    def __init__(self, graph: TinyGraph, folder: Path, **options: Any) -> None:
        options = {"dtype": "fp32", **options}
        artefact = lowering.write(graph.model(), folder, graph.component.name, **options)
        self.graph, self.weights_file = (folder / path for path in artefact.files)
        self.description = lowering.read(self.graph)
        self.weights = mx.load(str(self.weights_file))

    def run(self, inputs: dict[str, np.ndarray], weights: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
        arrays = {name: mx.array(value) for name, value in inputs.items()}
        weights = weights or self.weights
        outputs = lowering.Program(self.description, weights, arrays)(arrays, weights)
        return {name: np.array(y) for name, y in zip(self.description.outputs, outputs, strict=True)}


def error(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    return max(compare(found[name], wanted[name]).relative_l2 for name in wanted)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_agrees_with_onnx_runtime_at_every_size(name: str, tmp_path: Path) -> None:
    graph = TinyGraph(name, secrets.randbits(31))
    reference, here = graph.reference(tmp_path), OnMlx(graph, tmp_path)
    assert set(here.weights) == here.description.tensors
    for size in SIZES:
        inputs = graph.inputs(**size)
        assert error(here.run(inputs), reference.run(inputs)) <= 1e-5, (graph, size)


@pytest.mark.parametrize("name", ["pixart-alpha", "sana-sprint", "gemma2", "kl-decoder", "dc-decoder"])
def test_half_weights_cost_what_their_rounding_costs(name: str, tmp_path: Path) -> None:
    graph = TinyGraph(name, secrets.randbits(31))
    reference, here = graph.reference(tmp_path), OnMlx(graph, tmp_path, dtype="fp16")
    inputs = graph.inputs()
    assert error(here.run(inputs), reference.run(inputs)) <= 1e-2, graph
    large = {name for name, array in OnMlx(graph, tmp_path / "whole").weights.items() if array.size >= 1024}
    assert large == {name for name, array in here.weights.items() if array.dtype == mx.float16}


def test_products_of_a_half_transformer_run_in_float16_and_its_sums_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = TinyGraph("sana", 3)
    here = OnMlx(graph, tmp_path, dtype="fp16")
    seen: list[tuple[str, Any]] = []
    kept = lowering.table

    def spied(values: Any) -> dict[str, Any]:
        def spy(op: str, rule: Any) -> Any:
            def call(node: Any, *inputs: Any) -> Any:
                result = rule(node, *inputs)
                for part in result if isinstance(result, (list, tuple)) else [result]:
                    seen.append((node.name, getattr(part, "array", part).dtype))
                return result

            return call

        return {op: spy(op, rule) for op, rule in kept(values).items()}

    monkeypatch.setattr(lowering, "table", spied)
    here.run(graph.inputs())
    types = {str(dtype) for name, dtype in seen if "key_value_sum/MatMul" in name or "readout/MatMul" in name}
    assert types == {"mlx.core.float32"}
    assert "mlx.core.float16" in {str(dtype) for name, dtype in seen if "Conv" in name or "MatMul" in name}


def test_weights_lie_as_mlx_modules_have_them_under_their_names_in_the_checkpoint(tmp_path: Path) -> None:
    graph = TinyGraph("pixart", secrets.randbits(31))
    shapes = {
        name: tuple(int(d) for d in value.shape.numpy())
        for name, value in graph.model().graph.initializers.items()
        if not name.startswith("const_")
    }
    here = OnMlx(graph, tmp_path)
    assert set(here.weights) == set(shapes)
    linear, kernel = "transformer_blocks.0.attn1.to_q.weight", "pos_embed.proj.weight"
    assert tuple(here.weights[linear].shape) == shapes[linear][::-1]
    out, into, height, width = shapes[kernel]
    assert tuple(here.weights[kernel].shape) == (out, height, width, into)
    assert mx.load(str(here.weights_file), return_metadata=True)[1] == {"format": "mlx"}


FORMS = ["q2-g32", "q3-g32", "q4-g32", "q4-g64", "q4-g128", "q5-g32", "q6-g64", "q8-g32", "mxfp4", "mxfp8", "nvfp4"]


def _wide(random: np.random.Generator) -> Component:
    return pixart.build_transformer(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 1,
            "cross_attention_dim": 128,
            "caption_channels": 128,
            "sample_size": 8,
            "use_additional_conditions": False,
        }
    )


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks whose matrices are wide enough for every form."""
    monkeypatch.setitem(ARCHITECTURES, "pixart-wide", _wide)
    for name in ("t5", "gemma2"):
        monkeypatch.setitem(ARCHITECTURES, f"{name}-wide", partial(_wide_encoder, name))


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("name", FORMS)
def test_quantized_weights_compute_what_their_dequantized_form_computes(name: str, tmp_path: Path) -> None:
    form = MlxQuantization.parse(name)
    assert form.name == name
    graph = TinyGraph("pixart-wide", secrets.randbits(31))
    here, plain = OnMlx(graph, tmp_path / "q", quantization=form), OnMlx(graph, tmp_path / "plain")
    assert here.weights_file.stat().st_size < plain.weights_file.stat().st_size / (3 if form.bits <= 5 else 2)
    dense = dict(plain.weights)
    count = 0
    for weight, entry in here.description.forms.items():
        if entry.quantization is not None:
            parts = [here.weights[tensor] for tensor in entry.tensors(weight)]
            options = {"group_size": form.group_size, "bits": form.bits, "mode": form.mode}
            dense[weight] = mx.dequantize(*parts, **options).astype(mx.float32)
            count += 1
    assert count > 10
    inputs = graph.inputs()
    assert error(here.run(inputs), plain.run(inputs, dense)) <= 1e-3, graph


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("name", ["t5", "gemma2"])
def test_a_quantized_embedding_gives_the_dequantized_rows(name: str, tmp_path: Path) -> None:
    graph, form = TinyGraph(f"{name}-wide", secrets.randbits(31)), MlxQuantization.parse("q8-g32")
    here, reference = OnMlx(graph, tmp_path, quantization=form), graph.reference(tmp_path)
    tables = [key for key, entry in here.description.forms.items() if entry.quantization and entry.layout == "plain"]
    assert len(tables) == 1
    inputs = graph.inputs()
    assert error(here.run(inputs), reference.run(inputs)) <= 5e-2, graph


def _wide_encoder(name: str, random: np.random.Generator) -> Component:
    if name == "t5":
        return t5.build_text_encoder(
            {"vocab_size": 70, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4}
        )
    return gemma2.build_text_encoder(
        {
            "vocab_size": 70,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        }
    )


@pytest.mark.parametrize("text", ["q7", "q4-g16", "4", "q4-g", "fp4", "q4-g64 ", "", "Q4"])
def test_a_form_that_mlx_lacks_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConversionError, match="unknown MLX weights") as caught:
        MlxQuantization.parse(text)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


class Half(Module):
    """One Linear, for a weight that float16 cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = Linear(64, 64)

    def forward(self, op: Any, x: Any) -> Any:
        return self.proj(op, x)


def test_a_weight_beyond_float16_is_named(tmp_path: Path) -> None:
    specs = (TensorSpec("x", "float32", ("batch", 64)),), (TensorSpec("y", "float32", ("batch", 64)),)
    model = build(Component("transformer", "Half", Half(), *specs))
    arrays = {"proj.weight": np.full((64, 64), 1e5, np.float32), "proj.bias": np.zeros(64, np.float32)}
    bind(model, {key: TensorRef(name=key, dtype="float32", shape=a.shape, load=a.copy) for key, a in arrays.items()})
    with pytest.raises(ConversionError, match=r"weight proj\.weight does not fit into float16"):
        lowering.write(model, tmp_path, "transformer", dtype="fp16")


def quantized_model(
    codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, dtype: ir.DataType, block: int
) -> Any:
    """y = x · DequantizeLinear(codes), as a quantizer writes it."""
    width, out = codes.shape
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", width]))
    parts = [ir.Value(name=n) for n in ("w.weight", "w.scale", "w.zero")[: 2 if zero is None else 3]]
    for value, array in zip(parts, (codes, scale, zero), strict=False):
        kind = ir.DataType.FLOAT if value.name == "w.scale" else dtype
        tensor = ir.tensor(array.astype(kind.numpy()), dtype=kind, name=value.name)
        value.const_value, value.type, value.shape = tensor, ir.TensorType(kind), ir.Shape(array.shape)
    dense = ir.node("DequantizeLinear", parts, attributes={"axis": 0, "block_size": block})
    product = ir.node("MatMul", [x, dense.outputs[0]])
    product.outputs[0].name = "y"
    product.outputs[0].type, product.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", out])
    graph = ir.Graph(
        [x], product.outputs, nodes=[dense, product], initializers=parts, opset_imports={"": OPSET}, name="q"
    )
    return ir.Model(graph, ir_version=IR_VERSION)


CODES = {"int4": ir.DataType.INT4, "uint4": ir.DataType.UINT4, "int8": ir.DataType.INT8, "uint8": ir.DataType.UINT8}


@pytest.mark.parametrize("block", [32, 64, 128, 16])
@pytest.mark.parametrize("kind", CODES)
def test_codes_of_the_graph_are_carried_over_as_they_are(kind: str, block: int, tmp_path: Path) -> None:
    random = np.random.default_rng()
    low, high = {"int4": (-8, 8), "uint4": (0, 16), "int8": (-128, 128), "uint8": (0, 256)}[kind]
    codes = random.integers(low, high, (128, 24))
    scale = random.uniform(0.01, 0.02, (128 // block, 24)).astype(np.float32)
    zero = random.integers(low, high, scale.shape) if random.random() < 0.7 else None
    model = quantized_model(codes, scale, zero, CODES[kind], block)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = random.standard_normal((3, 128)).astype(np.float32)
    wanted = session.run(None, {"x": x})[0]

    artefact = lowering.write(model, tmp_path, "transformer", dtype="fp32")
    description = lowering.read(tmp_path / artefact.graph)
    weights = mx.load(str(tmp_path / artefact.files[1]))
    form = description.forms["w.weight"].quantization
    # A group of 16 has no kernel: those codes are dequantized in the graph.
    assert (form is None) == (block == 16)
    if form is not None:
        assert (form.bits, form.group_size) == (4 if "4" in kind else 8, block)
        assert set(weights) == {"w.weight", "w.scales", "w.biases"}
    arrays = {"x": mx.array(x)}
    found = np.array(lowering.Program(description, weights, arrays)(arrays, weights)[0])
    assert compare(found, wanted).relative_l2 <= 1e-5


@pytest.mark.parametrize("name", ["pixart", "sana", "gemma2", "kl-decoder"])
@pytest.mark.parametrize("form", [None, "q4-g32"])
def test_exported_functions_give_the_same_bits_in_a_fresh_process_without_edgedit(
    name: str, form: str | None, tmp_path: Path
) -> None:
    graph = TinyGraph(name, secrets.randbits(31))
    here = OnMlx(graph, tmp_path, quantization=None if form is None else MlxQuantization.parse(form))
    inputs = [graph.inputs(**size) for size in SIZES]
    sizes = [_named(graph, one) for one in inputs]
    target = tmp_path / "function.mlxfn"
    export(here.graph, here.weights_file, target, graph.component.inputs, sizes)
    # All the shapes together cost one set of constants, and the weights are not among them.
    assert target.stat().st_size < 400_000
    for index, one in enumerate(inputs):
        np.savez(tmp_path / f"in{index}.npz", **one)
        np.savez(tmp_path / f"out{index}.npz", **here.run(one))
    code = """
import json, sys, numpy as np
sys.path.insert(0, sys.argv[2])
import mlx_blas, mlx.core as mx  # the same BLAS, or the same sums in another order
mx.set_default_device(mx.cpu)
function, about = mx.import_function("function.mlxfn", return_metadata=True)
about = json.loads(about)
weights = mx.load(sys.argv[1])
for index in range(2):
    inputs, outputs = np.load(f"in{index}.npz"), np.load(f"out{index}.npz")
    found = function(*(mx.array(inputs[name]) for name in about["inputs"]), **weights)
    for name, value in zip(about["outputs"], found, strict=True):
        assert np.array_equal(np.array(value), outputs[name]), name
print(json.dumps(about["sizes"]), "edgedit" in sys.modules)
"""
    command = [sys.executable, "-c", code, str(here.weights_file), str(Path(mlx_blas.__file__).parent)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{json.dumps(sizes)} False"


def _named(graph: TinyGraph, inputs: dict[str, np.ndarray]) -> dict[str, int]:
    return {
        dimension: int(size)
        for spec in graph.component.inputs
        for dimension, size in zip(spec.shape, inputs[spec.name].shape, strict=True)
        if isinstance(dimension, str)
    }


def test_a_function_that_is_asked_for_a_shape_without_a_size_is_refused(tmp_path: Path) -> None:
    graph = TinyGraph("sana", 1)
    here = OnMlx(graph, tmp_path)
    with pytest.raises(ConversionError, match="no size is given for 'height'"):
        export(here.graph, here.weights_file, tmp_path / "f.mlxfn", graph.component.inputs, [{"batch": 1}])
    assert not (tmp_path / "f.mlxfn").exists()


def test_a_graph_that_is_none_of_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"\0" * 64)
    with pytest.raises(BundleError, match=r"x\.onnx: not a graph for MLX") as caught:
        lowering.read(tmp_path / "x.onnx")
    assert "\n" not in str(caught.value)
    graph = TinyGraph("sana", 1)
    graph.reference(tmp_path)
    with pytest.raises(BundleError, match="not a graph for MLX"):
        lowering.read(tmp_path / "canonical.onnx")

"""Core ML packages of every architecture, read back from disk and evaluated with numpy, against ONNX Runtime."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from tiny_graphs import ARCHITECTURES, HALF_PRECISION, TinyGraph

from edgedit.converters.coreml import precision_of
from edgedit.converters.graph import ALLOWED_OPERATORS, Component, TensorSpec
from edgedit.converters.lowerings import coreml
from edgedit.converters.lowerings.coreml import CoremlArtefact, CoremlFunction, CoremlOptions
from edgedit.converters.lowerings.mil.builder import MilBuilder
from edgedit.converters.lowerings.mil.islands import ANGLES, SUMS, VARIANCE, find_islands
from edgedit.errors import ConversionError
from edgedit.metrics import compare
from edgedit.runtimes.mil_interpreter import MilInterpreter
from edgedit.runtimes.mil_package import Blob, read_package

pytest.importorskip("coremltools")

#: Drawn anew in every run; set EDGEDIT_TEST_SEED to the number that a failure shows to see it again.
SEED = int(os.environ.get("EDGEDIT_TEST_SEED") or secrets.randbits(31))

FLOAT, INT64, BOOL = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.BOOL


def sizes_of(inputs: Sequence[TensorSpec], values: dict[str, np.ndarray]) -> dict[str, int]:
    return {
        name: size
        for spec in inputs
        for name, size in zip(spec.shape, values[spec.name].shape, strict=True)
        if isinstance(name, str)
    }


def write(graph: TinyGraph, root: Path, *values: dict[str, np.ndarray], **options: Any) -> CoremlArtefact:
    component = graph.component
    functions = [CoremlFunction(f"size_{i}", sizes_of(component.inputs, v)) for i, v in enumerate(values)]
    return coreml.write(
        graph.model(),
        root,
        component.name,
        inputs=component.inputs,
        functions=functions,
        options=CoremlOptions(**options),
    )


def sizes_for(name: str) -> tuple[tuple[int, int], int]:
    return ((4, 6), 7) if "encoder" in name else ((6, 4), 9)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_agrees_with_onnx_runtime(name: str, tmp_path: Path) -> None:
    graph = TinyGraph(name, SEED)
    values = graph.inputs(*sizes_for(name))
    expected = graph.reference(tmp_path).run(values)
    artefact = write(graph, tmp_path, values)
    for key, value in MilInterpreter(tmp_path / artefact.graph).run(values).items():
        error = compare(value, expected[key]).relative_l2
        assert error <= 1e-5, f"{name}, seed {SEED}: off by {error:.1e}"


@pytest.mark.parametrize("name", HALF_PRECISION)
def test_every_architecture_in_float16_agrees_to_60_decibels_and_nothing_overflows(name: str, tmp_path: Path) -> None:
    graph = TinyGraph(name, SEED)
    values = graph.inputs(*sizes_for(name))
    expected = graph.reference(tmp_path).run(values)
    artefact = write(graph, tmp_path, values, precision=precision_of(graph.component, "fp16"))
    interpreter = MilInterpreter(tmp_path / artefact.graph, emulate_fp16=True)
    for key, value in interpreter.run(values).items():
        decibels = compare(value, expected[key]).psnr_db
        assert decibels >= 60, f"{name}, seed {SEED}: {decibels:.1f} dB"
    assert not interpreter.overflows


def test_two_sizes_share_their_weights_and_each_gives_what_its_graph_gives(tmp_path: Path) -> None:
    graph = TinyGraph("sana-positions", SEED)
    first, second = graph.inputs((6, 4)), graph.inputs((3, 5), length=4)
    one = write(graph, tmp_path / "one", first, precision="fp16")
    two = write(graph, tmp_path / "two", first, second, precision="fp16")
    weights = [next(p for p in (tmp_path / folder).rglob("weight.bin")).stat().st_size for folder in ("one", "two")]
    assert weights[1] < 1.01 * weights[0] + 4096
    assert [f.name for f in two.functions] == ["size_0", "size_1"]
    reference = graph.reference(tmp_path)
    interpreter = MilInterpreter(tmp_path / "two" / two.graph)
    assert (sorted(interpreter.functions), interpreter.package.default) == (["size_0", "size_1"], "size_0")
    for function, values in (("size_0", first), ("size_1", second)):
        error = compare(interpreter.run(values, function)["prediction"], reference.run(values)["prediction"])
        assert error.relative_l2 < 2e-3
    assert one.functions[0].dims == two.functions[0].dims


@pytest.mark.parametrize("target", coreml.TARGETS)
def test_the_package_opens_in_coremltools_and_asks_for_its_target(target: str, tmp_path: Path) -> None:
    import coremltools

    graph = TinyGraph("pixart", SEED)
    artefact = write(graph, tmp_path, graph.inputs(), target=target, precision="fp16")
    model = coremltools.models.MLModel(str(tmp_path / artefact.graph), skip_model_load=True)
    specification = model.get_spec()
    assert specification.specificationVersion == {"iOS18": 9, "iOS26": 10}[target]
    assert [value.name for value in specification.description.input] == [s.name for s in graph.component.inputs]
    assert [value.name for value in specification.description.output] == ["prediction"]
    package = read_package(tmp_path / artefact.graph)
    opset = {"iOS18": "CoreML8", "iOS26": "CoreML9"}[target]
    assert {function.opset for function in package.functions.values()} == {opset}


def test_no_tensor_has_more_than_five_axes_and_islands_are_float32_in_the_program(tmp_path: Path) -> None:
    for name in ("pixart", "sana", "dc-decoder", "kl-decoder"):
        graph = TinyGraph(name, SEED)
        artefact = write(graph, tmp_path / name, graph.inputs(), precision="fp16")
        (function,) = read_package(tmp_path / name / artefact.graph).functions.values()
        for operation in function.operations:
            assert all(len(kind.shape) <= 5 for _, kind in operation.outputs), operation.name
        kinds = {operation.kind for operation in function.operations}
        types = {kind.dtype for operation in function.operations for _, kind in operation.outputs}
        assert {"fp16", "fp32"} <= types
        assert "cast" in kinds
        for operation in function.operations:
            if operation.kind in ("layer_norm", "reduce_mean", "rsqrt", "sin", "cos"):
                assert operation.outputs[0][1].dtype == "fp32", operation.name
            if operation.kind in ("linear", "conv"):
                assert operation.outputs[0][1].dtype == "fp16" or "emb" in operation.name, operation.name


def test_islands_are_found_in_linear_attention_sinusoids_and_norms() -> None:
    sana, dc = (find_islands(TinyGraph(name, SEED).model()) for name in ("sana", "dc-decoder"))
    assert {ANGLES, SUMS} == set(sana.values())
    assert {VARIANCE, SUMS} == set(dc.values())
    summed = [name for name, reason in sana.items() if reason == SUMS]
    assert all("/key_value_sum/" in name or "/readout/" in name for name in summed)
    assert len({name.split("/")[0] for name in summed}) == 2
    assert SUMS not in find_islands(TinyGraph("pixart", SEED).model()).values()


def test_a_weight_that_float16_cannot_hold_makes_its_node_an_island(tmp_path: Path) -> None:
    graph = TinyGraph("kl-decoder", SEED)
    model = graph.model()
    value = next(v for n, v in model.graph.initializers.items() if n.endswith("conv_in.weight"))
    large = np.asarray(value.const_value.numpy()).copy() * 1e7
    value.const_value = ir.tensor(large, name=value.name)
    values = graph.inputs()
    function = CoremlFunction("main", sizes_of(graph.component.inputs, values))
    artefact = coreml.write(
        model,
        tmp_path,
        "decoder",
        inputs=graph.component.inputs,
        functions=[function],
        options=CoremlOptions(precision="fp16"),
    )
    named = [name for name, reason in artefact.islands.items() if "too large" in reason]
    assert len(named) == 1
    assert "conv_in" in named[0]


def test_softmax_attention_written_out_and_cut_gives_the_fused_result(tmp_path: Path) -> None:
    graph = TinyGraph("pixart", SEED)
    values = graph.inputs()
    fused = write(graph, tmp_path / "fused", values)
    written = write(graph, tmp_path / "written", values, fused_attention=False)
    packages = [read_package(tmp_path / "fused" / fused.graph), read_package(tmp_path / "written" / written.graph)]
    kinds = [{op.kind for f in package.functions.values() for op in f.operations} for package in packages]
    assert "scaled_dot_product_attention" in kinds[0] - kinds[1]
    outputs = [MilInterpreter(package).run(values)["prediction"] for package in packages]
    assert compare(outputs[1], outputs[0]).relative_l2 < 1e-6


# One node at a time: (operator, inputs, static inputs, attributes). Symbolic inputs are drawn, static ones folded.
def _one(kind: str, *inputs: Any, **attributes: Any) -> Any:
    label = "-".join([kind, *(f"{k}{v}" for k, v in attributes.items())])
    return pytest.param(kind, inputs, attributes, id=label.replace(" ", ""))


_M = (2, 6, 4, 4)
OPERATORS = [
    *[_one(kind, (2, 3), (2, 3)) for kind in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Pow")],
    *[_one(kind, (2, 3)) for kind in ("Cos", "Sin", "Tanh", "Erf", "Relu", "Sigmoid", "Neg", "Sqrt", "Log")],
    _one("Gelu", (2, 3)),
    _one("Gelu", (2, 3), approximate="tanh"),
    _one("Softmax", (2, 3, 4), axis=1),
    _one("Clip", (2, 3), np.float32(-0.3), np.float32(0.4)),
    _one("ReduceSum", (2, 3, 4), np.array([1]), keepdims=0),
    _one("ReduceMean", (2, 3, 4), np.array([-1, 0]), keepdims=1),
    _one("Concat", (2, 3), (2, 1), axis=1),
    _one("Pad", (2, 3), np.array([1, 0, 2, 3]), np.float32(1.5)),
    _one("Pad", (2, 6, 4, 5), np.array([0, 0, 1, 2, 0, 0, 2, 1]), mode="reflect"),
    _one("Slice", (5, 7), np.array([1, -6]), np.array([5, 1000]), np.array([0, 1]), np.array([2, 3])),
    _one("Squeeze", (2, 1, 3, 1), np.array([1, -1])),
    _one("Unsqueeze", (2, 3), np.array([0, -1])),
    _one("Expand", (1, 3), np.array([2, 4, 3])),
    _one("Transpose", (2, 3, 4), perm=[2, 0, 1]),
    _one("Gather", (4, 3, 2), np.array([2, -1, 0, 0]), axis=1),
    _one("Conv", _M, np.ones((9, 2, 3, 2), np.float32), np.ones(9, np.float32), group=3, pads=[1, 0, 2, 1]),
    _one("Conv", _M, np.ones((6, 1, 3, 3), np.float32), group=6, strides=[2, 1], dilations=[1, 2], pads=[1] * 4),
    _one("ConvTranspose", _M, np.ones((6, 2, 3, 2), np.float32), np.ones(4, np.float32), group=2, strides=[2, 3]),
    _one("ConvTranspose", _M, np.ones((6, 2, 3, 3), np.float32), strides=[2, 2], pads=[1, 0, 0, 1]),
    _one("DepthToSpace", (2, 8, 3, 2), blocksize=2, mode="DCR"),
    _one("DepthToSpace", (2, 8, 3, 2), blocksize=2, mode="CRD"),
    _one("SpaceToDepth", (2, 3, 4, 6), blocksize=2),
    _one("LayerNormalization", (2, 3, 8), np.full(8, 0.7, np.float32), np.full(8, 0.2, np.float32), epsilon=1e-3),
    _one("RMSNormalization", (2, 3, 8), np.full(8, 0.7, np.float32), epsilon=1e-3),
    _one("GroupNormalization", _M, np.full(6, 0.7, np.float32), np.full(6, 0.2, np.float32), num_groups=3),
    _one("MatMul", (2, 3, 4), (2, 4, 5)),
    _one("MatMul", (2, 2, 3, 4), np.ones((4, 5), np.float32)),
    _one("Attention", (1, 3, 8), (1, 5, 8), (1, 5, 8), q_num_heads=2, kv_num_heads=2, scale=0.7),
    _one("Attention", (1, 4, 3, 8), (1, 2, 5, 8), (1, 2, 5, 8), (1, 1, 3, 5), softcap=2.0),
    _one("RotaryEmbedding", (1, 3, 16), (1, 3, 4), (1, 3, 4), num_heads=2),
    _one("RotaryEmbedding", (1, 2, 3, 8), (1, 3, 4), (1, 3, 4), interleaved=1),
]


def _lowered(
    nodes: Sequence[onnx.NodeProto], inputs: dict[str, np.ndarray], static: dict[str, np.ndarray], folder: Path
) -> tuple[np.ndarray, np.ndarray]:
    """What Core ML's program and ONNX Runtime make of a small graph with the output y."""
    infos = [
        onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in inputs.items()
    ]
    graph = onnx.helper.make_graph(
        list(nodes),
        "g",
        infos,
        [onnx.helper.make_tensor_value_info("y", FLOAT, None)],
        [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in static.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11)
    expected = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, inputs)[0]
    specs = [TensorSpec(n, str(a.dtype), a.shape) for n, a in inputs.items()]
    artefact = coreml.write(ir.from_proto(model), folder, "part", inputs=specs, functions=[CoremlFunction("main", {})])
    return MilInterpreter(folder / artefact.graph).run(inputs)["y"], expected


@pytest.mark.parametrize(("kind", "operands", "attributes"), OPERATORS)
def test_an_operator_agrees_with_onnx_runtime(
    kind: str, operands: tuple[Any, ...], attributes: dict[str, Any], tmp_path: Path
) -> None:
    random = np.random.default_rng(SEED)
    inputs, static, names = {}, {}, []
    for index, operand in enumerate(operands):
        names.append(f"i{index}")
        if isinstance(operand, tuple):
            drawn = random.standard_normal(operand).astype(np.float32)
            inputs[names[-1]] = np.abs(drawn) + np.float32(0.1) if kind in ("Sqrt", "Log", "Pow") else drawn
        else:
            array = np.asarray(operand)
            noisy = array.dtype == np.float32 and array.size > 1
            static[names[-1]] = (array * random.uniform(0.5, 1.5, array.shape)).astype("f") if noisy else array
    found, expected = _lowered([onnx.helper.make_node(kind, names, ["y"], **attributes)], inputs, static, tmp_path)
    assert compare(found, expected).relative_l2 < 3e-6, f"seed {SEED}"


def test_truth_values_and_whole_numbers_agree_with_onnx_runtime(tmp_path: Path) -> None:
    """Cast, Less, Equal, And, Where between numbers and tensors, and Clip of whole numbers."""
    make = onnx.helper.make_node
    nodes = [
        make("Cast", ["ids"], ["real"], to=FLOAT),
        make("Less", ["ids", "three"], ["less"]),
        make("Equal", ["ids", "one"], ["one_"]),
        make("Cast", ["ids"], ["some"], to=BOOL),
        make("And", ["less", "some"], ["both"]),
        make("Where", ["both", "half", "far"], ["chosen"]),
        make("Where", ["one_", "real", "chosen"], ["again"]),
        make("Clip", ["ids", "one", "three"], ["clipped"]),
        make("Cast", ["clipped"], ["narrow"], to=FLOAT),
        make("Add", ["again", "narrow"], ["y"]),
    ]
    static = {
        "three": np.array(3),
        "one": np.array(1),
        "half": np.array(0.5, np.float32),
        "far": np.array(-1e30, np.float32),
    }
    found, expected = _lowered(nodes, {"ids": np.arange(6).reshape(2, 3)}, static, tmp_path)
    np.testing.assert_array_equal(found, expected)


def test_every_allowed_operator_is_lowered_or_always_folded() -> None:
    folded = {"Constant", "ConstantOfShape", "DequantizeLinear", "Identity", "Range", "Shape"}
    assert set(MilBuilder().table) == set(ALLOWED_OPERATORS) - folded


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights_are_carried_over_code_by_code(bits: int, tmp_path: Path) -> None:
    random = np.random.default_rng(SEED)
    kind = onnx.TensorProto.INT4 if bits == 4 else onnx.TensorProto.UINT8
    low, high = (-8, 8) if bits == 4 else (0, 256)
    codes = random.integers(low, high, (64, 6))
    scale = random.uniform(0.01, 0.1, (2, 6)).astype(np.float32)
    tensors = [
        onnx.helper.make_tensor("q", kind, codes.shape, codes.flatten().tolist()),
        onnx.numpy_helper.from_array(scale, "s"),
        onnx.helper.make_tensor("z", kind, scale.shape, random.integers(low, high, scale.shape).flatten().tolist()),
    ]
    nodes = [
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=0, block_size=32),
        onnx.helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", FLOAT, (1, 3, 64))],
        [onnx.helper.make_tensor_value_info("y", FLOAT, None)],
        tensors,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    x = random.standard_normal((1, 3, 64)).astype(np.float32)
    expected = ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0]
    artefact = coreml.write(
        ir.from_proto(model),
        tmp_path,
        "part",
        inputs=[TensorSpec("x", "float32", (1, 3, 64))],
        functions=[CoremlFunction("main", {})],
    )
    interpreter = MilInterpreter(tmp_path / artefact.graph)
    (function,) = interpreter.package.functions.values()
    (stored,) = [op.inputs["data"] for op in function.operations if op.kind == "constexpr_blockwise_shift_scale"]
    if isinstance(stored, str):
        stored = next(op.inputs["val"] for op in function.operations if op.outputs[0][0] == stored)
    stored = stored.load() if isinstance(stored, Blob) else stored
    np.testing.assert_array_equal(stored, codes.T)
    assert compare(interpreter.run({"x": x})["y"], expected).relative_l2 < 1e-6


@pytest.mark.parametrize(
    ("kind", "shapes", "attributes", "reason"),
    [
        pytest.param("Attention", [(1, 2, 3, 4)] * 3, {"is_causal": 1}, "state causality as a mask", id="causal"),
        pytest.param("LayerNormalization", [(1, 3, 4)], {"axis": 1}, "more than the last axis", id="two axes"),
        pytest.param("Conv", [(1, 3, 4, 4), (3, 3, 1, 1)], {}, "kernel that is computed", id="kernel"),
        pytest.param("LpNormalization", [(1, 3)], {}, "no lowering for operator LpNormalization", id="unknown"),
    ],
)
def test_what_core_ml_cannot_express_is_refused_by_name(
    kind: str, shapes: list[tuple[int, ...]], attributes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    names = [f"i{i}" for i in range(len(shapes))]
    static = [onnx.numpy_helper.from_array(np.ones(shapes[0][1:], "f"), "g")] if kind.startswith("Layer") else []
    proto = onnx.helper.make_node(kind, [*names, *(t.name for t in static)], ["y"], name="block/7", **attributes)
    infos = [onnx.helper.make_tensor_value_info(n, FLOAT, s) for n, s in zip(names, shapes, strict=True)]
    graph = onnx.helper.make_graph([proto], "g", infos, [onnx.helper.make_tensor_value_info("y", FLOAT, None)], static)
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)]))
    specs = [TensorSpec(n, "float32", s) for n, s in zip(names, shapes, strict=True)]
    with pytest.raises(ConversionError, match=rf"block/7.*{reason}|{reason}.*block/7") as caught:
        coreml.write(model, tmp_path, "part", inputs=specs, functions=[CoremlFunction("main", {})])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.mlpackage"))


def test_a_size_that_is_not_given_is_named(tmp_path: Path) -> None:
    graph = TinyGraph("pixart", SEED)
    with pytest.raises(ConversionError, match="no size is given for the dimension 'length'"):
        coreml.write(
            graph.model(),
            tmp_path,
            "transformer",
            inputs=graph.component.inputs,
            functions=[CoremlFunction("main", {"batch": 1, "height": 4, "width": 4, "tokens": 4})],
        )


def test_a_component_says_when_nothing_of_it_is_computed_in_float16() -> None:
    def component(name: str, **runtime: Any) -> Component:
        return Component(name, "X", None, (), (), runtime=runtime)  # type: ignore[arg-type]

    assert precision_of(component("text_encoder"), "fp16") == "fp16-weights"
    assert precision_of(component("decoder", force_upcast=True), "fp16") == "fp16-weights"
    assert precision_of(component("decoder", force_upcast=False), "fp16") == "fp16"
    assert precision_of(component("transformer"), "fp32") == "fp32"

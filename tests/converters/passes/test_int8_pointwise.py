"""1×1 convolutions as integer products of tokens, against torch's convolutions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgedit.converters.passes.int8_pointwise import is_pointwise
from edgedit.converters.passes.quantize import Int8MatMul


def run(model: ir.Model, place: Path, x: np.ndarray, shape: np.ndarray | None) -> np.ndarray:
    ir.save(model, place / "graph.onnx")
    session = ort.InferenceSession(str(place / "graph.onnx"), providers=["CPUExecutionProvider"])
    inputs = {"x": x} if shape is None else {"x": x, "sides": shape}
    result: np.ndarray = session.run(None, inputs)[0]
    return result


def two_convolutions(codes: list[np.ndarray], scales: list[np.ndarray], bias: np.ndarray, *, tokens: bool) -> ir.Model:
    """1×1 with a bias, ReLU, 1×1 without: of tokens that become a map in between, or of a map."""
    channels = [codes[0].shape[1], codes[0].shape[0], codes[1].shape[0]]
    constants = {f"blocks.0.conv{i}.weight": c for i, c in enumerate(codes)}
    constants |= {f"blocks.0.conv{i}.weight/scale": s for i, s in enumerate(scales)}
    constants |= {"bias": bias, "flat": np.array([0, channels[2], -1])}
    nodes = [
        helper.make_node(
            "DequantizeLinear",
            [f"blocks.0.conv{i}.weight", f"blocks.0.conv{i}.weight/scale"],
            [f"w{i}"],
            name=f"blocks.0.conv{i}.weight/dequantize",
            axis=0,
        )
        for i in range(2)
    ]
    start, end = "x", "y"
    if tokens:
        constants["channels"] = np.array([0, channels[0]])
        nodes += [
            helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
            helper.make_node("Concat", ["channels", "sides"], ["shape"], axis=0),
            helper.make_node("Reshape", ["t", "shape"], ["map"]),
        ]
        start, end = "map", "c1"
    nodes += [
        helper.make_node("Conv", [start, "w0", "bias"], ["c0"], name="blocks.0.conv0", kernel_shape=[1, 1]),
        helper.make_node("Relu", ["c0"], ["r"]),
        helper.make_node("Conv", ["r", "w1"], [end], name="blocks.0.conv1", kernel_shape=[1, 1]),
    ]
    if tokens:
        nodes += [
            helper.make_node("Reshape", ["c1", "flat"], ["f"]),
            helper.make_node("Transpose", ["f"], ["y"], perm=[0, 2, 1]),
        ]
    sides = ["b", "n", channels[0]] if tokens else ["b", channels[0], "h", "w"]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, sides)]
    if tokens:
        inputs.append(helper.make_tensor_value_info("sides", TensorProto.INT64, [2]))
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    held = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", inputs, [output], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model))


@pytest.mark.parametrize("per_token", [False, True], ids=["by tensor", "by token"])
@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "map"])
def test_integer_products_of_tokens_stand_in_for_convolutions(tokens: bool, per_token: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng()
    channels, height, width = [int(n) for n in rng.integers(17, 90, 3)], 7, 5
    codes = [rng.integers(-127, 128, (channels[i + 1], channels[i], 1, 1)).astype(np.int8) for i in range(2)]
    scales = [rng.uniform(0.5, 1.5, len(c)).astype(np.float32) / 2000 for c in codes]
    bias = rng.standard_normal(channels[1]).astype(np.float32)
    model = two_convolutions(codes, scales, bias, tokens=tokens)
    picture = rng.standard_normal((2, channels[0], height, width)).astype(np.float32)
    weights = [
        torch.from_numpy(c.astype(np.float32) * s[:, None, None, None]) for c, s in zip(codes, scales, strict=True)
    ]
    inner = torch.relu(torch.conv2d(torch.from_numpy(picture), weights[0], torch.from_numpy(bias)))
    expected = torch.conv2d(inner, weights[1]).numpy()
    x, shape = picture, None
    if tokens:
        x = np.ascontiguousarray(picture.reshape(2, channels[0], -1).transpose(0, 2, 1))
        shape = np.array([height, width])
        expected = expected.reshape(2, channels[2], -1).transpose(0, 2, 1)
    result = Int8MatMul(per_token=["blocks.0.conv0", "blocks.0.conv1"] if per_token else ())(model)
    assert result.modified
    kinds = Counter(node.op_type for node in model.graph)
    assert kinds["MatMulIntegerToFloat" if per_token else "DynamicQuantizeMatMul"] == 2
    assert kinds["Conv"] == kinds["DequantizeLinear"] == 0
    # Two for the weights; of tokens one back into the map and one out of it, of a map two each way.
    assert kinds["Transpose"] == (4 if tokens else 6)
    found = run(model, tmp_path, x, shape)
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    "attributes",
    [{"strides": [2, 2]}, {"group": 3}, {"pads": [1, 1, 1, 1]}, {"kernel": 3}],
    ids=lambda a: next(iter(a)),
)
def test_other_convolutions_are_left_alone(attributes: dict[str, object]) -> None:
    side = int(attributes.pop("kernel", 1))  # type: ignore[call-overload]
    groups = int(attributes.get("group", 1))  # type: ignore[call-overload]
    node = helper.make_node("Conv", ["x", "w"], ["y"], **attributes)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 6, 9, 9])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    weight = numpy_helper.from_array(np.zeros((6, 6 // groups, side, side), np.float32), "w")
    graph = helper.make_graph([node], "g", [x], [y], [weight])
    model = ir.serde.deserialize_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]))
    assert not is_pointwise(next(iter(model.graph)))

"""The driver with a table that computes: every operator handed on is run by the ONNX reference, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from edgedit.converters.lowerings.driver import NodeInfo, Quantized, Weight, dense, is_static, lower, reshaped
from edgedit.errors import ConversionError

FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64


class Computed:
    """A backend value: an array that the driver must not take for a static one."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


def recorder(seen: list[str]) -> Callable[..., Any]:
    def rule(node: NodeInfo, *values: Any) -> list[Computed]:
        seen.append(node.op_type)
        arrays = [dense(v) if is_static(v) else v.array for v in values]
        names = [f"i{k}" for k in range(len(arrays))]
        outputs = [f"o{k}" for k in range(len(node.outputs))]
        proto = onnx.helper.make_node(node.op_type, names, outputs, **dict(node.attributes))
        infos = [
            onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), None)
            for n, a in zip(names, arrays, strict=True)
        ]
        graph = onnx.helper.make_graph(
            [proto], "one", infos, [onnx.helper.make_tensor_value_info(o, FLOAT, None) for o in outputs]
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
        return [Computed(a) for a in ReferenceEvaluator(model).run(None, dict(zip(names, arrays, strict=True)))]

    return rule


def model_of(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray] | list[onnx.TensorProto]) -> ir.Model:
    tensors = [onnx.numpy_helper.from_array(a, n) for n, a in weights.items()] if isinstance(weights, dict) else weights
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", FLOAT, ["b", "n", 4])],
        [onnx.helper.make_tensor_value_info("y", FLOAT, None)],
        tensors,
    )
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)]))


def node(kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> onnx.NodeProto:
    return onnx.helper.make_node(kind, inputs, outputs, name=f"scope/{kind}", **attributes)


def test_arithmetic_on_shapes_and_weights_never_reaches_the_table() -> None:
    """y = reshape(x, [b·n, 4]) + (w + 1): only Reshape and the last Add depend on x."""
    random = np.random.default_rng()
    weights = {"w": random.standard_normal(4).astype(np.float32), "one": np.array(1, np.float32)}
    model = model_of(
        [
            node("Shape", ["x"], ["s"], start=0, end=2),
            node("ReduceSum", ["s"], ["unused"], keepdims=1),
            node("Constant", [], ["tail"], value_ints=[-1, 4]),
            node("Identity", ["x"], ["same"]),
            node("Reshape", ["same", "tail"], ["flat"]),
            node("Add", ["w", "one"], ["shifted"]),
            node("Add", ["flat", "shifted"], ["y"]),
        ],
        weights,
    )
    seen: list[str] = []
    rule = recorder(seen)
    x = random.standard_normal((2, 3, 4)).astype(np.float32)
    outputs = lower(model, {"Add": rule, "Reshape": rule}, {"x": Computed(x)}, backend="test")
    assert seen == ["Reshape", "Add"]
    np.testing.assert_array_equal(outputs["y"].array, x.reshape(-1, 4) + (weights["w"] + 1))


def test_an_input_that_is_given_as_an_array_is_folded_away() -> None:
    model = model_of([node("Add", ["x", "w"], ["y"])], {"w": np.ones(4, np.float32)})
    outputs = lower(model, {}, {"x": np.zeros((1, 2, 4), np.float32)}, backend="test")
    np.testing.assert_array_equal(outputs["y"], np.ones((1, 2, 4)))


def test_an_operator_that_the_table_lacks_is_named_with_its_node() -> None:
    model = model_of([node("Relu", ["x"], ["y"])], {})
    with pytest.raises(ConversionError, match="Test has no lowering for operator Relu of node scope/Relu") as caught:
        lower(model, {}, {"x": Computed(np.zeros((1, 1, 4), np.float32))}, backend="Test")
    assert "\n" not in str(caught.value)


def test_a_rule_that_fails_and_a_missing_input_are_one_line_each() -> None:
    def refuse(_: NodeInfo, *values: Any) -> Any:
        raise ValueError("no such thing\nsecond line")

    model = model_of([node("Relu", ["x"], ["y"])], {})
    with pytest.raises(ConversionError, match=r"Test cannot express node scope/Relu \(Relu\): no such thing$"):
        lower(model, {"Relu": refuse}, {"x": Computed(np.zeros((1, 1, 4)))}, backend="Test")
    with pytest.raises(ConversionError, match="takes 'x'"):
        lower(model, {"Relu": refuse}, {}, backend="Test")


def test_weights_are_read_only_when_a_rule_asks() -> None:
    reads = []

    def load() -> ir.TensorProtocol:
        reads.append(1)
        return ir.tensor(np.ones((4, 4), np.float32))

    model = model_of(
        [node("Cast", ["w"], ["h"], to=10), node("MatMul", ["x", "h"], ["y"])], {"w": np.ones((4, 4), "f")}
    )
    value = model.graph.initializers["w"]
    value.const_value = ir.LazyTensor(load, dtype=ir.DataType.FLOAT, shape=ir.Shape([4, 4]), name="w", cache=False)
    found: list[Any] = []

    def keep(_: NodeInfo, x: Any, w: Any) -> Any:
        found.append(w)
        return x

    lower(model, {"MatMul": keep}, {"x": Computed(np.zeros((1, 1, 4)))}, backend="test")
    assert isinstance(found[0], Weight)
    assert (found[0].name, found[0].shape, reads) == ("w", (4, 4), [])
    assert found[0].numpy().dtype == np.float16
    assert reads == [1]


@pytest.mark.parametrize(
    ("kind", "zero", "shape", "block"),
    [
        pytest.param(kind, zero, shape, block, id=f"{onnx.TensorProto.DataType.Name(kind)}-{zero}-{shape}-{block}")
        for kind in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
        for zero in (False, True)
        for shape, block in (((3, 5), 2), ((6,), 0), ((), 0))
        if block == 0 or shape
    ],
)
def test_quantized_weights_keep_their_codes_and_dequantize_as_onnx_says(
    kind: int, zero: bool, shape: tuple[int, ...], block: int
) -> None:
    """Blocks along axis 0 of a [6, 5] weight, per channel of axis 0, and per tensor."""
    random = np.random.default_rng()
    low, high = {"INT4": (-8, 8), "UINT4": (0, 16), "INT8": (-128, 128), "UINT8": (0, 256)}[
        onnx.TensorProto.DataType.Name(kind)
    ]
    codes = random.integers(low, high, (6, 5))
    scale = random.uniform(0.1, 1, shape).astype(np.float32)
    tensors = [
        onnx.helper.make_tensor("q", kind, codes.shape, codes.flatten().tolist()),
        onnx.numpy_helper.from_array(scale, "s"),
    ]
    inputs = ["q", "s"]
    if zero:
        points = random.integers(low, high, shape)
        tensors.append(onnx.helper.make_tensor("z", kind, shape, np.atleast_1d(points).flatten().tolist()))
        inputs.append("z")
    attributes = {"axis": 0, **({"block_size": block} if block else {})}
    dequantize = node("DequantizeLinear", inputs, ["w"], **attributes)
    found: list[Any] = []

    def keep(_: NodeInfo, x: Any, w: Any) -> Any:
        found.append(w)
        return x

    model = model_of([dequantize, node("MatMul", ["x", "w"], ["y"])], tensors)
    lower(model, {"MatMul": keep}, {"x": Computed(np.zeros((1, 1, 6)))}, backend="test")
    quantized = found[0]
    assert isinstance(quantized, Quantized)
    np.testing.assert_array_equal(quantized.codes, codes)
    assert (quantized.bits, quantized.signed, quantized.name) == (4 if high <= 16 else 8, low < 0, "q")
    graph = onnx.helper.make_graph(
        [dequantize], "d", [], [onnx.helper.make_tensor_value_info("w", FLOAT, None)], tensors
    )
    reference = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])).run(
        None, {}
    )[0]
    np.testing.assert_allclose(quantized.numpy(), reference, rtol=1e-6)


def test_values_are_dropped_after_their_last_use() -> None:
    import gc
    import weakref

    alive: list[weakref.ref[Computed]] = []
    most = 0

    def step(_: NodeInfo, x: Computed) -> Computed:
        nonlocal most
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        value = Computed(x.array + 1)
        alive.append(weakref.ref(value))
        return value

    chain = [node("Relu", ["x" if i == 0 else f"v{i}"], [f"v{i + 1}" if i < 9 else "y"]) for i in range(10)]
    outputs = lower(model_of(chain, {}), {"Relu": step}, {"x": Computed(np.zeros((1, 1, 4)))}, backend="test")
    assert outputs["y"].array[0, 0, 0] == 10
    assert most <= 2


@pytest.mark.parametrize(
    ("current", "wanted", "zero", "expected"),
    [
        ((2, 3, 4), (0, -1), False, [2, 12]),
        ((2, 3, 4), (6, 4), False, [6, 4]),
        ((2, 3, 4), (0, 0, 2, -1), False, [2, 3, 2, 2]),
        ((0, 3), (0, 3), True, [0, 3]),
    ],
)
def test_reshape_follows_onnx(
    current: tuple[int, ...], wanted: tuple[int, ...], zero: bool, expected: list[int]
) -> None:
    assert reshaped(current, wanted, allow_zero=zero) == expected

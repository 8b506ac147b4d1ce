"""The MLX table against ONNX Runtime, operator by operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx_blas  # noqa: F401  (before MLX)
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edgedit.converters.graph import ALLOWED_OPERATORS, IR_VERSION, OPSET
from edgedit.converters.lowerings import mlx_attention
from edgedit.converters.lowerings.driver import lower
from edgedit.converters.lowerings.mlx_table import table
from edgedit.converters.lowerings.mlx_values import Values
from edgedit.errors import ConversionError

mx = pytest.importorskip("mlx.core")

#: Nodes that never reach a table: the driver folds them, or passes them through.
FOLDED = {"Constant", "Shape", "Range", "ConstantOfShape", "Identity"}


class Static:
    """An operand that the graph knows: an initializer."""

    def __init__(self, value: Any, dtype: Any = np.int64) -> None:
        self.array = np.asarray(value, dtype)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng().standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return np.abs(noise(*shape)) + np.float32(0.1)


def truth(*shape: int) -> np.ndarray:
    return np.random.default_rng().random(shape) < 0.5


def weights(*shape: int) -> Static:
    return Static(noise(*shape), np.float32)


def model_of(op: str, inputs: Sequence[Any], attributes: dict[str, Any], outputs: int) -> ir.Model:
    values: list[ir.Value | None] = []
    for index, operand in enumerate(inputs):
        if operand is None:
            values.append(None)
            continue
        array = operand.array if isinstance(operand, Static) else operand
        tensor = ir.tensor(array, name=f"i{index}")
        values.append(ir.Value(name=f"i{index}", type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape)))
        if isinstance(operand, Static):
            values[-1].const_value = tensor
    node = ir.node(op, values, attributes=attributes, num_outputs=outputs)
    for index, value in enumerate(node.outputs):
        value.name = f"o{index}"
    given = [v for v in values if v is not None]
    graph = ir.Graph(
        [v for v in given if v.const_value is None],
        node.outputs,
        nodes=[node],
        initializers=[v for v in given if v.const_value is not None],
        opset_imports={"": OPSET},
        name="one",
    )
    return ir.Model(graph, ir_version=IR_VERSION)


def evaluate(model: ir.Model, inputs: Sequence[Any]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The outputs of MLX and of ONNX Runtime."""
    feeds = {f"i{i}": x for i, x in enumerate(inputs) if isinstance(x, np.ndarray)}
    values = Values(half=False)
    found = lower(model, table(values), {name: mx.array(x) for name, x in feeds.items()}, backend="MLX")
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = session.run(None, feeds)
    return [np.array(values.array(found[f"o{i}"])) for i in range(len(wanted))], wanted


def check(op: str, inputs: Sequence[Any], attributes: dict[str, Any], outputs: int = 1) -> None:
    found, wanted = evaluate(model_of(op, inputs, attributes, outputs), inputs)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        if b.dtype.kind == "f":
            assert np.linalg.norm(a.astype(np.float64) - b) <= 2e-6 * max(1.0, float(np.linalg.norm(b)))
        else:
            assert np.array_equal(a, b)


HALF_PIXEL: dict[str, Any] = {"coordinate_transformation_mode": "half_pixel"}
SCALES = Static([1, 1, 3, 2], np.float32)
MAP = (2, 4, 5, 3)

CASES: list[tuple[str, list[Any], dict[str, Any]]] = [
    *[(op, [noise(3, 4), noise(2, 1, 4)], {}) for op in ("Add", "Sub", "Mul", "Max", "Min")],
    *[(op, [noise(3, 4), Static(0.7, np.float32)], {}) for op in ("Add", "Sub", "Mul", "Max", "Min")],
    ("Max", [noise(3), noise(2, 3), Static([0.1, 0.2, 0.3], np.float32)], {}),
    ("Div", [noise(3, 4), positive(4)], {}),
    ("Pow", [positive(3, 4), Static(1.7, np.float32)], {}),
    ("Pow", [noise(3, 4), Static(2, np.float32)], {}),
    *[(op, [noise(3, 4)], {}) for op in ("Neg", "Relu", "Sigmoid", "Tanh", "Sin", "Cos", "Erf")],
    *[(op, [positive(3, 4)], {}) for op in ("Sqrt", "Log")],
    ("And", [truth(3, 4), truth(4)], {}),
    ("Equal", [np.arange(6).reshape(2, 3), Static([0, 4, 2])], {}),
    ("Less", [noise(3, 4), noise(4)], {}),
    ("Where", [truth(3, 1), noise(3, 4), Static(-1e30, np.float32)], {}),
    ("Cast", [truth(3, 4)], {"to": 1}),
    ("Cast", [noise(3, 4) * 5], {"to": 7}),
    ("Cast", [np.arange(-2, 3)], {"to": 9}),
    ("Clip", [noise(3, 4), Static(-0.3, np.float32), Static(0.4, np.float32)], {}),
    ("Clip", [noise(3, 4), None, Static(0.4, np.float32)], {}),
    ("Concat", [noise(2, 3), noise(2, 1), Static(np.ones((2, 2)), np.float32)], {"axis": -1}),
    ("Expand", [noise(3, 1), Static([2, 1, 4])], {}),
    ("Gather", [weights(7, 3), np.array([[0, 6], [2, 2]])], {"axis": 0}),
    ("Gather", [noise(2, 5, 3), Static([4, 0, 0])], {"axis": 1}),
    ("Gather", [noise(2, 5, 3), Static(2)], {"axis": -1}),
    ("Gelu", [noise(3, 4)], {"approximate": "tanh"}),
    ("Gelu", [noise(3, 4)], {}),
    ("MatMul", [noise(2, 3, 4), weights(4, 5)], {}),
    ("MatMul", [noise(2, 3, 4), noise(2, 4, 5)], {}),
    ("Pad", [noise(2, 3), Static([1, 0, 0, 2]), Static(0.5, np.float32)], {}),
    ("Pad", [noise(2, 3), Static([1, 1])], {"mode": "edge", "axes_input": Static([1])}),
    ("Reshape", [noise(2, 3, 4), Static([0, -1])], {}),
    ("Slice", [noise(4, 9), Static([1, 0]), Static([100, 7]), Static([0, 1]), Static([1, 3])], {}),
    ("Slice", [noise(4, 9), Static([-5]), Static([-1]), Static([1])], {}),
    ("Softmax", [3 * noise(2, 3, 4)], {"axis": 1}),
    ("Split", [noise(2, 7)], {"axis": 1, "num_outputs": 3}),
    ("Split", [noise(2, 7), Static([2, 5])], {"axis": -1}),
    ("Squeeze", [noise(2, 1, 3, 1), Static([1])], {}),
    ("Squeeze", [noise(2, 1, 3, 1)], {}),
    ("Unsqueeze", [noise(2, 3), Static([-1, 1])], {}),
    ("Transpose", [noise(2, 3, 4)], {"perm": [0, 2, 1]}),
    ("Transpose", [noise(2, 3)], {}),
    *[(op, [noise(2, 3, 4), Static([0, -1])], {"keepdims": k}) for op in ("ReduceMean", "ReduceSum") for k in (0, 1)],
    ("ReduceSum", [noise(2, 3)], {}),
    ("LayerNormalization", [noise(2, 3, 8), weights(8), weights(8)], {"axis": -1, "epsilon": 1e-6}),
    ("LayerNormalization", [noise(2, 3, 8), Static(np.ones(8), np.float32)], {"axis": 2}),
    ("RMSNormalization", [noise(2, 3, 8), weights(8)], {"axis": -1, "epsilon": 1e-6}),
    ("GroupNormalization", [noise(*MAP), weights(4), weights(4)], {"num_groups": 2, "epsilon": 1e-5}),
    ("Conv", [noise(*MAP), weights(6, 4, 3, 3), weights(6)], {"pads": [1, 1, 1, 1]}),
    ("Conv", [noise(*MAP), weights(6, 4, 2, 2)], {"strides": [2, 2], "pads": [0, 0, 1, 1]}),
    ("Conv", [noise(*MAP), weights(8, 1, 3, 3), weights(8)], {"group": 4, "pads": [1, 1, 1, 1], "dilations": [1, 1]}),
    ("Conv", [noise(2, 4, 9, 8), weights(6, 2, 3, 3)], {"group": 2, "dilations": [2, 2]}),
    ("ConvTranspose", [noise(*MAP), weights(4, 6, 3, 3), weights(6)], {"strides": [2, 2], "pads": [1, 0, 1, 1]}),
    ("ConvTranspose", [noise(*MAP), weights(4, 6, 3, 3)], {"strides": [2, 2], "output_padding": [1, 1]}),
    ("DepthToSpace", [noise(2, 12, 3, 5)], {"blocksize": 2, "mode": "CRD"}),
    ("DepthToSpace", [noise(2, 12, 3, 5)], {"blocksize": 2, "mode": "DCR"}),
    ("SpaceToDepth", [noise(2, 3, 4, 6)], {"blocksize": 2}),
    (
        "Resize",
        [noise(*MAP), None, SCALES],
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    ),
    ("Resize", [noise(*MAP), None, SCALES], {"mode": "linear", **HALF_PIXEL}),
    ("Resize", [noise(*MAP), None, SCALES], {"mode": "cubic", "cubic_coeff_a": -0.75, **HALF_PIXEL}),
    ("Resize", [noise(*MAP), None, SCALES], {"mode": "cubic", **HALF_PIXEL}),
    ("Attention", [noise(2, 5, 24), noise(2, 7, 24), noise(2, 7, 24)], {"q_num_heads": 3, "kv_num_heads": 3}),
    (
        "Attention",
        [noise(2, 5, 24), noise(2, 7, 8), noise(2, 7, 8), noise(2, 1, 5, 7)],
        {"q_num_heads": 6, "kv_num_heads": 2, "scale": 0.3},
    ),
    (
        "Attention",
        [noise(2, 5, 24), noise(2, 7, 8), noise(2, 7, 8), noise(1, 6, 5, 7)],
        {"q_num_heads": 6, "kv_num_heads": 2, "softcap": 2.0},
    ),
    ("Attention", [noise(1, 2, 5, 72), noise(1, 2, 7, 72), noise(1, 2, 7, 72)], {}),
    ("Attention", [noise(1, 2, 5, 4), noise(1, 2, 7, 4), noise(1, 2, 7, 4), np.tri(5, 7) > 0], {}),
    ("Attention", [noise(1, 2, 6, 4), noise(1, 2, 6, 4), noise(1, 2, 6, 4)], {"is_causal": 1}),
    ("RotaryEmbedding", [noise(2, 5, 24), noise(2, 5, 4), noise(2, 5, 4)], {"num_heads": 3}),
    ("RotaryEmbedding", [noise(2, 3, 5, 8), noise(2, 5, 4), noise(2, 5, 4)], {"interleaved": 1}),
    (
        "RotaryEmbedding",
        [noise(2, 3, 5, 8), noise(9, 4), noise(9, 4), np.random.default_rng().integers(0, 9, (2, 5))],
        {},
    ),
]


def outputs_of(op: str, inputs: Sequence[Any], attributes: dict[str, Any]) -> int:
    if op != "Split":
        return 1
    return int(attributes.get("num_outputs", 0)) or len(inputs[1].array)


@pytest.mark.parametrize(("op", "inputs", "attributes"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)])
def test_an_operator_agrees_with_onnx_runtime(op: str, inputs: list[Any], attributes: dict[str, Any]) -> None:
    attributes = dict(attributes)
    if "axes_input" in attributes:
        inputs = [*inputs, None, attributes.pop("axes_input")]
    check(op, inputs, attributes, outputs_of(op, inputs, attributes))


def test_every_canonical_operator_has_a_rule_and_a_case() -> None:
    rules = set(table(Values(half=False)))
    assert rules >= ALLOWED_OPERATORS - FOLDED
    assert {case[0] for case in CASES} | {"DequantizeLinear"} == ALLOWED_OPERATORS - FOLDED


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("block", [0, 3])
def test_codes_that_mlx_has_no_form_for_are_dequantized_in_the_graph(signed: bool, block: int) -> None:
    codes = np.random.default_rng().integers(-100 if signed else 0, 100, (6, 5), np.int8 if signed else np.uint8)
    shape = (2, 5) if block else (5,)
    zero = np.random.default_rng().integers(0, 9, shape).astype(codes.dtype)
    attributes = {"axis": 0, "block_size": block} if block else {"axis": 1}
    inputs = [codes, Static(positive(*shape), np.float32), Static(zero, codes.dtype)]
    model = model_of("DequantizeLinear", inputs, attributes, 1)
    found, wanted = evaluate(model, inputs)
    assert np.allclose(found[0], wanted[0], rtol=1e-6)


@pytest.mark.parametrize("interleaved", [0, 1])
def test_tables_of_consecutive_positions_become_the_rope_kernel(
    interleaved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    rope = mx.fast.rope
    monkeypatch.setattr(mlx_attention.mx.fast, "rope", lambda *a, **k: used.append(1) or rope(*a, **k))
    angle = np.arange(40, dtype=np.float32)[:, None] * (10000.0 ** (-np.arange(8) / 8)).astype(np.float32)
    tables = [Static(np.broadcast_to(f(angle), (2, 40, 8)), np.float32) for f in (np.cos, np.sin)]
    check("RotaryEmbedding", [noise(2, 3, 40, 16), *tables], {"interleaved": interleaved})
    assert used
    used.clear()
    shifted = [Static(np.broadcast_to(f(angle + 1), (2, 40, 8)), np.float32) for f in (np.cos, np.sin)]
    check("RotaryEmbedding", [noise(2, 3, 40, 16), *shifted], {"interleaved": interleaved})
    assert not used


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "reason"),
    [
        ("Range", [np.array(0), np.array(3), np.array(1)], {}, "its length depends"),
        ("LayerNormalization", [noise(2, 3, 4), weights(3, 4)], {"axis": 1}, "more than the last axis"),
        ("Slice", [noise(4), Static([3]), Static([0]), Static([0]), Static([-1])], {}, "counts backwards"),
        ("Resize", [noise(*MAP), None, Static([1, 1, 1.5, 2], np.float32)], {"mode": "linear"}, "whole factors"),
        ("Conv", [noise(*MAP), weights(6, 4, 3, 3)], {"auto_pad": "SAME_UPPER"}, "auto_pad"),
    ],
)
def test_what_a_rule_cannot_do_is_refused_with_the_node_named(
    op: str, inputs: list[Any], attributes: dict[str, Any], reason: str
) -> None:
    model = model_of(op, inputs, attributes, 1)
    next(iter(model.graph)).name = "here/it/is"
    feeds = {f"i{i}": mx.array(x) for i, x in enumerate(inputs) if isinstance(x, np.ndarray)}
    with pytest.raises(ConversionError, match=f"MLX cannot express node here/it/is .{op}.: .*{reason}") as caught:
        lower(model, table(Values(half=False)), feeds, backend="MLX")
    assert "\n" not in str(caught.value)


def test_an_operator_that_the_table_lacks_is_named_with_its_node() -> None:
    model = model_of("Hardmax", [noise(2, 3)], {}, 1)
    next(iter(model.graph)).name = "here/it/is"
    with pytest.raises(ConversionError, match="MLX has no lowering for operator Hardmax of node here/it/is"):
        lower(model, table(Values(half=False)), {"i0": mx.array(noise(2, 3))}, backend="MLX")

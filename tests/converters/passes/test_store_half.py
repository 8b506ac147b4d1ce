from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edgedit.converters.lowerings import onnx as lowering
from edgedit.converters.passes.store_half import SMALLEST, StoreHalf
from edgedit.errors import ConversionError


def matmul(weight: np.ndarray) -> ir.Model:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None, weight.shape[0]]))
    w = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(weight.shape))
    w.const_value = ir.LazyTensor(lambda: ir.tensor(weight, name="w"), dtype=ir.DataType.FLOAT, shape=w.shape, name="w")
    node = ir.Node("", "MatMul", [x, w], num_outputs=1, name="matmul")
    node.outputs[0].name = "y"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [node.outputs[0]], nodes=[node], initializers=[w], opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=11)


def test_stored_weights_are_rounded_once_and_computed_in_float32(tmp_path: Path) -> None:
    rng = np.random.default_rng()
    weight, x = rng.standard_normal((64, 48), np.float32), rng.standard_normal((5, 64), np.float32)
    artefact = lowering.write(matmul(weight), tmp_path, "component", dtype="fp16")
    assert sum((tmp_path / f).stat().st_size for f in artefact.files if f.endswith(".data")) == weight.size * 2
    session = ort.InferenceSession(str(tmp_path / artefact.graph), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x})
    assert np.allclose(found, x @ weight.astype(np.float16).astype(np.float32), atol=1e-5)
    assert not np.allclose(found, x @ weight, atol=1e-5)


def test_small_tensors_stay_float32() -> None:
    model = matmul(np.ones((SMALLEST // 2, 1), np.float32))
    assert not StoreHalf()(model).modified


def test_a_weight_beyond_float16_is_refused_by_name(tmp_path: Path) -> None:
    weight = np.ones((64, 48), np.float32)
    weight[3, 4] = 7e4
    with pytest.raises(
        ConversionError, match=r"component: weight w does not fit into float16; convert with --dtype fp32"
    ):
        lowering.write(matmul(weight), tmp_path, "component", dtype="fp16")

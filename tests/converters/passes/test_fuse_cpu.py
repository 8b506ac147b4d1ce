from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from edgedit.converters.passes.fuse_cpu import FuseForCpu


def attention_model(**attributes: float) -> onnx.ModelProto:
    values = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in ("q", "k", "v", "bias")]
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    node = onnx.helper.make_node("Attention", ["q", "k", "v", "bias"], ["y"], name="attention", **attributes)
    graph = onnx.helper.make_graph([node], "g", values, [output])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11)


@pytest.mark.parametrize("scaled", [False, True])
def test_fused_attention_agrees_with_torch(tmp_path: Path, scaled: bool) -> None:
    batch, heads, width, queries, keys = (random.randint(1, 9) for _ in range(5))
    scale = random.uniform(0.1, 2.0)
    extra = {"scale": scale} if scaled else {}
    model = ir.from_proto(attention_model(q_num_heads=heads, kv_num_heads=heads, **extra))
    fuse = FuseForCpu()
    assert fuse(model).modified
    assert fuse.changes == {"MultiHeadAttention": 1}
    ir.save(model, tmp_path / "fused.onnx")
    q, k, v = (torch.randn(batch, n, heads * width) for n in (queries, keys, keys))
    bias = torch.randn(batch, 1, queries, keys)
    session = ort.InferenceSession(str(tmp_path / "fused.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"q": q.numpy(), "k": k.numpy(), "v": v.numpy(), "bias": bias.numpy()})
    split = [t.unflatten(-1, (heads, width)).transpose(1, 2) for t in (q, k, v)]
    wanted = torch.nn.functional.scaled_dot_product_attention(*split, attn_mask=bias, scale=scale if scaled else None)
    wanted = wanted.transpose(1, 2).flatten(2)
    assert np.abs(found - wanted.numpy()).max() < 1e-5, (batch, heads, width, queries, keys, scale)


@pytest.mark.parametrize("attributes", [{"kv_num_heads": 2}, {"is_causal": 1}, {"softcap": 30.0}])
def test_attention_that_the_kernel_cannot_do_is_left_alone(attributes: dict[str, float]) -> None:
    model = ir.from_proto(attention_model(**{"q_num_heads": 4, "kv_num_heads": 4, **attributes}))
    assert not FuseForCpu()(model).modified
    assert [node.op_type for node in model.graph] == ["Attention"]


@pytest.mark.parametrize("batch", [1, 2])
def test_group_norm_of_a_large_map_is_as_exact_as_its_elements(tmp_path: Path, batch: int) -> None:
    """One float32 sum over a million elements, as the operator's own function takes it, is wrong in the fifth digit."""
    groups, width = random.randint(1, 3), random.randint(1, 3)
    channels, side = groups * width, 700
    values = {n: onnx.numpy_helper.from_array(np.random.randn(channels).astype(np.float32), n) for n in ("w", "b")}
    maps = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", channels, "h", "v"]) for n in "xy"]
    node = onnx.helper.make_node("GroupNormalization", ["x", "w", "b"], ["y"], num_groups=groups, epsilon=1e-6)
    graph = onnx.helper.make_graph([node], "g", maps[:1], maps[1:], list(values.values()))
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11)
    model = ir.from_proto(proto)
    fuse = FuseForCpu()
    assert fuse(model).modified
    assert fuse.changes["GroupNormalization"] == 1
    ir.save(model, tmp_path / "staged.onnx")
    x = 3 + torch.randn(batch, channels, side, side - 31)
    weights = [torch.from_numpy(onnx.numpy_helper.to_array(values[n]).copy()).double() for n in ("w", "b")]
    wanted = torch.nn.functional.group_norm(x.double(), groups, *weights, eps=1e-6).numpy()
    session = ort.InferenceSession(str(tmp_path / "staged.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max(), (groups, width)


def silu_model(*shape: int | str) -> onnx.ModelProto:
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in "xy"]
    nodes = [onnx.helper.make_node("Sigmoid", ["x"], ["s"]), onnx.helper.make_node("Mul", ["x", "s"], ["y"])]
    graph = onnx.helper.make_graph(nodes, "g", values[:1], values[1:])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11)


def test_silu_of_vectors_is_exact_in_its_tail(tmp_path: Path) -> None:
    model = ir.from_proto(silu_model("batch", "width"))
    fuse = FuseForCpu()
    assert fuse(model).modified
    assert fuse.changes == {"Sigmoid": 1}
    ir.save(model, tmp_path / "silu.onnx")
    x = torch.empty(random.randint(1, 4), random.randint(50, 999)).uniform_(-80, 20)
    x[0, :3] = torch.tensor([-1000.0, 0.0, 1000.0])
    session = ort.InferenceSession(str(tmp_path / "silu.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, torch.nn.functional.silu(x.double()).numpy(), rtol=1e-6, atol=1e-37)


def test_silu_of_maps_keeps_its_one_kernel() -> None:
    assert not FuseForCpu()(ir.from_proto(silu_model("batch", 8, "height", "width"))).modified

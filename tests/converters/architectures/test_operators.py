"""Every self-attention operator against its N × N definition, and the list that says which block has which."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from attention_references import REFERENCES, Reference
from parity_tools import BASE_SEED, TOLERANCE, Graph, fresh_seed, randomise, relative_l2

from edgedit.converters.architectures.layers import Module, Op, Value, map_to_tokens
from edgedit.converters.architectures.operators import (
    OPERATORS,
    SOFTMAX,
    Operator,
    describe_operators,
    operators_of,
    self_attention,
)
from edgedit.converters.architectures.token_grid import TokenGrid
from edgedit.converters.graph import Component, TensorSpec, build
from edgedit.converters.passes.fuse_cpu import FuseForCpu
from edgedit.errors import ConversionError

CASES: dict[str, list[dict[str, Any]]] = {
    "softmax": [{}],
    "relu": [{}],
    "lit": [{"kernel_size": 5}, {"kernel_size": 3}],
    "clear": [{"radius": 1}, {"radius": 3}, {"radius": 5, "pool": 4}, {"radius": 2, "pool": 3}, {"radius": 40}],
    "kv": [{"factor": 2}, {"factor": 3}],
    "proxy": [{"window": 2}, {"window": 3}],
}
SIZES = ((7, 11), (13, 5), (1, 9), (17, 19), (3, 2), (4, 8))


class OnMap(Module):
    """A map [B, C, H, W] read as tokens, the attention under test, tokens [B, H·W, C] out."""

    def __init__(self, attention: Module, width: int) -> None:
        super().__init__()
        self.attention, self.width = attention, width

    def forward(self, op: Op, x: Value) -> Value:
        return self.attention(op, map_to_tokens(op, x, self.width), TokenGrid(op.Shape(x, start=2, end=4)))


def component(operator: Operator, heads: int, head_dim: int, **options: Any) -> Component:
    width = heads * head_dim
    options = {"bias": True, "qk_norm": None, **options}
    return Component(
        name="attention",
        architecture="test",
        module=OnMap(self_attention(operator, width, heads, head_dim, **options), width),
        inputs=(TensorSpec("x", "float32", ("batch", width, "height", "width")),),
        outputs=(TensorSpec("y", "float32", ("batch", "tokens", width)),),
    )


def weights_of(reference: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f"attention.{name}": tensor for name, tensor in reference.state_dict().items()}


def own_options(name: str, options: dict[str, Any], heads: int) -> dict[str, Any]:
    return {**({"heads": heads} if name in ("relu", "lit") else {}), **options}


ALL = [(name, number) for name, cases in CASES.items() for number in range(len(cases))]


@pytest.mark.parametrize(("name", "number"), ALL)
def test_an_operator_equals_its_definition_at_any_size_through_one_graph(
    name: str, number: int, tmp_path: Path
) -> None:
    assert set(CASES) == set(OPERATORS)
    options = CASES[name][number]
    seed = fresh_seed(ALL.index((name, number)))
    random = np.random.default_rng(seed)
    heads, head_dim = int(random.integers(1, 5)), int(random.choice([4, 6, 10]))
    bias, norm = bool(random.integers(2)), bool(random.integers(2))
    reference = randomise(REFERENCES[name](heads * head_dim, heads, **options, bias=bias, normalised=norm), seed)
    (operator,) = operators_of(
        [{"operator": name, **own_options(name, options, heads), "layers": [0]}], 1, heads * head_dim
    )
    qk_norm = "layer_norm_across_heads" if norm else None
    graph = Graph(component(operator, heads, head_dim, bias=bias, qk_norm=qk_norm), weights_of(reference), tmp_path)
    for height, width in SIZES:
        if name == "kv" and min(height, width) < options["factor"]:
            continue
        x = random.standard_normal((int(random.integers(1, 4)), heads * head_dim, height, width), dtype=np.float32)
        with torch.no_grad():
            tokens = torch.from_numpy(x).double().flatten(2).mT
            expected = reference.double()(tokens, (height, width)).numpy()
        assert relative_l2(graph(x=x), expected) <= TOLERANCE, f"{(height, width)}, seed {BASE_SEED}"


def test_a_radius_beyond_the_map_is_softmax_attention(tmp_path: Path) -> None:
    seed = fresh_seed(50)
    reference = randomise(Reference(12, 3), seed)
    local = Graph(component(Operator("clear", {"radius": 9, "pool": None}), 3, 4), weights_of(reference), tmp_path)
    x = np.random.default_rng(seed).standard_normal((2, 12, 6, 7), dtype=np.float32)
    with torch.no_grad():
        expected = reference(torch.from_numpy(x).flatten(2).mT, (6, 7)).numpy()
    assert relative_l2(local(x=x), expected) <= TOLERANCE, f"seed {BASE_SEED}"


def test_scores_far_from_zero_do_not_bring_unseen_keys_back(tmp_path: Path) -> None:
    seed = fresh_seed(51)
    reference = randomise(REFERENCES["clear"](8, 2, radius=2), seed)
    with torch.no_grad():
        reference.to_k.bias.copy_(-200 * reference.to_q.bias)
        reference.to_q.weight.mul_(0.1)
    local = Graph(component(Operator("clear", {"radius": 2, "pool": None}), 2, 4), weights_of(reference), tmp_path)
    x = np.random.default_rng(seed).standard_normal((1, 8, 9, 5), dtype=np.float32)
    with torch.no_grad():
        expected = reference.double()(torch.from_numpy(x).double().flatten(2).mT, (9, 5)).numpy()
    assert relative_l2(local(x=x), expected) <= 1e-4, f"seed {BASE_SEED}"


def shapes_at(part: Component, height: int, width: int, folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a run at this size holds, the outputs of all nodes among them."""
    model = build(part)
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            value.const_value = ir.tensor(np.zeros(value.shape.numpy(), np.float32), name=name)
    ir.passes.common.ShapeInferencePass()(model)
    values = [value for node in model.graph for value in node.outputs if not value.is_graph_output()]
    assert all(value.type is not None for value in values), "every tensor must be looked at"
    model.graph.outputs.extend(values)
    ir.save(model, folder / "shapes.onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(folder / "shapes.onnx", options, providers=["CPUExecutionProvider"])
    x = np.zeros((1, part.inputs[0].shape[1], height, width), np.float32)
    names = [output.name for output in session.get_outputs()]
    return {name: value.shape for name, value in zip(names, session.run(None, {"x": x}), strict=True)}


@pytest.mark.parametrize("name", ["relu", "lit", "clear", "kv", "proxy"])
def test_no_operator_holds_a_tensor_of_n_by_n(name: str, tmp_path: Path) -> None:
    options = {"relu": {"heads": 2}, "lit": {"heads": 2, "kernel_size": 5}, "clear": {"radius": 3, "pool": None}}
    options |= {"kv": {"factor": 2, "sampling": "conv"}, "proxy": {"window": 2}}
    parts = [component(Operator(name, options[name]), 2, 4) for _ in range(2)]
    small, large = (shapes_at(part, side, side + 1, tmp_path) for part, side in zip(parts, (16, 48), strict=True))
    growth = (48 * 49) / (16 * 17)
    for key, shape in large.items():
        assert math.prod(shape) < (48 * 49) ** 2 / 4, (key, shape)
        if name in ("relu", "lit", "clear"):
            assert math.prod(shape) <= 1.2 * growth * max(math.prod(small[key]), 16 * 17), (key, small[key], shape)


@pytest.mark.parametrize(
    ("name", "options"),
    [("lit", {"heads": 2, "kernel_size": 5}), ("clear", {"radius": 3, "pool": 2}), ("proxy", {"window": 3})],
    ids=["lit", "clear", "proxy"],
)
def test_the_fused_graph_computes_the_same(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    seed = fresh_seed(60)
    reference = randomise(REFERENCES[name](12, 2, **{k: v for k, v in options.items() if k != "heads"}), seed)
    graph = Graph(component(Operator(name, options), 2, 6), weights_of(reference), tmp_path)
    x = np.random.default_rng(seed).standard_normal((2, 12, 7, 10), dtype=np.float32)
    expected = graph(x=x)
    fuse = FuseForCpu()
    fuse(graph.model)
    assert bool(fuse.changes) == (name == "proxy")
    ir.save(graph.model, tmp_path / "fused.onnx")
    session = ort.InferenceSession(tmp_path / "fused.onnx", providers=["CPUExecutionProvider"])
    assert relative_l2(session.run(None, {"x": x})[0], expected) <= TOLERANCE, f"seed {BASE_SEED}"


def test_blocks_that_the_list_does_not_name_keep_their_own_attention() -> None:
    entries = [{"operator": "lit", "heads": 2, "layers": [0, 3]}, {"operator": "clear", "radius": 8, "layers": [1]}]
    lit, clear = Operator("lit", {"heads": 2, "kernel_size": 5}), Operator("clear", {"radius": 8, "pool": None})
    assert operators_of(entries, 4, 12) == (lit, clear, SOFTMAX, lit)
    assert operators_of(None, 2, 12) == (SOFTMAX, SOFTMAX)
    relu = Operator("relu", {"heads": 3})
    assert operators_of(entries, 4, 12, relu) == (lit, clear, relu, lit)
    assert operators_of([], 3, 12, {1: relu}) == (SOFTMAX, relu, SOFTMAX)


def test_what_a_manifest_says_of_operators_makes_them_again() -> None:
    entries = [
        {"operator": "kv", "factor": 2, "layers": [4, 1]},
        {"operator": "proxy", "window": 2, "layers": [0]},
        {"operator": "clear", "radius": 3, "pool": 2, "layers": [5]},
    ]
    operators = operators_of(entries, 6, 12)
    described = describe_operators(operators)
    assert described[1] == {"operator": "kv", "factor": 2, "sampling": "conv", "layers": [1, 4]}
    assert operators_of(described, 6, 12) == operators
    assert sorted(layer for entry in described for layer in entry["layers"]) == list(range(6))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"operator": "lit"}, "must be a list"),
        (["lit"], r"attention\[0\] is 'lit': it must be an object"),
        ([{"operator": "linear", "layers": [0]}], "has operator 'linear': choose one of softmax, relu"),
        ([{"operator": "lit", "layers": [0]}], "lacks heads"),
        ([{"operator": "lit", "heads": 5, "layers": [0]}], "heads = 5: it must divide the width, 12"),
        ([{"operator": "lit", "heads": 2, "kernel_size": 4, "layers": [0]}], "kernel_size = 4: .* odd"),
        ([{"operator": "lit", "heads": True, "layers": [0]}], "heads = True"),
        ([{"operator": "lit", "heads": 2, "radius": 4, "layers": [0]}], "unknown entry 'radius'"),
        ([{"operator": "clear", "radius": 0, "layers": [0]}], "radius = 0"),
        ([{"operator": "clear", "radius": 2, "pool": 1, "layers": [0]}], "pool = 1"),
        ([{"operator": "kv", "factor": 1, "layers": [0]}], "factor = 1"),
        ([{"operator": "proxy", "window": 1, "layers": [0]}], "window = 1"),
        ([{"operator": "relu", "heads": 2, "layers": [3]}], r"layers = \[3\]: it must list blocks from 0 to 2"),
        ([{"operator": "relu", "heads": 2, "layers": [-1]}], r"layers = \[-1\]"),
        ([{"operator": "relu", "heads": 2}], "layers = None"),
        ([{"operator": "relu", "heads": 2, "layers": [1, 1]}], "names layer 1, which has one already"),
        (
            [{"operator": "relu", "heads": 2, "layers": [1]}, {"operator": "proxy", "window": 2, "layers": [1]}],
            r"attention\[1\] names layer 1",
        ),
    ],
    ids=str,
)
def test_a_list_of_operators_that_cannot_be_is_refused_in_one_line(entries: Any, message: str) -> None:
    with pytest.raises(ConversionError, match=message) as caught:
        operators_of(entries, 3, 12)
    assert "\n" not in str(caught.value)

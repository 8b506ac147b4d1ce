"""Linear attention against the explicit kernel, compressed attention against its formula, neither through diffusers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from parity_tools import BASE_SEED, TOLERANCE, Graph, fresh_seed, randomise, relative_l2
from torch.nn import functional

from edgedit.converters.architectures.attention import KVCompressedAttention, KVCompression, LinearAttention
from edgedit.converters.architectures.layers import Module, Op, Value, int64s
from edgedit.converters.architectures.token_grid import TokenGrid
from edgedit.converters.graph import Component, TensorSpec, build
from edgedit.errors import ConversionError


class OnMap(Module):
    """A map [B, C, H, W] read as tokens, the attention under test, tokens [B, H·W, C] out."""

    def __init__(self, attention: Module, width: int) -> None:
        super().__init__()
        self.attention, self.width = attention, width

    def forward(self, op: Op, x: Value) -> Value:
        tokens = op.Transpose(op.Reshape(x, int64s(op, 0, self.width, -1)), perm=[0, 2, 1])
        return self.attention(op, tokens, TokenGrid(op.Shape(x, start=2, end=4)))


def on_map(attention: Module, width: int) -> Component:
    return Component(
        name="attention",
        architecture="test",
        module=OnMap(attention, width),
        inputs=(TensorSpec("x", "float32", ("batch", width, "height", "width")),),
        outputs=(TensorSpec("y", "float32", ("batch", "tokens", width)),),
    )


def prefixed(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f"attention.{name}": tensor for name, tensor in module.state_dict().items()}


def linear_pair(seed: int, heads: int, head_dim: int, **options: Any) -> tuple[torch.nn.Module, Component]:
    width, bias, qk_norm = heads * head_dim, options.get("bias", False), options.get("qk_norm")
    reference = DiffusersAttention(
        query_dim=width,
        heads=heads,
        kv_heads=heads if qk_norm else None,
        dim_head=head_dim,
        bias=bias,
        qk_norm=qk_norm,
        processor=SanaLinearAttnProcessor2_0(),
    )
    return randomise(reference, seed), on_map(LinearAttention(width, heads, head_dim, **options), width)


def explicit_kernel(attention: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Every weight of every query on every key, ReLU(q)·ReLU(k) over its row's sum, in float64."""
    attention = attention.double()
    tokens, heads = x.double().flatten(2).transpose(1, 2), attention.heads
    q, k, v = attention.to_q(tokens), attention.to_k(tokens), attention.to_v(tokens)
    if attention.norm_q is not None:
        q, k = attention.norm_q(q), attention.norm_k(k)
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
    weights = q.relu() @ k.relu().transpose(-1, -2)
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    return attention.to_out[0]((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("case", range(8))
def test_linear_attention_equals_the_explicit_normalised_kernel(case: int, tmp_path: Path) -> None:
    seed = fresh_seed(case)
    random = np.random.default_rng(seed)
    heads, head_dim = int(random.integers(1, 6)), int(random.choice([4, 8, 16, 32]))
    qk_norm = (None, "rms_norm_across_heads", "layer_norm_across_heads")[case % 3]
    reference, component = linear_pair(seed, heads, head_dim, bias=bool(case & 2), qk_norm=qk_norm)
    with torch.no_grad():
        # Small enough for the eps of their norms to count.
        for name in ("to_q", "to_k"):
            for parameter in getattr(reference, name).parameters():
                parameter.mul_(0.02)
    graph = Graph(component, prefixed(reference), tmp_path)
    for height, width in ((9, 14), (1, 5), (20, 20)):
        x = torch.from_numpy(
            random.standard_normal((int(random.integers(1, 4)), heads * head_dim, height, width))
        ).float()
        with torch.no_grad():
            direct = reference.float()(x.flatten(2).transpose(1, 2))
            expected = explicit_kernel(reference, x)
        actual = graph(x=x)
        assert relative_l2(actual, direct.numpy()) <= TOLERANCE, f"seed {BASE_SEED}, case {case}"
        assert relative_l2(actual, expected.numpy()) <= TOLERANCE, f"seed {BASE_SEED}, case {case}"


def test_a_query_that_no_key_answers_gives_zero_and_not_nan(tmp_path: Path) -> None:
    reference, component = linear_pair(fresh_seed(100), 2, 8, bias=True)
    with torch.no_grad():
        reference.to_q.bias.fill_(-100.0)
    x = torch.randn(2, 16, 3, 5)
    with torch.no_grad():
        expected = reference(x.flatten(2).transpose(1, 2)).numpy()
    actual = Graph(component, prefixed(reference), tmp_path)(x=x)
    assert np.array_equal(expected, np.broadcast_to(reference.to_out[0].bias.detach().numpy(), expected.shape))
    assert np.array_equal(actual, expected)


def test_linear_attention_never_holds_a_tensor_of_n_by_n() -> None:
    height = width = 128
    tokens, heads, head_dim = height * width, 36, 32
    channels = heads * head_dim
    model = build(on_map(LinearAttention(channels, heads, head_dim), channels))
    model.graph.inputs[0].shape = ir.Shape([1, channels, height, width])
    model.graph.outputs[0].shape = ir.Shape([1, tokens, channels])
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            value.const_value = ir.LazyTensor(
                lambda value=value: ir.tensor(np.zeros(value.shape.numpy(), np.float32)),
                dtype=ir.DataType.FLOAT,
                shape=value.shape,
                name=name,
            )
    inferred = onnx.shape_inference.infer_shapes(ir.to_proto(model), strict_mode=True, data_prop=True)
    sizes = {
        value.name: [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in inferred.graph.value_info
    }
    produced = {output for node in inferred.graph.node for output in node.output} - {"y"}
    assert produced <= set(sizes), "shape inference must reach every value, or this test sees nothing"
    assert all(size > 0 for shape in sizes.values() for size in shape)
    largest = max(sizes.items(), key=lambda item: math.prod(item[1]))
    assert math.prod(largest[1]) == tokens * channels, largest


class Compressed(torch.nn.Module):
    """PixArt-Sigma, section 3.2, written with torch: key and value maps through one convolution and one norm."""

    def __init__(self, width: int, heads: int, factor: int, sampling: str) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (torch.nn.Linear(width, width) for _ in range(3))
        self.to_out = torch.nn.ModuleList([torch.nn.Linear(width, width)])
        self.heads, self.factor, self.sampling = heads, factor, sampling
        if sampling == "conv":
            self.sr = torch.nn.Conv2d(width, width, factor, stride=factor, groups=width)
            self.norm = torch.nn.LayerNorm(width)

    def compress(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        x = x.transpose(1, 2).unflatten(2, (height, width))
        if self.sampling == "conv":
            return self.norm(self.sr(x).flatten(2).transpose(1, 2))
        if self.sampling == "ave":
            x = functional.interpolate(x, scale_factor=1 / self.factor, mode="nearest")
        else:
            x = x[
                :,
                :,
                : height // self.factor * self.factor : self.factor,
                : width // self.factor * self.factor : self.factor,
            ]
        return x.flatten(2).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        q, k, v = self.to_q(x), self.compress(self.to_k(x), height, width), self.compress(self.to_v(x), height, width)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        return self.to_out[0](functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("sampling", ["conv", "ave", "uniform"])
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_compressed_attention_equals_its_formula_on_even_and_odd_maps(
    sampling: str, factor: int, tmp_path: Path
) -> None:
    seed = fresh_seed(factor)
    random = np.random.default_rng(seed)
    heads, head_dim = int(random.integers(1, 4)), int(random.choice([4, 6, 10]))
    width = heads * head_dim
    reference = randomise(Compressed(width, heads, factor, sampling), seed)
    component = on_map(KVCompressedAttention(width, heads, head_dim, factor, sampling=sampling), width)
    graph = Graph(component, prefixed(reference), tmp_path)
    for shape in ((2 * factor, 3 * factor), (2 * factor + 1, 3 * factor - 1), (factor, 5 * factor + 1), (11, 7)):
        x = torch.from_numpy(random.standard_normal((2, width, *shape))).float()
        with torch.no_grad():
            expected = reference(x).numpy()
        assert relative_l2(graph(x=x), expected) <= TOLERANCE, f"{shape}, seed {BASE_SEED}"


def test_the_convolution_that_averages_keeps_the_mean_of_each_window(tmp_path: Path) -> None:
    reference = randomise(Compressed(8, 2, 2, "conv"), fresh_seed(7))
    with torch.no_grad():
        reference.sr.weight.fill_(1 / 4)
        reference.sr.bias.zero_()
    component = on_map(KVCompressedAttention(8, 2, 4, 2), 8)
    x = torch.randn(1, 8, 6, 10)
    tokens = x.flatten(2).transpose(1, 2)
    with torch.no_grad():
        means = [
            reference.norm(functional.avg_pool2d(part(tokens).transpose(1, 2).unflatten(2, (6, 10)), 2).flatten(2).mT)
            for part in (reference.to_k, reference.to_v)
        ]
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (reference.to_q(tokens), *means))
        expected = reference.to_out[0](functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    assert relative_l2(Graph(component, prefixed(reference), tmp_path)(x=x), expected.numpy()) <= TOLERANCE


@pytest.mark.parametrize(
    "config",
    [
        None,
        {"sampling": "conv", "scale_factor": 1, "kv_compress_layer": [0, 1]},
        {"sampling": None, "scale_factor": 1, "kv_compress_layer": []},
        {"sampling": "conv", "scale_factor": 2, "kv_compress_layer": []},
    ],
)
def test_a_compression_that_changes_nothing_leaves_plain_attention(config: dict[str, Any] | None) -> None:
    assert KVCompression.from_config(config, 2) is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sampling": "uniform_every"}, "uniform_every"),
        ({"sampling": None}, "sampling=None"),
        ({"scale_factor": 0}, "scale_factor=0"),
        ({"scale_factor": 1.5}, "scale_factor=1.5"),
        ({"kv_compress_layer": [0, 2]}, r"kv_compress_layer=\[0, 2\]"),
        ({"kv_compress_layer": "all"}, "kv_compress_layer='all'"),
        ({"window": 3}, "window"),
    ],
)
def test_a_compression_that_is_not_supported_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    config = {"sampling": "conv", "scale_factor": 2, "kv_compress_layer": [0, 1], **changes}
    with pytest.raises(ConversionError, match=named):
        KVCompression.from_config(config, 2)

"""Building blocks that the architecture files share. Parameter names are those of torch's and diffusers' modules.

Every block takes the operator builder `op` first, as `onnxscript.nn` modules do, and float32 values after it.
Shapes: tokens are [B, N, C], maps are [B, C, H, W].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn
from onnxscript.nn import Module, ModuleList, Parameter

from edgedit.converters.graph import LAYOUT

__all__ = [
    "ACTIVATIONS",
    "Attention",
    "Conv2d",
    "Empty",
    "GroupNorm",
    "LayerNorm",
    "Linear",
    "Module",
    "ModuleList",
    "Op",
    "Parameter",
    "RMSNorm",
    "TimestepEmbedding",
    "Value",
    "constant",
    "gelu_tanh",
    "int64s",
    "map_to_tokens",
    "padding_bias",
    "silu",
    "spatial_shape",
    "timestep_sinusoid",
    "tokens_to_map",
]

Op = Any  # onnxscript's OpBuilder dispatches operators by attribute
Value = ir.Value


class Empty(nn.Module):
    """A place in a ModuleList that has no parameters (dropout, an activation)."""


def constant(op: Op, array: np.ndarray) -> Value:
    """A constant tensor."""
    return op.Constant(value=ir.tensor(np.ascontiguousarray(array)))


def int64s(op: Op, *values: int) -> Value:
    """A one-dimensional int64 constant (shapes, axes, split sizes)."""
    return op.Constant(value_ints=list(values))


def silu(op: Op, x: Value) -> Value:
    """x * sigmoid(x)."""
    return op.Mul(x, op.Sigmoid(x))


def gelu_tanh(op: Op, x: Value) -> Value:
    """torch.nn.GELU(approximate="tanh")."""
    return op.Gelu(x, approximate="tanh")


def gelu(op: Op, x: Value) -> Value:
    """torch.nn.GELU()."""
    return op.Gelu(x, approximate="none")


def relu(op: Op, x: Value) -> Value:
    """max(x, 0)."""
    return op.Relu(x)


#: Activation functions by the names that configurations use.
ACTIVATIONS = {
    "silu": silu,
    "swish": silu,
    "gelu": gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_new": gelu_tanh,
    "relu": relu,
}


class Linear(nn.Module):
    """torch.nn.Linear. The checkpoint holds [out, in]; the graph holds [in, out], as MatMul wants it."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = Parameter([in_features, out_features])
        self.weight.metadata_props[LAYOUT] = "transposed"
        self.bias = Parameter([out_features]) if bias else None

    def forward(self, op: Op, x: Value) -> Value:
        y = op.MatMul(x, self.weight)
        return y if self.bias is None else op.Add(y, self.bias)


class Conv2d(nn.Module):
    """torch.nn.Conv2d with zero padding; `padding` is symmetric, or (top, left, bottom, right)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.weight = Parameter([out_channels, in_channels // groups, kernel_size, kernel_size])
        self.bias = Parameter([out_channels]) if bias else None
        self.attributes = {
            "kernel_shape": [kernel_size, kernel_size],
            "strides": [stride, stride],
            "pads": [padding] * 4 if isinstance(padding, int) else list(padding),
            "group": groups,
        }

    def forward(self, op: Op, x: Value) -> Value:
        inputs = [x, self.weight] if self.bias is None else [x, self.weight, self.bias]
        return op.Conv(*inputs, **self.attributes)


class LayerNorm(nn.Module):
    """torch.nn.LayerNorm over the last axis of width `width`."""

    def __init__(self, width: int, eps: float = 1e-5, *, affine: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.weight = Parameter([width]) if affine else None
        self.bias = Parameter([width]) if affine and bias else None
        self.width, self.eps = width, eps

    def forward(self, op: Op, x: Value) -> Value:
        scale = constant(op, np.ones(self.width, np.float32)) if self.weight is None else self.weight
        inputs = [x, scale] if self.bias is None else [x, scale, self.bias]
        return op.LayerNormalization(*inputs, axis=-1, epsilon=self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis (diffusers' RMSNorm, transformers' T5LayerNorm)."""

    def __init__(self, width: int, eps: float = 1e-6, *, affine: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.weight = Parameter([width]) if affine else None
        self.bias = Parameter([width]) if affine and bias else None
        self.width, self.eps = width, eps

    def forward(self, op: Op, x: Value) -> Value:
        scale = constant(op, np.ones(self.width, np.float32)) if self.weight is None else self.weight
        y = op.RMSNormalization(x, scale, axis=-1, epsilon=self.eps)
        return y if self.bias is None else op.Add(y, self.bias)


class GroupNorm(nn.Module):
    """torch.nn.GroupNorm on a map."""

    def __init__(self, groups: int, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = Parameter([channels]), Parameter([channels])
        self.groups, self.eps = groups, eps

    def forward(self, op: Op, x: Value) -> Value:
        return op.GroupNormalization(x, self.weight, self.bias, num_groups=self.groups, epsilon=self.eps)


def timestep_sinusoid(op: Op, timestep: Value, width: int, *, max_period: float = 10000.0) -> Value:
    """[B] → [B, width], cosines first: diffusers `get_timestep_embedding` with flip_sin_to_cos, downscale_freq_shift 0.

    The frequencies are rounded to float32 at the points where diffusers rounds them: at timestep 999 one unit in the
    last place of a frequency is 6e-5 of an angle.
    """
    half = width // 2
    exponent = np.float32(-math.log(max_period)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angles = op.Mul(op.Unsqueeze(timestep, int64s(op, 1)), constant(op, frequencies[None]))
    return op.Concat(op.Cos(angles), op.Sin(angles), axis=-1)


class TimestepEmbedding(nn.Module):
    """diffusers TimestepEmbedding: Linear, SiLU, Linear."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = Linear(in_channels, width), Linear(width, width)

    def forward(self, op: Op, x: Value) -> Value:
        return self.linear_2(op, silu(op, self.linear_1(op, x)))


class Attention(nn.Module):
    """Softmax attention as in diffusers' Attention: to_q, to_k, to_v, to_out.0, optional norms of query and key.

    x [B, N, width], context [B, L, context_width]; bias broadcasts to [B, heads, N, L]. The scale is 1/sqrt(head_dim).
    `norm_q`/`norm_k` are modules over the whole inner width (applied before heads are split) or None; `scaled` is the
    last thing that is done to the queries.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        *,
        context_width: int | None = None,
        bias: bool = True,
        out_bias: bool = True,
        norm_q: nn.Module | None = None,
        norm_k: nn.Module | None = None,
    ) -> None:
        super().__init__()
        inner, context_width = heads * head_dim, context_width or width
        self.to_q = Linear(width, inner, bias)
        self.to_k, self.to_v = Linear(context_width, inner, bias), Linear(context_width, inner, bias)
        self.to_out = ModuleList([Linear(inner, width, out_bias)])
        if norm_q is not None and norm_k is not None:
            self.norm_q, self.norm_k = norm_q, norm_k
        self.normalised = norm_q is not None
        self.heads = heads

    def forward(
        self,
        op: Op,
        x: Value,
        context: Value,
        bias: Value | None = None,
        scaled: Callable[[Op, Value], Value] | None = None,
    ) -> Value:
        q, k, v = self.to_q(op, x), self.to_k(op, context), self.to_v(op, context)
        if self.normalised:
            q, k = self.norm_q(op, q), self.norm_k(op, k)
        if scaled is not None:
            q = scaled(op, q)
        inputs = [q, k, v] if bias is None else [q, k, v, bias]
        y = op.Attention(*inputs, q_num_heads=self.heads, kv_num_heads=self.heads)
        return self.to_out[0](op, y)


def padding_bias(op: Op, mask: Value, queries: Value, value: float = -10000.0) -> Value:
    """Key-padding mask [B, L] (1 keep, 0 discard; float32) → additive bias [B, 1, N, L] for `queries` [B, N, C]."""
    bias = op.Mul(op.Sub(1.0, op.Unsqueeze(mask, int64s(op, 1, 2))), value)
    n = op.Shape(queries, start=1, end=2)
    return op.Expand(bias, op.Concat(int64s(op, 1, 1), n, int64s(op, 1), axis=0))


def spatial_shape(op: Op, x: Value) -> Value:
    """[H, W] of a map, as an int64 tensor of 2."""
    return op.Shape(x, start=2, end=4)


def map_to_tokens(op: Op, x: Value, channels: int) -> Value:
    """[B, C, H, W] → [B, H·W, C]."""
    return op.Transpose(op.Reshape(x, int64s(op, 0, channels, -1)), perm=[0, 2, 1])


def tokens_to_map(op: Op, x: Value, channels: int, hw: Value) -> Value:
    """[B, H·W, C] → [B, C, H, W]; `hw` is an int64 tensor of 2."""
    y = op.Transpose(x, perm=[0, 2, 1])
    return op.Reshape(y, op.Concat(int64s(op, 0, channels), hw, axis=0))

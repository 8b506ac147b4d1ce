"""T5 as a text encoder: transformers' T5EncoderModel (v1.0 and v1.1) and UMT5EncoderModel.

T5 is Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (2020), section
2.1; UMT5 is Chung et al., "UniMax" (2023). Neither scales the product of query and key, and both add to it a bias that
is learned per bucket of distances and per head: T5 has one table in block 0 for all blocks, UMT5 one table a block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from edgedit.converters.architectures.layers import (
    ACTIVATIONS,
    Linear,
    Module,
    ModuleList,
    Op,
    Parameter,
    RMSNorm,
    Value,
    constant,
    int64s,
)
from edgedit.converters.graph import Component, TensorSpec
from edgedit.errors import ConversionError

__all__ = ["build_text_encoder", "relative_position_buckets"]

#: Added to the attention score of a padded token. It swallows any score, so that a row without a single real token
#: attends evenly, as in transformers; at float32's lowest value ONNX Runtime gives zeros.
MASKED = -1e30

_DEFAULTS: dict[str, dict[str, Any]] = {
    "t5": {
        "architecture": "T5EncoderModel",
        "vocab_size": 32128,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
        "feed_forward_proj": "relu",
    },
    "umt5": {
        "architecture": "UMT5EncoderModel",
        "vocab_size": 250112,
        "d_ff": 1024,
        "num_layers": 8,
        "num_heads": 6,
        "feed_forward_proj": "gated-gelu",
    },
}
_SHARED_DEFAULTS: dict[str, Any] = {
    "d_model": 512,
    "d_kv": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "is_decoder": False,
}

_DROP = (
    (r"encoder\.embed_tokens\.weight", "the same matrix as shared.weight"),
    (r"decoder\..*", "the decoder is not part of a text encoder"),
    (r"lm_head\.weight", "the language model head is not part of a text encoder"),
)


def relative_position_buckets(num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every distance key - query from -max_distance to max_distance, int64 [2 max_distance + 1].

    Distances beyond the ends are in the buckets of the ends. Half of the buckets are for keys after the query; of
    either half, half are single distances and half grow with the logarithm. Rounded to float32 where transformers'
    `T5Attention._relative_position_bucket` (bidirectional) rounds, so that no distance falls into the next bucket.
    """
    half = num_buckets // 2
    exact = half // 2
    distance = np.arange(max_distance + 1)
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    position = np.log(ratio.astype(np.float64)).astype(np.float32) / np.float32(math.log(max_distance / exact))
    large = np.minimum(exact + (position * np.float32(half - exact)).astype(np.int64), half - 1)
    bucket = np.where(distance < exact, distance, large)
    return np.concatenate([bucket[:0:-1], bucket[:1], half + bucket[1:]])


class Embedding(Module):
    """torch.nn.Embedding."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = Parameter([rows, width])

    def forward(self, op: Op, ids: Value) -> Value:
        rows: Value = op.Gather(self.weight, ids, axis=0)
        return rows


class RelativeBias(Module):
    """Bias per head and bucket: clipped distances [L, L] → [1, heads, L, L]."""

    def __init__(self, num_buckets: int, max_distance: int, heads: int) -> None:
        super().__init__()
        self.weight = Parameter([num_buckets, heads])
        self.buckets = relative_position_buckets(num_buckets, max_distance)

    def forward(self, op: Op, distance: Value) -> Value:
        by_distance = op.Transpose(op.Gather(self.weight, constant(op, self.buckets), axis=0), perm=[1, 0])
        bias: Value = op.Unsqueeze(op.Gather(by_distance, distance, axis=1), int64s(op, 0))
        return bias


class SelfAttention(Module):
    """T5Attention of an encoder; `bias` [B, heads, L, L] is the relative bias with padded keys masked."""

    def __init__(self, c: Mapping[str, Any], *, relative: bool) -> None:
        super().__init__()
        width, heads = c["d_model"], c["num_heads"]
        inner = heads * c["d_kv"]
        self.q, self.k = Linear(width, inner, bias=False), Linear(width, inner, bias=False)
        self.v, self.o = Linear(width, inner, bias=False), Linear(inner, width, bias=False)
        self.heads = heads
        if relative:
            self.relative_attention_bias = RelativeBias(
                c["relative_attention_num_buckets"], c["relative_attention_max_distance"], heads
            )
        self.relative = relative

    def forward(self, op: Op, x: Value, keep: Value, distance: Value, bias: Value | None) -> tuple[Value, Value]:
        if self.relative:
            bias = op.Where(keep, self.relative_attention_bias(op, distance), op.Constant(value_float=MASKED))
        assert bias is not None, "the first block has the table"
        q, k, v = self.q(op, x), self.k(op, x), self.v(op, x)
        y = op.Attention(q, k, v, bias, q_num_heads=self.heads, kv_num_heads=self.heads, scale=1.0)
        return self.o(op, y), bias


class AttentionLayer(Module):
    """T5LayerSelfAttention: norm, attention, residual."""

    def __init__(self, c: Mapping[str, Any], *, relative: bool) -> None:
        super().__init__()
        self.SelfAttention = SelfAttention(c, relative=relative)
        self.layer_norm = RMSNorm(c["d_model"], c["layer_norm_epsilon"])

    def forward(self, op: Op, x: Value, keep: Value, distance: Value, bias: Value | None) -> tuple[Value, Value]:
        y, bias = self.SelfAttention(op, self.layer_norm(op, x), keep, distance, bias)
        return op.Add(x, y), bias


class Dense(Module):
    """T5DenseActDense: wi, activation, wo."""

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        self.wi, self.wo = Linear(c["d_model"], c["d_ff"], bias=False), Linear(c["d_ff"], c["d_model"], bias=False)
        self.activation = ACTIVATIONS[c["dense_act_fn"]]

    def forward(self, op: Op, x: Value) -> Value:
        y: Value = self.wo(op, self.activation(op, self.wi(op, x)))
        return y


class GatedDense(Module):
    """T5DenseGatedActDense: activation(wi_0) times wi_1, wo."""

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (Linear(c["d_model"], c["d_ff"], bias=False) for _ in range(2))
        self.wo = Linear(c["d_ff"], c["d_model"], bias=False)
        self.activation = ACTIVATIONS[c["dense_act_fn"]]

    def forward(self, op: Op, x: Value) -> Value:
        gate = self.activation(op, self.wi_0(op, x))
        y: Value = self.wo(op, op.Mul(gate, self.wi_1(op, x)))
        return y


class FeedForwardLayer(Module):
    """T5LayerFF: norm, dense, residual."""

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        self.DenseReluDense = GatedDense(c) if c["is_gated_act"] else Dense(c)
        self.layer_norm = RMSNorm(c["d_model"], c["layer_norm_epsilon"])

    def forward(self, op: Op, x: Value) -> Value:
        y: Value = op.Add(x, self.DenseReluDense(op, self.layer_norm(op, x)))
        return y


class Block(Module):
    """T5Block of an encoder."""

    def __init__(self, c: Mapping[str, Any], *, relative: bool) -> None:
        super().__init__()
        self.layer = ModuleList([AttentionLayer(c, relative=relative), FeedForwardLayer(c)])

    def forward(self, op: Op, x: Value, keep: Value, distance: Value, bias: Value | None) -> tuple[Value, Value]:
        x, bias = self.layer[0](op, x, keep, distance, bias)
        return self.layer[1](op, x), bias


class Stack(Module):
    """T5Stack of an encoder."""

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        every_block = c["model_type"] == "umt5"
        self.block = ModuleList([Block(c, relative=every_block or i == 0) for i in range(c["num_layers"])])
        self.final_layer_norm = RMSNorm(c["d_model"], c["layer_norm_epsilon"])
        self.max_distance = c["relative_attention_max_distance"]

    def forward(self, op: Op, x: Value, attention_mask: Value) -> Value:
        keep = op.Unsqueeze(op.Cast(attention_mask, to=ir.DataType.BOOL), int64s(op, 1, 2))
        length = op.Squeeze(op.Shape(x, start=1, end=2), int64s(op, 0))
        position = op.Range(op.Constant(value_int=0), length, op.Constant(value_int=1))
        distance = op.Sub(op.Unsqueeze(position, int64s(op, 0)), op.Unsqueeze(position, int64s(op, 1)))
        end = self.max_distance
        distance = op.Clip(distance, op.Constant(value_int=-end), op.Constant(value_int=end))
        distance = op.Add(distance, op.Constant(value_int=end))
        bias = None
        for block in self.block:
            x, bias = block(op, x, keep, distance, bias)
        y: Value = self.final_layer_norm(op, x)
        return y


class T5Encoder(Module):
    """input_ids int64 [B, L], attention_mask int64 [B, L] → hidden states float32 [B, L, d_model]."""

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        self.shared = Embedding(c["vocab_size"], c["d_model"])
        self.encoder = Stack(c)

    def forward(self, op: Op, input_ids: Value, attention_mask: Value) -> Value:
        hidden_states: Value = self.encoder(op, self.shared(op, input_ids), attention_mask)
        return hidden_states


def _resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the class's defaults filled in; refuses what the graph cannot do."""
    umt5 = str((config.get("architectures") or ["T5EncoderModel"])[0]).startswith("UMT5")
    model_type = config.get("model_type", "umt5" if umt5 else "t5")
    if model_type not in _DEFAULTS:
        raise ConversionError(f"model_type {model_type!r} is not a T5 encoder: expected one of {', '.join(_DEFAULTS)}")
    c = {**_SHARED_DEFAULTS, **_DEFAULTS[model_type], **config, "model_type": model_type}
    c["architecture"] = _DEFAULTS[model_type]["architecture"]
    if c["is_decoder"]:
        raise ConversionError("is_decoder True is not supported: a T5 text encoder attends in both directions")
    projection = str(c["feed_forward_proj"])
    gated, _, name = projection.rpartition("-")
    if gated not in ("", "gated"):
        raise ConversionError(f"feed_forward_proj {projection!r} is not supported: expected NAME or gated-NAME")
    # The two derived entries are written to config.json too, and win over feed_forward_proj in transformers.
    c.setdefault("is_gated_act", gated == "gated")
    c.setdefault("dense_act_fn", "gelu_new" if projection == "gated-gelu" else name)
    if c["dense_act_fn"] not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ConversionError(
            f"activation {c['dense_act_fn']!r} of feed_forward_proj is not supported: expected {known}"
        )
    buckets, end = c["relative_attention_num_buckets"], c["relative_attention_max_distance"]
    if buckets < 4:
        raise ConversionError(f"relative_attention_num_buckets {buckets} is not supported: at least 4 are needed")
    if end <= buckets // 4:
        raise ConversionError(
            f"relative_attention_max_distance {end} is not supported: it must exceed a quarter of the {buckets} buckets"
        )
    return c


def build_text_encoder(config: Mapping[str, Any]) -> Component:
    """T5 or UMT5 encoder of a transformers `config.json` (`model_type` "t5" or "umt5"); output after the final norm.

    Raises ConversionError for a value that the graph cannot represent.
    """
    c = _resolve(config)
    return Component(
        name="text_encoder",
        architecture=c["architecture"],
        module=T5Encoder(c),
        inputs=(
            TensorSpec("input_ids", "int64", ("batch", "length")),
            TensorSpec("attention_mask", "int64", ("batch", "length")),
        ),
        outputs=(TensorSpec("hidden_states", "float32", ("batch", "length", c["d_model"])),),
        drop=_DROP,
        runtime={
            "hidden_size": c["d_model"],
            "vocab_size": c["vocab_size"],
            "num_layers": c["num_layers"],
            "num_heads": c["num_heads"],
            "head_dim": c["d_kv"],
        },
    )

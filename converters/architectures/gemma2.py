"""Gemma-2 as a text encoder, as diffusers' SanaPipeline uses it: the last hidden state of transformers' Gemma2Model.

Gemma Team, "Gemma 2: Improving Open Language Models at a Practical Size" (2024), section 2: causal attention that
alternates between a sliding window and the whole prompt, grouped queries, soft-capped logits, a norm before and after
each sub-layer.
"""

from __future__ import annotations

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
    Value,
    constant,
    int64s,
)
from edgedit.converters.graph import Component, TensorSpec
from edgedit.errors import ConversionError

__all__ = ["build_text_encoder", "rope_frequencies"]

#: Added to the attention score of a token that must not be seen. It swallows any score, so that a query that sees
#: nothing (padding on the left) attends evenly, as in transformers; at float32's lowest value ONNX Runtime gives zeros.
MASKED = -1e30

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "attn_logit_softcapping": 50.0,
    "use_bidirectional_attention": None,
}
_ROPE_THETA = 10000.0
_SLIDING, _FULL = "sliding_attention", "full_attention"
_DROP = ((r"lm_head\.weight", "the language model head is not part of a text encoder"),)


def rope_frequencies(head_dim: int, theta: float) -> np.ndarray:
    """theta^(-2i / head_dim), float32 [head_dim / 2], rounded where transformers' Gemma2RotaryEmbedding rounds."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    power = np.power(np.float64(theta), exponent.astype(np.float64)).astype(np.float32)
    return np.float32(1.0) / power


class ScaledEmbedding(Module):
    """Gemma2TextScaledWordEmbedding: rows times sqrt(width), the factor in float32."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = Parameter([rows, width])
        self.scale = width**0.5

    def forward(self, op: Op, ids: Value) -> Value:
        rows: Value = op.Mul(op.Gather(self.weight, ids, axis=0), op.Constant(value_float=self.scale))
        return rows


class GemmaRMSNorm(Module):
    """Gemma2RMSNorm: the weight is stored as its difference from one."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = Parameter([width])
        self.eps = eps

    def forward(self, op: Op, x: Value) -> Value:
        scale = op.Add(self.weight, op.Constant(value_float=1.0))
        y: Value = op.RMSNormalization(x, scale, axis=-1, epsilon=self.eps)
        return y


class SelfAttention(Module):
    """Gemma2Attention; `bias` [B, 1, L, L], `cos` and `sin` [B, L, head_dim / 2]."""

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        width, head_dim, bias = c["hidden_size"], c["head_dim"], c["attention_bias"]
        self.heads, self.kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        self.q_proj = Linear(width, self.heads * head_dim, bias)
        self.k_proj, self.v_proj = (Linear(width, self.kv_heads * head_dim, bias) for _ in range(2))
        self.o_proj = Linear(self.heads * head_dim, width, bias)
        self.attributes: dict[str, Any] = {"scale": float(c["query_pre_attn_scalar"] ** -0.5)}
        if c["attn_logit_softcapping"] is not None:
            self.attributes["softcap"] = float(c["attn_logit_softcapping"])

    def forward(self, op: Op, x: Value, bias: Value, cos: Value, sin: Value) -> Value:
        q = op.RotaryEmbedding(self.q_proj(op, x), cos, sin, num_heads=self.heads)
        k = op.RotaryEmbedding(self.k_proj(op, x), cos, sin, num_heads=self.kv_heads)
        v = self.v_proj(op, x)
        y = op.Attention(q, k, v, bias, q_num_heads=self.heads, kv_num_heads=self.kv_heads, **self.attributes)
        out: Value = self.o_proj(op, y)
        return out


class GatedFeedForward(Module):
    """Gemma2MLP: activation(gate_proj) times up_proj, down_proj."""

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        width, inner = c["hidden_size"], c["intermediate_size"]
        self.gate_proj, self.up_proj = Linear(width, inner, bias=False), Linear(width, inner, bias=False)
        self.down_proj = Linear(inner, width, bias=False)
        self.activation = ACTIVATIONS[c["hidden_activation"]]

    def forward(self, op: Op, x: Value) -> Value:
        gate = self.activation(op, self.gate_proj(op, x))
        y: Value = self.down_proj(op, op.Mul(gate, self.up_proj(op, x)))
        return y


class Layer(Module):
    """Gemma2DecoderLayer."""

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        width, eps = c["hidden_size"], c["rms_norm_eps"]
        self.self_attn, self.mlp = SelfAttention(c), GatedFeedForward(c)
        self.input_layernorm, self.post_attention_layernorm = GemmaRMSNorm(width, eps), GemmaRMSNorm(width, eps)
        self.pre_feedforward_layernorm = GemmaRMSNorm(width, eps)
        self.post_feedforward_layernorm = GemmaRMSNorm(width, eps)

    def forward(self, op: Op, x: Value, bias: Value, cos: Value, sin: Value) -> Value:
        y = self.self_attn(op, self.input_layernorm(op, x), bias, cos, sin)
        x = op.Add(x, self.post_attention_layernorm(op, y))
        y = self.mlp(op, self.pre_feedforward_layernorm(op, x))
        y = self.post_feedforward_layernorm(op, y)
        out: Value = op.Add(x, y)
        return out


class Gemma2Encoder(Module):
    """input_ids int64 [B, L], attention_mask int64 [B, L] → hidden states float32 [B, L, hidden_size]."""

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        self.embed_tokens = ScaledEmbedding(c["vocab_size"], c["hidden_size"])
        self.layers = ModuleList([Layer(c) for _ in range(c["num_hidden_layers"])])
        self.norm = GemmaRMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.layer_types: list[str] = c["layer_types"]
        self.window: int | None = c["sliding_window"]
        self.frequencies = rope_frequencies(c["head_dim"], c["rope_theta"])

    def forward(self, op: Op, input_ids: Value, attention_mask: Value) -> Value:
        length = op.Squeeze(op.Shape(input_ids, start=1, end=2), int64s(op, 0))
        position = op.Range(op.Constant(value_int=0), length, op.Constant(value_int=1))
        biases = self._biases(op, position, attention_mask)
        cos, sin = self._rope(op, position, op.Shape(input_ids))
        x = self.embed_tokens(op, input_ids)
        for layer, kind in zip(self.layers, self.layer_types, strict=True):
            x = layer(op, x, biases[kind], cos, sin)
        hidden_states: Value = self.norm(op, x)
        return hidden_states

    def _biases(self, op: Op, position: Value, attention_mask: Value) -> dict[str, Value]:
        """Additive bias [B, 1, L, L] of each kind of layer in use: causal, within the window, padding left out."""
        query, key = op.Unsqueeze(position, int64s(op, 1)), op.Unsqueeze(position, int64s(op, 0))
        seen = {_FULL: op.Less(key, op.Add(query, op.Constant(value_int=1)))}
        if _SLIDING in self.layer_types:
            recent = op.Less(op.Sub(query, op.Constant(value_int=self.window)), key)
            seen[_SLIDING] = op.And(seen[_FULL], recent)
        keep = op.Unsqueeze(op.Cast(attention_mask, to=ir.DataType.BOOL), int64s(op, 1, 2))
        zero, masked = op.Constant(value_float=0.0), op.Constant(value_float=MASKED)
        return {
            kind: op.Where(op.And(keep, allowed), zero, masked)
            for kind, allowed in seen.items()
            if kind in self.layer_types
        }

    def _rope(self, op: Op, position: Value, shape: Value) -> tuple[Value, Value]:
        """cos and sin [B, L, head_dim / 2] of position times frequency."""
        angle = op.Mul(
            op.Unsqueeze(op.Cast(position, to=ir.DataType.FLOAT), int64s(op, 1)), constant(op, self.frequencies[None])
        )
        whole = op.Concat(shape, int64s(op, len(self.frequencies)), axis=0)
        return op.Expand(op.Cos(angle), whole), op.Expand(op.Sin(angle), whole)


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The base of the rotary embedding, in the spelling of transformers 5 (`rope_parameters`) or 4 (`rope_theta`)."""
    parameters: Mapping[str, Any] = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ConversionError(f"rope_type {kind!r} is not supported: only 'default'")
    unknown = sorted(set(parameters) - {"rope_type", "type", "rope_theta"})
    if unknown:
        raise ConversionError(f"rope_parameters entry {unknown[0]} {parameters[unknown[0]]!r} is not supported")
    return float(parameters.get("rope_theta", config.get("rope_theta", _ROPE_THETA)))


def _resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the class's defaults filled in; refuses what the graph cannot do."""
    if config.get("model_type", "gemma2") != "gemma2":
        raise ConversionError(f"model_type {config['model_type']!r} is not supported: expected 'gemma2'")
    c = {**_DEFAULTS, **config, "rope_theta": _rope_theta(config)}
    if c["layer_types"] is None:
        c["layer_types"] = [_FULL if i % 2 else _SLIDING for i in range(c["num_hidden_layers"])]
    for kind in c["layer_types"]:
        if kind not in (_SLIDING, _FULL):
            raise ConversionError(f"layer_types entry {kind!r} is not supported: expected {_SLIDING} or {_FULL}")
    if len(c["layer_types"]) != c["num_hidden_layers"]:
        raise ConversionError(
            f"layer_types has {len(c['layer_types'])} entries and num_hidden_layers is {c['num_hidden_layers']}: "
            "they must agree"
        )
    if _SLIDING in c["layer_types"] and not c["sliding_window"]:
        raise ConversionError(f"sliding_window {c['sliding_window']!r} is not supported with {_SLIDING} layers")
    if c["hidden_activation"] not in ACTIVATIONS:
        raise ConversionError(
            f"hidden_activation {c['hidden_activation']!r} is not supported: expected {', '.join(ACTIVATIONS)}"
        )
    if c["use_bidirectional_attention"]:
        raise ConversionError("use_bidirectional_attention True is not supported: Gemma-2 encodes causally")
    if c["head_dim"] % 2:
        raise ConversionError(f"head_dim {c['head_dim']} is not supported: rotary embedding needs an even one")
    if c["num_attention_heads"] % c["num_key_value_heads"]:
        raise ConversionError(
            f"num_key_value_heads {c['num_key_value_heads']} is not supported: "
            f"it must divide num_attention_heads {c['num_attention_heads']}"
        )
    return c


def build_text_encoder(config: Mapping[str, Any]) -> Component:
    """Gemma-2 of a transformers `config.json`; output after the final norm, as `Gemma2Model(...)[0]`.

    Raises ConversionError for a value that the graph cannot represent.
    """
    c = _resolve(config)
    return Component(
        name="text_encoder",
        architecture="Gemma2Model",
        module=Gemma2Encoder(c),
        inputs=(
            TensorSpec("input_ids", "int64", ("batch", "length")),
            TensorSpec("attention_mask", "int64", ("batch", "length")),
        ),
        outputs=(TensorSpec("hidden_states", "float32", ("batch", "length", c["hidden_size"])),),
        drop=_DROP,
        runtime={
            "hidden_size": c["hidden_size"],
            "vocab_size": c["vocab_size"],
            "num_layers": c["num_hidden_layers"],
            "num_heads": c["num_attention_heads"],
            "num_kv_heads": c["num_key_value_heads"],
            "head_dim": c["head_dim"],
            "max_length": c["max_position_embeddings"],
        },
    )

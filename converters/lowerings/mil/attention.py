"""MIL rules: softmax attention and rotary position embedding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgedit.converters.lowerings.driver import NodeInfo, is_static
from edgedit.converters.lowerings.mil.builder import MilBuilder, Pending, rules, shape_of
from edgedit.converters.lowerings.mil.tokens import channels_first, tokens

__all__: list[str] = []

_HEADS_FIRST = [0, 2, 1, 3]
#: The longest side of a tensor that the Neural Engine takes.
NEURAL_SIDE = 16384


@rules("Attention")
def attention(b: MilBuilder, node: NodeInfo, q: Any, k: Any, v: Any, mask: Any = None, *cache: Any) -> Any:
    """Softmax attention of three or four axes, with grouped key heads, a scale, a soft cap and an additive mask."""
    if cache or node.get("is_causal", 0) or len(node.outputs) > 1:
        raise ValueError("a key-value cache, is_causal or a second output; state causality as a mask")
    real = b.real(node)
    flat = len(shape_of(q)) == 3
    heads, kv_heads = shape_of(q)[1], shape_of(k)[1]
    if flat:
        heads, kv_heads = int(node.attributes["q_num_heads"]), int(node.attributes["kv_num_heads"])
    if b.neural:
        return _neural(b, node, (q, k, v), (heads, kv_heads), mask, real, flat=flat)
    q, k, v = (
        _heads(b, node, b.var(x, real), n) if flat else b.var(x, real)
        for x, n in ((q, heads), (k, kv_heads), (v, kv_heads))
    )
    if kv_heads != heads:
        order = np.repeat(np.arange(kv_heads, dtype=np.int32), heads // kv_heads)
        k, v = (b.mb.gather(x=x, indices=order, axis=1, name=b.name(node.name)) for x in (k, v))
    bias = None if mask is None else _mask(b, mask, real)
    scale = node.get("scale", None) or 1 / math.sqrt(shape_of(q)[-1])
    softcap = float(node.get("softcap", 0.0))
    if b.fused_attention and not softcap:
        y = _fused(b, node, q, k, v, bias, scale, real)
    else:
        y = _written(b, node, q, k, v, bias, scale, softcap, real)
    if not flat:
        return y
    n, _, length, width = shape_of(y)
    y = b.mb.transpose(x=y, perm=_HEADS_FIRST, name=b.name(node.name))
    return b.mb.reshape(x=y, shape=[n, length, heads * width], name=b.name(node.name))


def _neural(
    b: MilBuilder, node: NodeInfo, parts: tuple[Any, ...], heads: tuple[int, int], mask: Any, real: str, *, flat: bool
) -> Any:
    """Channels of a head before its tokens, [B, h, d, N], so that nothing is transposed on the way in or out."""
    q, k, v = (
        _channels_of_heads(b, node, x, n, real, flat=flat)
        for x, n in zip(parts, (heads[0], heads[1], heads[1]), strict=True)
    )
    if heads[0] != heads[1]:
        order = np.repeat(np.arange(heads[1], dtype=np.int32), heads[0] // heads[1])
        k, v = (b.mb.gather(x=x, indices=order, axis=1, name=b.name(node.name)) for x in (k, v))
    bias = None if mask is None else _mask(b, mask, real)
    n, _, width, queries = shape_of(q)
    scale = node.get("scale", None) or 1 / math.sqrt(width)
    y = _written(b, node, q, k, v, bias, scale, float(node.get("softcap", 0.0)), real, first=True)
    if not flat:
        return b.mb.transpose(x=y, perm=[0, 1, 3, 2], name=b.name(node.name))
    whole = heads[0] * shape_of(v)[2]

    def joined() -> Any:
        return b.mb.reshape(x=y, shape=[n, whole, 1, queries], name=b.name(node.name))

    return tokens(b, node.name, (n, queries, whole), joined)


def _channels_of_heads(b: MilBuilder, node: NodeInfo, x: Any, heads: int, real: str, *, flat: bool) -> Any:
    if not flat:
        return b.mb.transpose(x=b.var(x, real), perm=[0, 1, 3, 2], name=b.name(node.name))
    n, length, width = shape_of(x)
    value = channels_first(b, node.name, x, real)
    return b.mb.reshape(x=value, shape=[n, heads, width // heads, length], name=b.name(node.name))


def _heads(b: MilBuilder, node: NodeInfo, x: Any, heads: int) -> Any:
    """[B, N, h·d] → [B, h, N, d]."""
    n, length, width = shape_of(x)
    x = b.mb.reshape(x=x, shape=[n, length, heads, width // heads], name=b.name(node.name))
    return b.mb.transpose(x=x, perm=_HEADS_FIRST, name=b.name(node.name))


def _mask(b: MilBuilder, mask: Any, real: str) -> Any:
    """An additive mask; one that is the same for all queries stays one row."""
    if b.is_float(mask):
        return b.var(mask.base if isinstance(mask, Pending) and mask.kind == "broadcast" else mask, real)
    raise ValueError("a mask of truth values; state it as numbers that are added")


def _number(value: float, real: str) -> Any:
    return np.float16(value) if real == "fp16" else np.float32(value)


def _fused(b: MilBuilder, node: NodeInfo, q: Any, k: Any, v: Any, bias: Any, scale: float, real: str) -> Any:
    """MIL's operator divides by sqrt(d) and takes no other scale, so the query carries the difference."""
    extra = scale * math.sqrt(shape_of(q)[-1])
    if abs(extra - 1) > 1e-6:
        q = b.mb.mul(x=q, y=_number(extra, real), name=b.name(node.name))
    masked = {} if bias is None else {"attn_mask": bias}
    return b.mb.scaled_dot_product_attention(query=q, key=k, value=v, name=b.name(node.name), **masked)


def _written(
    b: MilBuilder,
    node: NodeInfo,
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    scale: float,
    softcap: float,
    real: str,
    *,
    first: bool = False,
) -> Any:
    """Product, soft cap, mask, softmax, product; for a part of the queries at a time where scores would be large.

    `first`: q, k, v and the result are [B, h, d, N] and not [B, h, N, d].
    """
    along = 3 if first else 2
    n, heads, queries = shape_of(q)[0], shape_of(q)[1], shape_of(q)[along]
    size = n * heads * shape_of(k)[along] * (2 if real == "fp16" else 4)
    part = max(1, min(queries, NEURAL_SIDE if first else queries, b.score_bytes // size))
    q = b.mb.mul(x=q, y=_number(scale / (softcap or 1.0), real), name=b.name(node.name))
    count = -(-queries // part)
    lengths = [part] * (count - 1) + [queries - part * (count - 1)]
    pieces = [q] if count == 1 else b.mb.split(x=q, split_sizes=lengths, axis=along, name=b.name(node.name))
    biases = [bias] * count
    if count > 1 and bias is not None and shape_of(bias)[2] > 1:
        biases = list(b.mb.split(x=bias, split_sizes=lengths, axis=2, name=b.name(node.name)))
    results = []
    for piece, added in zip(pieces, biases, strict=True):
        sides = {"transpose_x": True} if first else {"transpose_y": True}
        scores = b.mb.matmul(x=piece, y=k, name=b.name(node.name), **sides)
        if softcap:
            scores = b.mb.tanh(x=scores, name=b.name(node.name))
            scores = b.mb.mul(x=scores, y=_number(softcap, real), name=b.name(node.name))
        if added is not None:
            scores = b.mb.add(x=scores, y=added, name=b.name(node.name))
        weights = b.mb.softmax(x=scores, axis=-1, name=b.name(node.name))
        if first:
            results.append(b.mb.matmul(x=v, y=weights, transpose_y=True, name=b.name(node.name)))
        else:
            results.append(b.mb.matmul(x=weights, y=v, name=b.name(node.name)))
    return results[0] if count == 1 else b.mb.concat(values=results, axis=along, name=b.name(node.name))


@rules("RotaryEmbedding")
def rotary(b: MilBuilder, node: NodeInfo, x: Any, cos: Any, sin: Any, position: Any = None) -> Any:
    """Pairs of channels turned by an angle; [B, L, h·d] with num_heads or [B, h, L, d], tables [B, L, d/2]."""
    if position is not None or node.get("rotary_embedding_dim", 0):
        raise ValueError("position ids or a rotation of some channels only")
    real = b.real(node)
    shape, heads = shape_of(x), int(node.get("num_heads", 0))
    value = b.var(x, real)
    if len(shape) == 3:
        value = b.mb.reshape(x=value, shape=[*shape[:2], heads, shape[2] // heads], name=b.name(node.name))
    axis = 2 if len(shape) == 3 else 1
    c, s = (_table(b, node, table, axis, real) for table in (cos, sin))
    width = shape_of(value)[-1]
    if node.get("interleaved", 0):
        first, second = (
            b.mb.slice_by_index(
                x=value, begin=[0, 0, 0, start], end=list(shape_of(value)), stride=[1, 1, 1, 2], name=b.name(node.name)
            )
            for start in (0, 1)
        )
    else:
        first, second = b.mb.split(x=value, split_sizes=[width // 2] * 2, axis=-1, name=b.name(node.name))

    def product(a: Any, t: Any) -> Any:
        return b.mb.mul(x=a, y=t, name=b.name(node.name))

    turned = [
        b.mb.sub(x=product(first, c), y=product(second, s), name=b.name(node.name)),
        b.mb.add(x=product(second, c), y=product(first, s), name=b.name(node.name)),
    ]
    if node.get("interleaved", 0) and b.neural:
        # Pairs side by side again by their numbers: a fifth axis would leave the Neural Engine.
        joined = b.mb.concat(values=turned, axis=-1, name=b.name(node.name))
        order = np.arange(width, dtype=np.int32).reshape(2, -1).T.reshape(-1)
        joined = b.mb.gather(x=joined, indices=order, axis=-1, name=b.name(node.name))
        return b.mb.reshape(x=joined, shape=list(shape), name=b.name(node.name))
    if node.get("interleaved", 0):
        turned = [b.mb.expand_dims(x=part, axes=[-1], name=b.name(node.name)) for part in turned]
    joined = b.mb.concat(values=turned, axis=-1, name=b.name(node.name))
    return b.mb.reshape(x=joined, shape=list(shape), name=b.name(node.name))


def _table(b: MilBuilder, node: NodeInfo, table: Any, axis: int, real: str) -> Any:
    if is_static(table):
        return b.constant(table, real, lambda a: np.expand_dims(a, axis), f"axis{axis}")
    return b.mb.expand_dims(x=b.var(table, real), axes=[axis], name=b.name(node.name))

"""Rules for attention and rotary positions, onto `mx.fast.scaled_dot_product_attention` and `mx.fast.rope`."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from edgedit.converters.lowerings.driver import NodeInfo, dense, is_static
from edgedit.converters.lowerings.mlx_values import Array, Values

__all__ = ["FUSED_HEAD_WIDTHS", "attention", "rotary_embedding"]

#: Head widths for which MLX has a fused kernel over many queries; other widths write the N × N scores to memory.
FUSED_HEAD_WIDTHS = (64, 80, 128)
#: A head is padded with zeros to such a width when that adds at most this much of it.
_MOST_PADDING = 1 / 3
#: Root mean square by which `mx.fast.rope` may be off the graph's own cosines and sines to stand in for them.
_ROPE_TOLERANCE = 2e-6


def attention(
    values: Values, node: NodeInfo, query: Any, key: Any, value: Any, mask: Any = None, *rest: Any
) -> list[Array] | Array:
    """Attention without a cache: [B, N, heads·d] or [B, heads, N, d], grouped queries, a mask, a cap on the scores."""
    if any(extra is not None for extra in rest) or len(node.outputs) > 1:
        raise ValueError("a cache of keys and values, or an output of the scores, is not supported")
    q, k, v = (values.array(x) for x in (query, key, value))
    flat = q.ndim == 3
    if flat:
        heads, groups = int(node.attributes["q_num_heads"]), int(node.attributes["kv_num_heads"])
        q, k, v = (
            x.reshape(*x.shape[:2], n, -1).transpose(0, 2, 1, 3) for x, n in ((q, heads), (k, groups), (v, groups))
        )
    if values.half:
        # The products of one attention are short, and the softmax is float32 in the kernel.
        narrow = next((x.dtype for x in (q, k, v) if x.dtype != mx.float32), mx.float32)
        q, k, v = (x.astype(narrow) for x in (q, k, v))
    scale = float(node.get("scale", 0.0)) or q.shape[-1] ** -0.5
    bias = None if mask is None else _bias(values.array(mask), q.dtype)
    if int(node.get("is_causal", 0)):
        if bias is not None or q.shape[2] != k.shape[2]:
            raise ValueError("is_causal beside a mask, or with fewer queries than keys, is not supported")
        bias = "causal"
    cap = float(node.get("softcap", 0.0))
    y = _capped(q, k, v, scale, bias, cap) if cap else _fused(q, k, v, scale, bias)
    return y.transpose(0, 2, 1, 3).reshape(y.shape[0], y.shape[2], -1) if flat else y


def _bias(mask: Array, dtype: Any) -> Array:
    """A mask for the kernel: boolean as it is, numbers in the type of the scores, within its range."""
    if mask.dtype == mx.bool_ or mask.dtype == dtype:
        return mask
    return mx.clip(mask, -65504.0, 65504.0).astype(dtype) if dtype == mx.float16 else mask.astype(dtype)


def _fused(q: Array, k: Array, v: Array, scale: float, bias: Any) -> Array:
    width = q.shape[-1]
    target = next((w for w in FUSED_HEAD_WIDTHS if w >= width), width)
    if target == width or v.shape[-1] != width or target - width > _MOST_PADDING * width:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=bias)
    # Zeros add nothing to a score, and the columns that they make are cut off.
    space = [(0, 0)] * 3 + [(0, target - width)]
    q, k, v = (mx.pad(x, space) for x in (q, k, v))
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=bias)[..., :width]


def _capped(q: Array, k: Array, v: Array, scale: float, bias: Any, cap: float) -> Array:
    """softcap · tanh(score / softcap), then the mask, then softmax: no fused kernel has the cap."""
    if isinstance(bias, str):
        raise ValueError("softcap with is_causal is not supported; the graph gives a mask instead")
    batch, heads, queries, width = q.shape
    groups = k.shape[1]
    q = q.reshape(batch, groups, heads // groups, queries, width)
    scores = (q * scale).astype(mx.float32) @ k[:, :, None].swapaxes(-1, -2).astype(mx.float32)
    scores = (cap * mx.tanh(scores / cap)).reshape(batch, heads, queries, -1)
    if bias is not None:
        scores = mx.where(bias, scores, -np.inf) if bias.dtype == mx.bool_ else scores + bias
    weights = mx.softmax(scores, axis=-1, precise=True).astype(v.dtype)
    y = weights.reshape(batch, groups, heads // groups, queries, -1) @ v[:, :, None]
    return y.reshape(batch, heads, queries, -1)


def rotary_embedding(
    values: Values, node: NodeInfo, x: Any, cos: Any, sin: Any, positions: Any = None, *rest: Any
) -> Array:
    """RotaryEmbedding of [B, N, heads·d] or [B, heads, N, d]; cos and sin [B, N, d/2], or [positions, d/2] with ids."""
    if rest or int(node.get("rotary_embedding_dim", 0)):
        raise ValueError("rotation of a part of the head is not supported")
    a = values.array(x)
    flat, interleaved = a.ndim == 3, bool(node.get("interleaved", 0))
    if flat:
        a = a.reshape(*a.shape[:2], int(node.attributes["num_heads"]), -1).transpose(0, 2, 1, 3)
    periods = None
    if positions is None and is_static(cos) and is_static(sin):
        periods = values.derived(cos, "periods", lambda: _periods(dense(cos), dense(sin)))
    if periods is not None:
        y = mx.fast.rope(a, a.shape[-1], traditional=interleaved, base=None, scale=1.0, offset=0, freqs=periods)
    else:
        c, s = values.array(cos), values.array(sin)
        if positions is not None:
            ids = values.array(positions)
            c, s = c[ids], s[ids]
        y = _rotate(a, c[:, None].astype(a.dtype), s[:, None].astype(a.dtype), interleaved)
    return y.transpose(0, 2, 1, 3).reshape(y.shape[0], y.shape[2], -1) if flat else y


def _rotate(a: Array, c: Array, s: Array, interleaved: bool) -> Array:
    if interleaved:
        even, odd = a[..., 0::2], a[..., 1::2]
        return mx.stack([even * c - odd * s, odd * c + even * s], -1).reshape(a.shape)
    first, second = mx.split(a, 2, axis=-1)
    return mx.concatenate([first * c - second * s, second * c + first * s], axis=-1)


def _periods(cos: np.ndarray, sin: np.ndarray) -> np.ndarray | None:
    """1 / frequency of each pair, when the tables are those of positions 0, 1, 2 …; None when they are anything else.

    The kernel works its angles out anew. It stands in for the tables only where it would give the same numbers.
    """
    if cos.ndim != 3 or cos.shape[1] < 2:
        return None
    c, s = cos.astype(np.float64), sin.astype(np.float64)
    if (c != c[:1]).any() or (s != s[:1]).any():
        return None
    frequency = np.arctan2(s[0, 1], c[0, 1])
    if (frequency <= 0).any():
        return None
    # Each later row tells the frequency to one more digit.
    rows = np.arange(c.shape[1])
    for row in 2 ** np.arange(1, int(np.log2(max(1, len(rows) - 1))) + 1):
        found = np.arctan2(s[0, row], c[0, row])
        frequency = (found + 2 * np.pi * np.round((frequency * row - found) / (2 * np.pi))) / row
    periods = _reciprocals(frequency.astype(np.float32))
    angle = (rows[:, None].astype(np.float32) * (np.float32(1) / periods)).astype(np.float64)
    off = np.sqrt(np.mean((np.cos(angle) - c[0]) ** 2 + (np.sin(angle) - s[0]) ** 2))
    return periods if off <= _ROPE_TOLERANCE else None


def _reciprocals(frequency: np.ndarray) -> np.ndarray:
    """float32 numbers whose float32 reciprocals come nearest to `frequency`: the kernel divides."""
    guess = np.float32(1) / frequency
    around = np.stack([np.nextafter(guess, np.float32(0)), guess, np.nextafter(guess, np.float32(np.inf))])
    best = np.abs(np.float32(1) / around - frequency).argmin(0)
    return np.asarray(np.take_along_axis(around, best[None], 0)[0])

"""Self-attention over all tokens: softmax, ReLU linear attention, and softmax over compressed keys and values.

Every class takes tokens x [B, H·W, width] and the grid that they lie on, and returns tokens of the same shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

from edgedit.converters.architectures.layers import (
    Attention,
    Conv2d,
    LayerNorm,
    Linear,
    Module,
    ModuleList,
    Op,
    RMSNorm,
    Value,
    int64s,
    map_to_tokens,
    tokens_to_map,
)
from edgedit.converters.architectures.token_grid import TokenGrid
from edgedit.errors import ConversionError

__all__ = [
    "KVCompressedAttention",
    "KVCompression",
    "KeyValueSum",
    "LinearAttention",
    "QKNorms",
    "SelfAttention",
    "SoftmaxAttention",
    "StateReadout",
    "qk_norms",
]

#: Keeps a query that no key answers from dividing by zero (diffusers' SanaLinearAttnProcessor2_0).
_EPS = 1e-15

#: `eps` that diffusers' Attention hands to the norms of query and key.
_QK_NORM_EPS = 1e-5

_HEADS_FIRST, _HEADS_FIRST_TRANSPOSED = (0, 2, 1, 3), (0, 2, 3, 1)


_QK_NORMS = {"rms_norm_across_heads": RMSNorm, "layer_norm_across_heads": LayerNorm}


class QKNorms(TypedDict, total=False):
    """The two norms, or nothing."""

    norm_q: Module
    norm_k: Module


def qk_norms(qk_norm: str | None, width: int) -> QKNorms:
    """Norms of query and key over all heads together, `width` channels, by diffusers' name for them; none for None."""
    if qk_norm is None:
        return {}
    if qk_norm not in _QK_NORMS:
        raise ConversionError(f"qk_norm={qk_norm!r} is not supported: it must be null or one of {', '.join(_QK_NORMS)}")
    kind = _QK_NORMS[qk_norm]
    return {"norm_q": kind(width, _QK_NORM_EPS), "norm_k": kind(width, _QK_NORM_EPS)}


def _split_heads(op: Op, x: Value, heads: int, perm: tuple[int, ...]) -> Value:
    """[B, N, h·d] → [B, N, h, d], its axes in the order `perm`."""
    return op.Transpose(op.Reshape(x, int64s(op, 0, 0, heads, -1)), perm=list(perm))


class KeyValueSum(Module):
    """key, value [B, N, h·d] → state ReLU(k)ᵀ v [B, h, d, d] and its normaliser Σ ReLU(k) [B, h, d, 1].

    The sums run over all tokens: keep these nodes in float32 whatever the rest is in.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, op: Op, k: Value, v: Value) -> tuple[Value, Value]:
        k = _split_heads(op, op.Relu(k), self.heads, _HEADS_FIRST_TRANSPOSED)
        v = _split_heads(op, v, self.heads, _HEADS_FIRST)
        return op.MatMul(k, v), op.ReduceSum(k, int64s(op, -1), keepdims=1)


class StateReadout(Module):
    """query [B, N, h·d], state and normaliser → ReLU(q) state / (ReLU(q) normaliser + 1e-15), [B, N, h·d].

    Numerator and denominator grow with the number of tokens: keep these nodes in float32 too.
    """

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width

    def forward(self, op: Op, q: Value, state: Value, normaliser: Value) -> Value:
        q = _split_heads(op, op.Relu(q), self.heads, _HEADS_FIRST)
        y = op.Div(op.MatMul(q, state), op.Add(op.MatMul(q, normaliser), _EPS))
        y = op.Transpose(y, perm=list(_HEADS_FIRST))
        return op.Reshape(y, int64s(op, 0, 0, self.width))


class SelfAttention(Module):
    """The projections and norms of diffusers' Attention; its heirs say how query, key and value meet."""

    def __init__(self, width: int, heads: int, head_dim: int, *, bias: bool, qk_norm: str | None) -> None:
        super().__init__()
        self.heads, self.inner = heads, heads * head_dim
        self.to_q, self.to_k, self.to_v = (Linear(width, self.inner, bias) for _ in range(3))
        self.to_out = ModuleList([Linear(self.inner, width)])
        norms = qk_norms(qk_norm, self.inner)
        if norms:
            self.norm_q, self.norm_k = norms["norm_q"], norms["norm_k"]
        self.normalised = bool(norms)

    def _query(self, op: Op, x: Value) -> Value:
        q = self.to_q(op, x)
        return self.norm_q(op, q) if self.normalised else q

    def _key(self, op: Op, x: Value) -> Value:
        k = self.to_k(op, x)
        return self.norm_k(op, k) if self.normalised else k


class SoftmaxAttention(Attention):
    """diffusers' Attention of a map of tokens to itself: every token to every other."""

    def forward(self, op: Op, x: Value, grid: TokenGrid) -> Value:  # type: ignore[override]
        return super().forward(op, x, x, scaled=grid.scaled)


class LinearAttention(SelfAttention):
    """Linear self-attention with the kernel ReLU(q)·ReLU(k).

    SANA, section 2.2, after Katharopoulos et al., "Transformers are RNNs" (2020), section 3.2; diffusers' Attention
    with SanaLinearAttnProcessor2_0. Keys and values are summed before the query is computed, so that the fewest
    token-sized tensors live at once, and no N × N tensor ever does. The normaliser is a product of its own where
    diffusers appends a row of ones to the value: the same sum without the copy.

    With `kernel_size` the value, as a map, goes through a depthwise convolution `dwc` of that size too, which is added
    to the result before the last projection: LiT (Wang et al. 2025, arXiv 2501.12976), which also finds few heads to do
    as well as many.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        *,
        bias: bool = False,
        qk_norm: str | None = None,
        kernel_size: int | None = None,
    ) -> None:
        super().__init__(width, heads, head_dim, bias=bias, qk_norm=qk_norm)
        self.key_value_sum, self.readout = KeyValueSum(heads), StateReadout(heads, self.inner)
        self.convolves = kernel_size is not None
        if kernel_size is not None:
            self.dwc = Conv2d(self.inner, self.inner, kernel_size, padding=kernel_size // 2, groups=self.inner)

    def forward(self, op: Op, x: Value, grid: TokenGrid) -> Value:
        k, v = self._key(op, x), self.to_v(op, x)
        state, normaliser = self.key_value_sum(op, k, v)
        if not self.convolves:
            return self.to_out[0](op, self.readout(op, self._query(op, x), state, normaliser))
        local = map_to_tokens(op, self.dwc(op, tokens_to_map(op, v, self.inner, grid.size)), self.inner)
        return self.to_out[0](op, op.Add(self.readout(op, self._query(op, x), state, normaliser), local))


@dataclass(frozen=True)
class KVCompression:
    """How a block shortens its keys and values (PixArt-Sigma, section 3.2), by `factor` along each side of the grid.

    `sampling` is "conv" (learned depthwise convolution, then LayerNorm), or "ave" or "uniform", which both keep the
    first token of each factor × factor window. `layers` are the indices of the blocks that do it.
    """

    sampling: str
    factor: int
    layers: frozenset[int]

    @classmethod
    def from_config(cls, config: Any, num_layers: int) -> KVCompression | None:
        """From `kv_compress_config` of the original repository; None when it compresses nothing.

        Raises ConversionError for a key, sampling, factor or layer that is not supported.
        """
        if config is None:
            return None

        def refused(what: str, rule: str) -> ConversionError:
            return ConversionError(f"kv_compress_config {what} is not supported: {rule}")

        keys = {"sampling", "scale_factor", "kv_compress_layer"}
        if not isinstance(config, dict) or set(config) != keys:
            raise refused(repr(config), f"it must have {', '.join(sorted(keys))}")
        sampling, factor, layers = config["sampling"], config["scale_factor"], config["kv_compress_layer"]
        if type(factor) is not int or factor < 1:
            raise refused(f"scale_factor={factor!r}", "it must be a whole number above 0")
        if not isinstance(layers, list) or not all(type(i) is int and 0 <= i < num_layers for i in layers):
            raise refused(f"kv_compress_layer={layers!r}", f"it must list blocks from 0 to {num_layers - 1}")
        if factor == 1 or not layers:
            return None
        if sampling not in ("conv", "ave", "uniform"):
            raise refused(f"sampling={sampling!r}", "it must be 'conv', 'ave' or 'uniform'")
        return cls(sampling, factor, frozenset(layers))


class KVCompressedAttention(SelfAttention):
    """Softmax self-attention whose keys and values are shortened as maps: N queries, N / R² keys.

    PixArt-Sigma, section 3.2; class AttentionKVCompress of its repository. Key and value go through the same
    convolution `sr` and the same `norm`, after their projections and the norm of the key, if there is one; the query is
    untouched. What is left over when R does not divide a side is cut off, as a convolution without padding does.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        factor: int,
        *,
        sampling: str = "conv",
        bias: bool = True,
        qk_norm: str | None = None,
    ) -> None:
        super().__init__(width, heads, head_dim, bias=bias, qk_norm=qk_norm)
        self.factor, self.learned = factor, sampling == "conv"
        if self.learned:
            self.sr = Conv2d(self.inner, self.inner, self.factor, stride=self.factor, groups=self.inner)
            self.norm = LayerNorm(self.inner)

    def forward(self, op: Op, x: Value, grid: TokenGrid) -> Value:
        k = self._compress(op, self._key(op, x), grid)
        v = self._compress(op, self.to_v(op, x), grid)
        q = grid.scaled(op, self._query(op, x))
        y = op.Attention(q, k, v, q_num_heads=self.heads, kv_num_heads=self.heads)
        return self.to_out[0](op, y)

    def _compress(self, op: Op, x: Value, grid: TokenGrid) -> Value:
        if self.learned:
            x = self.sr(op, tokens_to_map(op, x, self.inner, grid.size))
            return self.norm(op, map_to_tokens(op, x, self.inner))
        steps = int64s(op, self.factor, self.factor)
        ends = op.Mul(op.Div(grid.size, steps), steps)
        x = op.Slice(grid.unfold(op, x, self.inner), int64s(op, 0, 0), ends, int64s(op, 1, 2), steps)
        return op.Reshape(x, int64s(op, 0, -1, self.inner))

"""Attention through proxies: the means of windows of tokens attend to each other, and every token attends to them."""

from __future__ import annotations

import onnx_ir as ir

from edgedit.converters.architectures.attention import SelfAttention
from edgedit.converters.architectures.layers import Op, Value, int64s
from edgedit.converters.architectures.token_grid import TokenGrid

__all__ = ["ProxyAttention"]


class ProxyAttention(SelfAttention):
    """Softmax self-attention by proxy tokens, the means of `window` × `window` tokens: x [B, H·W, width] → same.

    After PT-DiT (Wang et al. 2024, arXiv 2409.04005): with p the means, p' = p + A(p, p) and the result is A(x, p'),
    where A(a, b) is the attention of a to b with the same projections in both places. Windows at the right and bottom
    are means of the tokens that are there. The paper trains projections for each of the two attentions and adds
    attention within windows and shifted windows, for detail, in every block; a checkpoint that inherits the weights of
    softmax attention has neither. With M = ⌈H / w⌉ ⌈W / w⌉ proxies there are H·W · M + M² scores.
    """

    def __init__(
        self, width: int, heads: int, head_dim: int, window: int, *, bias: bool = True, qk_norm: str | None = None
    ) -> None:
        super().__init__(width, heads, head_dim, bias=bias, qk_norm=qk_norm)
        self.width, self.window = width, window

    def forward(self, op: Op, x: Value, grid: TokenGrid) -> Value:
        proxies = self._means(op, x, grid)
        proxies = op.Add(proxies, self._attend(op, proxies, proxies, grid))
        return self._attend(op, x, proxies, grid)

    def _attend(self, op: Op, x: Value, context: Value, grid: TokenGrid) -> Value:
        q, k, v = grid.scaled(op, self._query(op, x)), self._key(op, context), self.to_v(op, context)
        return self.to_out[0](op, op.Attention(q, k, v, q_num_heads=self.heads, kv_num_heads=self.heads))

    def _means(self, op: Op, x: Value, grid: TokenGrid) -> Value:
        """[B, H·W, C] → [B, M, C]."""
        window = int64s(op, self.window)
        counts = op.Div(op.Add(grid.size, self.window - 1), window)
        missing = op.Sub(op.Mul(counts, window), grid.size)
        pads = op.Concat(int64s(op, 0, 0), missing, axis=0)
        x = op.Pad(grid.unfold(op, x, self.width), pads, 0.0, int64s(op, 1, 2))
        batch = op.Shape(x, start=0, end=1)
        rows, columns = op.Split(counts, axis=0, num_outputs=2, _outputs=2)
        channels = int64s(op, self.width)
        cells = op.Concat(op.Mul(batch, rows), window, columns, window, channels, axis=0)
        sums = op.ReduceSum(op.Reshape(x, cells), int64s(op, 1, 3), keepdims=0)
        sums = op.Reshape(sums, op.Concat(batch, op.Mul(rows, columns), channels, axis=0))
        return op.Div(sums, grid.derive(("tokens in windows", self.window), lambda: self._tokens(op, grid, counts)))

    def _tokens(self, op: Op, grid: TokenGrid, counts: Value) -> Value:
        """How many tokens there are in each window, float32 [M, 1]."""
        sides = []
        for axis in (0, 1):
            firsts = op.Mul(op.Range(0, op.Gather(counts, op.Constant(value_int=axis)), 1), self.window)
            sides.append(op.Min(op.Sub(grid.side(op, axis), firsts), self.window))
        tokens = op.Mul(op.Unsqueeze(sides[0], int64s(op, 1)), sides[1])
        return op.Reshape(op.Cast(tokens, to=ir.DataType.FLOAT), int64s(op, -1, 1))

"""Softmax attention to the keys near a query on the token map, in time and memory linear in the number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgedit.converters.architectures.attention import SelfAttention
from edgedit.converters.architectures.layers import Op, Parameter, Value, constant, int64s
from edgedit.converters.architectures.token_grid import TokenGrid

__all__ = ["LocalAttention"]

#: Added to the score of a key that a query does not see; exp() of it is 0 in float32 beside any score below 9,000.
_UNSEEN = -10000.0

#: Sides of the tiles of queries that share one window of keys. A larger tile gathers each key less often, and scores
#: more keys outside the circle.
_SMALLEST_TILE, _LARGEST_TILE = 4, 16


def _tile(radius: int) -> int:
    return min(max(radius, _SMALLEST_TILE), _LARGEST_TILE)


@dataclass(frozen=True)
class _Windows:
    """Where tiles of T × T queries and their S × S keys lie, S = T + 2 (radius − 1). Int64 but for `circle`.

    queries [tiles, T²]: the token of each query; past the right and bottom edges the nearest one, whose result is
        dropped.
    keys [tiles, S²]: the token of each key, and H·W where the window leaves the map.
    tokens [H·W]: where each token's result is among the tiles · T² ones.
    circle [1, 1, T², S²]: 0 where a query sees a key by their places in tile and window, else −10000. The same for
        every tile.
    """

    queries: Value
    keys: Value
    tokens: Value
    circle: Value


def _windows(op: Op, grid: TokenGrid, radius: int) -> _Windows:
    tile, halo = _tile(radius), radius - 1
    span = tile + 2 * halo
    height, width = grid.side(op, 0), grid.side(op, 1)
    origins = [_origins(op, side, tile) for side in (height, width)]
    inside = [op.Add(origin, constant(op, np.arange(tile)[None])) for origin in origins]
    clipped = [op.Min(places, op.Sub(side, 1)) for places, side in zip(inside, (height, width), strict=True)]
    reached = [op.Add(origin, constant(op, np.arange(-halo, tile + halo)[None])) for origin in origins]
    on_map = [
        op.And(op.Less(-1, places), op.Less(places, side))
        for places, side in zip(reached, (height, width), strict=True)
    ]
    keys = op.Where(
        op.And(op.Unsqueeze(on_map[0], int64s(op, 1, 3)), op.Unsqueeze(on_map[1], int64s(op, 0, 2))),
        _flat(op, reached[0], reached[1], width),
        op.Mul(height, width),
    )
    places = [op.Range(0, side, 1) for side in (height, width)]
    tiles = [op.Div(place, tile) for place in places]
    offsets = [op.Sub(place, op.Mul(number, tile)) for place, number in zip(places, tiles, strict=True)]
    columns = op.Squeeze(op.Shape(origins[1], start=0, end=1))
    rows = op.Add(op.Mul(op.Mul(tiles[0], columns), tile * tile), op.Mul(offsets[0], tile))
    tokens = op.Add(op.Unsqueeze(rows, int64s(op, 1)), op.Add(op.Mul(tiles[1], tile * tile), offsets[1]))
    return _Windows(
        queries=op.Reshape(_flat(op, clipped[0], clipped[1], width), int64s(op, -1, tile * tile)),
        keys=op.Reshape(keys, int64s(op, -1, span * span)),
        tokens=op.Reshape(tokens, int64s(op, -1)),
        circle=_circle(op, radius, tile, span),
    )


def _origins(op: Op, side: Value, tile: int) -> Value:
    """First row or column of every tile, [tiles along the side, 1]."""
    count = op.Div(op.Add(side, tile - 1), tile)
    return op.Unsqueeze(op.Mul(op.Range(0, count, 1), tile), int64s(op, 1))


def _flat(op: Op, rows: Value, columns: Value, width: Value) -> Value:
    """rows [a, m], columns [b, n] → tokens rows · W + columns, [a, b, m, n]."""
    rows = op.Unsqueeze(op.Mul(rows, width), int64s(op, 1, 3))
    return op.Add(rows, op.Unsqueeze(columns, int64s(op, 0, 2)))


def _circle(op: Op, radius: int, tile: int, span: int) -> Value:
    """Made of small constants, so that a large table is not stored with the graph; a runtime folds it once."""
    halo = radius - 1
    between = np.arange(tile)[:, None] - (np.arange(span)[None] - halo)
    squares = constant(op, between**2)
    distances = op.Add(op.Unsqueeze(squares, int64s(op, 1, 3)), op.Unsqueeze(squares, int64s(op, 0, 2)))
    bias = op.Where(op.Less(distances, radius * radius), 0.0, _UNSEEN)
    return op.Reshape(bias, int64s(op, 1, 1, tile * tile, span * span))


class LocalAttention(SelfAttention):
    """Softmax self-attention of each token to the keys with dy² + dx² < radius², in tokens: x [B, H·W, width] → same.

    CLEAR (Liu et al. 2024, arXiv 2412.16112), for the image tokens. With `pool` P every query also sees the keys and
    values of all P × P windows of the map, averaged by the learned `spatial_weight` [1, 1, 1, P, 1, P, 1], as in the
    paper's variants with downsampling; what is left over at the right and bottom is in no window. These are H·W / P²
    more keys for every query.

    The map is cut into tiles of queries, each of which gathers the window of keys that its circles reach; the circle
    and the keys outside the map are masked by an added bias. Heads go one after the other, so that a window's keys and
    scores are held for one head at a time.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        radius: int,
        *,
        pool: int | None = None,
        bias: bool = True,
        qk_norm: str | None = None,
    ) -> None:
        super().__init__(width, heads, head_dim, bias=bias, qk_norm=qk_norm)
        self.head_dim, self.radius, self.pool = head_dim, radius, pool
        if pool is not None:
            self.spatial_weight = Parameter([1, 1, 1, pool, 1, pool, 1])

    def forward(self, op: Op, x: Value, grid: TokenGrid) -> Value:
        """Query and key get one more channel a head, in which the key that stands for everything outside the map has
        the bias of an unseen key and all others have 0; the query's entry there undoes the scale."""
        windows = grid.derive(("windows", self.radius), lambda: _windows(op, grid, self.radius))
        batch = op.Shape(x, start=0, end=1)
        q = self._with_channel(op, self._query(op, x), float(np.float32(self.head_dim**0.5)))
        k, v = self._key(op, x), self.to_v(op, x)
        pooled: tuple[Value, ...] = ()
        if self.pool is not None:
            pooled = (self._with_channel(op, self._pooled(op, k, grid), 0.0), self._pooled(op, v, grid))
        outside = np.zeros((1, 1, self.heads, self.head_dim + 1), np.float32)
        outside[..., -1] = _UNSEEN
        row = constant(op, outside.reshape(1, 1, -1))
        row = op.Expand(row, op.Concat(batch, int64s(op, 1, 1), axis=0))
        k = op.Concat(self._with_channel(op, k, 0.0), row, axis=1)
        v = op.Pad(v, int64s(op, 0, 1), 0.0, int64s(op, 1))
        parts = [self._by_head(op, part) for part in (q, k, v, *pooled)]
        shapes = self._shapes(op, batch, pooled)
        bias = windows.circle if self.pool is None else self._seen_by_all(op, windows.circle, pooled[0])
        heads = [self._head(op, windows, bias, shapes, *head) for head in zip(*parts, strict=True)]
        return self.to_out[0](op, heads[0] if self.heads == 1 else op.Concat(*heads, axis=-1))

    def _with_channel(self, op: Op, x: Value, value: float) -> Value:
        """[B, N, heads · d] → [B, N, heads · (d + 1)], the last channel of each head being `value`."""
        x = op.Reshape(x, int64s(op, 0, 0, self.heads, self.head_dim))
        wider = int64s(op, 0, 0, self.heads * (self.head_dim + 1))
        return op.Reshape(op.Pad(x, int64s(op, 0, 1), value, int64s(op, -1)), wider)

    def _by_head(self, op: Op, x: Value) -> list[Value]:
        if self.heads == 1:
            return [x]
        return list(op.Split(x, axis=-1, num_outputs=self.heads, _outputs=self.heads))

    def _shapes(self, op: Op, batch: Value, pooled: Sequence[Value]) -> tuple[Value, Value, Value, Value]:
        """One head's query, key and value as the batches of an attention, and its result with the tiles joined.

        [B · tiles, 1, …]: with an axis of heads, since ONNX's shape inference takes a value that is narrower than the
        key for one of a fraction of a head.
        """
        tile, channels = _tile(self.radius), self.head_dim
        keys = int64s(op, (tile + 2 * (self.radius - 1)) ** 2)
        if pooled:
            keys = op.Add(keys, op.Shape(pooled[0], start=1, end=2))
        return (
            int64s(op, -1, 1, tile * tile, channels + 1),
            op.Concat(int64s(op, -1, 1), keys, int64s(op, channels + 1), axis=0),
            op.Concat(int64s(op, -1, 1), keys, int64s(op, channels), axis=0),
            op.Concat(batch, int64s(op, -1, channels), axis=0),
        )

    def _head(
        self, op: Op, windows: _Windows, bias: Value, shapes: Sequence[Value], q: Value, k: Value, v: Value, *far: Value
    ) -> Value:
        """One head, [B, H·W, head_dim]; `far` are its pooled keys and values, if there are any."""
        q, k, v = (
            op.Gather(part, places, axis=1)
            for part, places in ((q, windows.queries), (k, windows.keys), (v, windows.keys))
        )
        if far:
            k, v = (self._append(op, near, pooled) for near, pooled in zip((k, v), far, strict=True))
        q, k, v = (op.Reshape(part, shape) for part, shape in zip((q, k, v), shapes, strict=False))
        y = op.Attention(q, k, v, bias, scale=self.head_dim**-0.5)
        return op.Gather(op.Reshape(y, shapes[3]), windows.tokens, axis=1)

    def _append(self, op: Op, near: Value, far: Value) -> Value:
        """near [B, tiles, S², d] and far [B, M, d], which every tile sees → [B, tiles, S² + M, d]."""
        tiles = op.Concat(int64s(op, 1), op.Shape(near, start=1, end=2), int64s(op, 1, 1), axis=0)
        return op.Concat(near, op.Expand(op.Unsqueeze(far, int64s(op, 1)), tiles), axis=2)

    def _seen_by_all(self, op: Op, circle: Value, pooled: Value) -> Value:
        """The circle's bias with a 0 for every pooled key, [1, 1, T², S² + M]."""
        queries = op.Shape(circle, start=2, end=3)
        shape = op.Concat(int64s(op, 1, 1), queries, op.Shape(pooled, start=1, end=2), axis=0)
        return op.Concat(circle, op.Expand(0.0, shape), axis=-1)

    def _pooled(self, op: Op, x: Value, grid: TokenGrid) -> Value:
        """x [B, H·W, C] → [B, (H // P) (W // P), C]."""
        pool, channels = int(self.pool or 1), self.inner
        steps = int64s(op, pool)
        counts = op.Div(grid.size, steps)
        x = op.Slice(grid.unfold(op, x, channels), int64s(op, 0, 0), op.Mul(counts, steps), int64s(op, 1, 2))
        batch = op.Shape(x, start=0, end=1)
        rows, columns = op.Split(counts, axis=0, num_outputs=2, _outputs=2)
        cells = op.Concat(op.Mul(batch, rows), steps, columns, steps, int64s(op, channels), axis=0)
        weight = op.Reshape(self.spatial_weight, int64s(op, 1, pool, 1, pool, 1))
        x = op.ReduceSum(op.Mul(op.Reshape(x, cells, allowzero=1), weight), int64s(op, 1, 3), keepdims=0)
        return op.Reshape(x, op.Concat(batch, op.Mul(rows, columns), int64s(op, channels), axis=0), allowzero=1)

"""The map that tokens lie on, handed to every block, with what layers derive from its size made once for all."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

from edgedit.converters.architectures.layers import Op, Value, int64s

__all__ = ["TokenGrid"]

T = TypeVar("T")


class TokenGrid:
    """`size` [H, W], int64. Tokens are in rows: token y · W + x lies at (y, x).

    `attention_scale`, float32 [1] or None: what softmax attention over the map multiplies its scores by, because their
    number changes with the size (`edgedit.attention_scale`).
    """

    def __init__(self, size: Value, attention_scale: Value | None = None) -> None:
        self.size, self.attention_scale = size, attention_scale
        self._derived: dict[Hashable, object] = {}

    def scaled(self, op: Op, query: Value) -> Value:
        """Queries that give scores times `attention_scale`; a factor of 1 leaves every bit as it is."""
        return query if self.attention_scale is None else op.Mul(query, self.attention_scale)

    def side(self, op: Op, axis: int) -> Value:
        """H (axis 0) or W (axis 1), an int64 scalar."""
        return self.derive(("side", axis), lambda: op.Gather(self.size, op.Constant(value_int=axis)))

    def derive(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made when it is first asked for and kept under `key`."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]  # type: ignore[return-value]

    def unfold(self, op: Op, x: Value, channels: int) -> Value:
        """Tokens [B, H·W, C] → [B, H, W, C]."""
        return op.Reshape(x, op.Concat(int64s(op, 0), self.size, int64s(op, channels), axis=0))

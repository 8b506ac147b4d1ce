"""Self-attention operators in torch, as modules that take the place of a block's `attn1`.

They compute what the canonical graph of the same name computes (`converters/architectures`), from the same parameters.
A checkpoint names them in its `edgedit.json`:

    "attention": [{"operator": "lit", "heads": 2, "kernel_size": 5, "layers": [0, 1, 2]}]

Every operator inherits the projections of the softmax attention that it replaces.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedit.errors import InputError

__all__ = ["OPERATORS", "SelfAttention", "make_operator", "parse_operator"]

_EPS = 1e-15
"""Keeps a query that no key answers from dividing by zero."""


class SelfAttention(nn.Module):
    """Projections of a diffusers `Attention` without cross-attention; heirs say how query, key and value meet.

    `grid` is (H, W) of the tokens and must be set before a call; H · W is the number of tokens.
    """

    grid: tuple[int, int] = (0, 0)

    def __init__(self, attention: Any, heads: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = attention.to_q, attention.to_k, attention.to_v
        self.to_out = nn.ModuleList([attention.to_out[0]])
        self.norm_q: nn.Module | None = attention.norm_q
        self.norm_k: nn.Module | None = attention.norm_k
        self.inner = attention.to_q.out_features
        if self.inner % heads:
            raise InputError(f"{self.inner} channels do not divide into {heads} heads; choose another --heads")
        self.heads = heads

    def forward(self, hidden_states: Tensor, *unused: Any, **also_unused: Any) -> Tensor:
        """(B, H · W, width) to the same shape; what diffusers passes besides is for attention to other things."""
        query, key, value = self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states)
        query = query if self.norm_q is None else self.norm_q(query)
        key = key if self.norm_k is None else self.norm_k(key)
        mixed: Tensor = self.to_out[0](self.mix(query, key, value))
        return mixed

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Query, key and value (B, N, inner) to (B, N, inner)."""
        raise NotImplementedError

    def split(self, x: Tensor) -> Tensor:
        """(B, N, inner) to (B, heads, N, inner / heads)."""
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def to_map(self, x: Tensor) -> Tensor:
        """(B, H · W, C) to (B, C, H, W)."""
        return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *self.grid)


class ReluAttention(SelfAttention):
    """O = relu(Q) (relu(K)^T V) / (relu(Q) sum relu(K)): Katharopoulos et al. 2020, section 3.2, with SANA's kernel.

    The sums are taken in float32 whatever the projections are in.
    """

    def __init__(self, attention: Any, *, heads: int) -> None:
        super().__init__(attention, heads)

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            q, k, v = (self.split(x.float()) for x in (F.relu(query), F.relu(key), value))
            state, normaliser = k.transpose(-1, -2) @ v, k.sum(-2).unsqueeze(-1)
            mixed = (q @ state) / (q @ normaliser + _EPS)
        return mixed.transpose(1, 2).flatten(2).to(value.dtype)


class LitAttention(ReluAttention):
    """ReLU linear attention plus a depthwise convolution of the values (LiT, section 3.1).

    The convolution begins at zero, so that a converted model begins as plain linear attention.
    """

    def __init__(self, attention: Any, *, heads: int, kernel_size: int = 5) -> None:
        super().__init__(attention, heads=heads)
        self.dwc = nn.Conv2d(self.inner, self.inner, kernel_size, padding=kernel_size // 2, groups=self.inner)
        nn.init.zeros_(self.dwc.weight)
        assert self.dwc.bias is not None
        nn.init.zeros_(self.dwc.bias)

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        local: Tensor = self.dwc(self.to_map(value)).flatten(2).transpose(1, 2)
        return super().mix(query, key, value) + local


class SoftmaxOver(SelfAttention):
    """Softmax attention over keys and values that `shorten` gives, with an optional mask."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self.shorten(key), self.shorten(value)
        mixed = F.scaled_dot_product_attention(
            self.split(query), self.split(keys), self.split(values), attn_mask=self.mask(query.device)
        )
        return mixed.transpose(1, 2).flatten(2)

    def shorten(self, x: Tensor) -> Tensor:
        """Keys or values (B, N, inner) to (B, M, inner)."""
        return x

    def mask(self, device: torch.device) -> Tensor | None:
        """Which of the M keys each of the N queries sees: bool (N, M)."""
        return None


class CompressedAttention(SoftmaxOver):
    """Keys and values go through one depthwise convolution of stride R and one norm (PixArt-Sigma, section 3.2).

    The convolution begins as the mean of a window, as the paper's does.
    """

    def __init__(self, attention: Any, *, heads: int, factor: int) -> None:
        super().__init__(attention, heads)
        self.sr = nn.Conv2d(self.inner, self.inner, factor, stride=factor, groups=self.inner)
        nn.init.constant_(self.sr.weight, 1 / factor**2)
        assert self.sr.bias is not None
        nn.init.zeros_(self.sr.bias)
        self.norm = nn.LayerNorm(self.inner)

    def shorten(self, x: Tensor) -> Tensor:
        shortened: Tensor = self.norm(self.sr(self.to_map(x)).flatten(2).transpose(1, 2))
        return shortened


class CircleAttention(SoftmaxOver):
    """Softmax over the keys less than `radius` tokens away, and over pooled ones (CLEAR, sections 3.2 and 3.3).

    With `pool` P the means of P × P windows, weighted by `spatial_weight`, are appended for every query; what is left
    over at the right and at the bottom is in no window.
    """

    def __init__(self, attention: Any, *, heads: int, radius: int, pool: int | None = None) -> None:
        super().__init__(attention, heads)
        self.radius, self.pool = radius, pool
        if pool is not None:
            self.spatial_weight = nn.Parameter(torch.full((1, 1, 1, pool, 1, pool, 1), 1 / pool**2))

    def shorten(self, x: Tensor) -> Tensor:
        if self.pool is None:
            return x
        height, width = (side // self.pool for side in self.grid)
        cut = self.to_map(x)[..., : height * self.pool, : width * self.pool]
        windows = cut.reshape(*x.shape[::2], height, self.pool, width, self.pool)
        weights = self.spatial_weight.reshape(1, 1, 1, self.pool, 1, self.pool)
        pooled = (windows * weights).sum((3, 5)).flatten(2).transpose(1, 2)
        return torch.cat([x, pooled], 1)

    def mask(self, device: torch.device) -> Tensor | None:
        rows, columns = (torch.arange(side, device=device) for side in self.grid)
        y, x = (axis.flatten() for axis in torch.meshgrid(rows, columns, indexing="ij"))
        near = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < self.radius**2
        if self.pool is None:
            return near
        windows = (self.grid[0] // self.pool) * (self.grid[1] // self.pool)
        return torch.cat([near, near.new_ones(len(near), windows)], 1)


OPERATORS: Mapping[str, Callable[..., SelfAttention]] = {
    "relu": ReluAttention,
    "lit": LitAttention,
    "clear": CircleAttention,
    "kv": CompressedAttention,
}
"""Operator name in `edgedit.json` to its class; the other keys of its object are the class's arguments."""

_FORMS = "lit, relu, clear:RADIUS, clear:RADIUS:POOL or kv:FACTOR"
_KEEPS_HEADS = ("clear", "kv")


def parse_operator(text: str, *, heads: int, linear_heads: int | None = None) -> dict[str, Any]:
    """The object of `edgedit.json`, without `layers`, that "lit", "relu", "clear:8", "clear:8:4" or "kv:2" stands for.

    Args:
        text: the command line's spelling.
        heads: heads of the softmax attention, which clear and kv keep.
        linear_heads: heads of lit and relu; None takes a quarter of `heads` (LiT, table 3: few heads cost the same and
            draw better).

    Raises:
        InputError: not an operator, or one without sense.
    """
    name, *numbers = text.strip().lower().split(":")
    try:
        values = [int(number) for number in numbers]
    except ValueError:
        values = [0]
    wanted = {"lit": (0,), "relu": (0,), "clear": (1, 2), "kv": (1,)}
    if name not in wanted or len(values) not in wanted[name] or any(value < 1 for value in values):
        raise InputError(f"unknown attention {text!r}; choose {_FORMS}")
    if name in _KEEPS_HEADS and linear_heads is not None:
        raise InputError(f"--heads is for lit and relu: {name} keeps the {heads} heads of the checkpoint")
    if name == "kv":
        return {"operator": "kv", "factor": values[0]}
    if name == "clear":
        return {"operator": "clear", "radius": values[0], "pool": values[1] if len(values) > 1 else None}
    chosen = max(1, heads // 4) if linear_heads is None else linear_heads
    return {"operator": name, "heads": chosen} | ({"kernel_size": 5} if name == "lit" else {})


def make_operator(spec: Mapping[str, Any], attention: Any) -> SelfAttention:
    """The operator that an object of `edgedit.json` describes, on the projections of a softmax attention.

    Raises InputError when it does not fit the attention.
    """
    arguments = {key: value for key, value in spec.items() if key not in ("operator", "layers")}
    arguments.setdefault("heads", attention.heads)
    if spec.get("operator") not in OPERATORS:
        raise InputError(f"unknown attention operator {spec.get('operator')!r}; choose {', '.join(OPERATORS)}")
    return OPERATORS[spec["operator"]](attention, **arguments)

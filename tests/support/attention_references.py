"""Self-attention operators written with torch as their definitions have them: every query against every key."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

__all__ = ["REFERENCES", "Reference"]


class Reference(torch.nn.Module):
    """Softmax attention with the projections of diffusers' Attention; its heirs say what else meets what.

    forward(tokens [B, H·W, C], size (H, W)) → tokens. In the place of a block's attn1 the size is the attribute `size`,
    and what diffusers passes beside the tokens is not used.
    """

    size: tuple[int, int] = (0, 0)

    def __init__(self, width: int, heads: int, *, bias: bool = True, normalised: bool = False) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (torch.nn.Linear(width, width, bias=bias) for _ in range(3))
        self.to_out = torch.nn.ModuleList([torch.nn.Linear(width, width)])
        if normalised:
            self.norm_q, self.norm_k = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.normalised, self.heads = normalised, heads

    def projected(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        return (self.norm_q(q), self.norm_k(k), v) if self.normalised else (q, k, v)

    def split(self, *parts: torch.Tensor) -> list[torch.Tensor]:
        return [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts]

    def join(self, y: torch.Tensor) -> torch.Tensor:
        return y.transpose(1, 2).flatten(2)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None = None
    ) -> torch.Tensor:
        q, k, v = self.split(q, k, v)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        return self.join(scores.softmax(-1) @ v)

    def forward(self, x: torch.Tensor, size: tuple[int, int] | None = None, **_: Any) -> torch.Tensor:
        return self.to_out[0](self.mix(x, size or self.size))

    def mix(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return self.attend(*self.projected(x))


class Relu(Reference):
    def values(self, v: torch.Tensor, size: tuple[int, int]) -> torch.Tensor | float:
        return 0.0

    def mix(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        q, k, v = self.projected(x)
        heads = self.split(q.relu(), k.relu(), v)
        weights = heads[0] @ heads[1].mT
        y = self.join(weights / (weights.sum(-1, keepdim=True) + 1e-15) @ heads[2])
        return y + self.values(v, size)


class LiT(Relu):
    def __init__(self, width: int, heads: int, *, kernel_size: int = 5, **options: Any) -> None:
        super().__init__(width, heads, **options)
        self.dwc = torch.nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2, groups=width)

    def values(self, v: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return self.dwc(v.mT.unflatten(2, size)).flatten(2).mT


class Clear(Reference):
    def __init__(self, width: int, heads: int, *, radius: int, pool: int | None = None, **options: Any) -> None:
        super().__init__(width, heads, **options)
        self.radius, self.pool = radius, pool
        if pool is not None:
            self.spatial_weight = torch.nn.Parameter(torch.full((1, 1, 1, pool, 1, pool, 1), 1 / pool**2))

    def pooled(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        side = self.pool or 1
        channels = x.shape[-1]
        weight = self.spatial_weight.view(1, 1, side, side).expand(channels, -1, -1, -1)
        if min(size) < side:
            return x[:, :0]
        return functional.conv2d(x.mT.unflatten(2, size), weight, stride=side, groups=channels).flatten(2).mT

    def mix(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        q, k, v = self.projected(x)
        places = torch.tensor(list(itertools.product(range(size[0]), range(size[1]))))
        seen = (places[:, None] - places[None]).pow(2).sum(-1) < self.radius**2
        if self.pool is not None:
            k, v = (torch.cat([part, self.pooled(part, size)], 1) for part in (k, v))
            seen = torch.cat([seen, seen.new_ones(seen.shape[0], k.shape[1] - seen.shape[0])], 1)
        return self.attend(q, k, v, seen=seen)


class KV(Reference):
    def __init__(self, width: int, heads: int, *, factor: int, **options: Any) -> None:
        super().__init__(width, heads, **options)
        self.sr = torch.nn.Conv2d(width, width, factor, stride=factor, groups=width)
        self.norm = torch.nn.LayerNorm(width)

    def short(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return self.norm(self.sr(x.mT.unflatten(2, size)).flatten(2).mT)

    def mix(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        q, k, v = self.projected(x)
        return self.attend(q, self.short(k, size), self.short(v, size))


class Proxy(Reference):
    def __init__(self, width: int, heads: int, *, window: int, **options: Any) -> None:
        super().__init__(width, heads, **options)
        self.window = window

    def proxies(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        grid, side = x.unflatten(1, size), self.window
        cells = [
            grid[:, y : y + side, z : z + side].mean((1, 2))
            for y in range(0, size[0], side)
            for z in range(0, size[1], side)
        ]
        return torch.stack(cells, 1)

    def mix(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        proxies = self.proxies(x, size)
        proxies = proxies + self.to_out[0](self.attend(*self.projected(proxies)))
        _, k, v = self.projected(proxies)
        return self.attend(self.projected(x)[0], k, v)


REFERENCES: Mapping[str, type[Reference]] = {
    "softmax": Reference,
    "relu": Relu,
    "lit": LiT,
    "clear": Clear,
    "kv": KV,
    "proxy": Proxy,
}

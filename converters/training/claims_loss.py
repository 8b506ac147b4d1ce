"""How far a reading of latents is from what captions claim, as a number with a gradient.

Every claim becomes an expected number of objects: the sum over the cells of the probability that an object of that
shape, colour, size and place has its centre there. It is right when that sum is the number claimed. Positions that a
caption leaves open stay open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgedit.converters.training.captions import Claims
from edgedit.converters.training.latent_reader import Reading
from edgedit.converters.training.world import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES

__all__ = ["ClaimBatch", "claims_loss"]

_GROUPS, _RELATIONS = 3, 2
_FLOOR = 0.02
"""Least share of a claim that counts as met, so that a claim that is wholly missed has a bounded gradient."""
_RELATION_NAMES = ("left of", "right of", "above", "below")
_THIRDS = (51 / 128, 77 / 128)


def _places(grid: int) -> Tensor:
    """(places + 1, grid · grid): 1 in the cells of a place, the last row for a claim without one."""
    third = np.searchsorted(_THIRDS, (np.arange(grid) + 0.5) / grid)
    columns = {"left": 0, "centre": 1, "right": 2}
    rows = {"top": 0, "centre": 1, "bottom": 2}
    maps = [(third[:, None] == rows[row]) & (third[None, :] == columns[column]) for column, row in PLACES.values()]
    return torch.from_numpy(np.stack([*maps, np.ones((grid, grid), bool)]).reshape(len(maps) + 1, -1)).float()


def _relations(grid: int) -> Tensor:
    """(4, N, N): 1 where a centre in the first cell lies so to one in the second."""
    y, x = np.divmod(np.arange(grid * grid), grid)
    dx, dy = x[:, None] - x[None, :], y[:, None] - y[None, :]
    across, down = np.abs(dx) > np.abs(dy), np.abs(dy) > np.abs(dx)
    return torch.from_numpy(np.stack([across & (dx < 0), across & (dx > 0), down & (dy < 0), down & (dy > 0)])).float()


def _index(names: Sequence[str], name: str | None) -> int:
    """Of a name; the place after the last for None, where the probability is one."""
    return len(names) if name is None else list(names).index(name)


@dataclass(frozen=True)
class ClaimBatch:
    """The claims of B captions as arrays.

    Attributes:
        groups: (B, 3, 5) int64: count, shape, colour, size, place; count 0 fills up.
        relations: (B, 2, 3) int64: first group, relation, second group; relation -1 fills up.
        background: (B,) int64, -1 when it is not named.
    """

    groups: Tensor
    relations: Tensor
    background: Tensor

    @classmethod
    def of(cls, claims: Sequence[Claims]) -> ClaimBatch:
        """The claims of captions, in order."""
        groups = np.zeros((len(claims), _GROUPS, 5), np.int64)
        relations = np.full((len(claims), _RELATIONS, 3), -1, np.int64)
        background = np.full(len(claims), -1, np.int64)
        for row, claim in enumerate(claims):
            for index, group in enumerate(claim.groups):
                groups[row, index] = (
                    group.count,
                    _index(SHAPES, group.shape),
                    _index(list(COLOURS), group.colour),
                    _index(list(SIZES), group.size),
                    _index(list(PLACES), group.place),
                )
            for index, relation in enumerate(claim.relations):
                relations[row, index] = (relation.first, _RELATION_NAMES.index(relation.relation), relation.second)
            if claim.background is not None:
                background[row] = list(BACKGROUNDS).index(claim.background)
        return cls(*(torch.from_numpy(array) for array in (groups, relations, background)))

    def to(self, device: torch.device) -> ClaimBatch:
        """The same on a device."""
        return ClaimBatch(self.groups.to(device), self.relations.to(device), self.background.to(device))

    def __getitem__(self, rows: Tensor) -> ClaimBatch:
        return ClaimBatch(self.groups[rows], self.relations[rows], self.background[rows])


def _probabilities(logits: Tensor) -> Tensor:
    """(B, classes + 1, N), ones at the end for what is not claimed."""
    shares = logits.softmax(-1).transpose(1, 2)
    return torch.cat([shares, torch.ones_like(shares[:, :1])], 1)


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """table (B, K, N), index (B, G) → (B, G, N)."""
    return table.gather(1, index[..., None].expand(-1, -1, table.shape[-1]))


def _shortfall(found: Tensor, wanted: Tensor) -> Tensor:
    """Minus the logarithm of the share of what is wanted that was found, 0 when nothing is wanted."""
    share = (found / wanted.clamp(min=1)).clamp(max=1)
    return -torch.log(share * (1 - _FLOOR) + _FLOOR) * (wanted > 0)


def claims_loss(reading: Reading, claims: ClaimBatch) -> Tensor:
    """Loss (B,) of a reading against claims: 0 when every claim is read for sure and nothing else is there."""
    cells = reading.centre.shape[1]
    grid = round(cells**0.5)
    centre = torch.sigmoid(reading.centre)
    count, shape, colour, size, place = claims.groups.unbind(-1)
    where = _places(grid).to(centre)[place]
    each = centre[:, None] * where
    for logits, index in ((reading.shape, shape), (reading.colour, colour), (reading.size, size)):
        each = each * _rows(_probabilities(logits), index)
    wanted = count.to(centre)
    total = _shortfall(each.sum(-1), wanted).sum(1)
    total = total + F.smooth_l1_loss(centre.sum(1), wanted.sum(1), reduction="none")
    said = claims.relations[..., 1] >= 0
    first, second = (claims.relations[..., side].clamp(min=0) for side in (0, 2))
    table = _relations(grid).to(centre)[claims.relations[..., 1].clamp(min=0)]
    pairs = torch.einsum("brn,brnm,brm->br", _rows(each, first), table, _rows(each, second))
    expected = wanted.gather(1, first) * wanted.gather(1, second) * said
    total = total + _shortfall(pairs, expected).sum(1)
    known = claims.background >= 0
    background = F.cross_entropy(reading.background, claims.background.clamp(min=0), reduction="none")
    return total + background * known

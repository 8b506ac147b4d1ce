"""What a scene holds at each token of the transformer, and a training-only head that must tell it.

The flow-matching loss of flat pictures is mostly about edges; what the caption decides (which shape, which colour,
where) is a small part of it and is learned late. Asking a middle layer for it directly, as REPA asks for features of
a vision model, gives that part a strong gradient at every sigma. The head is thrown away after training.

Reference: Yu et al., "Representation Alignment for Generation" (2024), section 3.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedit.converters.training.world import BACKGROUNDS, COLOURS, IMAGE_SIZE, SHAPES, SIZES, Scene

__all__ = ["LayoutHead", "layout_loss", "layout_of", "object_cells"]

NOTHING = -1
MIN_OVERLAP = 0.15
"""Least share of a token's square that an object's bounding box covers for the token to belong to the object."""
EDGE = 3.0
"""Pixels around an object in which its edge is drawn."""
_CLASSES = (len(SHAPES), len(COLOURS), len(SIZES), len(BACKGROUNDS), 2)


def layout_of(scenes: list[Scene], grid: int) -> npt.NDArray[np.int8]:
    """Classes (N, grid · grid, 4): shape, colour and size of the object at a token (-1 for none), and background."""
    cell = IMAGE_SIZE / grid
    low = np.arange(grid) * cell
    shapes, colours, sizes = list(SHAPES), list(COLOURS), list(SIZES)
    backgrounds = list(BACKGROUNDS)
    result = np.full((len(scenes), grid, grid, 4), NOTHING, np.int8)
    for index, scene in enumerate(scenes):
        result[index, :, :, 3] = backgrounds.index(scene.background)
        best = np.full((grid, grid), MIN_OVERLAP)
        for item in scene.items:
            half_width, half_height = item.half
            across = np.minimum(low + cell, item.x + half_width) - np.maximum(low, item.x - half_width)
            down = np.minimum(low + cell, item.y + half_height) - np.maximum(low, item.y - half_height)
            share = np.clip(down, 0, None)[:, None] * np.clip(across, 0, None)[None, :] / cell**2
            here = share > best
            best = np.maximum(best, share)
            result[index, here, :3] = (shapes.index(item.shape), colours.index(item.colour), sizes.index(item.size))
    return result.reshape(len(scenes), grid * grid, 4)


def object_cells(scenes: list[Scene], grid: int) -> npt.NDArray[np.bool_]:
    """(N, grid, grid): whether a cell of the latents reaches into the bounding box of an object or close to it."""
    cell = IMAGE_SIZE / grid
    low = np.arange(grid) * cell
    result = np.zeros((len(scenes), grid, grid), bool)
    for index, scene in enumerate(scenes):
        for item in scene.items:
            half_width, half_height = item.half
            across = (low + cell > item.x - half_width - EDGE) & (low < item.x + half_width + EDGE)
            down = (low + cell > item.y - half_height - EDGE) & (low < item.y + half_height + EDGE)
            result[index] |= down[:, None] & across[None, :]
    return result


class LayoutHead(nn.Module):
    """Hidden states (B, N, width) to the logits of shape, colour, size, background and presence, side by side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classes = nn.Linear(width, sum(_CLASSES))

    def forward(self, hidden_states: Tensor) -> Tensor:
        logits: Tensor = self.classes(self.norm(hidden_states))
        return logits


def layout_loss(logits: Tensor, layout: Tensor) -> Tensor:
    """Sum of the cross entropies, those of shape, colour and size over the tokens that hold an object."""
    shape, colour, size, background, presence = torch.split(logits.float().flatten(0, 1), list(_CLASSES), dim=-1)
    classes = layout.flatten(0, 1).long()
    held = (classes[:, 0] != NOTHING).long()
    total = F.cross_entropy(background, classes[:, 3]) + F.cross_entropy(presence, held)
    for part, wanted in ((shape, classes[:, 0]), (colour, classes[:, 1]), (size, classes[:, 2])):
        total = total + F.cross_entropy(part, wanted, ignore_index=NOTHING, reduction="sum") / held.sum().clamp(min=1)
    return total

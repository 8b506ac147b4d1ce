"""A small network that reads a scene in latents, so that what a caption claims has a gradient.

`scene_reader` tells what a picture shows, exactly and without learning, but nothing can be differentiated through it.
This network answers the same questions about clean latents, and about the denoiser's estimates of them: at every cell
of the latent map whether an object's centre is there, and which shape, colour and size that object has; and the
background. It is trained on rendered scenes and thrown away with the training; evaluation never uses it.

Reference: Li et al., "Reward Guided Latent Consistency Distillation" (2024), section 4.3 (a latent proxy of a reward).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedit.converters.training.layout import NOTHING
from edgedit.converters.training.world import BACKGROUNDS, COLOURS, IMAGE_SIZE, SHAPES, SIZES, Scene

__all__ = ["LatentReader", "Reading", "centres_of", "reading_loss"]

_CLASSES = (1, len(SHAPES), len(COLOURS), len(SIZES))


@dataclass(frozen=True)
class Reading:
    """What is read in B latents of N cells, as logits.

    Attributes:
        centre: (B, N), whether an object's centre lies in the cell.
        shape, colour, size: (B, N, classes) of the object there.
        background: (B, classes).
    """

    centre: Tensor
    shape: Tensor
    colour: Tensor
    size: Tensor
    background: Tensor


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(8, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.second(F.silu(self.first(F.silu(self.norm(x)))))
        return result


class LatentReader(nn.Module):
    """Latents (B, channels, h, w) to a `Reading` with N = h · w cells."""

    def __init__(self, channels: int, *, width: int = 96, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(depth)))
        self.cells = nn.Conv2d(width, sum(_CLASSES), 1)
        self.background = nn.Linear(width, len(BACKGROUNDS))

    def forward(self, latents: Tensor) -> Reading:
        features = F.silu(self.blocks(self.stem(latents)))
        cells = self.cells(features).flatten(2).transpose(1, 2).float()
        centre, shape, colour, size = torch.split(cells, list(_CLASSES), dim=-1)
        return Reading(centre[..., 0], shape, colour, size, self.background(features.mean((2, 3))).float())


def centres_of(scenes: Sequence[Scene], grid: int) -> npt.NDArray[np.int8]:
    """Classes (N, grid · grid, 4): shape, colour and size of the object whose centre is in a cell (-1 for none), and
    the background."""
    cell = IMAGE_SIZE / grid
    shapes, colours, sizes, backgrounds = list(SHAPES), list(COLOURS), list(SIZES), list(BACKGROUNDS)
    result = np.full((len(scenes), grid, grid, 4), NOTHING, np.int8)
    for index, scene in enumerate(scenes):
        result[index, :, :, 3] = backgrounds.index(scene.background)
        for item in scene.items:
            kind = (shapes.index(item.shape), colours.index(item.colour), sizes.index(item.size))
            result[index, int(item.y / cell), int(item.x / cell), :3] = kind
    return result.reshape(len(scenes), grid * grid, 4)


def reading_loss(reading: Reading, centres: Tensor) -> Tensor:
    """Cross entropies of a reading: of the centres over all cells, of the rest where a centre is.

    Args:
        reading: of B latents.
        centres: (B, N, 4) of `centres_of`.
    """
    classes = centres.long()
    held = classes[..., 0] != NOTHING
    count = held.sum().clamp(min=1)
    total = F.binary_cross_entropy_with_logits(reading.centre, held.float(), reduction="sum") / count
    for part, wanted in (
        (reading.shape, classes[..., 0]),
        (reading.colour, classes[..., 1]),
        (reading.size, classes[..., 2]),
    ):
        loss = F.cross_entropy(part.flatten(0, 1), wanted.flatten(), ignore_index=NOTHING, reduction="sum")
        total = total + loss / count
    return total + F.cross_entropy(reading.background, classes[:, 0, 3])

"""Where in a picture something is: weights for errors, so that a large plain background does not drown the rest.

Where the target of a loss is one value and not the mean of many (a teacher's output, the end of a trajectory), weights
do not move what is learnt, only what is learnt first.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["salience"]

WEIGHT = 6.0
FULL = 0.3
"""Distance from the plain part, over the largest in the picture, from which a cell has the whole weight."""


def salience(clean: Tensor) -> Tensor:
    """Weights (B, 1, H, W) with mean 1 of clean latents (B, C, H, W).

    A cell counts by its distance from the median cell. In a picture without a plain background nearly all cells are far
    from it, and the weights nearly alike.
    """
    middle = clean.flatten(2).median(-1).values[..., None, None]
    distance = (clean - middle).square().mean(1, keepdim=True).sqrt()
    largest = distance.amax((2, 3), keepdim=True).clamp(min=torch.finfo(distance.dtype).tiny)
    weights = 1 + WEIGHT * (distance / (FULL * largest)).clamp(max=1)
    return weights / weights.mean((2, 3), keepdim=True)

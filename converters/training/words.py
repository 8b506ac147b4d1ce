"""What each noun of a caption stands for, and a training-only head that must tell it from the text encoder's states.

A text encoder that is trained through a denoiser alone learns late which colour belongs to which shape and where the
second object of a sentence goes. Asked directly, it learns that in minutes. The head is thrown away after training.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedit.converters.training.world import BACKGROUNDS, COLOURS, IMAGE_SIZE, SHAPES, SIZES, Item, Scene

__all__ = ["FACTS", "WordHead", "noun_facts", "word_loss"]

UNKNOWN = -1
FACTS = ("shape", "colour", "size", "count", "column", "row", "background", "side")
_CLASSES = (len(SHAPES), len(COLOURS), len(SIZES), 3, 3, 3, len(BACKGROUNDS), 5)
_NOUNS = {word: shape for shape in SHAPES for word in (shape, shape + "s", shape + "es")}
_THIRDS = (51 / 128 * IMAGE_SIZE, 77 / 128 * IMAGE_SIZE)


def _third(values: Sequence[float]) -> int:
    return int(np.searchsorted(_THIRDS, float(np.mean(values))))


def _side(items: Sequence[Item], others: Sequence[Item]) -> int:
    """On which side of the others: 0 when there are none, 1 left, 2 right, 3 above, 4 below."""
    if not others:
        return 0
    dx, dy = (
        float(np.mean([getattr(item, axis) for item in items]) - np.mean([getattr(item, axis) for item in others]))
        for axis in ("x", "y")
    )
    return (1 if dx < 0 else 2) if abs(dx) > abs(dy) else (3 if dy < 0 else 4)


def _facts(items: Sequence[Item], scene: Scene) -> tuple[int, ...]:
    first = items[0]
    return (
        list(SHAPES).index(first.shape),
        list(COLOURS).index(first.colour),
        list(SIZES).index(first.size),
        len(items) - 1,
        _third([item.x for item in items]),
        _third([item.y for item in items]),
        list(BACKGROUNDS).index(scene.background),
        _side(items, [item for item in scene.items if item not in items]),
    )


def noun_facts(words: Sequence[str], scene: Scene) -> npt.NDArray[np.int8]:
    """Facts (L, 8) of the object that each word names, -1 at words that name none or could name several."""
    kinds: dict[tuple[str, str, str], list[Item]] = {}
    for item in scene.items:
        kinds.setdefault((item.shape, item.colour, item.size), []).append(item)
    result = np.full((len(words), len(FACTS)), UNKNOWN, np.int8)
    for position, word in enumerate(words):
        named = [items for (shape, _, _), items in kinds.items() if shape == _NOUNS.get(word)]
        if len(named) > 1:
            colour = words[position - 1] if position else ""
            named = [items for items in named if items[0].colour == colour]
        if len(named) == 1:
            result[position] = _facts(named[0], scene)
    return result


class WordHead(nn.Module):
    """Text states (B, L, width) to the logits of every fact, side by side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classes = nn.Linear(width, sum(_CLASSES))

    def forward(self, states: Tensor) -> Tensor:
        logits: Tensor = self.classes(self.norm(states))
        return logits


def word_loss(logits: Tensor, facts: Tensor) -> Tensor:
    """Sum of the cross entropies of the facts, each the mean over the words that name an object."""
    wanted = facts.flatten(0, 1).long()
    count = (wanted[:, 0] != UNKNOWN).sum().clamp(min=1)
    total = logits.new_zeros((), dtype=logits.float().dtype)
    parts = torch.split(logits.float().flatten(0, 1), list(_CLASSES), dim=-1)
    for index, part in enumerate(parts):
        total = total + F.cross_entropy(part, wanted[:, index], ignore_index=UNKNOWN, reduction="sum") / count
    return total

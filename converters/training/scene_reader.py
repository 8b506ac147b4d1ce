"""Reads a picture of the world back into a scene, with plain image analysis.

The background is the commonest palette colour, objects are the connected regions that differ from it, and each object
is told by the colour of its inner pixels, its bounding box, and the overlap of its normalised mask with the masks of
the eight shapes. Nothing is learned, and nothing is known of the prompt.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedit.converters.training.world import BACKGROUNDS, COLOURS, IMAGE_SIZE, SHAPES, SIZES, shape_mask

__all__ = ["FoundItem", "FoundScene", "read_scene"]

Pixels = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

_LEAST_AREA = 40
"""Regions of fewer pixels are specks, not objects."""
_TEMPLATE = 32
_WORST_COLOUR = 75.0
"""Largest distance in RGB (0 to 255) at which a colour still has a name."""
_LEAST_OVERLAP = 0.72
"""Least intersection over union with the best template for a region to have a shape."""


@dataclass(frozen=True)
class FoundItem:
    """An object in a picture; `shape` or `colour` is "unclear" when nothing fits. Geometry as in `world.Item`."""

    shape: str
    colour: str
    size: str
    extent: float
    x: float
    y: float
    half: tuple[float, float]


@dataclass(frozen=True)
class FoundScene:
    """What was read: the background ("unclear" when it fits no colour) and the objects."""

    background: str
    items: tuple[FoundItem, ...]


_PALETTE_NAMES = tuple(BACKGROUNDS)
_PALETTE = np.array([BACKGROUNDS[name] for name in _PALETTE_NAMES], np.float32)


def _name(colour: Pixels, names: tuple[str, ...]) -> str:
    distances = {name: float(np.linalg.norm(colour - np.array(BACKGROUNDS[name]))) for name in names}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= _WORST_COLOUR else "unclear"


def _components(mask: Mask) -> list[Mask]:
    """8-connected regions, by merging runs of rows."""
    labels = np.zeros(mask.shape, np.int32)
    parents: list[int] = [0]

    def root(label: int) -> int:
        while parents[label] != label:
            parents[label] = parents[parents[label]]
            label = parents[label]
        return label

    for row in range(mask.shape[0]):
        edges = np.flatnonzero(np.diff(np.concatenate(([0], mask[row].astype(np.int8), [0]))))
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            label = 0
            if row:
                for above in np.unique(labels[row - 1, max(0, start - 1) : stop + 1]):
                    if above:
                        found = root(int(above))
                        if label and found != label:
                            parents[max(found, label)] = min(found, label)
                            label = min(found, label)
                        else:
                            label = found
            if not label:
                label = len(parents)
                parents.append(label)
            labels[row, start:stop] = label
    roots = np.array([root(label) for label in range(len(parents))])
    labels = roots[labels]
    return [labels == label for label in np.unique(labels) if label]


def _normalised(coverage: Pixels) -> Pixels:
    """Coverage cut to its bounding box and brought to a square of `_TEMPLATE` pixels, aspect kept, centred."""
    rows, columns = _box(coverage)
    centre_y, centre_x = (rows[0] + rows[1]) / 2, (columns[0] + columns[1]) / 2
    side = max(rows[1] - rows[0], columns[1] - columns[0])
    offsets = (np.arange(_TEMPLATE * 2) + 0.5) / (_TEMPLATE * 2) - 0.5
    y, x = centre_y + offsets * side - 0.5, centre_x + offsets * side - 0.5
    sampled = _bilinear(coverage, y, x)
    small: Pixels = sampled.reshape(_TEMPLATE, 2, _TEMPLATE, 2).mean((1, 3))
    return small


def _bilinear(image: Pixels, y: npt.NDArray[Any], x: npt.NDArray[Any]) -> Pixels:
    padded = np.pad(image, 1)
    y, x = np.clip(y + 1, 0, image.shape[0]), np.clip(x + 1, 0, image.shape[1])
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    down, right = (y - top)[:, None], (x - left)[None, :]
    a, b = padded[np.ix_(top, left)], padded[np.ix_(top, left + 1)]
    c, d = padded[np.ix_(top + 1, left)], padded[np.ix_(top + 1, left + 1)]
    return np.asarray((a * (1 - right) + b * right) * (1 - down) + (c * (1 - right) + d * right) * down, np.float32)


def _box(coverage: Pixels) -> tuple[tuple[float, float], tuple[float, float]]:
    """(top, bottom), (left, right) in pixels, to a fraction of a pixel from the partly covered edge."""

    def ends(profile: Pixels) -> tuple[float, float]:
        solid = np.flatnonzero(profile >= 0.5)
        first, last = int(solid[0]), int(solid[-1])
        before = float(profile[first - 1]) if first else 0.0
        after = float(profile[last + 1]) if last + 1 < len(profile) else 0.0
        return first + (1 - float(profile[first])) - before, last + float(profile[last]) + after

    return ends(coverage.max(1)), ends(coverage.max(0))


@functools.cache
def _templates(extent: int) -> npt.NDArray[np.float32]:
    """Normalised masks of the eight shapes at an extent, at three positions within the pixel: (8, 3, T, T)."""
    side = extent + 8
    return np.stack(
        [
            np.stack(
                [
                    _normalised(shape_mask(shape, float(extent), side / 2 + part, side / 2 + part, (side, side)))
                    for part in (0.0, 0.25, 0.5)
                ]
            )
            for shape in SHAPES
        ]
    )


def _shape(coverage: Pixels, extent: float) -> str:
    mask = _normalised(coverage)
    templates = _templates(int(np.clip(round(extent / 2) * 2, 12, 80)))
    overlap = np.minimum(mask, templates).sum((2, 3)) / np.maximum(mask, templates).sum((2, 3))
    scores = overlap.max(1)
    best = int(scores.argmax())
    return SHAPES[best] if scores[best] >= _LEAST_OVERLAP else "unclear"


def _size(extent: float) -> str:
    middle = [(a[1] + b[0]) / 2 for a, b in zip(list(SIZES.values()), list(SIZES.values())[1:], strict=False)]
    return tuple(SIZES)[int(np.searchsorted(middle, extent))]


def read_scene(picture: npt.NDArray[np.uint8]) -> FoundScene:
    """Reads a uint8 (128, 128, 3) picture."""
    if picture.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(f"the reader takes {IMAGE_SIZE}×{IMAGE_SIZE} RGB pictures, not {picture.shape}")
    pixels = picture.astype(np.float32)
    nearest = np.linalg.norm(pixels[:, :, None] - _PALETTE, axis=-1).argmin(-1)
    commonest = int(np.bincount(nearest.ravel(), minlength=len(_PALETTE)).argmax())
    background_colour = np.median(pixels[nearest == commonest], axis=0)
    background = _name(background_colour, _PALETTE_NAMES)
    difference = np.linalg.norm(pixels - background_colour, axis=-1)
    items = []
    for region in _components(difference > 40.0):
        if region.sum() < _LEAST_AREA:
            continue
        item = _read_item(pixels, region, background_colour)
        if item is not None:
            items.append(item)
    return FoundScene(background, tuple(items))


def _read_item(pixels: Pixels, region: Mask, background_colour: Pixels) -> FoundItem | None:
    inner = region.copy()
    inner[1:] &= region[:-1]
    inner[:-1] &= region[1:]
    inner[:, 1:] &= region[:, :-1]
    inner[:, :-1] &= region[:, 1:]
    colour = np.median(pixels[inner if inner.any() else region], axis=0).astype(np.float32)
    axis = colour - background_colour
    near = region.copy()
    near[1:] |= region[:-1]
    near[:-1] |= region[1:]
    near[:, 1:] |= region[:, :-1]
    near[:, :-1] |= region[:, 1:]
    share = (pixels - background_colour) @ axis / max(float(axis @ axis), 1.0)
    coverage = (np.clip(share, 0, 1) * near).astype(np.float32)
    if coverage.max(initial=0.0) < 0.5:
        return None
    (top, bottom), (left, right) = _box(coverage)
    extent = max(bottom - top, right - left)
    if extent < 8:
        return None
    return FoundItem(
        shape=_shape(coverage, extent),
        colour=_name(colour, tuple(COLOURS)),
        size=_size(extent),
        extent=extent,
        x=(left + right) / 2,
        y=(top + bottom) / 2,
        half=((right - left) / 2, (bottom - top) / 2),
    )

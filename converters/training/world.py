"""The world of the embedded model: flat shapes on a flat background, and the pictures of them.

A scene is one to three shapes, each with a colour, a size and a position, on a background of another colour. The world
is closed and small on purpose: every statement a caption makes can be checked on the picture (`scene_reader`), and a
transformer of a few million parameters can learn all of it.

Geometry is in pixels of a 128×128 picture, x to the right, y down, positions are centres of bounding boxes.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "IMAGE_SIZE",
    "PLACES",
    "SHAPES",
    "SIZES",
    "Item",
    "Relation",
    "Scene",
    "combination",
    "is_held_out",
    "place_of",
    "relation_of",
    "render",
    "sample_scene",
    "shape_mask",
]

IMAGE_SIZE = 128
MARGIN = 3.0
"""Least distance in pixels from an object to the picture's edge."""
GAP = 5.0
"""Least distance in pixels between the bounding boxes of two objects."""
SUPERSAMPLING = 4
HELD_OUT_SHARE = 10
"""One combination in this many never occurs in training."""

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 25, 35),
    "orange": (255, 140, 0),
    "yellow": (255, 230, 40),
    "green": (25, 150, 60),
    "cyan": (40, 215, 225),
    "blue": (30, 65, 215),
    "purple": (125, 35, 165),
    "pink": (255, 145, 200),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (12, 12, 12),
    "grey": (128, 128, 128),
    **COLOURS,
}
SIZES: dict[str, tuple[float, float]] = {"small": (20.0, 24.0), "medium": (32.0, 37.0), "large": (48.0, 54.0)}
"""Range in pixels of the longer side of the bounding box."""

COLUMNS = {"left": (0.0, 44.0), "centre": (58.0, 70.0), "right": (84.0, 128.0)}
ROWS = {"top": (0.0, 44.0), "centre": (58.0, 70.0), "bottom": (84.0, 128.0)}
PLACES: dict[str, tuple[str, str]] = {
    "left": ("left", "centre"),
    "right": ("right", "centre"),
    "top": ("centre", "top"),
    "bottom": ("centre", "bottom"),
    "centre": ("centre", "centre"),
    "top left": ("left", "top"),
    "top right": ("right", "top"),
    "bottom left": ("left", "bottom"),
    "bottom right": ("right", "bottom"),
}
"""Name of a place: its column and its row."""

Relation = Literal["left of", "right of", "above", "below"]


@dataclass(frozen=True)
class Item:
    """One shape. `extent` is the longer side of its bounding box, (`x`, `y`) the centre of that box, in pixels."""

    shape: str
    colour: str
    size: str
    extent: float
    x: float
    y: float

    @property
    def half(self) -> tuple[float, float]:
        """Half width and half height of the bounding box, in pixels."""
        width, height = _aspect(self.shape)
        return self.extent * width / 2, self.extent * height / 2


@dataclass(frozen=True)
class Scene:
    """Objects on a background; the order of the objects has no meaning."""

    background: str
    items: tuple[Item, ...]


@functools.cache
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Polygon of a shape, centred on its bounding box, whose longer side is 1."""
    if shape in ("circle", "ring"):
        angles = np.linspace(0, 2 * math.pi, 96, endpoint=False)
        points = np.stack([np.cos(angles), np.sin(angles)], 1)
    elif shape == "square":
        points = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)
    elif shape == "triangle":
        points = np.array([(0, -math.sqrt(3)), (1, 0), (-1, 0)])
    elif shape == "diamond":
        points = np.array([(0, -1), (0.72, 0), (0, 1), (-0.72, 0)])
    elif shape == "star":
        angles = -math.pi / 2 + np.arange(10) * math.pi / 5
        radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
        points = np.stack([radius * np.cos(angles), radius * np.sin(angles)], 1)
    elif shape == "cross":
        a = 0.32
        points = np.array(
            [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
        )
    else:
        t = np.linspace(0, 2 * math.pi, 96, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        points = np.stack([x, y], 1)
    low, high = points.min(0), points.max(0)
    points = (points - (low + high) / 2) / (high - low).max()
    return tuple((float(x), float(y)) for x, y in points)


RING_HOLE = 0.52
"""Inner diameter of a ring over its outer diameter."""


@functools.cache
def _aspect(shape: str) -> tuple[float, float]:
    points = np.array(_outline(shape))
    width, height = points.max(0) - points.min(0)
    return float(width), float(height)


def shape_mask(shape: str, extent: float, x: float, y: float, size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Coverage, in [0, 1], of the pixels of a (width, height) canvas by a shape centred on (`x`, `y`)."""
    scale = SUPERSAMPLING
    canvas = Image.new("L", (size[0] * scale, size[1] * scale))
    draw = ImageDraw.Draw(canvas)
    outline = _outline(shape)

    def polygon(factor: float) -> list[tuple[float, float]]:
        # Pillow's coordinates name pixel centres, ours name corners.
        return [((x + px * factor) * scale - 0.5, (y + py * factor) * scale - 0.5) for px, py in outline]

    draw.polygon(polygon(extent), fill=255)
    if shape == "ring":
        draw.polygon(polygon(extent * RING_HOLE), fill=0)
    return np.asarray(canvas.reduce(scale), dtype=np.float32) / np.float32(255)


def render(scene: Scene) -> npt.NDArray[np.uint8]:
    """The picture of a scene: uint8, (128, 128, 3), anti-aliased."""
    picture = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    for item in scene.items:
        half = item.extent / 2 + 2
        left, top = max(0, int(item.x - half)), max(0, int(item.y - half))
        right, bottom = min(IMAGE_SIZE, int(item.x + half) + 1), min(IMAGE_SIZE, int(item.y + half) + 1)
        mask = shape_mask(item.shape, item.extent, item.x - left, item.y - top, (right - left, bottom - top))[..., None]
        part = picture[top:bottom, left:right]
        part += mask * (np.array(COLOURS[item.colour], np.float32) - part)
    return np.rint(picture).astype(np.uint8)


def _band(value: float, bands: dict[str, tuple[float, float]], slack: float = 2.0) -> str | None:
    return next((name for name, (low, high) in bands.items() if low - slack <= value <= high + slack), None)


def place_of(item: Item) -> str | None:
    """Name of the place where an object clearly is, or None when it is between places."""
    cell = (_band(item.x, COLUMNS), _band(item.y, ROWS))
    return next((name for name, place in PLACES.items() if place == cell), None)


def relation_of(first: Item, second: Item) -> Relation | None:
    """How `first` lies to `second`, or None when that is not clear.

    Clear means: apart along the axis named, and further along it than 1.6 times across it.
    """
    dx, dy = first.x - second.x, first.y - second.y
    across = abs(dx) - first.half[0] - second.half[0]
    down = abs(dy) - first.half[1] - second.half[1]
    if across >= GAP and abs(dx) >= 1.6 * abs(dy):
        return "left of" if dx < 0 else "right of"
    if down >= GAP and abs(dy) >= 1.6 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def _apart(first: Item, second: Item) -> bool:
    across = abs(first.x - second.x) - first.half[0] - second.half[0]
    down = abs(first.y - second.y) - first.half[1] - second.half[1]
    return max(across, down) >= GAP


def combination(scene: Scene) -> str:
    """What a scene combines, as a stable text: the unit of holding out.

    One object: shape, colour, place, background. More: shape and colour of each, background, and how the first two lie
    to each other. Sizes and exact positions do not enter, so an unseen combination is unseen at every size.
    """
    ordered = sorted(scene.items, key=lambda item: (item.shape, item.colour, item.x, item.y))
    parts = [scene.background, *(f"{item.colour} {item.shape}" for item in ordered)]
    if len(ordered) == 1:
        parts.append(str(place_of(ordered[0])))
    elif (ordered[0].shape, ordered[0].colour) != (ordered[1].shape, ordered[1].colour):
        dx, dy = ordered[0].x - ordered[1].x, ordered[0].y - ordered[1].y
        parts.append(("left" if dx < 0 else "right") if abs(dx) >= abs(dy) else ("above" if dy < 0 else "below"))
    return ", ".join(parts)


def is_held_out(scene: Scene) -> bool:
    """Whether the scene's combination is kept out of training (one in ten, by a hash that never changes)."""
    digest = hashlib.sha256(combination(scene).encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_SHARE == 0


def _pick(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(rng.integers(len(names)))]


def _positioned(rng: np.random.Generator, item: Item, place: str | None) -> Item:
    half_width, half_height = item.half
    low_x, high_x = half_width + MARGIN, IMAGE_SIZE - half_width - MARGIN
    low_y, high_y = half_height + MARGIN, IMAGE_SIZE - half_height - MARGIN
    if place is not None:
        column, row = COLUMNS[PLACES[place][0]], ROWS[PLACES[place][1]]
        # Small objects keep away from the edge, so that a place looks alike at all sizes.
        low_x, high_x = max(low_x, column[0], 22), min(high_x, column[1], IMAGE_SIZE - 22)
        low_y, high_y = max(low_y, row[0], 22), min(high_y, row[1], IMAGE_SIZE - 22)
    x, y = float(rng.uniform(low_x, high_x)), float(rng.uniform(low_y, high_y))
    return Item(item.shape, item.colour, item.size, item.extent, x, y)


def _wanted(rng: np.random.Generator, items: list[Item], layout: str) -> list[Item] | None:
    """Positions for `items` by rejection; None when none was found (the sizes do not fit the layout)."""
    places: list[str | None] = [None] * len(items)
    if layout == "places":
        places = [str(name) for name in rng.permutation(list(PLACES))[: len(items)]]
    for _ in range(60):
        placed = [_positioned(rng, item, place) for item, place in zip(items, places, strict=True)]
        if not all(_apart(a, b) for i, a in enumerate(placed) for b in placed[:i]):
            continue
        if layout in ("relation", "line"):
            relations = [relation_of(a, b) for a, b in itertools.pairwise(placed)]
            checked = relations[:1] if layout == "relation" else relations
            if None in checked or len(set(checked)) > 1:
                continue
        return placed
    return None


def sample_scene(
    rng: np.random.Generator, *, count: int | None = None, held_out: bool = False, grouped: bool | None = None
) -> Scene:
    """Draws a scene of the training part of the world, or of the held-out part.

    Args:
        rng: the only source of randomness.
        count: number of objects, 1 to 3; drawn (45 %, 40 %, 15 %) when None.
        held_out: draw from the combinations that training never sees.
        grouped: whether objects come as a group of equals ("two red circles"); drawn when None.
    """
    while True:
        scene = _sample_any(rng, count if count is not None else int(rng.choice(3, p=(0.45, 0.40, 0.15))) + 1, grouped)
        if scene is not None and is_held_out(scene) == held_out:
            return scene


def _sample_any(rng: np.random.Generator, count: int, grouped: bool | None) -> Scene | None:
    sizes = tuple(SIZES) if count < 3 else ("small", "medium")
    if rng.random() < 0.4:
        background = _pick(rng, ("white", "white", "black", "grey"))
    else:
        background = _pick(rng, tuple(COLOURS))
    colours = tuple(name for name in COLOURS if name != background)
    if grouped is None:
        grouped = count > 1 and rng.random() < (0.25 if count == 2 else 0.5)
    equal = 0
    if grouped:
        equal = count if count == 2 else int(rng.integers(2, 4))

    def kind() -> tuple[str, str, str]:
        return _pick(rng, SHAPES), _pick(rng, colours), _pick(rng, sizes)

    kinds = [kind()] * equal if equal else []
    while len(kinds) < count:
        drawn = kind()
        if all(drawn[:2] != other[:2] for other in kinds):
            kinds.append(drawn)
    items = [Item(*k, extent=float(rng.uniform(*SIZES[k[2]])), x=0.0, y=0.0) for k in kinds]
    layout = "places"
    if count == 2 and not grouped:
        layout = str(rng.choice(("relation", "places", "free"), p=(0.55, 0.3, 0.15)))
    elif count > 1:
        layout = "free" if grouped else str(rng.choice(("relation", "line", "free"), p=(0.4, 0.35, 0.25)))
        if grouped and equal < count:
            layout = str(rng.choice(("relation", "free")))
            items = items[::-1] if layout == "relation" else items
    placed = _wanted(rng, items, layout)
    return None if placed is None else Scene(background, tuple(placed))

"""The picture sizes that a family's checkpoints were trained on, by the side of the square one."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["trained_sizes"]

#: Heights → widths of the aspect-ratio buckets at 1024 pixels, both in units of 64 (diffusers' ASPECT_RATIO_4096_BIN
#: and ASPECT_RATIO_2048_BIN; the buckets of every other side are the same in proportion).
_BUCKETS: Mapping[int, tuple[int, ...]] = {
    8: (32, 31, 30, 29),
    9: (28, 27, 26),
    10: (25, 24),
    11: (23, 22, 21),
    12: (21, 20),
    13: (19, 18),
    14: (18, 17),
    15: (17, 16),
    16: (16, 15),
    17: (15, 14),
    18: (14, 13),
    19: (13,),
    20: (12,),
    21: (12,),
    22: (11,),
    23: (11,),
    24: (10,),
    25: (10,),
    26: (9,),
    27: (9,),
    28: (9,),
    29: (8,),
    30: (8,),
    31: (8,),
    32: (8,),
}
#: Those that sides up to 1024 lack (ASPECT_RATIO_256_BIN, ASPECT_RATIO_512_BIN, ASPECT_RATIO_1024_BIN).
_ONLY_LARGE = frozenset([(8, 31), (8, 30), (26, 9), (28, 9), (29, 8), (30, 8), (31, 8)])


def trained_sizes(sides: tuple[int, ...], side: int) -> list[list[int]]:
    """[width, height] pairs in pixels that a checkpoint of square side `side` was trained on, the square first.

    `sides` are those at which its family has aspect-ratio buckets; at another the square is the only size.
    """
    square = [side, side]
    if side not in sides:
        return [square]
    found = [
        [columns * side // 16, rows * side // 16]
        for rows, widths in _BUCKETS.items()
        for columns in widths
        if side > 1024 or (rows, columns) not in _ONLY_LARGE
    ]
    return [square, *(size for size in found if size != square)]

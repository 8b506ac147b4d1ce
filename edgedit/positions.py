"""Position embeddings that a transformer takes as an input, because they change with the size of the picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedit.errors import BundleError, InputError

__all__ = ["pos_embed_table"]

_PERIOD = 10000.0


def pos_embed_table(positions: Mapping[str, Any], height: int, width: int) -> npt.NDArray[np.float32]:
    """The sine-cosine table of a latent grid, float32 [1, tokens, dim]; tokens = (height / patch) · (width / patch).

    `positions` is the manifest's object: `kind` "sincos_2d"; `dim`, the width of a token, a multiple of 4; `patch_size`
    in latent pixels; `base_size`, a side of the training grid in patches, onto which every grid is stretched; and
    `interpolation_scale` > 0, which divides every position. `height` and `width` are in latent pixels.

    Equal to the table of diffusers' PatchEmbed (`get_2d_sincos_pos_embed`), which follows Peebles and Xie, "Scalable
    Diffusion Models with Transformers" (2023), section 3.2, with the stretch of PixArt-alpha, section 2.3: half of the
    channels hold the column and half the row, sines before cosines, at period 10000.

    Raises InputError for a size that patches do not divide, BundleError for a kind that this version does not know.
    """
    if positions["kind"] != "sincos_2d":
        raise BundleError(f"position embedding {positions['kind']!r} is not known to this version: update edgedit")
    patch = int(positions["patch_size"])
    for name, size in (("height", height), ("width", width)):
        if size < patch or size % patch:
            raise InputError(f"latent {name} {size} is not a multiple of the patch size {patch}: choose another size")
    rows, columns, half = height // patch, width // patch, int(positions["dim"]) // 2
    table = np.empty((rows, columns, 2 * half), np.float32)
    table[:, :, :half] = _axis_table(positions, columns)[None]
    table[:, :, half:] = _axis_table(positions, rows)[:, None]
    return table.reshape(1, rows * columns, 2 * half)


def _axis_table(positions: Mapping[str, Any], count: int) -> npt.NDArray[np.float32]:
    """Sines then cosines of one axis, [count, dim / 2].

    Positions are rounded to float32 after each division and angles taken in float64, as the reference does: at a
    position of 100 a float32 angle would be wrong by 8e-6.
    """
    stretch = np.float32(count / positions["base_size"])
    position = np.arange(count, dtype=np.float32) / stretch / np.float32(positions["interpolation_scale"])
    quarter = int(positions["dim"]) // 4
    frequency = 1.0 / _PERIOD ** (np.arange(quarter, dtype=np.float64) / quarter)
    angle = np.outer(position.astype(np.float64), frequency)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)

"""Inputs for a component that anyone can draw again: for reference outputs, and for timing."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from edgedit.noise import make_noise
from edgedit.positions import pos_embed_table

__all__ = ["TensorLike", "example_inputs"]

#: Inputs that are no unit noise: (mean, spread) of values that occur in use.
_RANGES: Mapping[str, tuple[float, float]] = {
    "timestep": (500.0, 100.0),
    "resolution": (1024.0, 100.0),
    "aspect_ratio": (1.0, 0.1),
    "guidance": (0.45, 0.01),
    "attention_scale": (1.0, 0.05),
}


class TensorLike(Protocol):
    """An entry of a component's inputs, as the manifest and the converters describe it."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int | str, ...]: ...


def example_inputs(
    component: str,
    inputs: Sequence[TensorLike],
    config: Mapping[str, Any],
    *,
    tokens: tuple[int, int] = (6, 4),
    length: int = 9,
    batch: int = 1,
) -> dict[str, np.ndarray]:
    """Philox noise of the right shapes and ranges, with a seed that depends on the component's name only.

    Args:
        inputs, config: the component's manifest entry.
        tokens: rows and columns of the transformer's token grid. An autoencoder's latents have as many rows and
            columns, its pictures `scale_factor` times that.
        length: text tokens; the last two are masked out.
    """
    noise = make_noise("philox", zlib.crc32(component.encode()))
    patch, factor = int(config.get("patch_size", 1)), int(config.get("scale_factor", 8))
    sizes = {
        "batch": batch,
        "length": length,
        "height": tokens[0] * patch,
        "width": tokens[1] * patch,
        "image_height": tokens[0] * factor,
        "image_width": tokens[1] * factor,
    }
    found: dict[str, np.ndarray] = {}
    for spec in inputs:
        shape = tuple(d if isinstance(d, int) else sizes.get(d, 1) for d in spec.shape)
        if spec.name == "pos_embed":
            found[spec.name] = pos_embed_table(config["positions"], sizes["height"], sizes["width"])
        elif spec.name == "input_ids":
            draw = np.abs(noise.normal(shape)).astype(np.float64) * 1e6
            found[spec.name] = draw.astype(np.int64) % int(config["vocab_size"])
        elif spec.name in ("attention_mask", "encoder_attention_mask"):
            mask = np.ones(shape, spec.dtype)
            mask[:, max(1, length - 2) :] = 0
            found[spec.name] = mask
        elif spec.name == "image":
            found[spec.name] = np.tanh(noise.normal(shape)).astype(np.float32)
        else:
            mean, spread = _RANGES.get(spec.name, (0.0, 1.0))
            found[spec.name] = (mean + spread * noise.normal(shape)).astype(np.float32)
    return found

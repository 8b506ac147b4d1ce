"""Reference inputs and outputs of a component: what its canonical fp32 graph gives for inputs that anyone can draw again.

They travel in the bundle (`reference/COMPONENT.npz`, a few hundred kilobytes), so that `verify` can say on another machine, for another
backend or precision, how far it is from the fp32 graph.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgedit.converters.graph import Component
from edgedit.noise import make_noise
from edgedit.positions import pos_embed_table

__all__ = ["reference_inputs", "save"]

#: Tokens of a latent map, and the other symbolic dimensions: small enough for any component, and never square.
TOKENS = (6, 4)
LENGTH = 9
IMAGE_BLOCKS = (3, 2)


def reference_inputs(component: Component) -> dict[str, np.ndarray]:
    """Inputs drawn from Philox noise with a seed that depends on the component's name only."""
    noise = make_noise("philox", zlib.crc32(component.name.encode()))
    runtime: Mapping[str, Any] = component.runtime
    patch = int(runtime.get("patch_size", 1))
    factor = int(runtime.get("scale_factor", 8))
    sizes = {
        "batch": 1,
        "length": LENGTH,
        "height": TOKENS[0] * patch,
        "width": TOKENS[1] * patch,
        "image_height": IMAGE_BLOCKS[0] * factor,
        "image_width": IMAGE_BLOCKS[1] * factor,
    }
    inputs: dict[str, np.ndarray] = {}
    for spec in component.inputs:
        shape = tuple(d if isinstance(d, int) else sizes.get(d, 1) for d in spec.shape)
        if spec.name == "pos_embed":
            inputs[spec.name] = pos_embed_table(runtime["positions"], sizes["height"], sizes["width"])
        elif spec.name == "input_ids":
            draw = np.abs(noise.normal(shape)) * 1e6
            inputs[spec.name] = draw.astype(np.int64) % int(runtime["vocab_size"])
        elif spec.name in ("attention_mask", "encoder_attention_mask"):
            mask = np.ones(shape, spec.dtype)
            mask[:, -2:] = 0
            inputs[spec.name] = mask
        elif spec.name == "image":
            inputs[spec.name] = np.tanh(noise.normal(shape)).astype(np.float32)
        else:
            inputs[spec.name] = noise.normal(shape) * np.float32(_SCALES.get(spec.name, 1.0)) + np.float32(_MEANS.get(spec.name, 0.0))
    return inputs


#: Inputs that are no unit noise: (mean, spread) of values that occur in use.
_MEANS = {"timestep": 500.0, "resolution": 1024.0, "aspect_ratio": 1.0, "guidance": 0.45}
_SCALES = {"timestep": 100.0, "resolution": 100.0, "aspect_ratio": 0.1, "guidance": 0.01}


def save(path: Path, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
    """Write inputs and outputs as one `.npz` (the same bytes for the same arrays)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {**{f"in.{k}": v for k, v in inputs.items()}, **{f"out.{k}": v for k, v in outputs.items()}}
    np.savez(path, **arrays)  # type: ignore[arg-type]

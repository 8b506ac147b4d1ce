"""Softmax scores that grow with the picture, for sizes that a model was not trained at.

The entropy of softmax attention grows with the logarithm of the number of keys: on a larger map every token looks at
more of the others, and at each less, on a smaller one the other way round. Jin et al., "Training-free Diffusion Model
Adaptation for Variable-Sized Text-to-Image Synthesis" (2023), section 3.3, keep the entropy by the scale
lambda = sqrt(log N / log N_train) / sqrt(d), with N tokens and heads of d channels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgedit.errors import InputError

if TYPE_CHECKING:
    from edgedit.manifest import Manifest

__all__ = ["ENTROPY", "INPUT", "entropy_scale", "resolve_scale"]

#: The transformer's input, float32 [1]: what the scores of self-attention are multiplied by beside 1/sqrt(d).
INPUT = "attention_scale"
#: What people call the scale of Jin et al.
ENTROPY = "entropy"
LARGEST = 4.0


def entropy_scale(tokens: int, trained: int) -> float:
    """sqrt(log tokens / log trained); 1 where either is a single token, which has no entropy."""
    return math.sqrt(math.log(tokens) / math.log(trained)) if tokens > 1 and trained > 1 else 1.0


def resolve_scale(asked: float | str | None, manifest: Manifest, width: int, height: int) -> float:
    """What the scores are multiplied by when the network sees `width` × `height` pixels.

    Args:
        asked: None for "entropy" where the transformer takes a scale and 1 where it does not; "entropy"; or a factor.

    Exactly 1 at every size that the model was trained at. Raises InputError for another value, or one that this
    transformer cannot honour.
    """
    section = manifest.components.get("transformer")
    able = section is not None and any(spec.name == INPUT for spec in section.inputs)
    if asked is None and not able:
        return 1.0
    if asked is not None and asked != ENTROPY:
        factor = _factor(asked)
    else:
        space, best = manifest.latents, manifest.recommended
        assert space is not None
        assert best is not None
        if (width, height) in ((best.width, best.height), *best.sizes):
            factor = 1.0
        else:
            area = (space.scale_factor * space.patch_size) ** 2
            factor = entropy_scale(width * height // area, best.width * best.height // area)
    if factor != 1 and not able:
        raise InputError(
            "the attention scale cannot be honoured: this transformer has no softmax over the picture, or was "
            "converted by an earlier version; leave it out, or convert the model again"
        )
    return factor


def _factor(value: float | str) -> float:
    try:
        found = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = float("nan")
    if not 0 < found <= LARGEST:
        raise InputError(
            f"an attention scale is {ENTROPY} or a number above 0 and at most {LARGEST:g} (1: as trained), "
            f"not {value!r}"
        )
    return found

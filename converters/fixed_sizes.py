"""The sizes that a backend with fixed shapes is made for: pictures in pixels, prompts in tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgedit.converters.lowerings.coreml import CoremlFunction
from edgedit.errors import ConversionError

__all__ = ["FixedSizes", "fixed_sizes"]


@dataclass(frozen=True)
class FixedSizes:
    """What every component of one model is made for.

    Attributes:
        pictures: (width, height) in pixels, the first being the one to use when nothing is said.
        scale_factor: pixels on a side of a latent.
        patch_size: latents on a side of a token.
        encoder_length: tokens that the text encoder takes.
        text_length: encoded tokens that the transformer sees.
    """

    pictures: tuple[tuple[int, int], ...]
    scale_factor: int
    patch_size: int
    encoder_length: int
    text_length: int

    def functions(self, component: str) -> tuple[CoremlFunction, ...]:
        """The functions of a component: one a picture size, or only one for the text encoder, which knows no sizes."""
        if component == "text_encoder":
            return (CoremlFunction("main", {"batch": 1, "length": self.encoder_length}),)
        return tuple(self._function(width, height) for width, height in self.pictures)

    def _function(self, width: int, height: int) -> CoremlFunction:
        rows, columns = height // self.scale_factor, width // self.scale_factor
        dims = {
            "batch": 1,
            "length": self.text_length,
            "height": rows,
            "width": columns,
            "tokens": (rows // self.patch_size) * (columns // self.patch_size),
            "image_height": height,
            "image_width": width,
        }
        return CoremlFunction(f"size_{width}x{height}", dims)

    def smallest_grid(self) -> tuple[int, int]:
        """Rows and columns of the latents of the smallest picture."""
        width, height = min(self.pictures, key=lambda size: size[0] * size[1])
        return height // self.scale_factor, width // self.scale_factor


def fixed_sizes(
    wanted: Sequence[tuple[int, int]] | None,
    runtime: Mapping[str, Mapping[str, Any]],
    prompt: Mapping[str, Any] | None,
    *,
    max_length: int,
) -> FixedSizes:
    """The sizes to convert for.

    Args:
        wanted: (width, height) in pixels; None is the size that the model was trained for.
        runtime: `Component.runtime` by component.
        prompt: the manifest's prompt section, if there is a tokenizer.
        max_length: text tokens where there is none.

    Raises:
        ConversionError: a size that the model cannot draw, or sizes for a model whose scale is not known.
    """
    transformer = runtime.get("transformer", {})
    space = runtime.get("decoder") or runtime.get("encoder")
    patch = int(transformer.get("patch_size", 1))
    factor = int(space["scale_factor"]) if space else 1
    side = int(transformer.get("sample_size") or (space or {}).get("sample_size") or 0)
    if wanted and not space and transformer:
        raise ConversionError(
            "sizes in pixels need the autoencoder, which says how many pixels a latent is; convert the whole "
            "checkpoint, or leave the sizes out"
        )
    if not wanted and space and not transformer:
        # `sample_size` of an autoencoder is in pixels.
        side = max(1, side // factor) if side else 64
    pictures = tuple(dict.fromkeys((int(w), int(h)) for w, h in wanted)) if wanted else ((side * factor,) * 2,)
    step = factor * patch
    for width, height in pictures:
        if width < step or height < step or width % step or height % step:
            raise ConversionError(f"size {width}x{height}: both sides must be multiples of {step} for this model")
    encoder, seen = max_length, max_length
    if prompt is not None:
        sides = [prompt["positive"], prompt["negative"]]
        encoder = max(int(side["max_length"]) for side in sides)
        seen = max(_seen(side) for side in sides)
    return FixedSizes(pictures, factor, patch, encoder, seen)


def _seen(side: Mapping[str, Any]) -> int:
    select = side["select"]
    return int(side["max_length"]) if select is None else int(select["first"]) + int(select["last"])

"""Which picture sizes a model was made for."""

from __future__ import annotations

from collections.abc import Sequence

from edgedit.errors import InputError

__all__ = ["check_size", "size_of_aspect"]

Size = tuple[int, int]
#: Sizes that a refusal names.
NAMED = 4


def check_size(sizes: Sequence[Size], width: int, height: int, *, what: str = "the model was not made for") -> None:
    """Raises InputError, which names the nearest, unless (width, height) is one of `sizes`, or none is known."""
    if not sizes or (width, height) in sizes:
        return
    near = sorted(sizes, key=lambda size: abs(size[0] - width) + abs(size[1] - height))[:NAMED]
    listed = ", ".join(f"{w}x{h}" for w, h in near)
    raise InputError(f"{what} {width}x{height} pixels; take one of {listed}, or draw it anyway with --force-size")


def size_of_aspect(sizes: Sequence[Size], width: float, height: float) -> Size:
    """The (width, height) of `sizes` whose aspect ratio is nearest to width : height.

    Ratios of the sizes are rounded to two decimals, and the first of equals wins in the order of the ratios: the choice
    is that of diffusers' `PixArtImageProcessor.classify_height_width_bin`. Raises InputError where no size is known.
    """
    if not sizes:
        raise InputError("the model does not say which sizes it was made for; give a width and a height")
    ordered = sorted(sizes, key=lambda size: size[1] / size[0])
    return min(ordered, key=lambda size: abs(round(size[1] / size[0], 2) - height / width))

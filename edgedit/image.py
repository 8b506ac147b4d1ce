"""Pictures as arrays and back, with the resampling and rounding of diffusers' `VaeImageProcessor`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from edgedit.errors import InputError

__all__ = ["RowCollector", "from_image", "latent_preview", "open_image", "rows_to_pixels", "to_uint8"]

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def to_uint8(array: npt.NDArray[np.floating]) -> list[Image.Image]:
    """Pictures from an array [N, C, H, W] in [-1, 1] with 1, 3 or 4 channels; values outside are clipped.

    Computed in float32 and rounded half to even, as `VaeImageProcessor.postprocess`. Raises InputError for another
    shape and for values that are not finite.
    """
    pixels = rows_to_pixels(array)
    return [Image.fromarray(np.ascontiguousarray(p[..., 0] if p.shape[-1] == 1 else p)) for p in pixels]


def rows_to_pixels(array: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """uint8 [N, H, W, C] from an array [N, C, H, W], rounded as `to_uint8` says, and with its errors."""
    if array.ndim != 4 or array.shape[1] not in _MODES:
        raise InputError(f"a picture is [N, 1, 3 or 4, H, W], not {list(array.shape)}; pass the decoder's output")
    if not np.isfinite(array).all():
        raise InputError("the picture has values that are not finite numbers; decode in fp32")
    unit = np.clip(array.astype(np.float32) * np.float32(0.5) + np.float32(0.5), 0, 1).transpose(0, 2, 3, 1)
    pixels: npt.NDArray[np.uint8] = (unit * np.float32(255)).round().astype(np.uint8)
    return pixels


class RowCollector:
    """Takes bands of rows [1, C, rows, W] in [-1, 1], from the top, and puts them together.

    With `as_pixels` every band is turned into bytes at once, so that the picture never stands in memory as floats.
    """

    def __init__(self, *, as_pixels: bool) -> None:
        self._as_pixels = as_pixels
        self._parts: list[np.ndarray] = []

    def __call__(self, top: int, rows: npt.NDArray[np.floating]) -> None:
        self._parts.append(rows_to_pixels(rows)[0] if self._as_pixels else rows)

    def result(self) -> Image.Image | npt.NDArray[np.floating]:
        """The picture, or float32 [1, C, H, W]."""
        if not self._as_pixels:
            return self._parts[0] if len(self._parts) == 1 else np.concatenate(self._parts, axis=2)
        pixels = self._parts[0] if len(self._parts) == 1 else np.concatenate(self._parts)
        self._parts.clear()
        return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))


def from_image(image: Image.Image, width: int, height: int) -> npt.NDArray[np.float32]:
    """`image` as float32 [1, 3, height, width] in [-1, 1], resized (Lanczos, the aspect ratio is not kept).

    Equal to diffusers' `load_image` and `VaeImageProcessor.preprocess`: turned upright by its EXIF orientation,
    transparency dropped. Raises InputError for a size below 1.
    """
    if width < 1 or height < 1:
        raise InputError(f"a picture cannot be {width}x{height}; give a width and height of at least 1")
    upright = _upright_rgb(image)
    if upright.size != (width, height):
        upright = upright.resize((width, height), Image.Resampling.LANCZOS)
    unit = np.asarray(upright).astype(np.float32) / np.float32(255)
    return np.ascontiguousarray((unit * np.float32(2) - np.float32(1)).transpose(2, 0, 1)[None])


def open_image(path: str | Path) -> Image.Image:
    """The picture in a file, whole, upright and RGB. Raises InputError when it is missing, damaged or no picture."""
    try:
        with Image.open(path) as image:
            return _upright_rgb(image)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such picture; check the path") from None
    except Image.DecompressionBombError:
        raise InputError(f"{path}: too large to be opened safely; scale it down first") from None
    # Decoders of damaged files raise all of these.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read as a picture ({reason}); save it again as PNG or JPEG") from None


def latent_preview(
    latents: npt.NDArray[np.floating], factors: npt.ArrayLike, bias: npt.ArrayLike, *, scale: int = 1
) -> Image.Image:
    """A cheap picture of latents [C, H, W] or [1, C, H, W]: rgb = latents . factors + bias, taken to be in [-1, 1].

    `factors` [C][3] and `bias` [3] come from `latents.preview` of the manifest. The picture has H x W pixels, or
    `scale` times as many each way. Raises InputError when the shapes do not fit.
    """
    planes = latents[0] if latents.ndim == 4 and latents.shape[0] == 1 else latents
    matrix, offset = np.asarray(factors, np.float32), np.asarray(bias, np.float32)
    if planes.ndim != 3 or matrix.shape != (planes.shape[0], 3) or offset.shape != (3,):
        raise InputError(f"latents {list(latents.shape)} do not fit preview factors {list(matrix.shape)}")
    rgb = np.einsum("chw,cr->rhw", np.nan_to_num(planes.astype(np.float32)), matrix) + offset[:, None, None]
    (image,) = to_uint8(np.clip(rgb, -1, 1)[None])
    if scale == 1:
        return image
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)


def _upright_rgb(image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        # Pillow clips 16-bit grey levels to 255 instead of scaling them.
        upright = Image.fromarray((np.asarray(upright).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    return upright.convert("RGB")

"""Pictures saved with the recipe that drew them, and recipes read back.

A PNG carries two text chunks: `edgedit`, the recipe as JSON, and `parameters`, the text that AUTOMATIC1111's web UI
writes and many tools read. JPEG and WebP carry the same in EXIF: ImageDescription (JSON) and UserComment (text).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from edgedit.errors import InputError
from edgedit.files import atomic_write_bytes

__all__ = ["FORMATS", "encode_image", "parameters_text", "png_chunks", "read_recipe", "save_image"]

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}

_EXIF_DESCRIPTION, _EXIF_SOFTWARE, _EXIF_IFD, _EXIF_USER_COMMENT = 0x010E, 0x0131, 0x8769, 0x9286
#: What fits behind the headers of the one APP1 segment that a JPEG has for EXIF.
_LARGEST_EXIF = 65_500

#: Keys of a recipe and the names that they have in the `parameters` text, in its order.
_PARAMETERS = {
    "steps": "Steps",
    "sampler": "Sampler",
    "guidance_scale": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "model_hash": "Model hash",
    "model": "Model",
    "strength": "Denoising strength",
    "rng": "RNG",
    "version": "Version",
}


def save_image(image: Image.Image, path: str | Path, recipe: Mapping[str, object] | None) -> None:
    """Writes `image` to `path` whole or not at all; the suffix (.png, .jpg, .jpeg, .webp) says in which format.

    Args:
        recipe: what drew the picture, anything that JSON can hold; None leaves the metadata out.

    Raises:
        InputError: another suffix, a place that cannot be written, or a recipe too long for JPEG.
    """
    atomic_write_bytes(path, encode_image(image, path, recipe))


def encode_image(image: Image.Image, path: str | Path, recipe: Mapping[str, object] | None) -> bytes:
    """The bytes that `save_image` writes to `path`, which is only named here.

    JPEG is written at quality 95 without chroma subsampling, WebP without loss. Raises InputError for another suffix
    and for a recipe too long for JPEG.
    """
    path = Path(path)
    kind = FORMATS.get(path.suffix.lower())
    buffer = BytesIO()
    if kind == "PNG":
        from edgedit.png_rows import PngRows

        # The same writer as for a picture that comes in bands, so that its bytes do not depend on how it came.
        whole = image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB")
        rows = PngRows(buffer, *whole.size, recipe)
        rows.pixels(0, np.asarray(whole).reshape(whole.height, whole.width, -1))
        rows.finish()
    elif kind == "JPEG":
        exif = _exif(recipe)
        if len(exif) > _LARGEST_EXIF:
            exif = _exif(recipe, comment=False)
        if len(exif) > _LARGEST_EXIF:
            raise InputError(f"{path}: the recipe is too long for a JPEG; save as .png")
        image.convert("RGB").save(buffer, "JPEG", quality=95, subsampling=0, exif=exif)
    elif kind == "WEBP":
        image.save(buffer, "WEBP", lossless=True, exif=_exif(recipe))
    else:
        raise InputError(f"{path}: pictures are saved as {', '.join(FORMATS)}; give one of these suffixes")
    return buffer.getvalue()


def png_chunks(recipe: Mapping[str, object] | None) -> PngImagePlugin.PngInfo:
    """The text chunks that carry `recipe` in a PNG, none for None."""
    chunks = PngImagePlugin.PngInfo()
    if recipe is not None:
        chunks.add_itxt("edgedit", json.dumps(recipe, ensure_ascii=False, allow_nan=False))
        chunks.add_text("parameters", parameters_text(recipe))
    return chunks


def read_recipe(path: str | Path) -> dict[str, object]:
    """The recipe in a picture that edgedit saved. Raises InputError when the file has none or cannot be read."""
    try:
        with Image.open(path) as image:
            if image.format == "PNG":
                text = image.info.get("edgedit")
            else:
                text = image.getexif().get(_EXIF_DESCRIPTION)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such picture; check the path") from None
    except Image.DecompressionBombError:
        raise InputError(f"{path}: too large to be opened safely") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read as a picture ({reason})") from None
    try:
        recipe = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        recipe = None
    if not isinstance(recipe, dict):
        raise InputError(
            f"{path}: carries no edgedit recipe; use a picture that edgedit saved and nothing changed since"
        )
    return recipe


def parameters_text(recipe: Mapping[str, object]) -> str:
    """The recipe in the text form of AUTOMATIC1111's web UI, as far as that has names for it."""
    values = dict(recipe)
    if "width" in values and "height" in values:
        values["size"] = f"{values['width']}x{values['height']}"
    if isinstance(values.get("model_hash"), str):
        values["model_hash"] = str(values["model_hash"])[:10]
    if "edgedit" in values:
        values["version"] = f"edgedit {values['edgedit']}"
    lines = [str(values.get("prompt", ""))]
    if values.get("negative_prompt"):
        lines.append(f"Negative prompt: {values['negative_prompt']}")
    known = {name: values[key] for key, name in _PARAMETERS.items() if values.get(key) is not None}
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in known.items()))
    return "\n".join(lines)


def _quoted(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


def _exif(recipe: Mapping[str, object] | None, *, comment: bool = True) -> bytes:
    exif = Image.Exif()
    if recipe is None:
        return b""
    exif[_EXIF_DESCRIPTION] = json.dumps(recipe, ensure_ascii=True, allow_nan=False)
    exif[_EXIF_SOFTWARE] = "edgedit"
    if comment:
        text = parameters_text(recipe).encode("utf-16-be", "replace")
        exif.get_ifd(_EXIF_IFD)[_EXIF_USER_COMMENT] = b"UNICODE\0" + text
    return exif.tobytes()

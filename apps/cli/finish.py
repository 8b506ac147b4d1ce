"""The last part of a drawing: latents kept until their picture is on the disk, and pictures written as they decode."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedit.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from edgedit.pipeline import Pipeline
    from edgedit.tiling.component import Tiling

__all__ = ["Undecoded", "decode_to_file", "make_tiling"]

SUFFIX = ".latents.npz"


@dataclass(frozen=True)
class Undecoded:
    """Latents [1, C, H, W] with the recipe that their picture will carry (None: none) and the name it will have."""

    latents: np.ndarray
    recipe: Mapping[str, Any] | None
    output: str
    model_hash: str | None

    def save(self) -> Path:
        """Write them beside the picture to come; returns the path. Raises InputError when the disk is full."""
        import numpy as np

        from edgedit.files import atomic_write_bytes

        facts = {"recipe": self.recipe, "output": str(Path(self.output).resolve()), "model_hash": self.model_hash}
        buffer = BytesIO()
        np.savez(buffer, latents=self.latents, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8))
        path = Path(self.output).with_suffix(SUFFIX)
        atomic_write_bytes(path, buffer.getvalue())
        return path

    @classmethod
    def read(cls, path: Path) -> Undecoded:
        """Read what `save` wrote, or the array of a .npy file. Raises InputError when it is neither."""
        import numpy as np

        from edgedit.apps.cli.start import read_latents

        if path.suffix == ".npy":
            return cls(read_latents(path), None, str(path.with_suffix(".png")), None)
        try:
            with np.load(path, allow_pickle=False) as stored:
                latents, facts = stored["latents"], json.loads(stored["facts"].tobytes())
            found = cls(latents.astype(np.float32), facts["recipe"], facts["output"], facts["model_hash"])
            if not isinstance(found.output, str) or not isinstance(found.recipe, dict | None):
                raise ValueError
            return found
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
        except Exception:
            raise InputError(
                f"{path}: holds no latents; pass a .npy file or a {SUFFIX} that a run left behind"
            ) from None


def make_tiling(
    mode: str,
    tile_size: int | None,
    overlap: int | None,
    max_memory: str | None,
    on_tile: Callable[[int, int], bool | None] | None = None,
) -> Tiling:
    """The settings of the tiles from the flags, checked. Raises InputError."""
    from edgedit.tiling.component import Tiling

    tiling = Tiling(mode, tile_size, overlap, max_memory, on_tile)
    tiling.check()
    return tiling


def decode_to_file(
    pipe: Pipeline, latents: np.ndarray, path: Path, recipe: Mapping[str, Any] | None, tiling: Tiling, *, stage: str
) -> None:
    """Decode latents [1, C, H, W] and save the picture, whole or not at all; a PNG is written band by band."""
    space = pipe.latent_space
    height, width = (side * space.scale_factor for side in latents.shape[2:])
    if path.suffix.lower() == ".png":
        from edgedit.png_rows import png_rows

        with png_rows(path, width, height, recipe) as rows:
            pipe.decode_rows(latents, rows, tiling, stage=stage)
        return
    from edgedit.image import RowCollector
    from edgedit.metadata import save_image

    collected = RowCollector(as_pixels=True)
    pipe.decode_rows(latents, collected, tiling, stage=stage)
    save_image(collected.result(), path, recipe)  # type: ignore[arg-type]

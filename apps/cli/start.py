"""Pictures and latents that a drawing starts from, and latents that it leaves."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedit.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

__all__ = ["Start", "file_hash", "plan_latents", "read_latents", "save_latents"]


@dataclass(frozen=True)
class Start:
    """What the drawing starts from besides its seed.

    Attributes:
        facts: what the recipe says of it: path and SHA-256 of the file.
    """

    image: Image | None = None
    latents: np.ndarray | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, image: Path | None, latents: Path | None) -> Start:
        """Read the files. Raises InputError when one cannot be read."""
        if image is not None:
            from edgedit.image import open_image

            picture = open_image(image)
            return cls(image=picture, facts={"image": {"path": str(image), "sha256": file_hash(image)}})
        if latents is not None:
            array = read_latents(latents)
            return cls(latents=array, facts={"latents": {"path": str(latents), "sha256": file_hash(latents)}})
        return cls()


def file_hash(path: Path) -> str:
    """SHA-256 of a file that a recipe starts from. Raises InputError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def plan_latents(template: str | None, seeds: Sequence[int]) -> list[Path | None]:
    """Where the latents of each picture go. Raises InputError for a name that does not do."""
    if template is None:
        return [None] * len(seeds)
    from edgedit.outputs import expand_output

    paths = [expand_output(template, seed=seed, index=index) for index, seed in enumerate(seeds)]
    if len(set(paths)) < len(paths):
        raise InputError(f"--latents-out {template!r}: several pictures, one name; put {{index}} or {{seed}} in it")
    for path in paths:
        if path.suffix != ".npy":
            raise InputError(f"--latents-out {str(path)!r}: latents are saved as .npy; give that suffix")
        if not path.parent.is_dir():
            raise InputError(f"--latents-out {str(path)!r}: the folder {path.parent} does not exist; make it first")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise InputError(f"--latents-out {str(path)!r}: the folder {path.parent} is not writable; choose another")
    return list(paths)


def save_latents(latents: np.ndarray, path: Path) -> None:
    """Write latents [1, C, H, W] as a NumPy file, whole or not at all. Raises InputError."""
    import numpy as np

    from edgedit.files import atomic_write_bytes

    buffer = BytesIO()
    np.save(buffer, latents, allow_pickle=False)
    atomic_write_bytes(path, buffer.getvalue())


def read_latents(path: Path) -> np.ndarray:
    """The floating-point array in a .npy file, as float32. Raises InputError."""
    import numpy as np

    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise InputError(f"{path}: the latents cannot be read ({error.strerror or error}); check the path") from None
    except (ValueError, EOFError):
        raise InputError(f"{path}: not a whole NumPy file of numbers; save it with numpy.save") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise InputError(f"{path}: holds no floating-point array; save latents [1, C, H, W] as float32")
    return array.astype(np.float32)

"""Where a calibration keeps what it has done so far, so that it can be stopped and started again.

The folder is `.NAME.work` beside the bundle to be made. It goes when the bundle is there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedit.converters.work_folder import WorkFolder

__all__ = ["Workspace"]

Arrays = Mapping[str, npt.NDArray[Any]]


class Workspace(WorkFolder):
    """Intermediate results of one conversion: named groups of arrays, each written whole or not at all."""

    def load(self, group: str, name: str) -> dict[str, npt.NDArray[Any]] | None:
        """The arrays stored under a name, None when there are none."""
        path = self._path(group, name)
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}

    def has(self, group: str, name: str) -> bool:
        """Whether arrays are stored under a name."""
        return self._path(group, name).exists()

    def save(self, group: str, name: str, arrays: Arrays) -> None:
        """Store arrays under a name."""
        path = self._path(group, name)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        partial.replace(path)

    def _path(self, group: str, name: str) -> Path:
        return self.folder / group / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.npz"

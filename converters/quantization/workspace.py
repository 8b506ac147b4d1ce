"""Where a calibration keeps what it has done so far, so that it can be stopped and started again.

The folder is `.NAME.work` beside the bundle to be made. It goes when the bundle is there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedit.errors import ConversionError, InputError

__all__ = ["Workspace"]

Arrays = Mapping[str, npt.NDArray[Any]]


class Workspace:
    """Intermediate results of one conversion: named groups of arrays, each written whole or not at all.

    Args:
        output: the bundle to be made.
        options: everything that the results depend on, as JSON.

    Raises:
        ConversionError: the folder cannot be made.
        InputError: an unfinished conversion with other options is there.
    """

    def __init__(self, output: Path, options: Mapping[str, Any]) -> None:
        self.folder = output.absolute().with_name(f".{output.name}.work")
        wanted = json.dumps(options, sort_keys=True, indent=1)
        try:
            self.folder.mkdir(exist_ok=True)
            path = self.folder / "options.json"
            if path.exists() and path.read_text(encoding="utf-8") != wanted:
                raise InputError(
                    f"{self.folder} holds an unfinished conversion with other options; "
                    "give the same ones to go on, or delete it to begin again"
                )
            path.write_text(wanted, encoding="utf-8")
        except OSError as error:
            raise ConversionError(f"{self.folder} cannot be written ({error.strerror}); choose another place") from None

    def remove(self) -> None:
        """The conversion is over."""
        shutil.rmtree(self.folder, ignore_errors=True)

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

"""A folder beside what a long conversion makes, so that it can be stopped and started again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgedit.errors import ConversionError, InputError

__all__ = ["WorkFolder"]


class WorkFolder:
    """`.NAME.work` beside the bundle or checkpoint NAME; it goes when that is there.

    Args:
        output: what is to be made.
        options: everything that the result depends on, as JSON.

    Raises:
        ConversionError: the folder cannot be made.
        InputError: an unfinished run with other options is there.
    """

    def __init__(self, output: Path, options: Mapping[str, Any]) -> None:
        self.folder = output.absolute().with_name(f".{output.name}.work")
        wanted = json.dumps(options, sort_keys=True, indent=1)
        try:
            self.folder.mkdir(exist_ok=True)
            path = self.folder / "options.json"
            if path.exists() and path.read_text(encoding="utf-8") != wanted:
                raise InputError(
                    f"{self.folder} holds an unfinished run with other options; "
                    "give the same ones to go on, or delete it to begin again"
                )
            path.write_text(wanted, encoding="utf-8")
        except OSError as error:
            raise ConversionError(f"{self.folder} cannot be written ({error.strerror}); choose another place") from None

    def remove(self) -> None:
        """The run is over."""
        shutil.rmtree(self.folder, ignore_errors=True)

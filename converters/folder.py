"""A checkpoint's folder, and the promise that no path of the checkpoint leads out of it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from edgedit.converters.strict_json import read_object
from edgedit.converters.tensors import quoted
from edgedit.errors import CheckpointError

__all__ = ["Folder", "Listing", "MissingFileError", "is_plain_name"]

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+\-]*")


def is_plain_name(name: object) -> bool:
    """Whether `name` can only be a file or folder right here: no separator, no `..`, nothing hidden."""
    return isinstance(name, str) and bool(_PLAIN_NAME.fullmatch(name)) and ".." not in name


class MissingFileError(CheckpointError):
    """A file that the checkpoint names and that is not there: a download that stopped half-way, often."""


class Listing(Protocol):
    """Files of a checkpoint by relative POSIX path, on disk or on the Hub."""

    @property
    def name(self) -> str: ...

    @property
    def files(self) -> Collection[str]: ...

    def read_json(self, relative: str, *, strict: bool = False) -> dict[str, Any]: ...


class Folder:
    """A folder on disk, from which no path leads out.

    Symbolic links may point anywhere within the folder, and in a snapshot of the Hugging Face cache
    (`models--ORG--NAME/snapshots/REVISION`) anywhere within that model's cache, where the blobs are.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            real = root.resolve(strict=True)
            self.files: frozenset[str] = frozenset(self._walk())
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{root} cannot be read ({error}): check the path and its permissions.") from None
        self._boundary = _boundary(real)

    @property
    def name(self) -> str:
        return str(self.root)

    def _walk(self) -> Iterator[str]:
        for entry in self.root.iterdir():
            if entry.is_dir():
                for file in entry.iterdir():
                    if file.is_file():
                        yield f"{entry.name}/{file.name}"
            elif entry.is_file():
                yield entry.name

    def path(self, relative: str) -> Path:
        """The path of a file or folder; CheckpointError when it is missing or lies outside."""
        parts = PurePosixPath(relative).parts
        if not parts or not all(map(is_plain_name, parts)):
            raise CheckpointError(
                f"{self.root} names the path {quoted(relative)}, which is not inside it: do not use it."
            )
        try:
            real = (self.root / relative).resolve(strict=True)
        except (OSError, RuntimeError):
            raise MissingFileError(f"{self.root / relative} is missing: download the checkpoint again.") from None
        if not real.is_relative_to(self._boundary):
            raise CheckpointError(
                f"{self.root / relative} is a link to the outside of the folder: put the file itself in its place."
            )
        return self.root / relative

    def read_json(self, relative: str, *, strict: bool = False) -> dict[str, Any]:
        """The JSON object in a file of the folder."""
        return read_object(self.path(relative), strict=strict)

    def below(self, name: str) -> Folder:
        """The sub-folder `name`, with the same boundary."""
        real = self.path(name)
        if not real.is_dir():
            raise MissingFileError(f"{self.root / name} is not a folder: download the checkpoint again.")
        folder = Folder(self.root / name)
        folder._boundary = self._boundary
        return folder


def _boundary(real: Path) -> Path:
    for folder in (real, *real.parents):
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            return folder.parent.parent
    return real

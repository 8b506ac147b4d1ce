"""Files of a batch: pictures and latents, written under a temporary name, synced, renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np

from edgedit.apps.batch.places import Places
from edgedit.errors import InputError
from edgedit.files import sync_folder

__all__ = ["Store"]


class Store:
    """Writes below one output folder. `name` keeps the temporary files of several processes apart."""

    def __init__(self, places: Places, name: str | None = None) -> None:
        self.places = places
        self.name = name or secrets.token_hex(6)
        self._made: set[Path] = set()

    def save(self, path: str, data: bytes) -> None:
        """Put `data` at `path` below the output folder, whole and on the disk when this returns.

        Raises InputError when that cannot be done, which is never the fault of the picture.
        """
        target = self.places.root / path
        temporary = self.places.partial / f"{self.name}-{secrets.token_hex(4)}"
        try:
            if target.parent not in self._made:
                # Never parents=True: the output folder itself must not come back after somebody deleted it.
                for folder in reversed([p for p in target.parents if p.is_relative_to(self.places.root)][:-1]):
                    folder.mkdir(exist_ok=True)
                if not target.parent.resolve().is_relative_to(self.places.root.resolve()):
                    raise InputError(f"{target.parent}: is a link out of the output folder; remove it")
                self._made.add(target.parent)
            try:
                with temporary.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
            sync_folder(target.parent)
        except OSError as error:
            self._made.clear()
            raise InputError(f"{target}: cannot be written ({error.strerror}); {_advice(error)}") from error

    def save_latents(self, key: str, latents: np.ndarray) -> None:
        """Keep latents [1, C, H, W] until the picture is recorded. Raises InputError.

        They are not synced, as they only save work.
        """
        buffer = BytesIO()
        np.save(buffer, latents, allow_pickle=False)
        data = buffer.getvalue()
        temporary = self.places.partial / f"{self.name}-{secrets.token_hex(4)}"
        try:
            try:
                temporary.write_bytes(hashlib.sha256(data).digest() + data)
                temporary.replace(self._latents(key))
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"{self._latents(key)}: cannot be written ({error.strerror}); {_advice(error)}") from error

    def latents(self, key: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """Latents that were kept, or None; damaged ones count as absent."""
        try:
            data = self._latents(key).read_bytes()
        except OSError:
            return None
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            return None
        array: np.ndarray = np.load(BytesIO(data[32:]), allow_pickle=False)
        return array if array.shape == shape and array.dtype == np.float32 else None

    def drop_latents(self, key: str) -> None:
        """The picture is recorded."""
        self._latents(key).unlink(missing_ok=True)

    def _latents(self, key: str) -> Path:
        return self.places.latents / f"{key}.npy"

    def sweep(self, is_finished: Callable[[int], bool]) -> None:
        """Remove what killed processes left: temporary files, and latents of pictures that are finished.

        Only when no other process is at work here. Raises `InputError` where the system forbids it.
        """
        try:
            for path in self.places.latents.iterdir():
                index = path.name.partition("-")[0]
                if not index.isdecimal() or is_finished(int(index)):
                    path.unlink(missing_ok=True)
            for path in self.places.partial.iterdir():
                path.unlink(missing_ok=True)
            for path in self.places.inside.glob("ledger.sqlite.partial-*"):
                path.unlink(missing_ok=True)
        except FileNotFoundError:
            return
        except OSError as error:
            raise InputError(f"{error.filename}: cannot be removed ({error.strerror}); {_advice(error)}") from error


def _advice(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some room and start again, nothing that is finished is lost"
    if error.errno == errno.ENOENT:
        return "the output folder was deleted or moved; put it back and start again"
    if error.errno == errno.EXDEV:
        return "the output folder must lie on one file system"
    return "check the folder's permissions and its disk, and start again; nothing that is finished is lost"

"""Files written whole or not at all, and their hashes."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from edgedit.errors import InputError

__all__ = ["atomic_file", "atomic_write_bytes", "sha256_file", "sync_file", "sync_folder"]


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Writes `data` to `path` so that a reader sees the old file or the new one, never a part.

    A symbolic link is followed. Raises InputError when the folder is missing or not writable, the disk is full, or
    `path` is something other than a regular file; nothing is left behind then.
    """
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file to write to, which becomes `path` when the block ends and is gone when it raises.

    Like `atomic_write_bytes`, with its errors; an OSError of the block counts as one of the file's.
    """
    target = Path(os.path.realpath(path))
    # A short name of its own: the target's may already be as long as the file system allows.
    temporary = target.parent / f".edgedit-{secrets.token_hex(6)}.tmp"
    try:
        if target.exists() and not target.is_file():
            raise InputError(f"{path}: not a regular file, so it is not overwritten; choose another name")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
            sync_folder(target.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); choose a folder that exists, is writable and has room"
        ) from error


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file's contents, 64 lower-case hexadecimal digits. Raises OSError when it cannot be read."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    """Returns when the contents of `path` are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Returns when the names in the folder `path` are on the disk; does nothing where folders cannot be synced."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

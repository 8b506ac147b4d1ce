"""JSON from untrusted files: bounded, and every way to be wrong ends in a CheckpointError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from edgedit.converters.tensors import quoted, read_bytes, regular_file_size
from edgedit.errors import CheckpointError

__all__ = ["parse_object", "read_object"]

_MAX_FILE = 64 << 20


def parse_object(text: bytes, what: str, *, strict: bool = False) -> dict[str, Any]:
    """Parses one JSON object.

    Args:
        text: UTF-8.
        what: what is being read, for the message, such as a file's path.
        strict: refuse what a reader could take in two ways: a key given twice, NaN and Infinity.

    Raises CheckpointError for text that is not UTF-8, not JSON, not an object, or nested beyond reason.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise CheckpointError(f"{what} gives the key {quoted(key)} twice: download or export it again.")
                seen.add(key)
        return result

    def no_constant(name: str) -> NoReturn:
        raise CheckpointError(f"{what} holds {name} where JSON has a number: download or export it again.")

    try:
        value = (
            json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=no_constant)
            if strict
            else json.loads(text.decode("utf-8"))
        )
    except (ValueError, RecursionError, MemoryError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise CheckpointError(f"{what} is not valid JSON ({reason}): download or export it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is JSON but not an object: download or export it again.")
    return value


def read_object(path: Path, *, strict: bool = False) -> dict[str, Any]:
    """Parses the JSON object in the file `path`; see `parse_object`."""
    size = regular_file_size(path)
    if size > _MAX_FILE:
        raise CheckpointError(f"{path} has {size} bytes, far too many for a configuration: give the right file.")
    return parse_object(read_bytes(path, 0, size).tobytes(), str(path), strict=strict)

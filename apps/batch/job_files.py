"""Job files: JSONL, CSV, Parquet and plain text, read as a stream of lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

from edgedit.apps.batch.jobs import FIELDS, Mistake
from edgedit.errors import InputError

__all__ = ["SUFFIXES", "kind_of", "read_jobs"]

#: Suffix → kind of job file.
SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
#: Longest line in bytes.
LONGEST_LINE = 4 << 20

_WHOLE = {"seed", "width", "height", "steps"}
_REAL = {"guidance_scale", "strength"}
_LISTS = {"seeds": int, "sigmas": float, "guidance_interval": float}

Line = tuple[int, "dict[str, object] | Mistake"]


def kind_of(path: Path, kind: str | None) -> str:
    """How `path` is read: `kind`, or what the suffix says. Raises InputError for a suffix that says nothing."""
    if kind is not None:
        if kind not in SUFFIXES.values():
            raise InputError(
                f"--jobs-format {kind!r} is unknown; choose one of: {', '.join(sorted(set(SUFFIXES.values())))}"
            )
        return kind
    try:
        return SUFFIXES[path.suffix.lower()]
    except KeyError:
        raise InputError(f"{path}: job files end in {', '.join(SUFFIXES)}; rename it or pass --jobs-format") from None


def read_jobs(path: Path, kind: str) -> Iterator[Line]:
    """(line number from 1, fields or what is wrong with the line) for every line that is not blank.

    Nothing is kept: a file of any length is read in the memory of a line. Raises InputError when the file cannot be
    read at all.
    """
    try:
        if kind == "parquet":
            yield from _parquet(path)
        elif kind == "csv":
            with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
                yield from _csv(path, text)
        else:
            yield from _lines(path, kind)
    except OSError as error:
        raise InputError(f"{path}: the jobs cannot be read ({error.strerror or error}); check the path") from None


def _lines(path: Path, kind: str) -> Iterator[Line]:
    with path.open("rb") as file:
        number = 0
        while data := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(data) > LONGEST_LINE:
                while data and not data.endswith(b"\n"):
                    data = file.readline(LONGEST_LINE)
                yield number, Mistake(number, "", f"is longer than {LONGEST_LINE >> 20} MB")
                continue
            if number == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")
            try:
                text = data.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                yield number, Mistake(number, "", f"is not UTF-8 text (byte {error.start + 1})")
                continue
            if text:
                yield number, {"prompt": text} if kind == "text" else _object(number, text)


def _object(number: int, text: str) -> dict[str, object] | Mistake:
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        return Mistake(number, "", f"is not JSON ({' '.join(str(error).split())})")
    if not isinstance(value, dict):
        return Mistake(number, "", 'is not a JSON object; write it like {"prompt": "a red circle"}')
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return result


_DECODER = json.JSONDecoder(parse_constant=_constant, object_pairs_hook=_pairs)


def _csv(path: Path, text: TextIO) -> Iterator[Line]:
    reader = csv.reader(text, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise InputError(f"{path}: not a CSV file ({error}); save it again") from None
    for name in header:
        if header.count(name) > 1:
            raise InputError(f"{path}: two columns are called {name!r}; rename one")
        if name not in FIELDS and not name.startswith("metadata."):
            raise InputError(
                f"{path}: the column {name!r} is not a field of a job; use {', '.join(FIELDS)} or metadata.NAME"
            )
    if "prompt" not in header:
        raise InputError(f"{path}: has no column called prompt in its first line; add one")
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield number, Mistake(number, "", f"is not a line of CSV ({error})")
            continue
        if row is None:
            return
        if not row:
            continue
        if len(row) > len(header):
            yield number, Mistake(number, "", f"has {len(row)} cells and the header {len(header)}; quote commas")
            continue
        yield number, _cells(number, dict(zip(header, row, strict=False)))


def _cells(number: int, row: dict[str, str]) -> dict[str, object] | Mistake:
    fields: dict[str, object] = {}
    metadata: dict[str, object] = {}
    for name, cell in row.items():
        if not cell.strip():
            continue
        if name.startswith("metadata."):
            metadata[name.removeprefix("metadata.")] = cell
        elif name == "metadata":
            value = _object(number, cell)
            if isinstance(value, Mistake):
                return Mistake(number, "metadata", value.reason)
            metadata.update(value)
        else:
            fields[name] = _cell(name, cell.strip())
    if metadata:
        fields["metadata"] = metadata
    return fields


def _cell(name: str, cell: str) -> object:
    """The cell as what the field holds; text that is none is left for the field's own check to name."""
    try:
        if name in _WHOLE:
            return int(cell)
        if name in _REAL:
            return float(cell)
        if name in _LISTS:
            return [_LISTS[name](word) for word in cell.strip("[]").replace(",", " ").replace(";", " ").split()]
    except ValueError:
        return cell
    return cell


def _parquet(path: Path) -> Iterator[Line]:
    try:
        from pyarrow import ArrowException, ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(f'{path}: Parquet needs pyarrow; run: pip install "edgedit[batch]"') from None
    try:
        file = ParquetFile(path)
    except (ArrowException, ArrowInvalid) as error:
        raise InputError(f"{path}: not a Parquet file ({' '.join(str(error).split())[:120]}); write it again") from None
    columns: list[Any] = list(file.schema_arrow.names)
    if "prompt" not in columns:
        raise InputError(f"{path}: has no column called prompt; add one")
    number = 0
    for batch in file.iter_batches(batch_size=4096):
        for row in batch.to_pylist():
            number += 1
            yield number, {name: _plain(value) for name, value in row.items()}


def _plain(value: object) -> object:
    """Maps come as lists of pairs; everything else is already what JSON would give."""
    if isinstance(value, list) and value and all(isinstance(item, tuple) and len(item) == 2 for item in value):
        return dict(value)
    return value

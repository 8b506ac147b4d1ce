"""The index beside the pictures: one JSON object each with recipe, timings and hash; and the same as Parquet."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgedit.apps.batch.ledger import Ledger, Picture
from edgedit.apps.batch.recipe_book import RecipeBook
from edgedit.bundle import Bundle
from edgedit.errors import InputError

__all__ = ["entry_of", "index_is_whole", "read_index", "rebuild_index", "write_parquet"]


def entry_of(
    picture: Picture, *, sha256: str, size: int, seconds: Mapping[str, float], recipe: Mapping[str, Any]
) -> dict[str, Any]:
    """What the index says of one picture; the ledger adds how many attempts it took and when it was finished."""
    return {
        "id": picture.id,
        "index": picture.index,
        "line": picture.line,
        "path": picture.path,
        "sha256": sha256,
        "bytes": size,
        "seed": picture.seed,
        "seconds": dict(seconds),
        "recipe": dict(recipe),
        "metadata": picture.spec.get("metadata"),
    }


def index_is_whole(ledger: Ledger) -> bool:
    """Whether the index file has everything that the ledger put there; a power cut may have taken the end of it."""
    (text,) = next(ledger.rows("SELECT value FROM meta WHERE key = 'index_bytes'"))
    try:
        return ledger.places.index.stat().st_size >= int(text)
    except FileNotFoundError:
        return int(text) == 0


def rebuild_index(ledger: Ledger, bundle: Bundle) -> None:
    """Write the index anew from the ledger. Raises InputError."""
    book, runtime = RecipeBook(bundle), ledger.meta.get("runtime") or {}
    times = "SELECT p.attempts, r.finished FROM pictures p JOIN results r ON r.idx = p.idx WHERE p.idx = ?"
    partial = ledger.places.partial / f"index-{os.getpid()}"
    try:
        with partial.open("w", encoding="utf-8") as file:
            for picture, sha256, size, seconds in ledger.finished():
                recipe = book.recipe(picture.spec).as_dict(bundle, seed=picture.seed, runtime=runtime)
                attempts, finished = next(ledger.rows(times, picture.index))
                entry = entry_of(picture, sha256=sha256, size=size, seconds=seconds, recipe=recipe)
                line = {**entry, "attempts": attempts, "finished": finished}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            length = file.tell()
        partial.replace(ledger.places.index)
    except OSError as error:
        raise InputError(f"{ledger.places.index}: cannot be written ({error.strerror}); check the folder") from error
    finally:
        partial.unlink(missing_ok=True)
    ledger.set_meta(index_bytes=length)


def read_index(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of an index. Raises InputError when it cannot be read."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield json.loads(line)
                except ValueError:
                    raise InputError(f"{path}: line {number} is damaged; run the batch again to mend it") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def write_parquet(source: Path, target: Path) -> int:
    """The index as Parquet, whole or not at all: a row a picture, recipe and metadata as JSON. Returns the rows.

    Raises InputError when pyarrow is missing or the file cannot be written.
    """
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter
    except ImportError:
        raise InputError('Parquet needs pyarrow; run: pip install "edgedit[batch]"') from None
    stages = ("encode", "denoise", "decode", "save")
    schema = pa.schema(
        [
            *(pa.field(name, pa.string()) for name in ("id", "path", "sha256", "prompt", "recipe", "metadata")),
            *(pa.field(name, pa.int64()) for name in ("index", "line", "bytes", "width", "height", "attempts")),
            pa.field("seed", pa.uint64()),
            pa.field("finished", pa.float64()),
            *(pa.field(f"seconds_{stage}", pa.float64()) for stage in stages),
        ]
    )

    def row(entry: dict[str, Any]) -> dict[str, Any]:
        recipe, metadata = entry["recipe"], entry["metadata"]
        return {
            **{name: entry[name] for name in ("id", "path", "sha256", "index", "line", "bytes", "attempts", "seed")},
            **{name: recipe[name] for name in ("prompt", "width", "height")},
            "recipe": json.dumps(recipe, ensure_ascii=False),
            "metadata": None if metadata is None else json.dumps(metadata, ensure_ascii=False),
            "finished": entry["finished"],
            **{f"seconds_{stage}": entry["seconds"].get(stage) for stage in stages},
        }

    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    count = 0
    try:
        with ParquetWriter(partial, schema, compression="zstd") as writer:
            rows: list[dict[str, Any]] = []
            for entry in read_index(source):
                rows.append(row(entry))
                count += 1
                if len(rows) >= 4096:
                    writer.write_table(pa.Table.from_pylist(rows, schema))
                    rows.clear()
            writer.write_table(pa.Table.from_pylist(rows, schema))
        partial.replace(target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error}); check the folder") from error
    finally:
        partial.unlink(missing_ok=True)
    return count

"""Shards of one batch, drawn on several machines, as one batch again."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgedit.apps.batch.index import read_index
from edgedit.apps.batch.ledger import Ledger
from edgedit.apps.batch.ledger_file import ledger_errors, write_ledger
from edgedit.apps.batch.places import Places
from edgedit.apps.batch.planning import Shard
from edgedit.errors import InputError
from edgedit.files import sha256_file, sync_folder

__all__ = ["merge_shards"]

_ALIKE = ("model_hash", "jobs_sha256", "name", "low_ram", "threads", "runtime")
_TABLES = ("jobs", "pictures", "paths", "results", "failures")


def merge_shards(
    target: Path, sources: Sequence[Path], on_picture: Callable[[str], None] | None = None
) -> tuple[int, list[str]]:
    """Make `target` the batch that its shards are parts of: pictures linked (or copied), ledgers and indexes joined.

    What a shard has not finished, or has lost since, is pending in the merged batch. A merge that was interrupted can
    be run again.

    Returns (finished pictures, those lost since, a line each).

    Raises InputError when the shards are not all there, not of one batch, or being worked on, or `target` has a ledger.
    """
    places = Places(target)
    if places.ledger.exists():
        raise InputError(f"{target}: already holds a batch; merge into a new folder")
    ledgers = [Ledger(Places(source)) for source in sources]
    try:
        _check(ledgers)
        for path in (places.inside, places.partial, places.latents, places.embeddings):
            path.mkdir(parents=True, exist_ok=True)
        lost: dict[int, str] = {}
        finished = 0
        for ledger in ledgers:
            for picture, sha256, _, _ in ledger.finished():
                if on_picture is not None:
                    on_picture(picture.path)
                problem = _bring(ledger.places.root / picture.path, target / picture.path, sha256, places)
                if problem is None:
                    finished += 1
                else:
                    lost[picture.index] = problem
        length = _join_indexes(ledgers, places, lost)
        _join_ledgers(ledgers, places, set(lost), length)
        return finished, list(lost.values())
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error}); check the folder") from error
    finally:
        for ledger in ledgers:
            ledger.close()


def _check(ledgers: Sequence[Ledger]) -> None:
    first = ledgers[0]
    numbers: dict[int, Path] = {}
    for ledger in ledgers:
        root = ledger.places.root
        if ledger.meta["shard"] is None:
            raise InputError(f"{root}: is a whole batch, not a shard; leave it out")
        for key in _ALIKE:
            if ledger.meta.get(key) != first.meta.get(key) and None not in (ledger.meta.get(key), first.meta.get(key)):
                raise InputError(
                    f"{root}: is of another batch than {first.places.root} ({key} is {ledger.meta.get(key)!r}, not "
                    f"{first.meta.get(key)!r}); merge shards that were begun alike"
                )
        shard = Shard.parse(ledger.meta["shard"])
        if shard.number in numbers:
            raise InputError(f"{root}: is the same shard as {numbers[shard.number]}; give each once")
        numbers[shard.number] = root
        if ledger.anything_running():
            raise InputError(f"{root}: is being worked on, or its process was killed; let it end, or start it again")
    count = Shard.parse(first.meta["shard"]).count
    if missing := sorted(set(range(1, count + 1)) - set(numbers)):
        raise InputError(f"shards {', '.join(map(str, missing))} of {count} are missing; name their folders too")
    if any(Shard.parse(ledger.meta["shard"]).count != count for ledger in ledgers):
        raise InputError("the shards are parts of different divisions; merge shards with one N of --shard I/N")


def _bring(source: Path, target: Path, sha256: str, places: Places) -> str | None:
    """Put a picture at its place; what is wrong with it otherwise."""
    try:
        if sha256_file(source) != sha256:
            return f"{source}: has other bytes than were recorded"
    except OSError as error:
        return f"{source}: cannot be read ({error.strerror})"
    if target.exists() and sha256_file(target) == sha256:
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = places.partial / f"merge-{os.getpid()}"
    try:
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(target.parent)
    return None


def _join_indexes(ledgers: Sequence[Ledger], places: Places, lost: dict[int, str]) -> int:
    partial = places.partial / f"index-{os.getpid()}"
    with partial.open("w", encoding="utf-8") as file:
        for ledger in ledgers:
            if not ledger.places.index.exists():
                continue
            for entry in read_index(ledger.places.index):
                if entry["index"] not in lost:
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
        length = file.tell()
    partial.replace(places.index)
    return length


def _join_ledgers(ledgers: Sequence[Ledger], places: Places, lost: set[int], index_bytes: int) -> None:
    def join(db: sqlite3.Connection) -> bool:
        for ledger in ledgers:
            with ledger_errors(ledger.places.ledger):
                for table in _TABLES:
                    rows: Any = ledger.rows(f"SELECT * FROM {table}")
                    first = next(rows, None)
                    if first is not None:
                        slots = ", ".join("?" * len(first))
                        db.execute(f"INSERT INTO {table} VALUES ({slots})", first)
                        db.executemany(f"INSERT INTO {table} VALUES ({slots})", rows)
        mistakes = ledgers[0].rows("SELECT * FROM mistakes")
        db.executemany("INSERT INTO mistakes VALUES (?, ?, ?)", mistakes)
        db.execute("UPDATE pictures SET owner = NULL")
        for index in lost:
            db.execute("UPDATE pictures SET state = 0, attempts = 0 WHERE idx = ?", (index,))
            db.execute("DELETE FROM results WHERE idx = ?", (index,))
        meta = dict(ledgers[0].meta)
        for key in ("jobs", "pictures"):
            meta[key] = sum(ledger.meta[key] for ledger in ledgers)
        meta |= {"shard": None, "index_bytes": index_bytes}
        db.executemany("INSERT INTO meta VALUES (?, ?)", [(key, json.dumps(value)) for key, value in meta.items()])
        return True

    write_ledger(places.ledger, join)

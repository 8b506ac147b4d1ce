"""The ledger as a file: its tables, making it whole or not at all, and opening it with care."""

from __future__ import annotations

import errno
import json
import os
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgedit.apps.batch.jobs import MISTAKE_LIMIT, Mistake
from edgedit.apps.batch.planning import PlannedJob
from edgedit.errors import InputError
from edgedit.files import sync_file, sync_folder

__all__ = [
    "DONE",
    "FAILED",
    "PENDING",
    "RUNNING",
    "STATES",
    "VERSION",
    "connect",
    "create",
    "insert_jobs",
    "ledger_errors",
    "write_ledger",
]

VERSION = 1
#: "edbL" as a number, in the header of the file: tells a ledger from any other database.
APPLICATION = 0x6564624C
PENDING, RUNNING, DONE, FAILED = range(4)
STATES = ("pending", "running", "done", "failed")

_HEADER = 100
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE jobs (job INTEGER PRIMARY KEY, line INTEGER NOT NULL, id TEXT NOT NULL, spec TEXT NOT NULL);
CREATE TABLE pictures (
    idx INTEGER PRIMARY KEY, job INTEGER NOT NULL, seed TEXT NOT NULL, grp INTEGER NOT NULL,
    state INTEGER NOT NULL DEFAULT 0, attempts INTEGER NOT NULL DEFAULT 0, owner INTEGER
);
CREATE TABLE paths (idx INTEGER PRIMARY KEY, path TEXT NOT NULL);
CREATE TABLE results (
    idx INTEGER PRIMARY KEY, sha256 TEXT NOT NULL, bytes INTEGER NOT NULL, seconds TEXT NOT NULL, finished REAL NOT NULL
);
CREATE TABLE failures (idx INTEGER NOT NULL, attempt INTEGER NOT NULL, error TEXT NOT NULL, final INTEGER NOT NULL);
CREATE TABLE mistakes (line INTEGER NOT NULL, field TEXT NOT NULL, reason TEXT NOT NULL);
CREATE TABLE owners (
    owner INTEGER PRIMARY KEY AUTOINCREMENT, place TEXT NOT NULL, pid INTEGER NOT NULL, born TEXT NOT NULL,
    host TEXT NOT NULL, beat INTEGER NOT NULL DEFAULT 0
);
"""
_INDEXES = """
CREATE UNIQUE INDEX jobs_id ON jobs (id);
CREATE INDEX todo ON pictures (attempts, grp, idx) WHERE state = 0;
CREATE INDEX running ON pictures (owner) WHERE state = 1;
CREATE INDEX failed ON pictures (idx) WHERE state = 3;
CREATE INDEX failures_idx ON failures (idx);
"""


@contextmanager
def ledger_errors(path: Path) -> Iterator[None]:
    """Turns what SQLite says of a damaged, full or unwritable ledger into one line for a person."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        text = str(error)
        if "full" in text:
            advice = "the disk is full: free some room and start again, nothing that is finished is lost"
        elif "malformed" in text or "not a database" in text or "encrypted" in text:
            advice = "the ledger is damaged; restore it from a copy, or move the folder away and start afresh"
        elif "readonly" in text or "unable to open" in text or "disk I/O" in text:
            advice = "the folder cannot be written; check that it is there, with its permissions and its disk"
        elif "locked" in text:
            advice = "another process keeps it locked; wait for that to end"
        else:
            advice = "check the disk, and that no other program uses the file"
        raise InputError(f"{path}: {text}; {advice}") from error


def connect(path: Path) -> sqlite3.Connection:
    """Open a ledger that is there.

    Raises InputError when it is missing, cut short, no ledger, or of another version.
    """
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(f"{path}: the ledger cannot be read ({error.strerror}); check the output folder") from None
    if len(header) < _HEADER or not header.startswith(b"SQLite format 3\0"):
        raise InputError(
            f"{path}: is not a ledger or is cut short; restore it, or move the folder away and start afresh"
        )
    with ledger_errors(path):
        connection = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        try:
            if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION:
                raise InputError(f"{path}: is a database, but not a batch's ledger; choose another output folder")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version != VERSION:
                raise InputError(
                    f"{path}: the ledger has version {version} and this edgedit knows {VERSION}; "
                    "finish it with the edgedit that began it, or choose another output folder"
                )
            pages = connection.execute("PRAGMA page_count").fetchone()[0]
            page_size = connection.execute("PRAGMA page_size").fetchone()[0]
            wal = path.with_name(path.name + "-wal")
            if size < pages * page_size and not (wal.exists() and wal.stat().st_size):
                raise InputError(
                    f"{path}: the ledger is damaged ({size} bytes, not {pages * page_size}); "
                    "restore it from a copy, or move the folder away and start afresh"
                )
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA cache_size = -65536")
        except BaseException:
            connection.close()
            raise
    return connection


def create(
    path: Path,
    meta: Mapping[str, Any],
    plan: Iterable[PlannedJob | Mistake],
    *,
    skip_invalid: bool,
    on_line: Callable[[int], None] | None = None,
) -> list[Mistake]:
    """Write a ledger of a whole plan, whole or not at all, and return the mistakes (at most `MISTAKE_LIMIT`).

    With mistakes and without `skip_invalid` nothing is left. A ledger that somebody else made meanwhile stays.

    Raises InputError when the disk is full or the folder cannot be written.
    """
    mistakes: list[Mistake] = []

    def fill(connection: sqlite3.Connection) -> bool:
        counts, found = insert_jobs(connection, plan, keep=not skip_invalid, on_line=on_line)
        mistakes.extend(found)
        for key, value in {**meta, **counts}.items():
            connection.execute("INSERT INTO meta VALUES (?, ?)", (key, json.dumps(value)))
        return skip_invalid or not found

    write_ledger(path, fill)
    return mistakes


def write_ledger(path: Path, fill: Callable[[sqlite3.Connection], bool]) -> None:
    """Make an empty ledger, let `fill` fill it, and publish it, unless `fill` says no.

    Raises InputError when the disk is full or the folder cannot be written; nothing is left then.
    """
    partial = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")
    try:
        with ledger_errors(path):
            connection = sqlite3.connect(partial, isolation_level=None)
            try:
                for pragma in ("journal_mode = OFF", "synchronous = OFF", "page_size = 8192", "cache_size = -32768"):
                    connection.execute(f"PRAGMA {pragma}")
                connection.execute(f"PRAGMA application_id = {APPLICATION}")
                connection.execute(f"PRAGMA user_version = {VERSION}")
                connection.executescript(_SCHEMA)
                connection.execute("BEGIN")
                if not fill(connection):
                    return
                connection.execute("COMMIT")
                connection.executescript(_INDEXES)
            finally:
                connection.close()
            _publish(partial, path)
    except OSError as error:
        raise InputError(
            f"{path}: the ledger cannot be written ({error.strerror}); check the folder and the disk"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _publish(partial: Path, path: Path) -> None:
    sync_file(partial)
    try:
        # Unlike a rename, a link never replaces the ledger of another process that began at the same moment.
        os.link(partial, path)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        if not path.exists():
            partial.rename(path)
    sync_folder(path.parent)


def insert_jobs(
    connection: sqlite3.Connection,
    plan: Iterable[PlannedJob | Mistake],
    *,
    keep: bool = False,
    on_line: Callable[[int], None] | None = None,
) -> tuple[dict[str, int], list[Mistake]]:
    """Insert planned jobs in the open transaction; with `keep`, only count them once a mistake was met.

    Returns ({"jobs", "pictures", "mistakes"}: counts, the first mistakes).
    """
    jobs: list[tuple[Any, ...]] = []
    pictures: list[tuple[Any, ...]] = []
    paths: list[tuple[Any, ...]] = []
    counts = {"jobs": 0, "pictures": 0, "mistakes": 0}
    mistakes: list[Mistake] = []

    def flush() -> None:
        connection.executemany("INSERT INTO jobs VALUES (?, ?, ?, ?)", jobs)
        connection.executemany("INSERT INTO pictures (idx, job, seed, grp) VALUES (?, ?, ?, ?)", pictures)
        connection.executemany("INSERT INTO paths VALUES (?, ?)", paths)
        for rows in (jobs, pictures, paths):
            rows.clear()

    for number, item in enumerate(plan):
        if on_line is not None and number % 1000 == 0:
            on_line(item.line)
        if isinstance(item, Mistake):
            counts["mistakes"] += 1
            if len(mistakes) < MISTAKE_LIMIT:
                mistakes.append(item)
            continue
        counts["jobs"] += 1
        counts["pictures"] += len(item.pictures)
        if keep and mistakes:
            continue
        jobs.append((item.number, item.line, item.id, item.spec))
        for picture in item.pictures:
            pictures.append((picture.index, item.number, str(picture.seed), item.group))
            paths.append((picture.index, picture.path))
        if len(pictures) >= 5000:
            flush()
    flush()
    connection.executemany("INSERT INTO mistakes VALUES (?, ?, ?)", [(m.line, m.field, m.reason) for m in mistakes])
    return counts, mistakes

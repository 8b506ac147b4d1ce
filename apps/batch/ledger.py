"""The ledger: what is to be drawn, who draws it, what was drawn, what failed. Every change is one transaction."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from edgedit.apps.batch.ledger_file import DONE, FAILED, PENDING, RUNNING, STATES, connect, ledger_errors
from edgedit.apps.batch.places import Places
from edgedit.errors import InputError

__all__ = ["Counts", "Ledger", "Picture"]


@dataclass(frozen=True)
class Picture:
    """One picture of the ledger: all that a worker needs, and where it stands."""

    index: int
    id: str
    seed: int
    path: str
    spec: Mapping[str, Any]
    group: int
    attempts: int = 0
    line: int = 0
    state: str = "pending"


@dataclass(frozen=True)
class Counts:
    """Pictures by state."""

    pending: int = 0
    running: int = 0
    done: int = 0
    failed: int = 0

    @property
    def total(self) -> int:
        """All pictures."""
        return self.pending + self.running + self.done + self.failed


_COLUMNS = "p.idx, j.id, p.seed, a.path, j.spec, p.grp, p.attempts, j.line, p.state"
_JOINED = "pictures p JOIN jobs j ON j.job = p.job JOIN paths a ON a.idx = p.idx"


def _picture(row: Sequence[Any]) -> Picture:
    index, identity, seed, path, spec, group, attempts, line, state = row
    return Picture(index, identity, int(seed), path, json.loads(spec), group, attempts, line, STATES[state])


class Ledger:
    """An open ledger. Every method raises InputError, one line, when the file cannot be read or written."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self._connection = connect(places.ledger)
        self._inode = places.ledger.stat().st_ino
        self.meta: dict[str, Any] = dict(self._meta())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _meta(self) -> Iterator[tuple[str, Any]]:
        with ledger_errors(self.places.ledger):
            for key, value in self._connection.execute("SELECT key, value FROM meta"):
                yield key, json.loads(value)

    @contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """A transaction that nobody else's comes between; undone when the block raises."""
        with ledger_errors(self.places.ledger):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def rows(self, query: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """The rows of a query."""
        with ledger_errors(self.places.ledger):
            yield from self._connection.execute(query, values)

    def check_place(self) -> None:
        """Raises InputError when the ledger's file was deleted or replaced while it is open."""
        try:
            same = self.places.ledger.stat().st_ino == self._inode
        except OSError:
            same = False
        if not same:
            raise InputError(
                f"{self.places.root}: the ledger was deleted or replaced during the run; "
                "restore the folder, or start afresh"
            )

    def set_meta(self, **values: Any) -> None:
        """Replace entries of `meta`."""
        with self.change() as db:
            for key, value in values.items():
                db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))
        self.meta.update(values)

    def counts(self) -> Counts:
        """Pictures by state. Only the indexes of what is not done are read: the table may have a million rows."""
        query = ", ".join(
            f"(SELECT count(*) FROM pictures WHERE state = {state})" for state in (PENDING, RUNNING, FAILED)
        )
        pending, running, failed = next(self.rows(f"SELECT {query}"))
        return Counts(pending, running, self.meta["pictures"] - pending - running - failed, failed)

    def has_work(self) -> bool:
        """Whether a picture is pending."""
        return next(self.rows("SELECT 1 FROM pictures WHERE state = 0 LIMIT 1"), None) is not None

    def anything_running(self) -> bool:
        """Whether a picture is being drawn, by whomever."""
        return next(self.rows("SELECT 1 FROM pictures WHERE state = 1 LIMIT 1"), None) is not None

    def is_finished(self, index: int) -> bool:
        """Whether picture `index` is drawn and recorded, or no picture at all."""
        row = next(self.rows("SELECT state FROM pictures WHERE idx = ?", index), None)
        return row is None or bool(row[0] == DONE)

    def claim(self, owner: int, count: int) -> list[Picture]:
        """Take up to `count` pending pictures, those of one group together, retried ones last."""
        with self.change() as db:
            taken = [
                index
                for (index,) in db.execute(
                    "SELECT idx FROM pictures WHERE state = 0 ORDER BY attempts, grp, idx LIMIT ?", (count,)
                )
            ]
            db.executemany(
                "UPDATE pictures SET state = 1, owner = ? WHERE idx = ?", [(owner, index) for index in taken]
            )
            return [_picture(self._row(db, index)) for index in taken]

    @staticmethod
    def _row(db: sqlite3.Connection, index: int) -> tuple[Any, ...]:
        row: tuple[Any, ...] = db.execute(f"SELECT {_COLUMNS} FROM {_JOINED} WHERE p.idx = ?", (index,)).fetchone()
        return row

    def release(self, owner: int) -> int:
        """Give back what `owner` took and did not finish. Returns how many pictures that were."""
        with self.change() as db:
            return _release(db, owner)

    def put_back(self, indices: Sequence[int], owner: int) -> None:
        """Give back some of the pictures that `owner` took."""
        with self.change() as db:
            db.executemany(
                "UPDATE pictures SET state = 0, owner = NULL WHERE idx = ? AND state = 1 AND owner = ?",
                [(index, owner) for index in indices],
            )

    def record_done(
        self, picture: Picture, *, sha256: str, size: int, seconds: Mapping[str, float], entry: Mapping[str, Any]
    ) -> bool:
        """Record a picture that is on the disk, and its `entry` in the index.

        Returns False, and changes nothing, when somebody else has recorded it already.
        """
        finished = time.time()
        with self.change() as db:
            state, attempts = db.execute(
                "SELECT state, attempts FROM pictures WHERE idx = ?", (picture.index,)
            ).fetchone()
            if state == DONE:
                return False
            db.execute(
                "UPDATE pictures SET state = 2, owner = NULL, attempts = attempts + 1 WHERE idx = ?", (picture.index,)
            )
            db.execute(
                "INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?)",
                (picture.index, sha256, size, json.dumps(seconds), finished),
            )
            line = {**entry, "attempts": attempts + 1, "finished": finished}
            self._append(db, json.dumps(line, ensure_ascii=False) + "\n")
        return True

    def _append(self, db: sqlite3.Connection, line: str) -> None:
        """Append to the index where the ledger says that it ends: what a killed process left there is overwritten."""
        (text,) = db.execute("SELECT value FROM meta WHERE key = 'index_bytes'").fetchone()
        offset, data = int(text), line.encode()
        try:
            descriptor = os.open(self.places.index, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
            try:
                if os.fstat(descriptor).st_size > offset:
                    os.ftruncate(descriptor, offset)
                os.lseek(descriptor, offset, os.SEEK_SET)
                while data:
                    data = data[os.write(descriptor, data) :]
                end = os.lseek(descriptor, 0, os.SEEK_CUR)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise InputError(
                f"{self.places.index}: cannot be written ({error.strerror}); "
                "check the folder and the disk and start again, nothing that is finished is lost"
            ) from error
        db.execute("UPDATE meta SET value = ? WHERE key = 'index_bytes'", (str(end),))

    def trim_index(self) -> None:
        """Cut off what a killed process wrote to the index and did not record."""
        with self.change() as db:
            self._append(db, "")

    def record_failure(self, picture: Picture, error: str, *, final: bool) -> None:
        """Count an attempt that failed; the picture waits for another unless it was the `final` one."""
        with self.change() as db:
            state, attempts = db.execute(
                "SELECT state, attempts FROM pictures WHERE idx = ?", (picture.index,)
            ).fetchone()
            if state == DONE:
                return
            db.execute(
                "UPDATE pictures SET state = ?, owner = NULL, attempts = ? WHERE idx = ?",
                (FAILED if final else PENDING, attempts + 1, picture.index),
            )
            db.execute("INSERT INTO failures VALUES (?, ?, ?, ?)", (picture.index, attempts + 1, error, int(final)))

    def retry(self, indices: Sequence[int] | None = None) -> int:
        """Make failed pictures, or those of `indices` in whatever state, pending again. Returns how many."""
        with self.change() as db:
            if indices is None:
                cursor = db.execute("UPDATE pictures SET state = 0, attempts = 0, owner = NULL WHERE state = 3")
                return cursor.rowcount
            for index in indices:
                db.execute(
                    "UPDATE pictures SET state = 0, attempts = 0, owner = NULL WHERE idx = ? AND state != 1", (index,)
                )
                db.execute(
                    "DELETE FROM results WHERE idx = ? AND idx IN (SELECT idx FROM pictures WHERE state = 0)", (index,)
                )
            return len(indices)

    def failures(self, limit: int = -1) -> list[tuple[Picture, str]]:
        """Failed pictures and the error of their last attempt."""
        query = (
            f"SELECT {_COLUMNS}, (SELECT error FROM failures f WHERE f.idx = p.idx ORDER BY f.rowid DESC LIMIT 1) "
            f"FROM {_JOINED} WHERE p.state = 3 ORDER BY p.idx LIMIT ?"
        )
        return [(_picture(row[:-1]), row[-1] or "") for row in self.rows(query, limit)]

    def finished(self, limit: int = -1) -> Iterator[tuple[Picture, str, int, dict[str, float]]]:
        """(picture, SHA-256, bytes, seconds by stage) of every finished picture in order."""
        query = (
            f"SELECT {_COLUMNS}, r.sha256, r.bytes, r.seconds FROM {_JOINED} JOIN results r ON r.idx = p.idx "
            "WHERE p.state = 2 ORDER BY p.idx LIMIT ?"
        )
        for *row, sha256, size, seconds in self.rows(query, limit):
            yield _picture(row), sha256, size, json.loads(seconds)


def _release(db: sqlite3.Connection, owner: int) -> int:
    cursor = db.execute("UPDATE pictures SET state = 0, owner = NULL WHERE state = 1 AND owner = ?", (owner,))
    return cursor.rowcount

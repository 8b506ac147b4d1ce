"""A job file that has changed since its ledger was made: lines may be added or mended, nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator

from edgedit.apps.batch.jobs import Mistake
from edgedit.apps.batch.ledger import Ledger
from edgedit.apps.batch.ledger_file import insert_jobs
from edgedit.apps.batch.planning import PlannedJob
from edgedit.errors import InputError

__all__ = ["grow"]


class _RefusedError(Exception):
    """Undoes the transaction."""


def grow(
    ledger: Ledger,
    plan: Iterable[PlannedJob | Mistake],
    digest: str,
    *,
    skip_invalid: bool,
    on_line: Callable[[int], None] | None = None,
) -> list[Mistake]:
    """Add the jobs of `plan` that the ledger lacks, all or none, and return the mistakes.

    Raises InputError when a job that the ledger has is different now, or gone.
    """
    mistakes: list[Mistake] = []
    old = 0

    def new_ones() -> Iterator[PlannedJob | Mistake]:
        nonlocal old
        for item in plan:
            if isinstance(item, PlannedJob) and _has(ledger, item):
                old += 1
            else:
                yield item

    meta = ledger.meta
    try:
        with ledger.change() as db:
            db.execute("DELETE FROM mistakes")
            counts, mistakes = insert_jobs(db, new_ones(), keep=not skip_invalid, on_line=on_line)
            if mistakes and not skip_invalid:
                raise _RefusedError
            if old < meta["jobs"]:
                raise InputError(
                    f"{ledger.places.root}: {meta['jobs'] - old} jobs of this batch are gone from the job file; "
                    "put them back, or choose another output folder"
                )
            values = {
                "jobs": meta["jobs"] + counts["jobs"],
                "pictures": meta["pictures"] + counts["pictures"],
                "mistakes": counts["mistakes"],
                "jobs_sha256": digest,
            }
            for key, value in values.items():
                db.execute("UPDATE meta SET value = ? WHERE key = ?", (json.dumps(value), key))
            ledger.meta.update(values)
    except _RefusedError:
        pass
    return mistakes


def _has(ledger: Ledger, job: PlannedJob) -> bool:
    """Whether the ledger has the job just as it is. Raises InputError when it has it differently."""
    found = next(ledger.rows("SELECT id, spec FROM jobs WHERE job = ?", job.number), None)
    if found is None:
        return False
    same = found == (job.id, job.spec)
    if same:
        first, last = job.pictures[0].index, job.pictures[-1].index
        query = (
            "SELECT p.idx, p.seed, a.path FROM pictures p JOIN paths a ON a.idx = p.idx "
            "WHERE p.job = ? AND p.idx BETWEEN ? AND ? ORDER BY p.idx"
        )
        kept = list(ledger.rows(query, job.number, first, last))
        same = kept == [(picture.index, str(picture.seed), picture.path) for picture in job.pictures]
    if not same:
        raise InputError(
            f"line {job.line} of the job file: job {job.id!r} is not what it was when the batch was begun; "
            "add changed jobs at the end under new ids, or choose another output folder"
        )
    return True

"""What can be told about a batch without drawing."""

from __future__ import annotations

from typing import Any

from edgedit.apps.batch.ledger import Ledger
from edgedit.apps.batch.owners import is_gone

__all__ = ["describe_batch"]

#: Errors and lines that are listed.
LISTED = 20


def describe_batch(ledger: Ledger) -> dict[str, Any]:
    """Counts, what went wrong how often, lines left out, time spent, and who is at work now."""
    counts, meta = ledger.counts(), ledger.meta
    size, first, last = next(ledger.rows("SELECT sum(bytes), min(finished), max(finished) FROM results"))
    errors = ledger.rows(
        "SELECT error, count(*) FROM failures f JOIN pictures p ON p.idx = f.idx AND p.state = 3 WHERE f.final "
        "GROUP BY error ORDER BY 2 DESC LIMIT ?",
        LISTED,
    )
    mistakes = ledger.rows("SELECT line, field, reason FROM mistakes ORDER BY line LIMIT ?", LISTED)
    owners = ledger.rows("SELECT place, pid, born, host FROM owners")
    return {
        "folder": str(ledger.places.root),
        "model": meta["model"],
        "model_hash": meta["model_hash"],
        "bundle": meta["bundle"],
        "jobs_file": meta["jobs_file"],
        "shard": meta["shard"],
        "jobs": meta["jobs"],
        "pictures": counts.total,
        "done": counts.done,
        "failed": counts.failed,
        "running": counts.running,
        "pending": counts.pending,
        "bytes": size or 0,
        "first_finished": first,
        "last_finished": last,
        "errors": [{"error": error, "pictures": count} for error, count in errors],
        "lines_left_out": meta["mistakes"],
        "mistakes": [{"line": line, "field": field, "reason": reason} for line, field, reason in mistakes],
        "at_work": [
            {"process": pid, "host": host} for place, pid, born, host in owners if is_gone(place, pid, born) is not True
        ],
    }

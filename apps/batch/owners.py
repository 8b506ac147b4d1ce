"""Who works on a ledger, and who only seems to: leases that expire without trusting any clock.

Each process counts up a number in the ledger. Another believes it dead when it is provably gone (same machine, no such
process), or when the number has stood still for `LEASE` seconds of the observer's own monotonic clock.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

from edgedit.apps.batch.ledger import Ledger
from edgedit.errors import InputError

__all__ = ["BEAT", "LEASE", "Owner", "is_gone", "whereabouts"]

#: Seconds between two beats, and seconds without one after which an owner counts as dead.
BEAT, LEASE = 2.0, 30.0


def whereabouts() -> str:
    """Names the set of processes among which a process number means something: this boot, this PID namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return f"{platform.node()}"
    return f"{boot} {space}"


def _born(pid: int) -> str:
    """When the process started, so that a reused number is noticed; "" where the system does not tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def is_gone(place: str, pid: int, born: str) -> bool | None:
    """Whether the process has ended; None when that cannot be known from here."""
    if place != whereabouts() or os.name == "nt":
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    if born and _born(pid) != born:
        return True
    # A killed process that its parent has not asked after yet still answers.
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state == "Z"


class Owner:
    """This process's place among the owners of a ledger.

    Args:
        join: work beside others that are alive, instead of refusing to start.
        on_wait: told, in one line, when the start has to wait for another's lease.
    """

    def __init__(
        self, ledger: Ledger, *, join: bool, on_wait: Callable[[str], None] | None = None, lease: float = LEASE
    ) -> None:
        self.ledger, self.lease = ledger, lease
        self._seen: dict[int, tuple[int, float]] = {}
        self._first: dict[int, int] = {}
        self._beaten = 0.0
        told = False
        while True:
            self.reap()
            number = self._enter(join)
            if number is not None:
                self.number = number
                return
            if not told and on_wait is not None:
                on_wait(f"another process may be at work in {ledger.places.root}; waiting {lease:.0f} s to see")
                told = True
            time.sleep(min(BEAT / 2, lease / 4))

    def _enter(self, join: bool) -> int | None:
        """Register; None when it is not known yet whether another owner lives. Raises InputError when one does."""
        with self.ledger.change() as db:
            others = db.execute("SELECT owner, place, pid, born, host, beat FROM owners").fetchall()
            if not join:
                for number, place, pid, born, host, beat in others:
                    first = self._first.setdefault(number, beat)
                    if is_gone(place, pid, born) is False or beat != first:
                        raise InputError(
                            f"{self.ledger.places.root}: process {pid} on {host} is at work on this batch; "
                            "wait for it, or add --join to work beside it"
                        )
                if others:
                    return None
            pid = os.getpid()
            cursor = db.execute(
                "INSERT INTO owners (place, pid, born, host) VALUES (?, ?, ?, ?)",
                (whereabouts(), pid, _born(pid), platform.node()),
            )
            return int(cursor.lastrowid or 0)

    def beat(self) -> int:
        """Show that this process lives, and release what the dead hold; cheap when called often.

        Returns how many pictures were released.
        """
        now = time.monotonic()
        if now - self._beaten < BEAT:
            return 0
        self._beaten = now
        with self.ledger.change() as db:
            if not db.execute("UPDATE owners SET beat = beat + 1 WHERE owner = ?", (self.number,)).rowcount:
                # Others believed this process dead, say because the machine slept. Its pictures may be drawn twice,
                # which gives the same bytes; it goes on under its old number.
                db.execute(
                    "INSERT INTO owners (owner, place, pid, born, host) VALUES (?, ?, ?, ?, ?)",
                    (self.number, whereabouts(), os.getpid(), _born(os.getpid()), platform.node()),
                )
        return self.reap()

    def reap(self) -> int:
        """Strike dead owners off and release their pictures. Returns how many pictures those were."""
        released = 0
        own = getattr(self, "number", None)
        for number, place, pid, born, beat in list(
            self.ledger.rows("SELECT owner, place, pid, born, beat FROM owners")
        ):
            if number == own:
                continue
            gone = is_gone(place, pid, born)
            last, since = self._seen.setdefault(number, (beat, time.monotonic()))
            if gone is None:
                if last != beat:
                    self._seen[number] = (beat, time.monotonic())
                gone = last == beat and time.monotonic() - since > self.lease
            if gone:
                with self.ledger.change() as db:
                    if db.execute("DELETE FROM owners WHERE owner = ? AND beat = ?", (number, beat)).rowcount:
                        cursor = db.execute(
                            "UPDATE pictures SET state = 0, owner = NULL WHERE state = 1 AND owner = ?", (number,)
                        )
                        released += cursor.rowcount
        return released

    def leave(self) -> None:
        """Release what is held and go."""
        with self.ledger.change() as db:
            db.execute("UPDATE pictures SET state = 0, owner = NULL WHERE state = 1 AND owner = ?", (self.number,))
            db.execute("DELETE FROM owners WHERE owner = ?", (self.number,))

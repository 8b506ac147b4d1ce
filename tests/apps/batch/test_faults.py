"""What goes wrong on real machines: full disks, folders that vanish, damaged ledgers, clocks, rival processes."""

from __future__ import annotations

import errno
import io
import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgedit.apps.batch import owners
from edgedit.apps.batch.checking import check_batch
from edgedit.apps.batch.ledger import Ledger
from edgedit.apps.batch.owners import Owner
from edgedit.apps.batch.places import Places
from edgedit.apps.batch.pool import LocalPool
from edgedit.apps.batch.reporter import Reporter
from edgedit.apps.batch.run import Summary
from edgedit.errors import InputError

Write = Callable[..., Path]
Draw = Callable[..., Summary]
Read = Callable[..., dict[str, bytes]]
Open = Callable[..., Ledger]


class Acting(Reporter):
    """Does something after the first picture."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self.act = act

    def picture(self, entry: Any) -> None:
        super().picture(entry)
        if self.drawn == 1:
            self.act()


def test_a_full_disk_stops_the_run_and_costs_no_picture(
    write_jobs: Write, draw_batch: Draw, pictures: Read, open_ledger: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = write_jobs(4)
    draw_batch(jobs, "whole")
    fsync = os.fsync
    full = False

    def limited(descriptor: int) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    def fill() -> None:
        nonlocal full
        full = True

    monkeypatch.setattr(os, "fsync", limited)
    with pytest.raises(InputError, match=r"No space left on device.*free some room and start again"):
        draw_batch(jobs, reporter=Acting(fill), batch=1)
    full = False
    with open_ledger() as ledger:
        counts = ledger.counts()
        assert (counts.failed, counts.running) == (0, 0)
        assert counts.pending > 0
    assert draw_batch(jobs).done == 4
    assert pictures() == pictures("whole")
    with open_ledger() as ledger:
        assert check_batch(ledger).problems == []


def test_a_ledger_that_finds_no_room_says_so(write_jobs: Write, draw_batch: Draw, open_ledger: Open) -> None:
    draw_batch(write_jobs(2), dry_run=True)
    with open_ledger() as ledger:
        (pages,) = next(ledger.rows("PRAGMA page_count"))
        next(ledger.rows(f"PRAGMA max_page_count = {pages}"))
        with pytest.raises(InputError, match="the disk is full: free some room and start again"):
            ledger.set_meta(large="x" * 100_000)
        assert "large" not in dict(ledger.rows("SELECT key, value FROM meta"))


def test_an_output_folder_that_is_deleted_stops_the_run(write_jobs: Write, draw_batch: Draw, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="deleted"):
        draw_batch(write_jobs(6), reporter=Acting(lambda: (tmp_path / "out").rename(tmp_path / "gone")), batch=1)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused(write_jobs: Write, draw_batch: Draw, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="the output folder cannot be made"):
        draw_batch(write_jobs(1), "file/out")


@pytest.fixture
def forbid(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Make a folder read-only, for root too: the system refuses to open a file below it for writing."""
    folders: list[Path] = []
    real = io.open

    def guarded(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if set(mode) & set("wxa+") and any(Path(file).is_relative_to(folder) for folder in folders):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(file))
        return real(file, mode, *arguments, **options)

    monkeypatch.setattr(io, "open", guarded)
    yield folders.append
    folders.clear()


def test_a_folder_that_becomes_read_only_stops_the_run_and_costs_no_picture(
    write_jobs: Write,
    draw_batch: Draw,
    pictures: Read,
    open_ledger: Open,
    tmp_path: Path,
    forbid: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs = write_jobs(4)
    draw_batch(jobs, "whole")
    refusal = r"cannot be written \(Read-only file system\); check the folder's permissions .* start again"
    with pytest.raises(InputError, match=refusal) as refused:
        draw_batch(jobs, reporter=Acting(lambda: forbid(tmp_path / "out")), batch=1)
    assert "\n" not in str(refused.value)
    monkeypatch.undo()
    with open_ledger() as ledger:
        counts = ledger.counts()
        assert (counts.failed, counts.running) == (0, 0)
        assert counts.pending > 0
    assert draw_batch(jobs).done == 4
    assert pictures() == pictures("whole")


def test_a_folder_that_the_system_locks_stops_the_run(write_jobs: Write, draw_batch: Draw, tmp_path: Path) -> None:
    folder = tmp_path / "out" / ".batch" / "partial"

    def lock(how: str) -> None:
        if how == "+i":
            (folder / "left-by-a-killed-process").touch()
        if os.geteuid() != 0:
            folder.chmod(0o500 if how == "+i" else 0o700)
        elif subprocess.run(["chattr", how, folder], capture_output=True).returncode:
            pytest.skip("this file system locks nothing for root")

    if os.geteuid() == 0 and shutil.which("chattr") is None:
        pytest.skip("needs chattr to keep root out")
    try:
        with pytest.raises(InputError, match="cannot be written"):
            draw_batch(write_jobs(4), reporter=Acting(lambda: lock("+i")), batch=1)
        with pytest.raises(InputError, match=r"cannot be removed .* check the folder's permissions"):
            draw_batch(write_jobs(4))
    finally:
        lock("-i")
    assert draw_batch(write_jobs(4)).done == 4


def test_a_ledger_that_may_only_be_read_says_so(write_jobs: Write, draw_batch: Draw, open_ledger: Open) -> None:
    draw_batch(write_jobs(2), dry_run=True)
    with open_ledger() as ledger:
        next(ledger.rows("PRAGMA query_only = 1"), None)
        with pytest.raises(InputError, match="the folder cannot be written; check that it is there"):
            ledger.claim(1, 1)


@pytest.mark.parametrize("rest", [0, 50, 5000])
def test_a_ledger_cut_short_is_refused_in_one_line(
    rest: int, write_jobs: Write, draw_batch: Draw, tmp_path: Path
) -> None:
    jobs = write_jobs(20)
    draw_batch(jobs, dry_run=True)
    ledger = tmp_path / "out/.batch/ledger.sqlite"
    ledger.write_bytes(ledger.read_bytes()[:rest])
    with pytest.raises(InputError, match=r"is cut short|is damaged") as refused:
        draw_batch(jobs)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("PRAGMA user_version = 9", "has version 9 and this edgedit knows 1"),
        ("PRAGMA application_id = 0", "not a batch"),
    ],
)
def test_a_ledger_of_another_version_or_kind_is_refused(
    change: str, words: str, write_jobs: Write, draw_batch: Draw, tmp_path: Path
) -> None:
    draw_batch(write_jobs(1), dry_run=True)
    connection = sqlite3.connect(tmp_path / "out/.batch/ledger.sqlite")
    connection.execute(change)
    connection.close()
    with pytest.raises(InputError, match=words):
        draw_batch(write_jobs(1))


def test_a_clock_that_jumps_back_hurts_nothing(
    write_jobs: Write, draw_batch: Draw, open_ledger: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(2_000_000_000, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    summary = draw_batch(write_jobs(4), batch=1)
    assert (summary.done, summary.failed) == (4, 0)
    assert summary.seconds >= 0
    with open_ledger() as ledger:
        assert check_batch(ledger).problems == []
        assert all(value >= 0 for _, _, _, seconds in ledger.finished() for value in seconds.values())


def test_a_second_process_is_refused_or_joins(write_jobs: Write, draw_batch: Draw, open_ledger: Open) -> None:
    jobs = write_jobs(4)
    draw_batch(jobs, dry_run=True)
    with open_ledger() as ledger:
        other = Owner(ledger, join=False)
        with pytest.raises(InputError, match=r"process \d+ on .* is at work on this batch"):
            draw_batch(jobs)
        (mine,) = ledger.claim(other.number, 1)
        released: list[int] = []

        def release() -> None:
            released.append(ledger.release(other.number))

        summary = draw_batch(jobs, join=True, reporter=Acting(release))
        assert released == [1]
        assert summary.done == 4
        assert mine.index == 0
        other.leave()


def test_the_lease_of_a_process_that_cannot_be_seen_expires_without_a_clock(
    write_jobs: Write, draw_batch: Draw, open_ledger: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_batch(write_jobs(2), dry_run=True)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with open_ledger() as ledger:
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(owners, "whereabouts", lambda: "another machine")
            lost = Owner(ledger, join=False)
            assert len(ledger.claim(lost.number, 2)) == 2
        waited: list[str] = []
        found = Owner(ledger, join=False, on_wait=waited.append, lease=0.2)
        assert len(waited) == 1
        assert ledger.counts().pending == 2
        found.leave()


def test_a_process_elsewhere_that_gives_signs_of_life_is_left_alone(
    write_jobs: Write, draw_batch: Draw, open_ledger: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_batch(write_jobs(2), dry_run=True)
    with open_ledger() as ledger:
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(owners, "whereabouts", lambda: "another machine")
            other = Owner(ledger, join=False)

        def beat(_: str) -> None:
            with ledger.change() as db:
                db.execute("UPDATE owners SET beat = beat + 1 WHERE owner = ?", (other.number,))

        with pytest.raises(InputError, match="is at work on this batch"):
            Owner(ledger, join=False, on_wait=beat, lease=30)


def test_a_number_that_another_process_has_now_is_not_the_old_process(
    write_jobs: Write, draw_batch: Draw, open_ledger: Open
) -> None:
    assert owners.is_gone(owners.whereabouts(), os.getpid(), "1") is True
    assert owners.is_gone(owners.whereabouts(), os.getpid(), owners._born(os.getpid())) is False
    assert owners.is_gone("another machine", os.getpid(), "") is None


def test_a_picture_that_exceeds_the_memory_of_its_worker_fails_alone(
    write_jobs: Write, draw_batch: Draw, open_ledger: Open
) -> None:
    jobs = [
        {"id": "huge", "prompt": "a cat", "steps": 1, "size": "16384x16384"},
        {"id": "small", "prompt": "a cat", "steps": 1},
    ]
    draw_batch(write_jobs(jobs), dry_run=True)
    summary = draw_batch(None, make_pool=lambda s: LocalPool(_with_memory(s, 700 << 20)), retries=1, batch=1)
    assert (summary.done, summary.failed) == (1, 1)
    with open_ledger() as ledger:
        ((picture, error),) = ledger.failures()
    assert picture.id == "huge"
    assert error.startswith("out of memory: ")


def _with_memory(settings: Any, memory: int) -> Any:
    from dataclasses import replace

    return replace(settings, memory=memory)


def test_a_picture_that_takes_too_long_fails_and_the_others_do_not(write_jobs: Write, draw_batch: Draw) -> None:
    jobs = [
        {"id": "slow", "prompt": "a cat", "steps": 1000, "size": "64x64"},
        {"id": "quick", "prompt": "a cat", "steps": 1},
    ]
    summary = draw_batch(write_jobs(jobs), make_pool=LocalPool, timeout=4.0, retries=0)
    assert (summary.done, summary.failed) == (1, 1)


def test_temporary_files_of_a_killed_process_go_at_the_next_start(
    write_jobs: Write, draw_batch: Draw, tmp_path: Path, open_ledger: Open
) -> None:
    jobs = write_jobs(2)
    draw_batch(jobs, dry_run=True)
    places = Places(tmp_path / "out")
    (places.partial / "w1-abc").write_bytes(b"half a picture")
    places.index.write_text('{"half": ')
    draw_batch(jobs)
    with open_ledger() as ledger:
        assert check_batch(ledger).problems == []


def test_checking_finds_what_differs(write_jobs: Write, draw_batch: Draw, tmp_path: Path, open_ledger: Open) -> None:
    draw_batch(write_jobs(3), name="{id}.png")
    root = tmp_path / "out"
    (root / "j0.png").unlink()
    (root / "j1.png").write_bytes(b"x")
    (root / "stranger.png").write_bytes(b"x")
    with open_ledger() as ledger:
        found = check_batch(ledger)
        assert sorted(found.damaged) == [0, 1]
        assert found.strangers == ["stranger.png"]
        ledger.retry(list(found.damaged))
    draw_batch(None)
    (root / "stranger.png").unlink()
    with open_ledger() as ledger:
        assert check_batch(ledger).problems == []

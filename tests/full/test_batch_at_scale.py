"""Batches of real size: a million lines, and two thousand pictures under thirty kills."""

from __future__ import annotations

import json
import os
import random
import resource
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killing import draw_and_kill

from edgedit.apps.batch.checking import check_batch
from edgedit.apps.batch.ledger import Ledger
from edgedit.apps.batch.places import Places

pytestmark = pytest.mark.full

#: Pictures and kills; the whole check is 2000 and 30.
PICTURES = int(os.environ.get("EDGEDIT_BATCH_PICTURES", "2000"))
KILLS = int(os.environ.get("EDGEDIT_BATCH_KILLS", "30"))


def test_a_million_lines_are_checked_in_three_minutes_and_half_a_gigabyte(tmp_path: Path) -> None:
    jobs = tmp_path / "jobs.jsonl"
    with jobs.open("w") as file:
        for i in range(1_000_000):
            job = {"id": f"scene-{i}", "prompt": f"a red circle above a blue square, number {i}", "seed": i}
            file.write(json.dumps({**job, "metadata": {"row": i}}) + "\n")
    command = [sys.executable, "-m", "edgedit", "batch", str(jobs), "-o", str(tmp_path / "out"), "-q"]
    started = time.monotonic()
    subprocess.run([*command, "--dry-run"], check=True)
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    connection = sqlite3.connect(tmp_path / "out/.batch/ledger.sqlite")
    connection.execute("UPDATE pictures SET state = 2, attempts = 1")
    connection.execute("INSERT INTO results SELECT idx, '', 1000, '{}', 0 FROM pictures")
    connection.commit()
    connection.close()
    started = time.monotonic()
    subprocess.run(command, check=True)
    again = time.monotonic() - started
    print(f"\n1,000,000 lines: ledger in {seconds:.1f} s, peak {peak / 1e6:.0f} MB; started again in {again:.2f} s")
    assert seconds < 180
    assert peak < 500e6
    assert again < 5


def test_two_thousand_pictures_survive_thirty_kills(tmp_path: Path) -> None:
    prompts = ["a red circle above a blue square on a white background", "three small rings", "a green star"]
    jobs = tmp_path / "jobs.jsonl"
    lines = ({"id": f"p{i}", "prompt": prompts[i % 3], "seed": i, "steps": 4} for i in range(PICTURES))
    jobs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "edgedit", "batch", str(jobs), "-o", str(tmp_path / "whole"), "-q"]
    subprocess.run([*command, "-t", "1", "--batch-size", "1"], check=True)
    seed = random.randrange(2**31)
    started = time.monotonic()
    killed = draw_and_kill(
        [jobs, "-o", tmp_path / "out", "-t", 1],
        kills=KILLS,
        rng=random.Random(seed),
        longest=8 * PICTURES / 2000,
        timeout=7200,
    )
    print(f"\n{PICTURES} pictures, killed {killed} times (seed {seed}), {time.monotonic() - started:.0f} s")
    with Ledger(Places(tmp_path / "out")) as ledger, Ledger(Places(tmp_path / "whole")) as whole:
        assert ledger.counts().done == PICTURES
        assert check_batch(ledger).problems == []
        assert [row[1] for row in ledger.finished()] == [row[1] for row in whole.finished()]
    if PICTURES >= 2000:
        assert killed == KILLS

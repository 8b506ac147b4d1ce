"""`edgedit batch` as processes: killed, interrupted, joined, spread over a cluster, asked for reports."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killing import draw_and_kill

from edgedit.apps.batch.checking import check_batch
from edgedit.apps.batch.ledger import Ledger
from edgedit.apps.batch.run import Summary

Write = Callable[..., Path]
Draw = Callable[..., Summary]
Read = Callable[..., dict[str, bytes]]
Open = Callable[..., Ledger]
Run = Callable[..., Any]


def test_killed_again_and_again_it_ends_with_every_picture_drawn_once_and_alike(
    write_jobs: Write, draw_batch: Draw, pictures: Read, open_ledger: Open, bundle: Path, tmp_path: Path
) -> None:
    jobs = write_jobs([{"id": f"j{i}", "prompt": "a red cat", "seed": i, "steps": 30} for i in range(40)])
    draw_batch(jobs, "whole")
    seed = random.randrange(2**31)
    arguments = [jobs, "-m", bundle, "-o", tmp_path / "out", "-w", 2, "-t", 1, "--batch-size", 3]
    killed = draw_and_kill(arguments, kills=3, rng=random.Random(seed), longest=0.3)
    assert pictures() == pictures("whole"), f"seed {seed}, killed {killed} times"
    with open_ledger() as ledger:
        assert ledger.counts().done == 40
        assert check_batch(ledger).problems == []


def test_the_first_ctrl_c_finishes_the_pictures_under_way(
    write_jobs: Write, start: Run, bundle: Path, open_ledger: Open, tmp_path: Path
) -> None:
    jobs = write_jobs([{"id": f"j{i}", "prompt": "a cat", "steps": 200} for i in range(200)])
    process = start("batch", jobs, "-m", bundle, "-o", tmp_path / "out", "-w", 1, "-t", 1, "--json")
    for line in process.stdout:
        if json.loads(line)["event"] == "picture":
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "stopping after the pictures under way" in err
    events = [json.loads(line) for line in out.splitlines()]
    with open_ledger() as ledger:
        counts = ledger.counts()
        assert (counts.running, counts.failed) == (0, 0)
        assert 0 < counts.done < 200
        assert counts.done == 1 + sum(event["event"] == "picture" for event in events)
        assert next(ledger.rows("SELECT count(*) FROM owners")) == (0,)
        assert check_batch(ledger).problems == []


def test_the_second_ctrl_c_stops_at_once(
    write_jobs: Write, start: Run, bundle: Path, open_ledger: Open, tmp_path: Path
) -> None:
    jobs = write_jobs([{"id": f"j{i}", "prompt": "a cat", "steps": 1000, "size": "64x64"} for i in range(4)])
    process = start("batch", jobs, "-m", bundle, "-o", tmp_path / "out", "-w", 1, "-t", 1, "--json", "--force-size")
    for line in process.stdout:
        if json.loads(line)["event"] == "step":
            break
    process.send_signal(signal.SIGINT)
    for line in process.stderr:
        if "press Ctrl-C again" in line:
            break
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert time.monotonic() - began < 20
    with open_ledger() as ledger:
        assert ledger.counts().pending == 4
        assert check_batch(ledger).problems == []


def test_jobs_from_standard_input_go_on_without_it(
    write_jobs: Write, bundle: Path, cli: Run, tmp_path: Path, open_ledger: Open
) -> None:
    jobs = write_jobs(2)
    command = [sys.executable, "-m", "edgedit", "batch", "-", "-m", str(bundle), "-o", "out", "--dry-run", "-q"]
    subprocess.run(command, input=jobs.read_bytes(), check=True)
    # Nothing had failed: retry draws what is left.
    assert cli("batch", "retry", "out", "-w", 1, "-q").status == 0
    with open_ledger() as ledger:
        assert ledger.counts().done == 2


def test_status_report_and_retry_say_what_failed(write_jobs: Write, draw_batch: Draw, cli: Run, tmp_path: Path) -> None:
    bad = {"id": "bad", "prompt": "a </script><b>cat", "guidance_scale": 1e38, "steps": 1}
    jobs = write_jobs([bad, {"id": "good", "prompt": "a cat", "steps": 1}, {"prompt": 7}])
    draw_batch(jobs, skip_invalid=True, retries=0)
    status = cli("batch", "status", "out")
    assert status.status == 0
    assert "2: 1 done, 1 failed, 0 running, 0 pending" in status.out
    assert "failed 1 times: the " in status.out
    assert "values that are not numbers" in status.out
    assert "line 3: prompt: must be a text, not 7" in status.out
    facts = json.loads(cli("batch", "status", "out", "--json").out)
    assert (facts["done"], facts["failed"], facts["lines_left_out"], facts["at_work"]) == (1, 1, 1, [])
    assert cli("batch", "report", "out").lines == ["out/report.html"]
    page = Path("out/report.html").read_text()
    data = page.split('type="application/json">')[1].split("</script>")[0]
    items = {item["id"]: item for item in json.loads(data)}
    assert items["bad"]["prompt"] == "a </script><b>cat"
    assert items["good"]["thumb"].startswith("data:image/webp;base64,")
    assert items["good"]["href"] == "./0000/good.png"
    verified = cli("batch", "report", "out", "--verify")
    assert (verified.status, verified.lines) == (0, ["1 pictures checked, 0 problems"])
    Path("out/0000/good.png").write_bytes(b"x")
    verified = cli("batch", "report", "out", "--verify")
    assert (verified.status, verified.lines[0]) == (1, "0000/good.png: has other bytes than were recorded")


def test_merged_shards_are_the_whole_batch(
    write_jobs: Write, draw_batch: Draw, pictures: Read, cli: Run, open_ledger: Open
) -> None:
    from edgedit.apps.batch.planning import Shard

    jobs = write_jobs(5)
    draw_batch(jobs, "whole")
    for number in (1, 2):
        draw_batch(jobs, f"part{number}", shard=Shard(number, 2))
    assert cli("batch", "merge", "all", "part1").err.startswith("error: shards 2 of 2 are missing")
    Path("part1/0000/j0.png").unlink()
    merged = cli("batch", "merge", "all", "part1", "part2")
    assert (merged.status, merged.lines[-1]) == (0, "all: 4 pictures")
    assert "part1/0000/j0.png: cannot be read" in merged.out
    assert draw_batch(jobs, "all").drawn == 1
    assert pictures("all") == pictures("whole")
    with open_ledger("all") as ledger:
        assert check_batch(ledger).problems == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gone.jsonl", "-o", "out"], "gone.jsonl: there is no such job file"),
        (["jobs.jsonl", "-o", "out", "--shard", "3/2"], "--shard '3/2' is not NUMBER/COUNT"),
        (["jobs.jsonl", "-o", "out", "--memory", "much"], "--memory 'much' is not a size"),
        (["jobs.jsonl", "-o", "out", "--memory", "1M"], "--memory of 0.0 GB is too little"),
        (["jobs.jsonl", "-o", "out", "--name", "../{id}.png"], "must be a plain path inside the output folder"),
        (["jobs.jsonl", "-o", "out", "--engine", "spark"], "choose local or ray"),
        (["jobs.jsonl", "-o", "out", "--address", "x"], "add --engine ray"),
        (["jobs.jsonl"], "Missing option '--output'"),
        (["empty.jsonl", "-o", "out"], "holds no valid job"),
        (["status", "nowhere"], "nowhere: holds no batch"),
        (["retry", "nowhere"], "nowhere: holds no batch"),
        (["report", "nowhere", "--verify", "-o", "x"], "give one of --output, --verify and --parquet"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_on_the_command_line_is_one_line(
    arguments: list[str], words: str, write_jobs: Write, cli: Run
) -> None:
    write_jobs(1)
    Path("empty.jsonl").write_text("\n")
    outcome = cli("batch", *arguments)
    assert outcome.status == 2
    assert words in outcome.err
    assert outcome.err.startswith("error: ")
    assert len(outcome.err.splitlines()) == 1


def test_help_of_batch_names_its_commands(cli: Run) -> None:
    out = cli("batch", "--help").out
    assert all(name in out for name in ("status", "retry", "report", "merge"))
    assert "--skip-invalid" in cli("batch", "run", "--help").out

"""`linearize`, `distill` and `eval`, as a person calls them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

QUICK = ("--train-steps", "11", "--samples", "4", "--batch-size", "2")


def test_a_new_user_gets_from_a_checkpoint_to_a_fast_picture(checkpoint: Path, cli: Callable[..., Any]) -> None:
    done = cli("linearize", str(checkpoint), "-o", "linear", "--layers", "auto", "--max-error", "100", *QUICK)
    assert done.status == 0, done.err
    assert "error alone" in done.out
    assert "regression: loss" in done.out
    assert "lit: layers 0, 1" in done.out
    done = cli("distill", "linear", "-o", "fast", "--method", "lcm", "--steps", "2", *QUICK, "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["schedule"]["timesteps"] == [[999, 500], [999]]
    assert Path("fast/loss.png").stat().st_size > 1000
    assert cli("convert", "fast", "-o", "fast.edgedit", "-q").status == 0
    done = cli("generate", "a red circle", "-m", "fast.edgedit", "-o", "fast.png", "--seed", "1")
    assert done.status == 0, done.err
    assert Path("fast.png").exists()
    done = cli("generate", "a red circle", "-m", "fast.edgedit", "-o", "one.png", "--steps", "1", "--seed", "1")
    assert done.status == 0, done.err


def test_eval_of_held_out_scenes_writes_tables_and_pictures(bundle: Path, cli: Callable[..., Any]) -> None:
    done = cli("eval", str(bundle), "-n", "5", "-o", "scores", "--steps", "2", "--against", str(bundle))
    assert done.status == 0, done.err
    assert "| one object | **all claims** |" in done.out
    record = json.loads(Path("scores/scores.json").read_text())
    assert record["tables"]["all prompts"]["all"]["total"] == 5
    assert record["frechet_to_scenes"] > 0
    assert {path.name for path in Path("scores").iterdir()} == {"scores.json", "scores.md", "sheet.png", "pairs.png"}


def test_eval_against_itself_finds_no_difference(bundle: Path, cli: Callable[..., Any]) -> None:
    Path("prompts.txt").write_text("a red circle\n\na blue star\n")
    done = cli("eval", str(bundle), "--prompts", "prompts.txt", "-o", "scores", "--against", str(bundle), "--json")
    assert done.status == 0, done.err
    record = json.loads(done.out)
    assert "tables" not in record
    assert record["agreement"]["psnr_db"] == 100
    assert record["frechet_to_other"] < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linearize", "missing", "-o", "new"), "does not exist"),
        (("linearize", "CHECKPOINT", "-o", "new", "--budget", "soon"), "write 90s, 30m or 2h"),
        (("linearize", "CHECKPOINT", "-o", "new", "--budget", "0m"), "more than nothing"),
        (("linearize", "CHECKPOINT", "-o", "new", "--attention", "fast"), "lit, relu, clear:RADIUS"),
        (("linearize", "CHECKPOINT", "-o", "no/such/new"), "choose another --output"),
        (("distill", "CHECKPOINT", "-o", "new", "--method", "luck"), "unknown method"),
        (("distill", "CHECKPOINT", "-o", "new", "--steps", "5"), "choose 1, 2, 4"),
        (("eval", "CHECKPOINT", "-o", "new", "-n", "1"), "at least 2"),
        (("eval", "CHECKPOINT", "-o", "new", "-n", "none.txt"), "neither a number nor a text file"),
        (("eval", "missing.edgedit", "-o", "new"), "missing.edgedit"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    arguments: tuple[str, ...], message: str, checkpoint: Path, cli: Callable[..., Any]
) -> None:
    done = cli(*(str(checkpoint) if word == "CHECKPOINT" else word for word in arguments))
    assert done.status == 2
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not Path("new").exists()


def test_ctrl_c_leaves_a_run_that_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from edgedit.apps.cli.main import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "linearize", str(checkpoint), "-o", "new", "--samples", "4"]
    child = subprocess.Popen([*command, "--train-steps", "100000"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / ".new.work" / "losses.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(child.pid, signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    assert "nothing was left half written" in errors
    assert not (tmp_path / "new").exists()
    assert (tmp_path / ".new.work" / "latents.npy").exists()

"""The command line as a process: start-up, exit status, signals, pipes and terminals."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import edgedit
from edgedit.metadata import read_recipe

Start = Callable[..., "subprocess.Popen[str]"]

#: A picture that takes a minute or so.
LONG = ("generate", "a cat", "-s", 1, "--steps", 1000, "--size", "64x64", "--force-size", "-t", 1)


def hidden(folder: Path) -> list[Path]:
    """Files that an atomic write has not finished."""
    return [path for path in folder.rglob(".*") if path.name != ".cache"]


def interrupt_after(process: subprocess.Popen[str], stream: Any, mark: str, times: int = 1) -> None:
    """Send Ctrl-C when `stream` says `mark`, again when the first is acknowledged."""
    for line in stream:
        if mark in line:
            break
    process.send_signal(signal.SIGINT)
    for _ in range(times - 1):
        assert process.stderr is not None
        for line in process.stderr:
            if "press Ctrl-C again" in line:
                break
        process.send_signal(signal.SIGINT)


def test_the_console_script_is_this_command() -> None:
    (script,) = (entry for entry in entry_points(group="console_scripts") if entry.name == "edgedit")
    assert script.value == "edgedit.apps.cli.main:main"


@pytest.mark.parametrize("arguments", [["--version"], ["-V"]])
def test_python_m_edgedit_tells_its_version(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "edgedit", *arguments], capture_output=True, text=True, check=True)
    assert done.stdout == f"edgedit {edgedit.__version__}\n"


def test_help_takes_less_than_half_a_second_of_processor_time() -> None:
    times = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "edgedit", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.5


def test_help_loads_no_backend_and_no_converter() -> None:
    code = "import sys; from edgedit.apps.cli.main import main; main(['generate', '--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "edgedit.apps.cli.generate" in loaded
    heavy = {"numpy", "PIL", "onnx", "onnxruntime", "onnxscript", "tokenizers", "torch", "huggingface_hub"}
    assert not heavy & loaded


def test_a_run_in_another_process_gives_the_same_picture_and_prints_its_path_alone(
    start: Start, bundle: Path, draw: Callable[..., Any]
) -> None:
    draw("a red cat", "-s", 8, "-o", "here.png")
    process = start("generate", "a red cat", "-m", bundle, "-s", 8, "--steps", 2, "-t", 1, "-o", "there.png")
    out, err = process.communicate()
    assert (process.returncode, out) == (0, "there.png\n"), err
    assert Path("here.png").read_bytes() == Path("there.png").read_bytes()
    assert "Traceback" not in err


def test_the_first_ctrl_c_stops_after_a_step_and_keeps_the_finished_pictures(start: Start, bundle: Path) -> None:
    process = start("generate", "a cat", "-m", bundle, "-s", 1, "-b", 200, "--steps", 100, "-t", 1)
    assert process.stdout is not None
    first = process.stdout.readline().strip()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    paths = [first, *out.splitlines()]
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "stopping after this step" in err
    assert f"{len(paths)} of 200 pictures finished" in err
    assert err.splitlines()[-1] == "stopped; nothing was left half written"
    assert sorted(path.name for path in Path().glob("*.png")) == sorted(paths)
    for path in paths:
        assert read_recipe(path)["steps"] == 100
        with Image.open(path) as image:
            assert np.asarray(image).shape == (16, 16, 3)
    assert hidden(Path()) == []


def test_ctrl_c_stops_between_two_windows_of_a_step(start: Start, bundle: Path) -> None:
    windows = ("--size", "512x512", "--denoise-tile", 16, "--denoise-overlap", 12)
    process = start("generate", "a cat", "-m", bundle, "-s", 1, "--steps", 1, "-t", 1, *windows, "--json")
    interrupt_after(process, process.stdout, "denoise")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "stopping after this window" in err
    assert list(Path().glob("*.png")) == []


def test_the_first_ctrl_c_does_not_wait_for_the_picture(start: Start, bundle: Path) -> None:
    process = start(*LONG, "-m", bundle)
    interrupt_after(process, process.stderr, "denoise")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "0 of 1 pictures finished" in err
    assert list(Path().glob("*.png")) == []


def test_the_second_ctrl_c_stops_at_once_and_leaves_nothing_half_written(start: Start, bundle: Path) -> None:
    process = start(*LONG, "-m", bundle)
    interrupt_after(process, process.stderr, "denoise", times=2)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert list(Path().glob("*.png")) == []
    assert hidden(Path()) == []


def test_ctrl_c_while_converting_leaves_no_part_of_a_bundle(start: Start, checkpoint: Path) -> None:
    process = start("convert", checkpoint, "-o", "a.edgedit", "--measure")
    interrupt_after(process, process.stderr, "transformer")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "stopped; nothing was left half written"
    assert not Path("a.edgedit").exists()
    assert hidden(Path()) == []


@pytest.mark.parametrize("command", ["convert", "generate"])
def test_a_full_disk_is_one_line_and_leaves_nothing(start: Start, checkpoint: Path, bundle: Path, command: str) -> None:
    def limit() -> None:
        # Files above this size cannot be written: the closest to a full disk that needs no privileges.
        most = 50_000 if command == "convert" else 100
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    arguments = {
        "convert": ["convert", checkpoint, "-o", "a.edgedit", "-q"],
        "generate": ["generate", "a cat", "-m", bundle, "--steps", 1, "-t", 1, "-o", "a.png", "-q"],
    }[command]
    process = start(*arguments, preexec_fn=limit)
    out, err = process.communicate()
    assert (process.returncode, out) == (2, ""), err
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert any(words in err for words in ("disk is full", "disk may be full", "has room"))
    assert not Path("a.edgedit").exists()
    assert not Path("a.png").exists()
    assert hidden(Path()) == []


def test_a_reader_that_goes_away_causes_no_complaint(start: Start) -> None:
    process = start("models", "--json")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.wait()


def test_a_debug_run_shows_the_traceback(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("1", True), ("0", False)):
        monkeypatch.setenv("EDGEDIT_DEBUG", value)
        process = start("verify", "missing")
        _, err = process.communicate()
        assert process.returncode != 0
        assert ("Traceback" in err) is expected
        assert "there is no such bundle" in err


def test_a_fault_of_our_own_is_one_line_that_says_how_to_report_it(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("edgedit.verify", broken)
    done = cli("verify", "builtin", "-q")
    assert (done.status, done.out) == (2, "")
    assert "a fault in edgedit (ZeroDivisionError: a bug)" in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory"),
        (PermissionError(13, "Permission denied", "/x/y"), "/x/y: Permission denied; check its permissions"),
        (OSError(28, "No space left on device"), "No space left on device; free some room"),
        (KeyboardInterrupt(), "stopped; nothing was left half written"),
    ],
)
def test_failures_of_the_machine_are_one_line(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, error: BaseException, words: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("edgedit.verify", broken)
    done = cli("verify", "builtin", "-q")
    assert done.status == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert (done.out, len(done.err.splitlines())) == ("", 1)
    assert words in done.err


def test_on_a_terminal_a_bar_is_drawn_and_cleared_and_stdout_stays_clean(start: Start, bundle: Path) -> None:
    import pty

    terminal, end = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        while True:
            try:
                data = os.read(terminal, 4096)
            except OSError:
                return
            if not data:
                return
            shown.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    process = start("generate", "a [red] zebra", "-m", bundle, "--steps", 40, "-t", 1, "-s", 1, "-s", 2, stderr=end)
    out = process.communicate()[0]
    os.close(end)
    reader.join(timeout=30)
    os.close(terminal)
    text = b"".join(shown).decode()
    assert (process.returncode, out) == (0, "edgedit-1.png\nedgedit-2.png\n"), text
    for words in ("denoise 2/2", "40/40", "━", "seed 2,", "does not know these words of the prompt: [red], zebra"):
        assert words in text, text


def test_events_reach_a_program_while_it_draws(start: Start, bundle: Path) -> None:
    process = start("generate", "a cat", "-m", bundle, "--steps", 50, "-b", 50, "-t", 1, "--json")
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["event"] == "picture":
            break
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert json.loads(out.splitlines()[-1])["event"] == "stopped"

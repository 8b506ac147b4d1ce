"""One tiny bundle that diffusers' weights were converted to, and ways to run the command line on it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgedit.apps.cli.main import main

# The shell that starts the tests may leave SIGINT ignored; a person's terminal does not.
_RESET = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
_MAIN = "from edgedit.apps.cli.main import main; sys.exit(main())"


@dataclass(frozen=True)
class Outcome:
    """What one call of the command line left."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


@pytest.fixture(scope="session")
def checkpoint(saved_pipeline: Callable[[str], tuple[Any, Path, int]]) -> Path:
    """A PixArt-Sigma pipeline with random weights, as diffusers saves it."""
    return saved_pipeline("pixart-sigma")[1]


@pytest.fixture(scope="session")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint converted by the command line: sides are multiples of 4, trained for 16x16."""
    path = tmp_path_factory.mktemp("bundle") / "tiny.edgedit"
    assert main(["convert", str(checkpoint), "-o", str(path), "-q"]) == 0
    return path


@pytest.fixture(autouse=True)
def _clean_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEDIT_CACHE", str(tmp_path / ".cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("EDGEDIT_MODELS", "EDGEDIT_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run `edgedit ARGUMENTS` in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return Outcome(status, *capsys.readouterr())

    return run


@pytest.fixture
def draw(cli: Callable[..., Outcome], bundle: Path) -> Callable[..., Outcome]:
    """Run `edgedit generate` on the tiny bundle, two steps on one thread unless the arguments say otherwise."""

    def run(*arguments: object, steps: int | None = 2) -> Outcome:
        few = [] if steps is None else ["--steps", steps]
        return cli("generate", "-m", bundle, "-t", 1, *few, *arguments)

    return run


@pytest.fixture
def start() -> Callable[..., subprocess.Popen[str]]:
    """Start `edgedit ARGUMENTS` as a child process with its own pipes."""

    def run(*arguments: object, **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _RESET + _MAIN, *map(str, arguments)]
        settings: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        return subprocess.Popen(command, env={**os.environ}, **settings)

    return run

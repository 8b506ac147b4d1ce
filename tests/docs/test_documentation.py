"""Every command and every piece of Python in the README and in docs/ runs, in order, in a folder of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgedit.api import BUILTIN

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHORTER = ((r"--budget \S+", "--train-steps 2 --samples 4"), (r"--prompts \d+", "--prompts 2"))
"""What takes long on a page is run for a moment only."""
HUB_ID = re.compile(r"edgedit convert ([\w-]+/[\w.-]+) ")


def blocks(page: Path) -> list[tuple[str, str]]:
    return [(language, body) for language, body in FENCE.findall(page.read_text(encoding="utf-8"))]


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with the repository's checkpoint and a bundle in it, as the pages assume."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    (tmp_path / "cat.edgedit").symlink_to(BUILTIN)
    return tmp_path


@pytest.fixture
def environment(workplace: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cache = {"HF_HUB_CACHE": str(workplace / "hub"), "EDGEDIT_CACHE": str(workplace / "cache")}
    return {**os.environ, **cache, "PATH": path, "HF_HUB_OFFLINE": "1"}


def put_into_hub_cache(folder: Path, cache: Path, repository: str) -> None:
    """Lay a saved pipeline out as the Hub's cache does, so that its id resolves without a network."""
    place = cache / f"models--{repository.replace('/', '--')}"
    revision = "0" * 40
    (place / "snapshots").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(revision)
    (place / "snapshots" / revision).symlink_to(folder, target_is_directory=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_on_the_page_runs(
    page: Path, workplace: Path, environment: dict[str, str], saved_pipeline: Callable[[str], tuple[Any, Path, int]]
) -> None:
    for repository in {
        found for _, body in blocks(page) for found in HUB_ID.findall(body) if not found.startswith("models/")
    }:
        put_into_hub_cache(saved_pipeline("pixart-sigma")[1], workplace / "hub", repository)
    python: list[str] = []
    for language, body in blocks(page):
        if language == "python":
            python.append(body)
            continue
        for command in body.replace("\\\n", " ").splitlines():
            if not command.strip() or command.startswith("#"):
                continue
            if command.startswith(
                "make "
            ):  # these set up an environment: see test_make_targets_exist and the full checks
                command = f"make -C {ROOT} -n {command.removeprefix('make ')}"
            for long, short in SHORTER:
                command = re.sub(long, short, command)
            done = subprocess.run(command, shell=True, cwd=workplace, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    if python:
        done = subprocess.run(
            [sys.executable, "-c", "\n".join(python)], cwd=workplace, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_every_link_on_a_page_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"

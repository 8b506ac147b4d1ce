"""Job files, and a way to draw them with workers that are threads of the test."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from inline_pool import InlinePool

from edgedit.apps.batch.ledger import Ledger
from edgedit.apps.batch.places import Places
from edgedit.apps.batch.reporter import Reporter
from edgedit.apps.batch.run import BatchRequest, Summary, run_batch

WORDS = ["a red cat", "a blue dog on the big circle", "a small green square", "the dog of the cat and the circle"]


@pytest.fixture
def write_jobs(tmp_path: Path) -> Callable[..., Path]:
    """Write jobs as JSONL; a number makes so many of two steps with ids j0, j1 …"""

    def write(jobs: int | Iterable[Mapping[str, Any] | str], name: str = "jobs.jsonl") -> Path:
        if isinstance(jobs, int):
            jobs = [{"id": f"j{i}", "prompt": WORDS[i % 4], "steps": 2} for i in range(jobs)]
        path = tmp_path / name
        path.write_text("".join((job if isinstance(job, str) else json.dumps(job)) + "\n" for job in jobs))
        return path

    return write


@pytest.fixture
def draw_batch(tmp_path: Path, bundle: Path) -> Callable[..., Summary]:
    """Run a batch on the tiny bundle with one thread-worker, unless the arguments say otherwise."""

    def run(
        jobs: Path | None,
        root: Path | str = "out",
        *,
        reporter: Reporter | None = None,
        stop: Callable[[], bool] = lambda: False,
        **options: Any,
    ) -> Summary:
        settings: dict[str, Any] = {"workers": 1, "threads": 1, "bundle": bundle, "make_pool": InlinePool}
        settings = {**settings, "force_size": True, **options}
        request = BatchRequest(root=tmp_path / root, jobs=jobs, **settings)
        return run_batch(request, reporter or Reporter(), stop=stop)

    return run


@pytest.fixture
def open_ledger(tmp_path: Path) -> Callable[..., Ledger]:
    """The ledger of an output folder."""
    return lambda root="out": Ledger(Places(tmp_path / root))


@pytest.fixture
def pictures(tmp_path: Path) -> Callable[..., dict[str, bytes]]:
    """path → bytes of every picture in an output folder."""

    def read(root: Path | str = "out") -> dict[str, bytes]:
        folder = tmp_path / root
        found = [path for path in folder.rglob("*") if path.suffix in (".png", ".jpg", ".webp")]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}

    return read

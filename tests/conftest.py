"""Fixtures that tests of several folders share."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def saved_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path, int]]:
    """kind → (pipeline, folder that diffusers saved it to, seed), built once a session."""
    made: dict[str, tuple[Any, Path, int]] = {}

    def get(kind: str) -> tuple[Any, Path, int]:
        if kind not in made:
            from tiny_pipelines import build_pipeline

            seed = random.randrange(2**31)
            pipeline = build_pipeline(kind, seed)
            folder = tmp_path_factory.mktemp(kind)
            pipeline.save_pretrained(folder)
            made[kind] = (pipeline, folder, seed)
        return made[kind]

    return get

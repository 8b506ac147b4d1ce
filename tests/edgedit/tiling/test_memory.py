"""Plans against the peaks of processes: what a decode is said to take is what it takes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parent.parent.parent / "bench"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCH))
    import tiling

    tiling.FOLDER = tmp_path_factory.mktemp("bundles")
    yield tiling
    sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def measure(bench: ModuleType) -> Callable[..., dict[str, Any]]:
    """Decode to a square picture in a process of its own; its peak and its plan in bytes, and more."""

    def run(kind: str, side: int, mode: str, memory: str | None, *, one_tile: bool = False) -> dict[str, Any]:
        bundle = bench.prepare(kind, bench.FOLDER)
        latents = side // bench.factor_of(bundle)
        found: dict[str, Any] = bench.decode(bundle, latents, latents, mode, memory=memory, one_tile=one_tile)
        return found

    return run


@pytest.mark.parametrize(
    ("kind", "side", "mode", "memory"),
    [
        ("scenes", 768, "off", "8G"),
        ("scenes", 768, "exact", "300M"),
        ("tiny", 1024, "off", "8G"),
        ("tiny", 1024, "exact", "250M"),
        ("dc", 512, "off", "8G"),
    ],
)
def test_a_decode_takes_what_was_planned_within_15_percent(
    measure: Callable[..., dict[str, Any]], kind: str, side: int, mode: str, memory: str | None
) -> None:
    found = measure(kind, side, mode, memory)
    assert abs(found["peak"] / found["planned"] - 1) <= 0.15, found


def test_one_tile_of_every_pass_has_the_peak_of_all(measure: Callable[..., dict[str, Any]]) -> None:
    whole, probed = (measure("scenes", 768, "exact", "250M", one_tile=few) for few in (False, True))
    assert probed["tile"] < 768
    assert abs(probed["peak"] / whole["peak"] - 1) <= 0.05, (whole, probed)

"""What tiles promise at real sizes: bytes at the peak whatever the height, and the picture of the whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.full

SCRIPT = Path(__file__).parent.parent / "bench" / "tiling.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundles")


def bench() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))
    import tiling

    return tiling


def decode(
    kind: str, folder: Path, height: int, width: int, memory: str | None, mode: str = "exact"
) -> dict[str, float]:
    bundle = bench().prepare(kind, folder)
    factor = bench().factor_of(bundle)
    options = json.dumps({"memory": memory})
    command = [sys.executable, str(SCRIPT), "child", str(bundle), str(height // factor), str(width // factor), mode]
    done = subprocess.run([*command, options], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(("memory", "limit"), [("3G", 3e9), ("2G", 2e9)])
@pytest.mark.parametrize("kind", ["sdxl", "dcae"])
@pytest.mark.parametrize(("height", "width"), [(4096, 4096), (2048, 16384)])
def test_a_large_picture_keeps_to_its_budget(
    folder: Path, kind: str, height: int, width: int, memory: str, limit: float
) -> None:
    found = decode(kind, folder, height, width, memory)
    assert found["peak"] < limit
    assert abs(found["peak"] / found["planned"] - 1) <= 0.15


def test_the_peak_does_not_grow_with_the_height(folder: Path) -> None:
    peaks = [decode("dcae", folder, height, 1024, "2G")["peak"] for height in (2048, 8192, 32768)]
    assert max(peaks) < 2e9


@pytest.mark.parametrize(
    ("kind", "side", "mode", "memory"),
    [
        ("sdxl", 512, "off", "8G"),
        ("sdxl", 768, "exact", "1200M"),
        ("kl", 1024, "off", "8G"),
        ("kl", 1024, "exact", "500M"),
        ("dcae", 768, "off", "8G"),
        ("dcae", 1536, "exact", "1500M"),
        ("taesd", 1024, "off", "8G"),
        ("taesd", 2048, "exact", "500M"),
        ("scenes", 512, "off", "8G"),
        ("scenes", 1024, "exact", "400M"),
        ("dc", 1024, "exact", "300M"),
    ],
)
def test_a_plan_says_what_a_decode_takes(folder: Path, kind: str, side: int, mode: str, memory: str | None) -> None:
    found = decode(kind, folder, side, side, memory, mode)
    assert abs(found["peak"] / found["planned"] - 1) <= 0.15, found


@pytest.mark.parametrize("kind", ["scenes", "kl", "kl3", "kl2"])
def test_fast_comes_within_50_db_of_the_whole_from_every_map_that_it_may_start_from(folder: Path, kind: str) -> None:
    from edgedit.bundle import open_bundle
    from edgedit.image import RowCollector
    from edgedit.runtimes.base import RuntimeOptions, open_runtime
    from edgedit.tiling.pieces import read_pieces
    from edgedit.tiling.regions import Extent
    from edgedit.tiling.run import TileRunner
    from edgedit.tiling.schedule import Budget, _fast, _Search

    opened = open_bundle(bench().prepare(kind, folder))
    runtime: Any = open_runtime(opened, "onnx", RuntimeOptions())
    tiles = opened.artefact("decoder", "onnx").tiles
    assert tiles is not None
    pieces = read_pieces(opened.file(tiles))
    side = 512 // bench().factor_of(opened.path)
    latents = bench().patchwork(pieces.values[pieces.input].channels, side, side)
    session = runtime.open("decoder")
    (name,) = session.inputs
    (whole,) = session.run({name: latents}).values()
    search = _Search(pieces, Extent(side, side), Budget(2e9, 1e12))
    found = {}
    for boundary in pieces.boundaries[1:-1]:
        schedule = _fast(search, boundary)
        if schedule is None:
            continue
        rows = RowCollector(as_pixels=False)
        runner = TileRunner(pieces, lambda graph: runtime.open_piece("decoder", graph), folder / "scratch")
        runner.run(latents, schedule.program, lambda top, band, rows=rows: rows(top, band.copy()))
        found[boundary] = bench().psnr(rows.result(), whole)
    assert found
    assert min(found.values()) >= 50, found

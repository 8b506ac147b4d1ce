"""What tiles promise at real sizes: bytes at the peak whatever the height, and the picture of the whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

SCRIPT = Path(__file__).parent.parent / "bench" / "tiling.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundles")


def decode(kind: str, folder: Path, height: int, width: int, memory: str) -> dict[str, float]:
    sys.path.insert(0, str(SCRIPT.parent))
    import tiling as bench

    bundle = bench.prepare(kind, folder)
    factor = bench.factor_of(bundle)
    options = json.dumps({"memory": memory})
    command = [sys.executable, str(SCRIPT), "child", str(bundle), str(height // factor), str(width // factor), "exact"]
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

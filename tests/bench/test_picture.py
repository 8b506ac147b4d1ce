from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.full
@pytest.mark.skipif(sys.platform == "win32", reason="reads a child's peak memory with wait4")
def test_time_to_a_picture_is_measured_beside_diffusers(tmp_path: Path) -> None:
    script = Path(__file__).parent / "picture.py"
    command = [sys.executable, str(script), "--quick", "--pixels", "16", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "picture.json").read_text())
    assert [len(rounds) for rounds in found.values()] == [1, 1]
    assert all(seconds > 0 and peak > 1e7 for rounds in found.values() for seconds, peak in rounds)
    assert "× memory" in (tmp_path / "picture.md").read_text()

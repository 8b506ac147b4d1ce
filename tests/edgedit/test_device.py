from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from edgedit.device import available_cores, available_memory, cache_dir


def test_available_memory_is_what_the_system_says() -> None:
    found, expected = available_memory(), psutil.virtual_memory().available
    assert found is not None
    assert found <= expected * 1.2


def test_the_peak_is_the_process_s_own_and_not_that_of_the_one_that_started_it() -> None:
    large = bytearray(256 << 20)
    for place in range(0, len(large), 4096):
        large[place] = 1
    code = "from edgedit.device import peak_memory; a = peak_memory(); b = bytes(64 << 20); print(a, peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < 200 << 20
    assert after >= before
    del large


def test_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEDIT_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("EDGEDIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_dir() == tmp_path / "edgedit"


def test_cores_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= available_cores() <= (psutil.cpu_count() or 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3}, raising=False)
    assert available_cores() == 1

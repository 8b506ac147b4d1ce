"""The quantization benchmark runs and its table says what it measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import quantization


@pytest.mark.full
def test_the_table_has_a_row_a_form(tmp_path: Path) -> None:
    output = tmp_path / "table.md"
    quantization.main(["--prompts", "2", "--steps", "2", "--forms", "fp32", "w8", "-o", str(output)])
    lines = output.read_text().splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == ["fp32", "w8"]
    assert float(lines[3].split(" | ")[2]) < 0.28

"""The benchmarks of quantized pictures run, and their tables say what they measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import apple_forms
import quantization


@pytest.mark.full
def test_the_table_has_a_row_a_form(tmp_path: Path) -> None:
    output = tmp_path / "table.md"
    quantization.main(["--prompts", "2", "--steps", "2", "--forms", "fp32", "w8", "-o", str(output)])
    lines = output.read_text().splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == ["fp32", "w8"]
    assert float(lines[3].split(" | ")[2]) < 0.28


@pytest.mark.full
def test_the_table_of_apples_forms_has_a_row_a_form(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    pytest.importorskip("mlx.core")
    output = tmp_path / "table.md"
    forms = ["coreml:weights=palette4", "mlx:w4"]
    apple_forms.main(["--prompts", "1", "--steps", "2", "--forms", *forms, "-o", str(output)])
    rows = [line.strip("| ").split(" | ") for line in output.read_text().splitlines()[2:]]
    assert [row[:2] for row in rows] == [["onnx", "fp32"], ["coreml", "palette4"], ["mlx", "w4"]]
    assert all(float(row[2].removesuffix(" MB")) < 0.2 * float(rows[0][2].removesuffix(" MB")) for row in rows[1:])

"""The comparison with other tools runs and says how near the outputs are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import beside

pytest.importorskip("openvino")
SMALL = ["--quick", "--batch", "1", "--length", "5", "--threads", "1", "--repeat", "1", "--rounds", "1"]


def test_a_step_of_sana_has_one_token_for_32_pixels(tmp_path: Path) -> None:
    flags = ["--pixels", "256", "--vs", "--dtypes", "fp32", "--out", str(tmp_path)]
    beside.main(["sana", *SMALL, *flags])
    (first, _) = json.loads((tmp_path / "sana-b1.json").read_text())["contenders"]
    assert first["components"][0]["shapes"]["latents"] == [1, 4, 8, 8]
    assert "256 px" in (tmp_path / "sana-b1.md").read_text()


@pytest.mark.parametrize("case", ["lit", pytest.param("kl", marks=pytest.mark.full)])
def test_a_case_gives_a_table_with_times_and_fidelity(case: str, tmp_path: Path) -> None:
    sides = ["--pixels", "32", "--vs", "diffusers", "--dtypes", "fp32", "w8a8"]
    beside.main([case, *SMALL, *sides, "--out", str(tmp_path)])
    document = json.loads((tmp_path / f"{case}-b1.json").read_text())
    assert [item["label"] for item in document["contenders"]] == [
        f"{case}-fp32.edgedit",
        f"{case}-fp32.edgedit@openvino",
        f"{case}-w8a8.edgedit@onnxruntime",
        f"{case}-w8a8.edgedit@openvino",
        "diffusers",
    ]
    near = {item["label"]: item["components"][0]["agreement"] for item in document["contenders"]}
    if case == "kl":
        assert document["reference"] == "diffusers"
        assert near["kl-fp32.edgedit"]["relative_l2"] < 1e-4
    else:
        assert document["reference"] == "lit-fp32.edgedit"
        assert near["lit-fp32.edgedit@openvino"]["relative_l2"] < 1e-4
        assert near["lit-w8a8.edgedit@openvino"]["relative_l2"] < 0.2
        assert near["diffusers"]["relative_l2"] > 0.1
    table = (tmp_path / f"{case}-b1.md").read_text()
    assert "| × torch | × fp32 |" in table
    assert table.count("| fp32 |") == 3

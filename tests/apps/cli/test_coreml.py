"""Core ML packages from the command line: their form, and what `inspect` and `verify` say of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_pipelines import build_pipeline

pytest.importorskip("coremltools")

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build_pipeline("pixart-sigma", int(np.random.default_rng().integers(2**31))).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("units", "linears"), [("all", True), ("ne", False)])
def test_compute_units_choose_the_form_and_both_give_what_onnx_runtime_gives(
    units: str, linears: bool, cli: Run, source: Path
) -> None:
    made = cli(
        "convert", source, "-o", "a.edgedit", "--to", "onnx,coreml", "--compute-units", units, "--json",
        "--components", "transformer,decoder",
    )  # fmt: skip
    assert made.status == 0, made.err
    for component in json.loads(made.out)["components"]:
        assert max(artefact["parity"]["relative_l2"] for artefact in component["artefacts"]) <= 1e-5
    reports = json.loads(cli("inspect", "a.edgedit", "--json").out)["coreml"]
    assert ("linear" in reports["transformer"]["operators"]) == linears
    assert units == "all" or max(report["largest_rank"] for report in reports.values()) == 4
    verified = cli("verify", "a.edgedit", "--backend", "coreml", "--interpreter", "--json")
    assert verified.status == 0, verified.err


def test_a_form_that_there_is_not_is_one_line(cli: Run, source: Path) -> None:
    for options, said in (
        (("--to", "coreml", "--compute-units", "gpu"), "choose from: all, ne"),
        (("--compute-units", "ne"), "need the target coreml"),
    ):
        done = cli("convert", source, "-o", "b.edgedit", *options)
        assert done.status == 2
        (error,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert said in error
    assert not Path("b.edgedit").exists()

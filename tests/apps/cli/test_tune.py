from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgedit import tuning_record
from edgedit.bundle import open_bundle
from edgedit.tuning_record import ComponentChoice, Measured, TuningRecord

Run = Callable[..., Any]
CHOICE = ComponentChoice("onnxruntime", 1, "cpu")
RECORD = TuningRecord(
    width=16,
    height=16,
    tokens=16,
    components={"text_encoder": CHOICE},
    guidance_together=True,
    guidance_seconds=(0.1, 0.3),
    measured=(Measured("text_encoder", CHOICE, (0.25, 0.5), 1e-7),),
    machine="a machine",
)


def test_tuning_prints_a_table_and_is_shown_used_and_forgotten(
    cli: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "run: edgedit tune" in cli("tune", bundle, "--show").err

    def tune(path: Path, **options: Any) -> TuningRecord:
        assert options["seconds"] == 120.0
        assert (options["width"], options["height"], options["components"]) == (16, 16, ["text_encoder"])
        tuning_record.save(open_bundle(path), RECORD)
        return RECORD

    monkeypatch.setattr("edgedit.tuning.tune", tune)
    done = cli("tune", bundle, "--time", "2m", "--size", "16x16", "--components", "text_encoder")
    assert done.status == 0, done.err
    assert "chosen" in done.out
    assert "0.1000 s a step as one batch of two, 0.3000 s as two; one batch is chosen" in done.out
    assert cli("tune", bundle, "--show").out == done.out
    assert json.loads(cli("tune", bundle, "--show", "--json").out)["components"]["text_encoder"]["threads"] == 1
    assert "text_encoder on onnxruntime, threads 1, cpu graph" in cli("inspect", bundle).out
    drawn = cli("generate", "a red cat", "-m", bundle, "--steps", 1, "-s", 1, "--json")
    assert "text_encoder on onnxruntime, 1 thread, cpu graph" in drawn.out
    plain = cli("generate", "a red cat", "-m", bundle, "--steps", 1, "-s", 1, "--json", "--engine", "onnxruntime")
    assert "cpu graph" not in plain.out
    assert cli("tune", bundle, "--forget").out == "removed\n"
    assert cli("tune", bundle, "--forget").out == "there was nothing to remove\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--time", "soon"], "--time 'soon' is not a time"),
        (["--time", "0s"], "above 0 seconds"),
        (["--show", "--forget"], "not both"),
        (["--components", "unet"], "has no unet"),
    ],
)
def test_what_means_nothing_is_one_line(cli: Run, bundle: Path, flags: list[str], message: str) -> None:
    done = cli("tune", bundle, *flags)
    assert done.status == 2
    assert message in done.err
    assert done.err.count("\n") == 1


def test_an_engine_that_is_not_there_is_one_line(cli: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    done = cli("generate", "a red cat", "-m", bundle, "--engine", "openvino")
    assert done.status == 2
    assert "pip install 'edgedit[openvino]'" in done.err
    done = cli("generate", "a red cat", "-m", bundle, "--engine", "abacus")
    assert done.status == 2
    assert "unknown engine 'abacus'; choose one of: auto, onnxruntime, openvino" in done.err

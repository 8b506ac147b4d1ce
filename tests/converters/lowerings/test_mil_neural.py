"""Packages in the Neural Engine's form: what ONNX Runtime computes, in four axes and 1x1 convolutions."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_graphs import ARCHITECTURES, HALF_PRECISION, TinyGraph

from edgedit.converters.coreml import CoremlOptions as Chosen
from edgedit.converters.coreml import precision_of
from edgedit.converters.lowerings import coreml
from edgedit.converters.lowerings.coreml import CoremlFunction, CoremlOptions
from edgedit.errors import ConversionError
from edgedit.metrics import compare
from edgedit.runtimes.mil_interpreter import MilInterpreter
from edgedit.runtimes.mil_report import report

pytest.importorskip("coremltools")

#: Drawn anew in every run; set EDGEDIT_TEST_SEED to the number that a failure shows to see it again.
SEED = int(os.environ.get("EDGEDIT_TEST_SEED") or secrets.randbits(31))


def package(graph: TinyGraph, values: dict[str, np.ndarray], folder: Path, **options: Any) -> Path:
    shapes = [(spec, values[spec.name].shape) for spec in graph.component.inputs]
    sizes = {n: s for spec, shape in shapes for n, s in zip(spec.shape, shape, strict=True) if isinstance(n, str)}
    artefact = coreml.write(
        graph.model(),
        folder,
        graph.component.name,
        inputs=graph.component.inputs,
        functions=[CoremlFunction("main", sizes)],
        options=CoremlOptions(neural=True, **options),
    )
    return folder / artefact.graph


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_agrees_and_has_four_axes_and_no_linear_layer(name: str, tmp_path: Path) -> None:
    graph = TinyGraph(name, SEED)
    values = graph.inputs((4, 6), 7)
    expected = graph.reference(tmp_path).run(values)
    path = package(graph, values, tmp_path)
    for key, value in MilInterpreter(path).run(values).items():
        error = compare(value, expected[key]).relative_l2
        assert error <= 1e-5, f"{name}, seed {SEED}: off by {error:.1e}"
    found = report(path)
    assert (found.largest_rank, found.ranked) == (4, {})
    assert "linear" not in found.operators
    assert "scaled_dot_product_attention" not in found.operators


def test_attention_in_parts_is_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = TinyGraph("pixart", SEED)
    values = graph.inputs((4, 6), 7)
    whole = package(graph, values, tmp_path / "whole")
    monkeypatch.setattr(coreml, "NEURAL_SCORES", 600)
    parts = package(graph, values, tmp_path / "parts")
    assert report(parts).operators["softmax"] > 2 * report(whole).operators["softmax"]
    outputs = [MilInterpreter(path).run(values)["prediction"] for path in (whole, parts)]
    assert compare(outputs[1], outputs[0]).relative_l2 < 1e-6


@pytest.mark.parametrize("name", HALF_PRECISION)
def test_every_architecture_in_half_precision_agrees_to_60_decibels_and_nothing_overflows(
    name: str, tmp_path: Path
) -> None:
    graph = TinyGraph(name, SEED)
    values = graph.inputs((4, 6), 7)
    expected = graph.reference(tmp_path).run(values)
    path = package(graph, values, tmp_path, precision=precision_of(graph.component, "fp16"))
    interpreter = MilInterpreter(path, emulate_fp16=True)
    for key, value in interpreter.run(values).items():
        decibels = compare(value, expected[key]).psnr_db
        assert decibels >= 60, f"{name}, seed {SEED}: {decibels:.1f} dB"
    assert not interpreter.overflows
    if name == "pixart":
        assert "layer_norm" not in report(path).float32, "norms stay on the Neural Engine"


def test_an_attention_that_the_form_has_not_is_refused() -> None:
    with pytest.raises(ConversionError, match="written out for the Neural Engine"):
        Chosen(compute_units="ne", attention="fused")
    with pytest.raises(ConversionError, match="choose from: all, ne"):
        Chosen(compute_units="gpu")
    assert not Chosen(compute_units="ne").fused

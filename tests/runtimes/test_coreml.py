"""Sessions of fixed sizes that take any batch and any prompt that fits, evaluated with the interpreter."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_graphs import TinyGraph

from edgedit.converters.lowerings import coreml as lowering
from edgedit.converters.lowerings.coreml import CoremlFunction
from edgedit.errors import InputError, RuntimeUnavailableError
from edgedit.manifest import Function, TensorSpec
from edgedit.metrics import compare
from edgedit.runtimes.coreml import CoremlSession
from edgedit.runtimes.coreml_engine import CoremlEngine, InterpreterEngine
from edgedit.runtimes.onnx import OnnxSession

pytest.importorskip("coremltools")

SEED = int(os.environ.get("EDGEDIT_TEST_SEED") or secrets.randbits(31))
SIZES = {"wide": (3, 7), "tall": (5, 2)}


def _open(name: str, root: Path) -> tuple[TinyGraph, CoremlSession, OnnxSession]:
    graph = TinyGraph(name, SEED)
    component = graph.component
    patch = int(component.runtime.get("patch_size", 1))
    functions = [
        CoremlFunction(
            label,
            {"batch": 1, "length": 12, "height": rows * patch, "width": columns * patch, "tokens": rows * columns},
        )
        for label, (rows, columns) in SIZES.items()
    ]
    artefact = lowering.write(graph.model(), root, component.name, inputs=component.inputs, functions=functions)
    inputs, outputs = (
        [TensorSpec(spec.name, spec.dtype, spec.shape) for spec in part]
        for part in (component.inputs, component.outputs)
    )
    engine = InterpreterEngine(root / artefact.graph, emulate_fp16=False)
    named = [Function(function.name, function.dims) for function in functions]
    return graph, CoremlSession(engine, inputs, outputs, named, component.name), graph.reference(root)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyGraph, CoremlSession, OnnxSession]:
    return _open("pixart-alpha", tmp_path_factory.mktemp("pixart"))


@pytest.mark.parametrize("grid", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize(("batch", "length"), [(1, 12), (3, 5), (2, 3)])
def test_a_batch_and_a_short_prompt_give_what_the_flexible_graph_gives(
    opened: tuple[TinyGraph, CoremlSession, OnnxSession], grid: tuple[int, int], batch: int, length: int
) -> None:
    graph, session, reference = opened
    inputs = graph.inputs(grid, length, batch)
    found, expected = session.run(inputs)["prediction"], reference.run(inputs)["prediction"]
    assert found.shape == expected.shape
    assert compare(found, expected).relative_l2 < 1e-5, f"seed {SEED}"


@pytest.mark.parametrize("name", ["t5", "gemma2"])
def test_a_text_encoder_gives_only_the_tokens_it_was_given(name: str, tmp_path: Path) -> None:
    graph, session, reference = _open(name, tmp_path)
    inputs = graph.inputs(length=5)
    inputs["attention_mask"] = np.ones((1, 5), np.int64)
    found, expected = session.run(inputs)["hidden_states"], reference.run(inputs)["hidden_states"]
    assert found.shape == expected.shape == (1, 5, expected.shape[2])
    assert compare(found, expected).relative_l2 < 1e-5, f"seed {SEED}"


def test_a_size_that_was_not_converted_for_is_named_with_those_that_were(
    opened: tuple[TinyGraph, CoremlSession, OnnxSession],
) -> None:
    graph, session, _ = opened
    patch = int(graph.component.runtime["patch_size"])
    there = f"height {3 * patch} width {7 * patch} tokens 21; height {5 * patch} width {2 * patch} tokens 10"
    with pytest.raises(InputError, match=rf"at height {4 * patch} .*only: {there}\); convert it again with --size"):
        session.run(graph.inputs((4, 4)))
    with pytest.raises(InputError, match="at most 12 text tokens on Core ML, not 13"):
        session.run(graph.inputs((3, 7), length=13))
    with pytest.raises(InputError, match="takes"):
        session.run({"latents": np.zeros((1, 1, 2, 2), np.float32)})
    wrong = graph.inputs((3, 7))
    wrong["timestep"] = np.zeros((2,), np.float32)
    with pytest.raises(InputError, match="timestep must be"):
        session.run(wrong)


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML is there")
def test_core_ml_off_a_mac_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"runs on macOS only; add --interpreter") as caught:
        CoremlEngine(tmp_path, compute_units="all", cache=tmp_path)
    assert "\n" not in str(caught.value)

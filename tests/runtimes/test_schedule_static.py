"""Work that depends on the timestep alone is done once a timestep, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import edgedit
from edgedit.bundle import Bundle, open_bundle
from edgedit.example_inputs import example_inputs
from edgedit.runtimes import prompt_static, schedule_static
from edgedit.runtimes.base import RuntimeOptions, open_runtime
from edgedit.runtimes.onnx import CPU, OnnxSession
from edgedit.runtimes.prompt_static import PROMPT_INPUTS, PromptStaticSession, split_model
from edgedit.runtimes.schedule_static import SCHEDULE_INPUTS, open_divided

Saved = Callable[[str], tuple[Any, Path, int]]


@pytest.fixture(scope="module")
def bundle_of(saved_pipeline: Saved, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    place = tmp_path_factory.mktemp("bundles")

    def get(kind: str) -> Bundle:
        path = place / f"{kind}.edgedit"
        if not path.exists():
            edgedit.convert(saved_pipeline(kind)[1], path, components=["transformer"], measure=False)
        return open_bundle(path)

    return get


def inputs_of(bundle: Bundle, **sizes: Any) -> dict[str, np.ndarray]:
    entry = bundle.component("transformer")
    return example_inputs("transformer", entry.inputs, entry.config, **sizes)


def open_parts(bundle: Bundle) -> tuple[PromptStaticSession, list[np.ndarray]]:
    """A transformer, and the timesteps that its schedule part is run with."""
    session = open_runtime(bundle, "onnx", RuntimeOptions(threads=1)).open("transformer")
    assert isinstance(session, PromptStaticSession)
    inner = session._step
    assert isinstance(inner, PromptStaticSession)
    told: list[np.ndarray] = []
    run = inner._prompt.run

    def count(inputs: Any) -> Any:
        told.append(inputs["timestep"].copy())
        return run(inputs)

    inner._prompt.run = count  # type: ignore[method-assign]
    return session, told


@pytest.mark.parametrize("kind", ["pixart-alpha", "sana-sprint"])
def test_the_parts_together_are_the_undivided_graph(bundle_of: Callable[[str], Bundle], kind: str) -> None:
    bundle = bundle_of(kind)
    artefact = bundle.artefact("transformer", "onnx")
    divided, _ = open_parts(bundle)
    graph = artefact.fused_graph.path if artefact.fused_graph else artefact.graph
    whole = OnnxSession(bundle.file(graph), [CPU], 1, None, "whole")
    assert set(divided.inputs) == set(whole.inputs)
    for sizes in ({"batch": 2}, {"batch": 1, "tokens": (3, 5)}):
        inputs = inputs_of(bundle, **sizes)
        for step in range(2):
            inputs = {**inputs, "timestep": inputs["timestep"] * np.float32(1 - 0.3 * step)}
            found, wanted = divided.run(inputs)["prediction"], whole.run(inputs)["prediction"]
            assert np.linalg.norm(found - wanted) <= 1e-6 * np.linalg.norm(wanted)


def test_each_timestep_is_embedded_once_for_all_pictures(bundle_of: Callable[[str], Bundle]) -> None:
    bundle = bundle_of("pixart-sigma")
    session, told = open_parts(bundle)
    inputs, predictions = inputs_of(bundle), []
    for picture in range(3):
        for step in range(4):
            now = {"latents": inputs["latents"] + picture, "timestep": inputs["timestep"] + step}
            predictions.append(session.run({**inputs, **now})["prediction"])
    assert len(told) == 4
    fresh, _ = open_parts(bundle)
    last = {"latents": inputs["latents"] + 2, "timestep": inputs["timestep"] + 3}
    assert np.array_equal(fresh.run({**inputs, **last})["prediction"], predictions[-1])
    assert not np.array_equal(predictions[-1], predictions[-2])


def test_the_embedding_and_the_modulation_leave_the_step(bundle_of: Callable[[str], Bundle]) -> None:
    bundle = bundle_of("pixart-sigma")
    model = onnx.load(bundle.file(bundle.artefact("transformer", "onnx").graph), load_external_data=False)
    by_prompt = split_model(model, PROMPT_INPUTS)
    assert by_prompt is not None
    split = split_model(onnx.load_model_from_string(by_prompt.rest), SCHEDULE_INPUTS)
    assert split is not None
    each = onnx.load_model_from_string(split.rest).graph
    assert not [value.name for value in each.initializer if "adaln" in value.name or "scale_shift_table" in value.name]
    assert "timestep" not in {value.name for value in each.input}


def test_results_of_many_timesteps_are_dropped_oldest_first(
    bundle_of: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule_static, "_KEPT", 2)
    session, told = open_parts(bundle_of("pixart-sigma"))
    inputs = inputs_of(bundle_of("pixart-sigma"))
    for step in (0, 1, 2, 2, 1, 0):
        session.run({**inputs, "timestep": inputs["timestep"] + step})
    assert [float(t[0] - inputs["timestep"][0]) for t in told] == [0, 1, 2, 0]
    monkeypatch.setattr(prompt_static, "_LARGEST", 10)
    session.run({**inputs, "timestep": inputs["timestep"] + 7})
    session.run({**inputs, "timestep": inputs["timestep"] + 7})
    assert len(told) == 6, "what is too large is not kept"


def test_a_graph_that_has_no_prompt_is_divided_by_its_schedule_alone(tmp_path: Path) -> None:
    make, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    real = onnx.TensorProto.FLOAT
    nodes = [make("Cos", ["timestep"], ["c"]), make("Add", ["latents", "c"], ["prediction"])]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [info("latents", real, [1]), info("timestep", real, [1])],
        [info("prediction", real, [1])],
        value_info=[info("c", real, [1])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "g.onnx")

    class Part:
        def __init__(self, model: bytes) -> None:
            self.session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
            self.inputs = {value.name: value for value in self.session.get_inputs()}

        def run(self, inputs: Any) -> dict[str, np.ndarray]:
            names = [value.name for value in self.session.get_outputs()]
            return dict(zip(names, self.session.run(None, dict(inputs)), strict=True))

        def close(self) -> None: ...

    session = open_divided(tmp_path / "g.onnx", lambda name, model: Part(model), "g")
    assert session is not None
    found = session.run({"latents": np.ones(1, np.float32), "timestep": np.zeros(1, np.float32)})
    np.testing.assert_array_equal(found["prediction"], [2.0])
    del graph.value_info[:]
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "g.onnx")
    assert open_divided(tmp_path / "g.onnx", lambda name, model: Part(model), "g") is None

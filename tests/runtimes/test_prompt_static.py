"""Work that depends on the prompt alone is done once a prompt, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import edgedit
from edgedit.bundle import Bundle, open_bundle
from edgedit.errors import BundleError, InputError
from edgedit.example_inputs import example_inputs
from edgedit.runtimes import prompt_static
from edgedit.runtimes.base import RuntimeOptions, open_runtime
from edgedit.runtimes.onnx import CPU, OnnxSession
from edgedit.runtimes.prompt_static import PromptStaticSession, split_graph

Saved = Callable[[str], tuple[Any, Path, int]]
KINDS = ["pixart-alpha", "pixart-sigma", "sana", "sana-sprint"]


@pytest.fixture(scope="module")
def bundle_of(saved_pipeline: Saved, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    place = tmp_path_factory.mktemp("bundles")

    def get(kind: str) -> Bundle:
        path = place / f"{kind}.edgedit"
        if not path.exists():
            edgedit.convert(saved_pipeline(kind)[1], path, components=["transformer"])
        return open_bundle(path)

    return get


def inputs_of(bundle: Bundle, **sizes: Any) -> dict[str, np.ndarray]:
    entry = bundle.component("transformer")
    return example_inputs("transformer", entry.inputs, entry.config, **sizes)


def open_transformer(bundle: Bundle, **options: Any) -> PromptStaticSession:
    session = open_runtime(bundle, "onnx", RuntimeOptions(threads=1, **options)).open("transformer")
    assert isinstance(session, PromptStaticSession)
    return session


@pytest.mark.parametrize("kind", KINDS)
def test_both_parts_together_are_the_undivided_graph(bundle_of: Callable[[str], Bundle], kind: str) -> None:
    bundle = bundle_of(kind)
    artefact = bundle.artefact("transformer", "onnx")
    divided = open_transformer(bundle)
    graph = artefact.fused_graph.path if artefact.fused_graph else artefact.graph
    whole = OnnxSession(bundle.file(graph), [CPU], 1, None, "whole")
    assert set(divided.inputs) == set(whole.inputs)
    for sizes in ({"batch": 2}, {"batch": 1, "length": 5}, {"batch": 2, "tokens": (3, 5)}):
        inputs = inputs_of(bundle, **sizes)
        found, wanted = divided.run(inputs)["prediction"], whole.run(inputs)["prediction"]
        assert np.linalg.norm(found - wanted) <= 1e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_values_and_the_projection_of_the_text_leave_the_step(
    bundle_of: Callable[[str], Bundle], kind: str
) -> None:
    bundle = bundle_of(kind)
    split = split_graph(bundle.file(bundle.artefact("transformer", "onnx").graph))
    assert split is not None
    prompt, step = (onnx.load_from_string(part).graph for part in (split.static, split.rest))
    weights = {value.name for value in step.initializer}
    assert not [name for name in weights if "attn2.to_k" in name or "attn2.to_v" in name or "caption" in name]
    assert len([name for name in split.values if "attn2" in name]) == 4
    assert "encoder_hidden_states" not in {value.name for value in step.input}
    assert {value.name for value in prompt.input} <= {"encoder_hidden_states", "encoder_attention_mask"}


def test_the_prompt_part_runs_once_for_each_of_two_prompts(bundle_of: Callable[[str], Bundle]) -> None:
    bundle = bundle_of("pixart-sigma")
    session, runs = open_transformer(bundle), []
    original = session._prompt.run
    session._prompt.run = lambda inputs: runs.append(1) or original(inputs)  # type: ignore[method-assign, func-returns-value]
    first, second = inputs_of(bundle), inputs_of(bundle, length=5)
    alone = session.run(first)["prediction"]
    for step in range(3):
        for text in (first, second):
            session.run({**text, "timestep": text["timestep"] + step})
    assert len(runs) == 2
    assert np.array_equal(session.run(first)["prediction"], alone)
    changed = {**first, "encoder_hidden_states": first["encoder_hidden_states"] + 1}
    assert not np.array_equal(session.run(changed)["prediction"], alone)
    masked = {**first, "encoder_attention_mask": np.ones_like(first["encoder_attention_mask"])}
    assert not np.array_equal(session.run(masked)["prediction"], alone)
    assert len(runs) == 4
    first["encoder_hidden_states"][:] = 0
    session.run(first)
    assert len(runs) == 5


def test_results_that_are_too_large_are_not_kept(
    bundle_of: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_static, "_LARGEST", 10)
    bundle = bundle_of("pixart-sigma")
    session, inputs = open_transformer(bundle), inputs_of(bundle)
    assert np.array_equal(session.run(inputs)["prediction"], session.run(inputs)["prediction"])
    assert session._kept == []


def test_optimised_graphs_are_kept_for_every_part(bundle_of: Callable[[str], Bundle], tmp_path: Path) -> None:
    bundle = bundle_of("sana")
    inputs = inputs_of(bundle)
    wanted = open_transformer(bundle).run(inputs)["prediction"]
    first = open_transformer(bundle, graph_cache=tmp_path).run(inputs)["prediction"]
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 3, "prompt, schedule and each step"
    assert np.array_equal(open_transformer(bundle, graph_cache=tmp_path).run(inputs)["prediction"], first)
    assert sorted(tmp_path.iterdir()) == kept
    assert np.allclose(first, wanted, atol=1e-6)


def test_wrong_inputs_and_closed_sessions_are_named(bundle_of: Callable[[str], Bundle]) -> None:
    bundle = bundle_of("pixart-sigma")
    session, inputs = open_transformer(bundle), inputs_of(bundle)
    with pytest.raises(InputError, match=r"takes \['attention_scale', 'encoder_attention_mask'.*\]; got \['latents'\]"):
        session.run({"latents": inputs["latents"]})
    session.close()
    with pytest.raises(BundleError, match="closed"):
        session.run(inputs)


def test_a_graph_without_such_work_stays_whole(tmp_path: Path) -> None:
    def save(output: str, *nodes: onnx.NodeProto) -> Path:
        values = [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1])
            for name in ("latents", "encoder_hidden_states", output)
        ]
        graph = onnx.helper.make_graph(list(nodes), "g", values[:2], values[2:])
        onnx.save(onnx.helper.make_model(graph), tmp_path / "g.onnx")
        return tmp_path / "g.onnx"

    make = onnx.helper.make_node
    assert split_graph(save("y", make("Add", ["latents", "encoder_hidden_states"], ["y"]))) is None
    text = make("Neg", ["encoder_hidden_states"], ["k"])
    assert split_graph(save("y", text, make("Add", ["latents", "k"], ["y"]))) is None  # the type of k is not said

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from tiny_pipelines import build_pipeline

import edgedit
from edgedit.bundle import Bundle, open_bundle
from edgedit.example_inputs import example_inputs
from edgedit.parts import PartedSession, read_parts
from edgedit.runtimes.base import RuntimeOptions
from edgedit.runtimes.onnx import OnnxRuntime

KINDS = ("pixart-alpha", "pixart-sigma", "sana", "sana-sprint")


def converted(kind: str, layers: int, folder: Path, **options: str) -> Bundle:
    build_pipeline(kind, random.randrange(2**31), layers=layers).save_pretrained(folder / "model")
    edgedit.convert(folder / "model", folder / "x.edgedit", components=["transformer"], **options)  # type: ignore[arg-type]
    return open_bundle(folder / "x.edgedit")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["fp32", "w8a8"])
def test_the_parts_together_compute_what_the_whole_transformer_does(kind: str, dtype: str, tmp_path: Path) -> None:
    layers = random.randint(3, 7)
    bundle = converted(kind, layers, tmp_path, dtype=dtype)
    runtime = OnnxRuntime(bundle, RuntimeOptions())
    artefact = bundle.component("transformer").artefacts["onnx"]
    assert artefact.parts is not None
    parts = read_parts(bundle.file(artefact.parts))
    assert parts.blocks == layers
    session = PartedSession(parts, lambda graph: runtime.open_part("transformer", graph))
    entry = bundle.component("transformer")
    tokens = (random.randint(2, 9), random.randint(2, 9))
    inputs = example_inputs("transformer", entry.inputs, entry.config, tokens=tokens, batch=2)
    expected = runtime.open("transformer").run(inputs)["prediction"]
    found = session.run(inputs)["prediction"]
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected), (kind, layers)


def test_the_parts_share_the_weights_of_the_whole_and_store_none_of_their_own(tmp_path: Path) -> None:
    bundle = converted("pixart-sigma", 4, tmp_path)
    files = bundle.component("transformer").artefacts["onnx"].files
    parts = [bundle.file(path) for path in files if ".part" in path and path.endswith(".onnx")]
    assert len(parts) == 4
    weights = dict.fromkeys(ir.load(bundle.file("onnx/transformer.onnx")).graph.initializers, 0)
    for path in parts:
        for name, value in ir.load(path).graph.initializers.items():
            weights[name] = weights.get(name, 0) + 1
            tensor = value.const_value
            assert tensor is not None
            assert tensor.nbytes < 256 or isinstance(tensor, ir.ExternalTensor), name
    large = [name for name in weights if name.endswith(".weight") and "norm" not in name]
    assert large
    assert {weights[name] for name in large} == {1}


def test_a_transformer_of_two_blocks_stays_whole(tmp_path: Path) -> None:
    bundle = converted("sana", 2, tmp_path)
    artefact = bundle.component("transformer").artefacts["onnx"]
    assert artefact.parts is None
    assert not [path for path in artefact.files if ".part" in path]


@pytest.mark.parametrize("damage", ["{", '{"version": 99}', '{"version": 1, "parts": []}', "[]"])
def test_a_damaged_plan_is_one_clear_line(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "transformer.parts.json"
    path.write_text(damage, encoding="utf-8")
    with pytest.raises(edgedit.EdgeditError) as refused:
        read_parts(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert json.dumps(str(refused.value))

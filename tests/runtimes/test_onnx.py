from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgedit
from edgedit.bundle import open_bundle
from edgedit.errors import BundleError, InputError, RuntimeUnavailableError
from edgedit.runtimes.base import RuntimeOptions, open_runtime

Saved = Callable[[str], tuple[Any, Path, int]]


@pytest.fixture(scope="module")
def bundle_path(saved_pipeline: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "x.edgedit"
    edgedit.convert(saved_pipeline("pixart-sigma")[1], path)
    return path


def ids() -> dict[str, np.ndarray]:
    values = np.random.default_rng().integers(0, 30, (1, 7))
    return {"input_ids": values, "attention_mask": np.ones_like(values)}


def test_the_cpu_form_agrees_with_the_canonical_graph(bundle_path: Path) -> None:
    runtime = open_runtime(open_bundle(bundle_path))
    inputs = ids()
    fused, canonical = runtime.open("text_encoder"), runtime.open_canonical("text_encoder")  # type: ignore[attr-defined]
    a, b = fused.run(inputs)["hidden_states"], canonical.run(inputs)["hidden_states"]
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def test_a_cached_graph_gives_the_same_values_and_is_made_once(bundle_path: Path, tmp_path: Path) -> None:
    runtime = open_runtime(open_bundle(bundle_path), options=RuntimeOptions(graph_cache=tmp_path / "graphs"))
    plain = open_runtime(open_bundle(bundle_path))
    inputs = ids()
    wanted = plain.open("text_encoder").run(inputs)["hidden_states"]
    first = runtime.open("text_encoder").run(inputs)["hidden_states"]
    entries = sorted((tmp_path / "graphs").rglob("*"))
    second = runtime.open("text_encoder").run(inputs)["hidden_states"]
    assert np.array_equal(first, second)
    assert np.allclose(first, wanted, atol=1e-6)
    assert sorted((tmp_path / "graphs").rglob("*")) == entries
    assert not [entry for entry in entries if entry.name.startswith(".partial")]


def test_a_closed_session_says_so(bundle_path: Path) -> None:
    session = open_runtime(open_bundle(bundle_path)).open("text_encoder")
    session.close()
    with pytest.raises(BundleError, match="closed"):
        session.run(ids())


def test_wrong_inputs_are_named(bundle_path: Path) -> None:
    session = open_runtime(open_bundle(bundle_path)).open("text_encoder")
    with pytest.raises(InputError, match=r"takes \['attention_mask', 'input_ids'\]; got \['input_ids'\]"):
        session.run({"input_ids": ids()["input_ids"]})


def test_what_this_machine_or_bundle_lacks_is_refused(bundle_path: Path) -> None:
    bundle = open_bundle(bundle_path)
    with pytest.raises(
        RuntimeUnavailableError, match=r"CUDAExecutionProvider is not in this onnxruntime; it has: .*CPU"
    ):
        open_runtime(bundle, options=RuntimeOptions(providers=("cuda",)))
    with pytest.raises(InputError, match="unknown backend 'tpu'; choose one of: auto, onnx"):
        open_runtime(bundle, "tpu")
    with pytest.raises(InputError, match="threads must be at least 1"):
        open_runtime(bundle, options=RuntimeOptions(threads=0))


def test_a_graph_that_is_no_graph_is_one_line(bundle_path: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle_path, tmp_path / "copy.edgedit"))
    graph = copy / "onnx" / "text_encoder.cpu.onnx"
    graph.write_bytes(b"\0" * graph.stat().st_size)
    with pytest.raises(BundleError, match="edgedit verify") as caught:
        open_runtime(open_bundle(copy)).open("text_encoder")
    assert "\n" not in str(caught.value)

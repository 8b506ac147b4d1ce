"""Compressed forms of weights: what they lose, and what Core ML's own decompression makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgedit.converters.lowerings.mil.compression import Palette, Scaled, parse_form
from edgedit.errors import ConversionError


def weight(*shape: int) -> np.ndarray:
    return np.random.default_rng().standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("name", "worst"), [("int8", 1 / 254), ("int4", 1 / 14), ("int4-b16", 1 / 14)])
@pytest.mark.parametrize("shape", [(24, 64), (24, 64, 3, 3), (6, 50)])
def test_scaled_integers_are_within_half_a_step_of_the_largest_value(
    name: str, worst: float, shape: tuple[int, ...]
) -> None:
    original = weight(*shape)
    original[0] = 0
    stored = parse_form(name).compress(original)
    assert isinstance(stored, Scaled)
    largest = 7 if stored.bits == 4 else 127
    assert np.abs(stored.codes).max() == largest
    block = shape[1] // stored.scale.shape[1]
    limits = np.repeat(stored.scale, block, axis=1) * largest * worst * 1.001
    assert (np.abs(stored.dense() - original) <= limits).all()
    assert not stored.dense()[0].any()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_a_palette_is_as_good_as_k_means_of_another_library(bits: int) -> None:
    vq = pytest.importorskip("scipy.cluster.vq")
    original = weight(32, 64)
    stored = parse_form(f"palette{bits}").compress(original)
    assert isinstance(stored, Palette)
    assert stored.indices.max() < 2**bits
    error = float(np.mean((stored.dense() - original) ** 2))
    start = np.quantile(original, (np.arange(2**bits) + 0.5) / 2**bits)[:, None]
    codes, _ = vq.kmeans(original.reshape(-1, 1).astype(np.float64), start)
    _, distances = vq.vq(original.reshape(-1, 1).astype(np.float64), codes)
    assert error <= 1.05 * float(np.mean(distances**2)) + 1e-9


def test_small_outputs_lose_less_when_groups_have_palettes_of_their_own() -> None:
    original = weight(32, 64) * np.linspace(0.1, 5, 32, dtype=np.float32)[:, None]
    forms = [parse_form(name) for name in ("palette4", "palette4-g8")]
    errors = [np.mean((form.compress(original).dense() - original)[:8] ** 2) for form in forms]
    assert errors[1] < 0.7 * errors[0]


def test_coremltools_decompresses_each_form_to_the_same_weight(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    import onnx
    import onnx_ir as ir

    from edgedit.converters.graph import TensorSpec
    from edgedit.converters.lowerings import coreml
    from edgedit.converters.lowerings.coreml import CoremlFunction, CoremlOptions
    from edgedit.runtimes.mil_interpreter import MilInterpreter

    original, x = weight(64, 48), weight(1, 3, 64)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, (1, 3, 64))],
        [onnx.helper.make_tensor_value_info("y", 1, None)],
        [onnx.numpy_helper.from_array(original, "w")],
    )
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)]))
    for name in ("int8", "int4", "palette3", "palette4-g16"):
        form = parse_form(name)
        artefact = coreml.write(
            model,
            tmp_path / name,
            "part",
            inputs=[TensorSpec("x", "float32", (1, 3, 64))],
            functions=[CoremlFunction("main", {})],
            options=CoremlOptions(form=form),
        )
        assert artefact.precision == name
        found = MilInterpreter(tmp_path / name / artefact.graph).run({"x": x})["y"]
        np.testing.assert_allclose(found, x @ form.compress(original.T).dense().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["int5", "palette5", "palette", "int4-b0", "palette4-b2", "q4"])
def test_a_form_that_core_ml_has_not_is_refused(name: str) -> None:
    with pytest.raises(ConversionError, match=f"unknown Core ML weights '{name}'") as caught:
        parse_form(name)
    assert "\n" not in str(caught.value)

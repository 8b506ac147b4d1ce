"""Islands that only running a package shows: overflows, and rounding that costs too much."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tiny_graphs import TinyGraph

from edgedit.converters.coreml import CoremlOptions, CoremlPlan
from edgedit.converters.fixed_sizes import FixedSizes
from edgedit.converters.graph import TensorSpec
from edgedit.converters.lowerings import coreml
from edgedit.converters.lowerings.coreml import CoremlFunction
from edgedit.converters.lowerings.mil.measured import COSTLY, OVERFLOW, more_islands
from edgedit.metrics import compare
from edgedit.runtimes.mil_interpreter import MilInterpreter

pytest.importorskip("coremltools")


def chain(*steps: tuple[str, str, float]) -> ir.Model:
    """Nodes (name, operator, number), one after the other, on x [4, 64]."""
    nodes, numbers, value = [], [], "x"
    for name, operator, number in steps:
        numbers.append(onnx.numpy_helper.from_array(np.array(number, np.float32), f"{name}_number"))
        nodes.append(onnx.helper.make_node(operator, [value, f"{name}_number"], [f"{name}_out"], name=name))
        value = f"{name}_out"
    infos = [onnx.helper.make_tensor_value_info(name, 1, (4, 64)) for name in ("x", value)]
    graph = onnx.helper.make_graph(nodes, "g", infos[:1], infos[1:], numbers)
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)]))


@pytest.mark.parametrize(
    ("steps", "reason", "named"),
    [
        ([("a/up", "Mul", 5e4), ("b/down", "Mul", 1e-3), ("c/last", "Add", 1.0)], OVERFLOW, "a/up"),
        ([("a/far", "Add", 3000.0), ("b/back", "Sub", 3000.0), ("c/last", "Mul", 2.0)], COSTLY, "a/far"),
    ],
    ids=["overflow", "rounding"],
)
def test_a_package_is_mended_where_it_overflows_or_rounds_too_much(
    steps: list[tuple[str, str, float]], reason: str, named: str, tmp_path: Path
) -> None:
    x = (3 * np.random.default_rng().standard_normal((4, 64))).astype(np.float32)
    model, islands = chain(*steps), {}
    for attempt in range(4):
        artefact = coreml.write(
            model,
            tmp_path / str(attempt),
            "part",
            inputs=[TensorSpec("x", "float32", (4, 64))],
            functions=[CoremlFunction("main", {})],
            options=coreml.CoremlOptions(precision="fp16", islands=islands),
        )
        package = tmp_path / str(attempt) / artefact.graph
        found = more_islands(package, artefact.origins, {"x": x})
        if not found:
            break
        islands |= found
    assert islands[named] == reason
    assert "c/last" not in islands
    interpreter = MilInterpreter(package, emulate_fp16=True)
    (value,) = interpreter.run({"x": x}).values()
    (exact,) = MilInterpreter(package).run({"x": x}).values()
    assert compare(value, exact).psnr_db >= 60
    assert not interpreter.overflows
    assert artefact.islands[named] == reason


def test_a_conversion_keeps_sixty_decibels_with_activations_of_trained_size(tmp_path: Path) -> None:
    """The residual stream of trained transformers reaches thousands: weights are scaled until it does."""
    graph = TinyGraph("pixart", 3)
    sizes = FixedSizes(((8, 12),), 1, int(graph.component.runtime["patch_size"]), 9, 9)
    plan = CoremlPlan(sizes, CoremlOptions())
    values = graph.inputs((6, 4), 9)
    model = graph.model()
    for name, value in model.graph.initializers.items():
        if name.endswith(("ff.net.2.weight", "attn1.to_out.0.weight")):
            assert value.const_value is not None
            value.const_value = ir.tensor(np.asarray(value.const_value.numpy()) * np.float32(3000), name=name)
    ir.save(model, tmp_path / "canonical.onnx")
    _, (_, emulated) = plan.write(graph.component, model, tmp_path, dtype="fp16", check=True)
    from edgedit.runtimes.onnx import CPU, OnnxSession

    expected = OnnxSession(tmp_path / "canonical.onnx", [CPU], 1, None, "x").run(values)["prediction"]
    session = emulated()
    assert compare(session.run(values)["prediction"], expected).psnr_db >= 60
    assert not session.engine.interpreter.overflows  # type: ignore[attr-defined]

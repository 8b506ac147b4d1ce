"""Runs a graph segment by segment over many samples, so that never more than a segment's weights are in memory.

Every segment is opened once and run on all samples; what later segments need of each sample is carried in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

__all__ = ["SEGMENT_BYTES", "run_in_segments"]

Array = npt.NDArray[Any]

SEGMENT_BYTES = 256 << 20
"""Weights, and whatever else a node costs, that one segment may have."""


def run_in_segments(
    model: ir.Model,
    samples: Sequence[Mapping[str, Array]],
    place: Path,
    *,
    watched: Collection[ir.Value] = (),
    on_value: Callable[[int, ir.Value, Array], None] | None = None,
    on_segment: Callable[[int, int], None] | None = None,
    extra_cost: Callable[[ir.Value], int] = lambda value: 0,
    limit: int = SEGMENT_BYTES,
) -> list[dict[str, Array]]:
    """Outputs of the graph for every sample.

    Args:
        samples: inputs by name.
        place: a folder for one segment's weights at a time.
        watched: values that `on_value` is told with the number of the sample, when they are computed.
        on_segment: told (segments done, segments in all).
        extra_cost: bytes that a watched value costs beside the weights.
        limit: bytes of a segment; a single node may cost more.
    """
    graph = model.graph
    tell = on_value or (lambda index, value, array: None)
    parts = _cut(graph, set(watched), extra_cost, limit)
    place.mkdir(parents=True, exist_ok=True)
    carried: list[dict[ir.Value, Array]] = [{v: sample[v.name or ""] for v in graph.inputs} for sample in samples]
    for value in graph.inputs:
        if value in watched:
            for index, values in enumerate(carried):
                tell(index, value, values[value])
    for number, nodes in enumerate(parts):
        later = {v for part in parts[number + 1 :] for node in part for v in node.inputs if v is not None}
        later |= set(graph.outputs)
        made = [v for node in nodes for v in node.outputs if not _is_constant(v)]
        wanted = [v for v in made if v in later or v in watched]
        if wanted:
            session, inputs = _open(nodes, wanted, carried[0], place, model)
            for index, values in enumerate(carried):
                found = session.run(None, {v.name: values[v] for v in inputs})
                for value, array in zip(wanted, found, strict=True):
                    if value in watched:
                        tell(index, value, array)
                    if value in later:
                        values[value] = array
            del session
        for values in carried:
            for value in [v for v in values if v not in later]:
                del values[value]
        if on_segment is not None:
            on_segment(number + 1, len(parts))
    for left in place.iterdir():
        left.unlink()
    return [{v.name or "": values[v] for v in graph.outputs} for values in carried]


def _is_constant(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "Constant"


def _cut(
    graph: ir.Graph, watched: Collection[ir.Value], extra_cost: Callable[[ir.Value], int], limit: int
) -> list[list[ir.Node]]:
    """The graph's nodes in order, in runs that cost at most `limit`."""
    parts: list[list[ir.Node]] = [[]]
    cost, seen = 0, set[ir.Value]()
    for node in graph:
        weights = {v for v in node.inputs if v is not None and v.is_initializer()} - seen
        own = sum(v.const_value.nbytes for v in weights if v.const_value is not None)
        own += sum(extra_cost(v) for v in node.outputs if v in watched)
        if parts[-1] and cost + own > limit:
            parts.append([])
            cost, seen = 0, set()
        parts[-1].append(node)
        cost += own
        seen |= weights
    return parts


def _open(
    nodes: Sequence[ir.Node],
    outputs: Sequence[ir.Value],
    sample: Mapping[ir.Value, Array],
    place: Path,
    whole: ir.Model,
) -> tuple[Any, list[ir.Value]]:
    """A session for a run of nodes, and the values that it takes."""
    import onnxruntime

    copies: dict[ir.Value, ir.Value] = {}
    inputs: list[ir.Value] = []
    initializers: list[ir.Value] = []
    made: list[ir.Node] = []

    def copied(value: ir.Value) -> ir.Value:
        if value in copies:
            return copies[value]
        if value.is_initializer():
            copy = ir.Value(name=value.name, type=value.type, shape=value.shape, const_value=value.const_value)
            initializers.append(copy)
        elif _is_constant(value):
            node = value.producer()
            assert node is not None
            constant = ir.Node("", "Constant", [], list(node.attributes.values()), num_outputs=1, name=node.name)
            copy = constant.outputs[0]
            copy.name = value.name
            made.append(constant)
        else:
            kind = ir.TensorType(ir.DataType.from_numpy(np.dtype(sample[value].dtype)))
            copy = ir.Value(name=value.name, type=kind, shape=None)
            inputs.append(value)
        copies[value] = copy
        return copy

    for node in nodes:
        if node.op_type == "Constant":
            continue
        taken = [None if used is None else copied(used) for used in node.inputs]
        copy = ir.Node(
            node.domain,
            node.op_type,
            taken,
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            name=node.name,
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name = old.name
            copies[old] = new
        made.append(copy)
    graph = ir.Graph(
        [copies[v] for v in inputs],
        [copies[v] for v in outputs],
        nodes=made,
        initializers=initializers,
        opset_imports=dict(whole.graph.opset_imports),
        name="segment",
    )
    path = place / "segment.onnx"
    for left in place.iterdir():
        left.unlink()
    ir.save(ir.Model(graph, ir_version=whole.ir_version), path, external_data="segment.data", size_threshold_bytes=256)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]), inputs

"""A graph cut into chunks whose weights stay below a limit: one package each, run one after the other.

A chunk ends where the fewest values cross, in the second half of what the limit allows. What depends on weights only is
in every chunk that uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from edgedit.errors import ConversionError

__all__ = ["cut"]


def cut(model: ir.Model, limit: int, bytes_of: Callable[[ir.Value], int]) -> list[ir.Model]:
    """The graph itself where it is small enough, or copies of its parts; weights are shared.

    Values that cross are called cut_0, cut_1 …; a chunk takes and gives those, and the graph's inputs and outputs.

    Args:
        limit: bytes of weights in a chunk.
        bytes_of: bytes that a weight takes in its package.

    Raises:
        ConversionError: a single weight is over the limit.
    """
    weights = [value for value in model.graph.initializers.values() if value.const_value is not None]
    if sum(map(bytes_of, weights)) <= limit:
        return [model]
    static = _static(model)
    nodes = [node for node in model.graph if not all(value in static for value in node.outputs)]
    costs = [_weights(node, static) for node in nodes]
    crossing = _crossing(nodes, static, set(model.graph.outputs))
    ends: list[int] = []
    while (start := ends[-1] if ends else 0) < len(nodes):
        ends.append(_end(costs, crossing, start, limit, bytes_of))
    names: dict[ir.Value, str] = {}
    bounds = zip([0, *ends[:-1]], ends, strict=True)
    return [_part(model, nodes[a:b], set(nodes[b:]), static, names) for a, b in bounds]


def _static(model: ir.Model) -> set[ir.Value]:
    """Values that depend on no input."""
    found = set(model.graph.initializers.values())
    for node in model.graph:
        if all(value is None or value in found for value in node.inputs):
            found.update(node.outputs)
    return found


def _weights(node: ir.Node, static: set[ir.Value]) -> set[ir.Value]:
    """Weights that a node uses, or that are worked into what it uses."""
    found: set[ir.Value] = set()
    waiting = [value for value in node.inputs if value is not None and value in static]
    while waiting:
        value = waiting.pop()
        producer = value.producer()
        if producer is None:
            found.add(value)
        else:
            waiting.extend(source for source in producer.inputs if source is not None)
    return found


def _crossing(nodes: Sequence[ir.Node], static: set[ir.Value], outputs: set[ir.Value]) -> list[int]:
    """Number of values that live on where a chunk would end before each node."""
    places = {node: index for index, node in enumerate(nodes)}
    steps = np.zeros(len(nodes) + 2, np.int64)
    for index, node in enumerate(nodes):
        for value in node.outputs:
            last = max((places[use.node] for use in value.uses() if use.node in places), default=index)
            last = index if value in outputs and last == index else last
            steps[index + 1] += 1
            steps[last + 1] -= 1
    return [int(count) for count in np.cumsum(steps)[: len(nodes) + 1]]


def _end(
    costs: Sequence[set[ir.Value]], crossing: Sequence[int], start: int, limit: int, bytes_of: Callable[[ir.Value], int]
) -> int:
    """Where the chunk that starts at `start` ends."""
    seen: set[ir.Value] = set()
    total, half = 0, start + 1
    for index in range(start, len(costs)):
        total += sum(map(bytes_of, costs[index] - seen))
        seen |= costs[index]
        if total > limit:
            if index == start:
                name = max(costs[index], key=bytes_of).name
                raise ConversionError(
                    f"weight {name} takes more than the {limit} bytes that a Core ML package may have; "
                    "store it in fewer bits"
                )
            return min(range(min(half, index), index + 1), key=lambda place: (crossing[place], -place))
        if total <= limit // 2:
            half = index + 1
    return len(costs)


def _part(
    model: ir.Model,
    nodes: Sequence[ir.Node],
    later: set[ir.Node],
    static: set[ir.Value],
    names: dict[ir.Value, str],
) -> ir.Model:
    copies: dict[ir.Value, ir.Value] = {}
    inputs: list[ir.Value] = []
    weights: list[ir.Value] = []
    made: list[ir.Node] = []

    def copied(value: ir.Value) -> ir.Value:
        if value not in copies:
            producer = value.producer()
            if value in static and producer is not None:
                copy_node(producer)
            else:
                name = value.name if value in static or producer is None else names[value]
                copies[value] = ir.Value(name=name, type=value.type, shape=value.shape, const_value=value.const_value)
                (weights if value in static else inputs).append(copies[value])
        return copies[value]

    def copy_node(node: ir.Node) -> None:
        taken = [None if value is None else copied(value) for value in node.inputs]
        attributes = list(node.attributes.values())
        made.append(
            ir.Node(node.domain, node.op_type, taken, attributes, num_outputs=len(node.outputs), name=node.name)
        )
        for old, new in zip(node.outputs, made[-1].outputs, strict=True):
            new.name, new.type, new.shape = old.name, old.type, old.shape
            copies[old] = new

    for node in nodes:
        copy_node(node)
    outputs = []
    for node in nodes:
        for value in node.outputs:
            if value.is_graph_output():
                outputs.append(copies[value])
            elif any(use.node in later for use in value.uses()):
                names[value] = f"cut_{len(names)}"
                copies[value].name = names[value]
                outputs.append(copies[value])
    imports = dict(model.graph.opset_imports)
    graph = ir.Graph(inputs, outputs, nodes=made, initializers=weights, opset_imports=imports, name="chunk")
    return ir.Model(graph, ir_version=model.ir_version)

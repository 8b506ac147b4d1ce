"""Which nodes of a canonical graph float16 cannot compute, and why: found in the graph's structure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

__all__ = ["ANGLES", "SUMS", "VARIANCE", "find_islands", "summary", "whole"]

ANGLES = "the angle of a sine: float16 rounds 999 to a half"
SUMS = "sums over all tokens, and their quotient"
VARIANCE = "variance of a norm"


def whole(model: ir.Model, reason: str) -> dict[str, str]:
    """Every node, for `reason`."""
    return {str(node.name): reason for node in model.graph}


def find_islands(model: ir.Model) -> dict[str, str]:
    """Node name → reason, for nodes that need float32 whatever the weights are.

    * What is under a sine or cosine: an angle in radians of up to a thousand has no digits left after the point.
    * Linear attention: a scope (the path of a module) with products of two activations and a sum or a quotient but no
      softmax. Its sums grow with the number of tokens.
    * A norm written out: a scope with a mean and a square root.
    """
    scopes: dict[str, list[ir.Node]] = defaultdict(list)
    for node in model.graph:
        scopes[str(node.name).rpartition("/")[0]].append(node)
    islands: dict[str, str] = {}
    for nodes in scopes.values():
        kinds = {node.op_type for node in nodes}
        products = any(node.op_type == "MatMul" and _between_activations(node) for node in nodes)
        if products and kinds & {"ReduceSum", "Div"} and not kinds & {"Softmax", "Attention"}:
            islands.update({str(node.name): SUMS for node in nodes})
        elif {"ReduceMean", "Sqrt"} <= kinds:
            islands.update({str(node.name): VARIANCE for node in nodes})
    for node in model.graph:
        if node.op_type in ("Sin", "Cos"):
            islands.update({str(above.name): ANGLES for above in _ancestors(node)})
    return islands


def _between_activations(node: ir.Node) -> bool:
    return all(value is not None and not value.is_initializer() for value in node.inputs)


def _ancestors(node: ir.Node) -> set[ir.Node]:
    found, waiting = {node}, [node]
    while waiting:
        for value in waiting.pop().inputs:
            above: Any = None if value is None else value.producer()
            if above is not None and above not in found:
                found.add(above)
                waiting.append(above)
    return found


def summary(islands: Mapping[str, str]) -> dict[str, int]:
    """Reason → number of nodes."""
    counts: dict[str, int] = defaultdict(int)
    for reason in islands.values():
        counts[reason] += 1
    return dict(counts)

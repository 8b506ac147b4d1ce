"""Islands by measurement: what a package in float16 overflows at, and where its rounding costs most.

The interpreter runs the package on real inputs, exactly and with float16 rounded. What the structure of a graph does
not show (`islands`) shows here: activations of a trained network beyond 65504, and differences of large numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgedit.metrics import compare
from edgedit.runtimes.mil_interpreter import MilInterpreter
from edgedit.runtimes.mil_package import MilFunction, MilOperation, read_package

__all__ = ["COSTLY", "OVERFLOW", "TARGET", "more_islands"]

OVERFLOW = "passes float16's largest number (measured)"
COSTLY = "float16 rounds too much here (measured)"

#: PSNR in decibels that float16 arithmetic keeps to exact arithmetic on the same weights: with the rounding of the
#: weights, which is 68 dB or better, 60 are left.
TARGET = 62.0

#: Parts that rounding is measured in: a run of the interpreter each.
_PARTS = 48


def more_islands(
    package: Path,
    origins: Mapping[str, str],
    inputs: Mapping[str, np.ndarray],
    function: str | None = None,
    *,
    target: float = TARGET,
) -> dict[str, str]:
    """Nodes that need float32 besides those that have it, with the reason; empty when the package is good enough.

    A rewritten package is to be measured again: what was cut off at an overflow may overflow further on.

    Args:
        origins: MIL operation → node of the graph.
        inputs: of one function, of the sizes that it takes.
        function: its name; None where there is one only.
    """
    found = read_package(package)
    exact = MilInterpreter(found)
    wanted = exact.run(inputs, function)
    program = found.functions[function or found.default]
    nodes = _nodes(program, origins)
    if exact.overflows:
        return dict.fromkeys(_overflowing(program, nodes, exact.overflows), OVERFLOW)
    interpreter = MilInterpreter(found, emulate_fp16=True)
    if _decibels(interpreter.run(inputs, function), wanted) >= target:
        return {}
    parts = _parts(program, nodes)
    losses = []
    for part in parts:
        interpreter.rounded = frozenset(name for name, node in nodes.items() if node in part)
        losses.append(10 ** (-_decibels(interpreter.run(inputs, function), wanted) / 10))
    rest = sum(losses)
    chosen: dict[str, str] = {}
    for index in np.argsort(losses)[::-1]:
        # Half of what is allowed: parts are measured one by one, and what is rounded together adds up to more.
        if rest <= 0.5 * 10 ** (-target / 10):
            break
        rest -= losses[index]
        chosen |= dict.fromkeys(parts[index], COSTLY)
    return chosen


def _decibels(values: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> float:
    worst = min(compare(values[name], wanted[name]).psnr_db for name in wanted)
    return worst if math.isfinite(worst) else -200.0


def _nodes(program: MilFunction, origins: Mapping[str, str]) -> dict[str, str]:
    """Operation → node. One without a name of its own belongs to the node before it, a cast to the one that asked for
    it."""
    found, last = {}, ""
    for operation in program.operations:
        last = origins.get(operation.name, last)
        found[operation.name] = last
    users: dict[str, str] = {}
    for operation in reversed(program.operations):
        if operation.kind == "cast":
            found[operation.name] = users.get(operation.outputs[0][0], found[operation.name])
        users |= dict.fromkeys(_used(operation), found[operation.name])
    return found


def _overflowing(program: MilFunction, nodes: Mapping[str, str], overflows: Mapping[str, float]) -> set[str]:
    """The nodes of what overflows; where that is a cast, those that asked for it."""
    found: set[str] = set()
    for operation in program.operations:
        if operation.name not in overflows:
            continue
        if operation.kind != "cast":
            found.add(nodes[operation.name])
            continue
        made = {name for name, _ in operation.outputs}
        found |= {nodes[user.name] for user in program.operations if made & _used(user)}
    return found - {""}


def _used(operation: MilOperation) -> set[Any]:
    values = [v for value in operation.inputs.values() for v in (value if isinstance(value, list) else [value])]
    return {value for value in values if isinstance(value, str)}


def _parts(program: MilFunction, nodes: Mapping[str, str]) -> list[set[str]]:
    """Nodes that compute in float16, those of one module together, neighbours joined where there are many."""
    modules: dict[str, set[str]] = {}
    for operation in program.operations:
        node = nodes[operation.name]
        if node and any(kind.dtype == "fp16" for _, kind in operation.outputs) and operation.kind != "const":
            modules.setdefault(node.rpartition("/")[0], set()).add(node)
    each = -(-len(modules) // _PARTS)
    every = list(modules.values())
    return [set[str]().union(*every[i : i + each]) for i in range(0, len(every), each)] if every else []

"""A transformer cut between its blocks, so that a step may leave some of them out (`edgedit.step_cache`).

Four graphs over the weights of the whole one: everything up to the first block, the first and the second half of the
blocks that follow, and what comes after the last. The first hands on, beside the hidden states, what the others need of
the conditioning. Δ-DiT (Chen et al., 2024, section 3) leaves out such a front or rear range of blocks.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from edgedit.converters.lowerings.onnx import OnnxArtefact

__all__ = ["CUT", "PLAN_VERSION", "write_parts"]

PLAN_VERSION = 1
#: Components that are cut.
CUT = ("transformer",)
#: Fewer blocks cannot be cut into a first, a front and a rear part.
LEAST_BLOCKS = 3
_BLOCK = re.compile(r"^\w*blocks\.(\d+)/")


def write_parts(root: Path, component: str, artefact: OnnxArtefact) -> OnnxArtefact:
    """Write COMPONENT.part0.onnx to part3.onnx and COMPONENT.parts.json beside the graph that the CPU runs.

    Returns the artefact with its new files, or as it is where the graph is no chain of at least three blocks.
    """
    source = root / (artefact.fused_graph or artefact.graph)
    model = ir.load(source)
    graph = model.graph
    chain = _chain(graph)
    if len(chain) <= LEAST_BLOCKS:
        return artefact
    before, *after = chain
    bounds = [1, 1 + len(after) // 2, len(after)]
    ends = [*(after[bound - 1] for bound in bounds), graph.outputs[0]]
    shared = _shared(graph, ends)
    if shared is None:
        return artefact
    files: list[Path] = []
    parts: list[dict[str, object]] = []
    for index, end in enumerate(ends):
        known = list(graph.inputs) if index == 0 else [ends[index - 1], *shared, *graph.inputs]
        outputs = [end, before, *shared] if index == 0 else [end]
        part = ir.convenience.extract(graph, known, outputs)
        for value in [value for value in part.inputs if not value.uses() and not value.is_graph_output()]:
            part.inputs.remove(value)
        # `extract` leaves them in no particular order, and a conversion writes the same bytes every time.
        held = {name: part.initializers[name] for name in graph.initializers if name in part.initializers}
        part.initializers.clear()
        part.initializers.update(held)
        path = source.parent / f"{component}.part{index}.onnx"
        ir.save(ir.Model(part, ir_version=model.ir_version, producer_name="edgedit"), path)
        files.append(path)
        names = {"inputs": [value.name for value in part.inputs], "outputs": [value.name for value in outputs]}
        parts.append({"graph": path.name, **names})
    plan = {
        "version": PLAN_VERSION,
        "blocks": len(after),
        "bounds": bounds,
        "before": before.name,
        "hidden": [value.name for value in ends[:-1]],
        "parts": parts,
    }
    path = source.parent / f"{component}.parts.json"
    path.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
    names_of_files = [file.relative_to(root).as_posix() for file in [path, *files]]
    return replace(artefact, parts=names_of_files[0], files=(*artefact.files, *names_of_files))


def _chain(graph: ir.Graph) -> list[ir.Value]:
    """The hidden states before the first block and after each, empty where they are not one value between any two."""
    moved = _descendants(graph, graph.inputs[0])
    blocks = 1 + max((block for node in graph if (block := _block(node)) is not None), default=-1)
    chain: list[ir.Value] = []
    for index in range(-1, blocks):
        here, following = None if index < 0 else index, index + 1 if index + 1 < blocks else None
        crossing = {
            value: None
            for node in graph
            if _block(node) == here
            for value in node.outputs
            if value in moved and any(_block(use.node) == following for use in value.uses())
        }
        if len(crossing) != 1:
            return []
        chain += crossing
    return chain


def _shared(graph: ir.Graph, ends: list[ir.Value]) -> list[ir.Value] | None:
    """What the first part must hand on beside the hidden states; None where a later part would have to as well."""
    needed = [_ancestors(end, stop) for end, stop in zip(ends, [None, *ends], strict=False)]
    uses = Counter(node for part in needed[1:] for node in part)
    fixed = _fixed(graph)
    handed = {node for node in uses if node not in fixed and (node in needed[0] or uses[node] > 1)}
    if any(value in _descendants(graph, ends[0]) for node in handed for value in node.outputs):
        return None
    later = {node for node in uses if node not in handed}
    return [
        value
        for node in graph
        if node in handed
        for value in node.outputs
        if any(use.node in later for use in value.uses())
    ]


def _block(node: ir.Node) -> int | None:
    match = _BLOCK.match(node.name or "")
    return None if match is None else int(match.group(1))


def _descendants(graph: ir.Graph, source: ir.Value) -> set[ir.Value]:
    """`source` and every value computed from its elements (not merely from its shape)."""
    found = {source}
    for node in graph:
        if node.op_type not in ("Shape", "Size") and not found.isdisjoint(v for v in node.inputs if v is not None):
            found.update(node.outputs)
    return found


def _fixed(graph: ir.Graph) -> set[ir.Node]:
    """Nodes that depend on no input: constants, and weights on their way to float32."""
    inputs: set[ir.Value] = set(graph.inputs)
    fixed = set()
    for node in graph:
        if inputs.isdisjoint(v for v in node.inputs if v is not None):
            fixed.add(node)
        else:
            inputs.update(node.outputs)
    return fixed


def _ancestors(value: ir.Value, stop: ir.Value | None) -> Set[ir.Node]:
    """The nodes that compute `value`, from `stop` where that is given."""
    found: set[ir.Node] = set()
    waiting: list[Iterable[ir.Value | None]] = [[value]]
    while waiting:
        for wanted in waiting.pop():
            node = None if wanted is None or wanted is stop else wanted.producer()
            if node is not None and node not in found:
                found.add(node)
                waiting.append(node.inputs)
    return found

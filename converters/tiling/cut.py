"""The graph of an autoencoder as a list of steps, cut where sums over all positions are complete.

Every value has a level: the number of such sums, one after the other, that it depends on. Steps of one level run tile
by tile once the sums of the levels before are known. Within a level the graph is cut further wherever one map is all
that goes on, so that halos stay small and any such map may be kept instead of computed again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from edgedit.converters.tiling.norms import Moments, open_norms
from edgedit.converters.tiling.positions import Kind, Layout, infer_layouts
from edgedit.converters.tiling.receptive import is_spatial
from edgedit.errors import ConversionError

__all__ = ["Attend", "Cut", "Gather", "Local", "Step", "Sums", "cut"]


@dataclass(frozen=True)
class Local:
    """Nodes that run on one tile: maps, tokens and sums in, maps or tokens out."""

    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    sums: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]


@dataclass(frozen=True)
class Sums:
    """Nodes that make of a tile's own positions what is added up over all tiles (a linear attention's state)."""

    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]


@dataclass(frozen=True)
class Gather:
    """Keys and values [1, n, C] of a softmax attention, kept of all tiles."""

    node: ir.Node
    keys: ir.Value
    values: ir.Value


@dataclass(frozen=True)
class Attend:
    """Softmax attention of a tile's queries over all gathered keys and values."""

    node: ir.Node
    queries: ir.Value
    output: ir.Value


Step = Local | Sums | Gather | Attend | Moments


@dataclass
class Cut:
    """A cut graph: its steps in order, and the layout of every value."""

    model: ir.Model
    steps: list[Step] = field(default_factory=list)
    layouts: dict[ir.Value, Layout] = field(default_factory=dict)


def cut(model: ir.Model, stride: int) -> Cut:
    """Cut `model` (changed in place). `stride` is what its input's sides must be a multiple of.

    Raises ConversionError when the graph mixes positions in a way that no tile can.
    """
    norms = open_norms(model)
    result = Cut(model, layouts=infer_layouts(model, stride))
    return _Cutter(result, norms).run()


class _Cutter:
    def __init__(self, result: Cut, norms: list[Moments]) -> None:
        self.result, self.norms, self.layouts = result, norms, result.layouts
        self.graph = result.model.graph
        self.levels: dict[ir.Value, int] = {self.graph.inputs[0]: 0}
        self.sums: set[ir.Value] = set()
        self.attention: dict[ir.Value, ir.Node] = {}
        self._assign_levels()

    def kind(self, value: ir.Value) -> Kind:
        return self.layouts[value].kind if value in self.layouts else Kind.FIXED

    def placed(self, value: ir.Value) -> bool:
        """Whether a value lies on positions."""
        return self.kind(value) in (Kind.MAP, Kind.TOKENS)

    def _assign_levels(self) -> None:
        waiting = {id(norm.of): norm for norm in self.norms}
        by_value: dict[ir.Value, list[Moments]] = {}
        for norm in waiting.values():
            by_value.setdefault(norm.of, []).append(norm)
        for norm in self.norms:
            if norm not in by_value[norm.of]:
                by_value[norm.of].append(norm)

        def known(value: ir.Value, level: int) -> None:
            self.levels[value] = level
            for norm in by_value.get(value, ()):
                self.levels[norm.mean] = self.levels[norm.reciprocal_std] = level + 1
                self.sums.update((norm.mean, norm.reciprocal_std))

        known(self.graph.inputs[0], 0)
        for node in self.graph:
            used = [v for v in node.inputs if v is not None and v in self.levels]
            if not used:
                continue
            level = max(self.levels[v] for v in used)
            for value in node.outputs:
                kind = self.kind(value)
                if kind == Kind.FIXED:
                    continue
                if node.op_type == "Attention":
                    self.attention[value] = node
                    known(value, level + 1)
                elif kind == Kind.GLOBAL and any(self.placed(v) for v in used):
                    if node.op_type not in ("MatMul", "ReduceSum"):
                        raise ConversionError(f"{node.name}: a {node.op_type} over all positions cannot be added up")
                    self.sums.add(value)
                    known(value, level + 1)
                else:
                    known(value, level)

    def run(self) -> Cut:
        boundary = self._crossing()
        highest = max(self.levels[value] for value in self.graph.outputs)
        for level in range(highest + 1):
            boundary |= self._level(level, boundary)
        return self.result

    def _crossing(self) -> set[ir.Value]:
        """Maps that a later level, a norm's moments or the graph's output need."""
        found: set[ir.Value] = {self.graph.inputs[0], *self.graph.outputs, *(norm.of for norm in self.norms)}
        for node in self.graph:
            for output in node.outputs:
                if output not in self.levels or not (self.placed(output) or output in self.sums):
                    continue
                home = self.levels[output] - (output in self.attention)
                found.update(self._maps_below(node.inputs, home, of_sum=output in self.sums))
        return found

    def _maps_below(self, inputs: Iterable[ir.Value | None], level: int, *, of_sum: bool) -> set[ir.Value]:
        """Maps that a node of `level` takes from earlier levels, through token nodes that are computed again there.

        A sum is computed from maps alone, of whatever level.
        """
        found: set[ir.Value] = set()
        for value in inputs:
            if value is None or value not in self.levels or not self.placed(value) or value in self.attention:
                continue
            if self.kind(value) == Kind.MAP:
                if self.levels[value] < level or of_sum:
                    found.add(value)
            elif self.levels[value] < level or of_sum:
                producer = value.producer()
                assert producer is not None
                found |= self._maps_below(producer.inputs, level, of_sum=of_sum)
        return found

    def _level(self, level: int, boundary: set[ir.Value]) -> set[ir.Value]:
        """Append the steps of one level; return the boundary values that they add."""
        added: set[ir.Value] = set()
        for value, node in self.attention.items():
            if self.levels[value] == level:
                queries = node.inputs[0]
                assert queries is not None
                self._local([queries], boundary)
                self.result.steps.append(Attend(node, queries, value))
                added.add(value)
        nodes = [
            node
            for node in self.graph
            if any(self.levels.get(v) == level and self.placed(v) and v not in self.attention for v in node.outputs)
        ]
        wanted = [v for node in nodes for v in node.outputs if v in boundary]
        gathered = [
            (node, node.inputs[1], node.inputs[2])
            for value, node in self.attention.items()
            if self.levels[value] == level + 1
        ]
        tokens = [v for _, k, v2 in gathered for v in (k, v2) if v is not None]
        start = 0
        for stop, last in self._articulations(nodes, after_tokens=bool(added)):
            made = {v for node in nodes[start:stop] for v in node.outputs}
            outputs = [v for v in wanted + tokens if v in made]
            if last is not None and last not in outputs:
                outputs.append(last)
            if outputs:
                self._local(outputs, boundary | added)
            if last is not None:
                added.add(last)
            start = stop
        for node, keys, values in gathered:
            assert keys is not None
            assert values is not None
            self.result.steps.append(Gather(node, keys, values))
        summed = [v for v in self.sums if self.levels[v] == level + 1 and v.producer() is not None]
        if summed:
            order = {v: i for i, node in enumerate(self.graph) for v in node.outputs}
            summed.sort(key=lambda v: order[v])
            found_nodes, inputs, sums = self._extract(summed, boundary | added)
            if sums:
                raise ConversionError(f"{summed[0].name}: a sum of sums cannot run in tiles")
            self.result.steps.append(Sums(found_nodes, inputs, tuple(summed)))
        self.result.steps.extend(norm for norm in self.norms if self.levels[norm.mean] == level + 1)
        return added

    def _local(self, outputs: Sequence[ir.Value], boundary: set[ir.Value]) -> None:
        nodes, inputs, sums = self._extract(outputs, boundary)
        self.result.steps.append(Local(nodes, inputs, sums, tuple(outputs)))

    def _extract(
        self, outputs: Sequence[ir.Value], boundary: set[ir.Value]
    ) -> tuple[tuple[ir.Node, ...], tuple[ir.Value, ...], tuple[ir.Value, ...]]:
        """Nodes that compute `outputs` from boundary values, in order, with the values and the sums that they take."""
        needed: set[ir.Node] = set()
        inputs: dict[ir.Value, None] = {}
        sums: dict[ir.Value, None] = {}
        stack = list(outputs)
        asked = set(outputs)
        while stack:
            value = stack.pop()
            producer = value.producer()
            if value in self.sums and value not in asked:
                sums[value] = None
            elif (value in boundary and value not in asked) or value in self.graph.inputs:
                inputs[value] = None
            elif producer is not None and producer not in needed:
                needed.add(producer)
                stack.extend(v for v in producer.inputs if v is not None)
        nodes = tuple(node for node in self.graph if node in needed)
        return nodes, tuple(inputs), tuple(sums)

    def _articulations(self, nodes: Sequence[ir.Node], *, after_tokens: bool) -> list[tuple[int, ir.Value | None]]:
        """Where to cut within a level: (number of nodes before, the one map that goes on), the end last.

        A cut comes before a node that mixes positions, once another such node or attention's tokens lie behind.
        """
        index = {node: i for i, node in enumerate(nodes)}
        last_use: dict[ir.Value, int] = {}
        for node, i in index.items():
            for value in node.inputs:
                if value is not None and value in self.levels and self.placed(value):
                    last_use[value] = i
        ends: list[tuple[int, ir.Value | None]] = []
        live: set[ir.Value] = set()
        mixed = after_tokens
        candidate: tuple[int, ir.Value] | None = None
        for i, node in enumerate(nodes):
            if is_spatial(node):
                if candidate is not None:
                    ends.append(candidate)
                    candidate, mixed = None, False
                mixed = node.op_type == "Conv" or mixed
            live.update(v for v in node.inputs if v in last_use)
            live.update(v for v in node.outputs if v in last_use)
            live = {v for v in live if last_use[v] > i}
            if mixed and len(live) == 1:
                (value,) = live
                if self.kind(value) == Kind.MAP and value in node.outputs:
                    candidate = (i + 1, value)
        return [*ends, (len(nodes), None)]

"""Pieces and plan of a component written beside its graph; no weight is stored twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgedit.converters.lowerings.onnx import OnnxArtefact
from edgedit.converters.passes.int8_convolution import Int8Convolution, MapRanges
from edgedit.converters.tiling.cost import cost_of
from edgedit.converters.tiling.cut import Attend, Cut, Gather, Local, Step, Sums, cut
from edgedit.converters.tiling.norms import Moments
from edgedit.converters.tiling.pieces import attend_model, piece_model
from edgedit.converters.tiling.positions import Kind
from edgedit.converters.tiling.receptive import halo
from edgedit.errors import ConversionError

__all__ = ["PLAN_VERSION", "TILED", "write_pieces"]

PLAN_VERSION = 1
#: Components that can run in tiles.
TILED = ("decoder", "encoder", "tiny_decoder")


def write_pieces(
    root: Path,
    component: str,
    artefact: OnnxArtefact,
    stride: int,
    map_ranges: Mapping[str, MapRanges] | None = None,
) -> OnnxArtefact:
    """Cut the graph that `artefact` names and write its pieces and COMPONENT.tiles.json into the same folder.

    Args:
        stride: what the sides of the graph's input must be a multiple of.
        map_ranges: of convolutions that compute in int8.

    Returns the artefact with its new files. Raises ConversionError when the graph cannot be cut.
    """
    whole = root / artefact.graph
    result = cut(ir.load(whole), stride)
    writer = _Writer(result, whole.parent, component, map_ranges or {})
    plan = writer.plan()
    path = whole.parent / f"{component}.tiles.json"
    path.write_text(json.dumps({"version": PLAN_VERSION, "stride": stride, **plan}, indent=1) + "\n", encoding="utf-8")
    files = [file.relative_to(root).as_posix() for file in [path, *writer.files]]
    return replace(artefact, tiles=files[0], files=(*artefact.files, *files))


class _Writer:
    def __init__(self, result: Cut, folder: Path, component: str, map_ranges: Mapping[str, MapRanges]) -> None:
        self.result, self.folder, self.component, self.map_ranges = result, folder, component, map_ranges
        self.files: list[Path] = []
        self.named: dict[ir.Value, None] = {}

    def plan(self) -> dict[str, Any]:
        graph = self.result.model.graph
        steps = [self._step(step) for step in self.result.steps]
        values = {}
        for value in self.named:
            layout = self.result.layouts[value]
            scale = [layout.scale.numerator, layout.scale.denominator]
            values[value.name] = {"kind": layout.kind.value, "channels": layout.channels, "scale": scale}
        whole = cost_of(list(graph), graph.outputs, self.result.layouts, Fraction(1))
        weights = sum(v.const_value.nbytes for v in graph.initializers.values() if v.const_value is not None)
        return {
            "input": graph.inputs[0].name,
            "output": graph.outputs[0].name,
            "whole": {"flops": round(whole.flops), "workspace": round(whole.workspace), "weights": weights},
            "values": values,
            "steps": steps,
        }

    def _names(self, values: tuple[ir.Value, ...]) -> list[str | None]:
        placed = [v for v in values if self.result.layouts[v].kind in (Kind.MAP, Kind.TOKENS)]
        self.named.update(dict.fromkeys(placed))
        return [v.name for v in values]

    def _save(self, model: ir.Model) -> str:
        path = self.folder / f"{self.component}.tile{len(self.files):02d}.onnx"
        Int8Convolution(self.map_ranges)(model)
        ir.save(model, path)
        self.files.append(path)
        return path.name

    def _step(self, step: Step) -> dict[str, Any]:
        layouts = self.result.layouts
        if isinstance(step, Local):
            scales = {layouts[v].scale for v in step.inputs}
            if len(scales) != 1:
                raise ConversionError(
                    f"{step.outputs[0].name}: a piece that takes maps of several sizes cannot be tiled"
                )
            (scale,) = scales
            reach = halo(step.nodes, step.outputs, step.inputs)
            tokens = any(layouts[v].kind == Kind.TOKENS for v in (*step.inputs, *step.outputs))
            if tokens and reach != (0, 0):
                raise ConversionError(f"{step.outputs[0].name}: a piece cannot both mix positions and handle tokens")
            cost = cost_of(step.nodes, step.outputs, layouts, scale)
            model = piece_model(
                f"{self.component} {len(self.files)}", step.nodes, (*step.inputs, *step.sums), step.outputs, layouts
            )
            return {
                "run": "local",
                "graph": self._save(model),
                "inputs": self._names(step.inputs),
                "sums": self._names(step.sums),
                "outputs": self._names(step.outputs),
                "halo": list(reach),
                "flops": round(cost.flops),
                "workspace": round(cost.workspace),
                "weights": sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value),
            }
        if isinstance(step, Sums):
            cost = cost_of(step.nodes, step.outputs, layouts, layouts[step.inputs[0]].scale, frees=False)
            model = piece_model(
                f"{self.component} sums {len(self.files)}", step.nodes, step.inputs, step.outputs, layouts
            )
            return {
                "run": "sums",
                "graph": self._save(model),
                "inputs": self._names(step.inputs),
                "outputs": self._names(step.outputs),
                "flops": round(cost.flops),
                "workspace": round(cost.workspace),
            }
        if isinstance(step, Gather):
            keys, values = self._names((step.keys, step.values))
            return {"run": "gather", "name": step.node.name, "keys": keys, "values": values}
        if isinstance(step, Attend):
            channels = layouts[step.queries].channels
            if layouts[step.output].channels != channels:
                raise ConversionError(f"{step.node.name}: values of another width than the queries cannot be tiled")
            queries, output = self._names((step.queries, step.output))
            return {
                "run": "attend",
                "graph": self._save(attend_model(step.node, channels)),
                "gathered": step.node.name,
                "heads": step.node.attributes["q_num_heads"].as_int(),
                "queries": queries,
                "output": output,
            }
        assert isinstance(step, Moments)
        (of, mean, reciprocal_std) = self._names((step.of, step.mean, step.reciprocal_std))
        return {
            "run": "moments",
            "of": of,
            "groups": step.groups,
            "epsilon": step.epsilon,
            "mean": mean,
            "reciprocal_std": reciprocal_std,
        }

"""The plan of a component's pieces (`COMPONENT.tiles.json` of a bundle) as records.

A plan is a list of steps. Stages run on one tile (`Local`, `Attend`); reductions are completed over all tiles before
the next stage begins (`Moments`, `Sums`, `Gather`). A map has `scale` pixels a side for each pixel of the input.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from edgedit.errors import BundleError

__all__ = [
    "Attend",
    "Gather",
    "Local",
    "Moments",
    "Pieces",
    "Reduction",
    "Stage",
    "Sums",
    "Value",
    "Whole",
    "read_pieces",
]

PLAN_VERSION = 1


@dataclass(frozen=True)
class Value:
    """A map [1, channels, h, w] or tokens [1, positions, channels] that passes from piece to piece."""

    is_map: bool
    channels: int
    scale: Fraction


@dataclass(frozen=True)
class Local:
    """A graph on one tile. `halo`: pixels of its inputs before and after; flops, workspace bytes an input pixel."""

    graph: str
    inputs: tuple[str, ...]
    sums: tuple[str, ...]
    outputs: tuple[str, ...]
    halo: tuple[int, int]
    flops: float
    workspace: float
    weights: int


@dataclass(frozen=True)
class Attend:
    """Softmax attention of a tile's queries over everything that `gathered` holds, block by block."""

    graph: str
    gathered: str
    heads: int
    queries: str
    output: str

    @property
    def inputs(self) -> tuple[str, ...]:
        """What it takes from the tile."""
        return (self.queries,)

    @property
    def outputs(self) -> tuple[str, ...]:
        """What it gives to the tile."""
        return (self.output,)


@dataclass(frozen=True)
class Moments:
    """Mean and 1/sqrt(variance + epsilon) of each group of channels of the map `of`, over all positions."""

    of: str
    groups: int
    epsilon: float
    mean: str
    reciprocal_std: str

    @property
    def inputs(self) -> tuple[str, ...]:
        """What it takes from a tile's own pixels."""
        return (self.of,)


@dataclass(frozen=True)
class Sums:
    """A graph whose outputs are added up over all tiles."""

    graph: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    flops: float
    workspace: float


@dataclass(frozen=True)
class Gather:
    """Keys and values of all positions, in any order but the same for both."""

    name: str
    keys: str
    values: str

    @property
    def inputs(self) -> tuple[str, ...]:
        """What it takes from a tile's own pixels."""
        return (self.keys, self.values)


Stage = Local | Attend
Reduction = Moments | Sums | Gather


@dataclass(frozen=True)
class Whole:
    """The component run in one: flops and workspace (bytes) a pixel of its input, and bytes of its weights."""

    flops: float
    workspace: float
    weights: int


@dataclass(frozen=True)
class Pieces:
    """A component cut into `stages`; `reductions[b]` follow the stage before boundary b and precede stage b.

    Boundaries are numbered from 0, before the first stage, to len(stages), after the last.
    """

    input: str
    output: str
    stride: int
    values: Mapping[str, Value]
    stages: tuple[Stage, ...]
    reductions: Mapping[int, tuple[Reduction, ...]]
    whole: Whole
    _live: dict[int, tuple[str, ...]] = field(default_factory=dict, repr=False, compare=False)

    def live(self, boundary: int) -> tuple[str, ...]:
        """Names of the values that are made before `boundary` and needed after it."""
        if boundary not in self._live:
            made = [self.input, *(name for stage in self.stages[:boundary] for name in stage.outputs)]
            later = {name for stage in self.stages[boundary:] for name in stage.inputs}
            later |= {n for b, parts in self.reductions.items() if b > boundary for part in parts for n in part.inputs}
            self._live[boundary] = tuple(name for name in made if name in later)
        return self._live[boundary]

    def scale_at(self, boundary: int) -> Fraction:
        """Scale of the last stage's outputs before `boundary`."""
        if boundary == 0:
            return self.values[self.input].scale
        return self.values[self.stages[boundary - 1].outputs[0]].scale

    @cached_property
    def boundaries(self) -> tuple[int, ...]:
        """Boundaries at which everything that goes on is maps of one scale, and so can be kept."""
        inner = [
            b
            for b in range(1, len(self.stages))
            if all(self.values[n].is_map and self.values[n].scale == self.scale_at(b) for n in self.live(b))
        ]
        return (0, *inner, len(self.stages))


def read_pieces(path: Path) -> Pieces:
    """Read a plan. Raises BundleError when it is damaged or of a newer version."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["version"] > PLAN_VERSION:
            raise BundleError(f"{path}: made for a newer edgedit; upgrade it (pip install --upgrade edgedit)")
        return _parse(raw)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise BundleError(f"{path}: is no plan of tiles ({error}); convert the model again") from error


def _parse(raw: Mapping[str, Any]) -> Pieces:
    values = {
        name: Value(entry["kind"] == "map", int(entry["channels"]), Fraction(*entry["scale"]))
        for name, entry in raw["values"].items()
    }
    stages: list[Stage] = []
    reductions: dict[int, tuple[Reduction, ...]] = {}
    for step in raw["steps"]:
        kind = step["run"]
        if kind == "local":
            stages.append(
                Local(
                    step["graph"],
                    tuple(step["inputs"]),
                    tuple(step["sums"]),
                    tuple(step["outputs"]),
                    (int(step["halo"][0]), int(step["halo"][1])),
                    float(step["flops"]),
                    float(step["workspace"]),
                    int(step["weights"]),
                )
            )
        elif kind == "attend":
            stages.append(Attend(step["graph"], step["gathered"], int(step["heads"]), step["queries"], step["output"]))
        else:
            place = len(stages)
            reductions[place] = (*reductions.get(place, ()), _reduction(kind, step))
    whole = Whole(float(raw["whole"]["flops"]), float(raw["whole"]["workspace"]), int(raw["whole"]["weights"]))
    return Pieces(raw["input"], raw["output"], int(raw["stride"]), values, tuple(stages), reductions, whole)


def _reduction(kind: str, step: Mapping[str, Any]) -> Reduction:
    if kind == "moments":
        return Moments(step["of"], int(step["groups"]), float(step["epsilon"]), step["mean"], step["reciprocal_std"])
    if kind == "sums":
        return Sums(
            step["graph"],
            tuple(step["inputs"]),
            tuple(step["outputs"]),
            float(step["flops"]),
            float(step["workspace"]),
        )
    if kind == "gather":
        return Gather(step["name"], step["keys"], step["values"])
    raise ValueError(f"unknown step {kind!r}")

"""Compressed forms of a weight that Core ML decompresses itself: scaled integers, and palettes."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from edgedit.errors import ConversionError

__all__ = ["SMALLEST", "Palette", "Scaled", "WeightForm", "parse_form"]

#: Weights of fewer values are left as they are.
SMALLEST = 2048

#: Values of a group that its palette is fitted to; more change its entries by less than their rounding.
_SAMPLE = 1 << 18
_ROUNDS = 40


@dataclass(frozen=True)
class Scaled:
    """Codes times a scale for each block of the second axis (or, with one block, for each output)."""

    codes: np.ndarray
    scale: np.ndarray
    bits: int

    def dense(self) -> np.ndarray:
        """The weight that is computed with, float32."""
        block = self.codes.shape[1] // self.scale.shape[1]
        return np.asarray(self.codes.astype(np.float32) * np.repeat(self.scale, block, axis=1))


@dataclass(frozen=True)
class Palette:
    """Numbers of entries, and the entries [groups of outputs, 1 …, entries, 1]."""

    indices: np.ndarray
    table: np.ndarray
    bits: int

    def dense(self) -> np.ndarray:
        """The weight that is computed with, float32."""
        groups = self.table.shape[0]
        flat = self.indices.reshape(groups, -1)
        tables = self.table.reshape(groups, -1)
        return np.take_along_axis(tables, flat.astype(np.int64), axis=1).reshape(self.indices.shape)


@dataclass(frozen=True)
class WeightForm:
    """How weights of linear layers and convolutions are stored.

    Attributes:
        name: as it is written: "int8", "int4-b32", "palette4-g16" …
        kind: "int" or "palette".
        bits: of a code or an index.
        group: int: values of one output's inputs that share a scale, 0 for all of them. palette: outputs that share a
            palette, 0 for all of them.
    """

    name: str
    kind: str
    bits: int
    group: int

    def compress(self, weight: np.ndarray) -> Scaled | Palette:
        """A float weight [out, in, …] in this form; a group that does not divide its axis becomes the whole axis."""
        return self._scaled(weight) if self.kind == "int" else self._palette(weight)

    def _scaled(self, weight: np.ndarray) -> Scaled:
        """Symmetric: codes from -(2^(bits-1) - 1) to 2^(bits-1) - 1, the largest value of a block at an end."""
        out, width, *rest = weight.shape
        block = self.group if self.group and width % self.group == 0 else width
        values = weight.astype(np.float32).reshape(out, width // block, block, *rest)
        axes = tuple(range(2, values.ndim))
        top = float(2 ** (self.bits - 1) - 1)
        largest = np.abs(values).max(axis=axes, keepdims=True)
        scale = np.where(largest > 0, largest / top, 1).astype(np.float32)
        codes = np.clip(np.rint(values / scale), -top, top).astype(np.int8).reshape(weight.shape)
        return Scaled(codes, scale.reshape(out, width // block, *[1] * len(rest)), self.bits)

    def _palette(self, weight: np.ndarray) -> Palette:
        out = weight.shape[0]
        groups = out // self.group if self.group and out % self.group == 0 else 1
        values = weight.astype(np.float32).reshape(groups, -1)
        entries = 2**self.bits
        tables = np.stack([_cluster(row, entries) for row in values])
        middles = (tables[:, 1:] + tables[:, :-1]) / 2
        indices = np.stack([np.searchsorted(m, row) for m, row in zip(middles, values, strict=True)])
        shape = (groups, *[1] * (weight.ndim - 1), entries, 1)
        return Palette(indices.astype(np.uint8).reshape(weight.shape), tables.reshape(shape), self.bits)


def _cluster(values: np.ndarray, count: int) -> np.ndarray:
    """Centres of `count` clusters in one dimension, ascending: Lloyd's k-means from the quantiles.

    In one dimension a cluster is a stretch of the sorted values, so a round costs `count` look-ups.
    """
    ordered = np.sort(values[:: max(1, len(values) // _SAMPLE)]).astype(np.float64)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    centres = np.quantile(ordered, (np.arange(count) + 0.5) / count)
    for _ in range(_ROUNDS):
        ends = np.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2)
        edges = np.concatenate([[0], ends, [len(ordered)]])
        sizes = np.diff(edges)
        means = np.divide(np.diff(sums[edges]), sizes, out=centres.copy(), where=sizes > 0)
        if np.array_equal(means, centres):
            break
        centres = means
    return np.sort(centres).astype(np.float32)


def parse_form(name: str) -> WeightForm:
    """A form by its name: int8, int4, int4-b32 (any block), palette1, 2, 3, 4, 6 or 8, palette4-g16 (any group).

    int8 has one scale an output, int4 one for 32 inputs, a palette serves a whole tensor when no group is named.
    Raises ConversionError for anything else.
    """
    found = re.fullmatch(r"int(4|8)(?:-b([1-9]\d*))?|palette([123468])(?:-g([1-9]\d*))?", name)
    if found is None:
        raise ConversionError(
            f"unknown Core ML weights {name!r}; choose int8, int4, int4-b64 (a block), palette1 to palette8 "
            "(not 5 or 7), or palette4-g16 (a group of outputs)"
        )
    bits, block, indices, group = found.groups()
    if bits is None:
        return WeightForm(name, "palette", int(indices), int(group or 0))
    return WeightForm(name, "int", int(bits), int(block) if block else 32 if bits == "4" else 0)

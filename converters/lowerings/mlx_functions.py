"""Exported functions: a component as an `.mlxfn` file, which MLX Swift, C++ and C run without Python and without us.

One file holds a function for every set of shapes; the weights stay outside, in the component's safetensors file, and
are given by name at each call. MLX writes the strides of no constant, so that one that is not contiguous would be read
back wrong without a word: none is captured but by `Values.constant`, and what was written is read back and compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from edgedit.converters.lowerings.mlx import Program, read
from edgedit.errors import ConversionError
from edgedit.example_inputs import TensorLike

__all__ = ["export", "shapes_of"]


def shapes_of(inputs: Sequence[TensorLike], sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The inputs' shapes with every named size filled in. Raises ConversionError for one that `sizes` lacks."""
    try:
        return {s.name: tuple(d if isinstance(d, int) else sizes[d] for d in s.shape) for s in inputs}
    except KeyError as error:
        raise ConversionError(f"no size is given for {error.args[0]!r}, which a fixed shape needs") from None


def export(
    graph: Path,
    weights: Path,
    target: Path,
    inputs: Sequence[TensorLike],
    sizes: Sequence[Mapping[str, int]],
    *,
    check: bool = True,
) -> None:
    """Write `target`, an `.mlxfn` file with one function for each of `sizes`.

    A function takes the component's inputs by position, in the manifest's order, and every tensor of the weights file
    by name; it returns the outputs in the manifest's order. The metadata of the file is JSON: `inputs` and `outputs`
    (names in order), `weights` (the safetensors file, beside this one) and `sizes`.

    Args:
        check: read the file back, run every function of it, and compare.

    Raises:
        ConversionError: a size is missing, or the file, read back, does not give what it was written from.
    """
    description = read(graph)
    arrays: Any = mx.load(str(weights))
    names = [spec.name for spec in inputs]
    programs: dict[tuple[tuple[int, ...], ...], Program] = {}
    examples: list[list[Any]] = []
    for one in sizes:
        shapes = shapes_of(inputs, one)
        example = [mx.array(_example(spec, shapes[spec.name])) for spec in inputs]
        key = tuple(shapes[name] for name in names)
        if key not in programs:
            programs[key] = Program(description, arrays, dict(zip(names, example, strict=True)))
            examples.append(example)

    def run(*values: Any, **tensors: Any) -> list[Any]:
        program = programs[tuple(tuple(value.shape) for value in values)]
        return program(dict(zip(names, values, strict=True)), tensors)

    about = {
        "inputs": names,
        "outputs": list(description.outputs),
        "weights": weights.name,
        "sizes": [dict(one) for one in sizes],
    }
    with mx.exporter(str(target), run, metadata=json.dumps(about)) as exporter:
        for example in examples:
            exporter(*example, **arrays)
    if not check:
        return
    again: Any = mx.import_function(str(target))
    for example in examples:
        wanted, found = run(*example, **arrays), again(*example, **arrays)
        if not all(mx.array_equal(a, b, equal_nan=True).item() for a, b in zip(wanted, found, strict=True)):
            raise ConversionError(f"{target.name}: read back, the function gives other numbers; report this, please")


def _example(spec: TensorLike, shape: tuple[int, ...]) -> np.ndarray:
    """Values that every component takes, none of them equal: what is compared must not be blind to a transposition."""
    count = np.arange(int(np.prod(shape)))
    if spec.dtype.startswith("int"):
        return np.asarray((count % 7 % 2 if "mask" in spec.name else count % 2).reshape(shape), spec.dtype)
    return np.asarray(np.sin(1.0 + count).reshape(shape), spec.dtype)

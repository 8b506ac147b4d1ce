"""The layers of a graph whose weights can be quantized."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from edgedit.converters.passes.int8_pointwise import is_pointwise
from edgedit.converters.quantization.form import BLOCKS, INT_BITS, Form
from edgedit.converters.quantization.levels import LEVELS

__all__ = ["SMALLEST", "Layer", "block_of", "find_layers", "fitted", "layer_name"]

#: Channels from which a convolution of maps is faster in int8.
_WIDE = 64

SMALLEST = 4096
"""Weights with fewer elements keep their type: biases, norms and small tables weigh nothing."""


@dataclass(frozen=True)
class Layer:
    """A weight and where it is used.

    Attributes:
        name: the weight's name without ".weight".
        kind: "matrix" ([inputs, outputs]), "convolution" ([outputs, …]) or "table" ([rows, width], looked up).
        value: the initializer.
        shape: its sides.
    """

    name: str
    kind: str
    value: ir.Value
    shape: tuple[int, ...]

    @property
    def has_int8(self) -> bool:
        """Whether there is int8 arithmetic for it: a matrix, or a 1×1 convolution."""
        if self.kind != "convolution":
            return self.kind == "matrix"
        return bool(self.nodes) and all(is_pointwise(node) for node in self.nodes)

    @property
    def has_int8_maps(self) -> bool:
        """Whether it is a convolution of maps that computes in int8 once the ranges of its maps are known."""
        wide = self.kind == "convolution" and len(self.shape) == 4 and min(self.shape[:2]) >= _WIDE
        return wide and all("group" not in n.attributes or n.attributes["group"].as_int() == 1 for n in self.nodes)

    @property
    def nodes(self) -> list[ir.Node]:
        """The nodes that take the weight."""
        return [use.node for use in self.value.uses()]


def layer_name(weight: str) -> str:
    """ "proj_out.weight" is the weight of "proj_out"."""
    return weight.removesuffix(".weight")


def find_layers(model: ir.Model) -> dict[str, Layer]:
    """Layers by name, in the order of the graph's initializers. Nothing is read from disk."""
    found = {}
    for key, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < SMALLEST or value.shape is None:
            continue
        shape = tuple(int(side) for side in value.shape.numpy())
        uses = {(use.node.op_type, use.idx) for use in value.uses()}
        if uses == {("MatMul", 1)} and len(shape) == 2:
            kind = "matrix"
        elif uses == {("Conv", 1)}:
            kind = "convolution"
        elif uses == {("Gather", 0)} and len(shape) == 2 and _looks_up_rows(value):
            kind = "table"
        else:
            continue
        found[layer_name(key)] = Layer(layer_name(key), kind, value, shape)
    return found


def _looks_up_rows(value: ir.Value) -> bool:
    attributes = [use.node.attributes for use in value.uses()]
    return all("axis" not in found or found["axis"].as_int() == 0 for found in attributes)


def block_of(rows: int, wanted: int) -> int | None:
    """The largest block up to `wanted` that divides the input axis, at least 16."""
    return next((size for size in BLOCKS if size <= wanted and rows % size == 0), None)


def fitted(form: Form, layer: Layer) -> Form:
    """What a form becomes on a layer.

    Convolutions and tables have 8 bits at least and no methods, tables no zeros, and int8 arithmetic only where there
    is some; a matrix whose inputs divide into no block, or whose outputs do not fill a byte, takes the next wider form
    that it can have.
    """
    sparsity = None if layer.kind == "table" else form.sparsity
    if not form.is_coded:
        return Form(form.bits, sparsity=sparsity)
    if layer.kind != "matrix":
        int8 = form.int8_activations and (layer.has_int8 or layer.has_int8_maps)
        return Form(8, int8_activations=int8, per_token=form.per_token and int8, sparsity=sparsity)
    if form.format == "palette" and layer.shape[1] % form.width:
        bits = next(bits for bits in sorted(INT_BITS) if bits >= form.bits) if form.sparsity is None else 8
        block = 64 if bits < 8 else None
        return fitted(
            replace(form, bits=bits, block=block, format="int", vector=None),
            layer,
        )
    changes = dict(form.__dict__)
    if form.format != "palette" and form.bits < 8:
        block = None if form.block is None else block_of(layer.shape[0], form.block)
        changes["block"] = block
        if block is None:
            changes |= {"bits": 8, "format": "int"}
        elif form.bits == 3 and layer.shape[1] % 8:
            changes["bits"] = 4
        elif form.format in LEVELS and layer.shape[1] % 2:
            changes["format"] = "int"
    return Form(**changes)

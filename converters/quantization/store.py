"""A layer's weight in the canonical graph as codes: nodes of standard operators that open what is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgedit.converters.quantization.form import Form
from edgedit.converters.quantization.layers import Layer
from edgedit.converters.quantization.levels import LEVELS
from edgedit.converters.quantization.packing import LOW_TABLE, SIGN_TABLE

__all__ = ["DEQUANTIZE", "INT2_OPSET", "Parts", "store"]

Parts = Callable[[], Mapping[str, npt.NDArray[np.generic]]]

#: End of the name of the node that a weight comes out of.
DEQUANTIZE = "/dequantize"
#: Operator set and IR version in which DequantizeLinear takes 2-bit codes.
INT2_OPSET, INT2_IR = 25, 13
_LOW = {4: ir.DataType.INT4, 2: ir.DataType.INT2}
_STORED: Mapping[ir.DataType, Any] = {ir.DataType.INT4: ml_dtypes.int4, ir.DataType.INT2: ml_dtypes.int2}
_TABLES = {
    "quantization/low": LOW_TABLE,
    "quantization/sign": SIGN_TABLE,
    **{f"quantization/{name}": levels.table for name, levels in LEVELS.items()},
}


def store(model: ir.Model, layer: Layer, form: Form, parts: Parts) -> None:
    """Replace a layer's weight by the arrays of its encoded form, which `parts` makes when the model is written.

    `form` is `fitted` to the layer. Codes keep the weight's name; the other arrays have it before a slash.
    """
    writer = _Writer(model, layer, parts)
    if layer.kind == "table":
        writer.table()
        return
    shape, axis = layer.shape, 0 if layer.kind == "convolution" else 1
    if form.format == "palette":
        width = form.width
        codes = writer.part("", ir.DataType.UINT8, (shape[0], shape[1] // width))
        entries = writer.part("entries", ir.DataType.INT8, (256, width))
        writer.dequantize(writer.looked_up(entries, codes, "codes", shape), writer.scale((shape[1],)), axis, None)
        return
    if form.bits == 3:
        low, sign = (
            writer.looked_up(
                writer.shared_table(f"quantization/{table}"),
                writer.part(part, ir.DataType.UINT8, (shape[0], shape[1] // count)),
                f"{table}_bits",
                shape,
            )
            for part, table, count in (("", "low", 4), ("sign", "sign", 8))
        )
        codes = writer.cast(writer.node("Add", [low, sign], "sum"), ir.DataType.INT8, "codes")
    elif form.format in LEVELS:
        packed = writer.part("", ir.DataType.UINT8, (shape[0], shape[1] // 2))
        numbers = writer.looked_up(writer.shared_table(f"quantization/{form.format}"), packed, "pairs", shape)
        codes = writer.cast(numbers, ir.DataType.INT8, "codes")
    else:
        codes = writer.part("", _LOW.get(form.bits, ir.DataType.INT8), shape)
    if form.block is None:
        writer.dequantize(codes, writer.scale((shape[axis],)), axis, None)
        return
    groups = (shape[0] // form.block, shape[1])
    if form.int8_activations:
        multiplier = writer.part("multiplier", ir.DataType.INT8, groups)
        factors = writer.cast(multiplier, ir.DataType.FLOAT, "factors")
        scales = writer.node("Mul", [factors, writer.scale((shape[1],))], "scales")
    else:
        scales = writer.scale(groups)
    writer.dequantize(codes, scales, 0, form.block)
    if form.bits == 2:
        model.graph.opset_imports[""] = max(INT2_OPSET, model.graph.opset_imports[""])
        model.ir_version = max(INT2_IR, model.ir_version)


class _Writer:
    """Makes the initializers and nodes of one layer; nodes are put in before the first use of the weight."""

    def __init__(self, model: ir.Model, layer: Layer, parts: Parts) -> None:
        self.graph, self.layer, self.parts = model.graph, layer, parts
        self.uses = [(use.node, use.idx) for use in layer.value.uses()]
        name = layer.value.name
        assert name is not None
        self.name = name
        self.place = self.uses[0][0] if len(self.uses) == 1 else next(iter(self.graph))
        del self.graph.initializers[name]

    def part(self, suffix: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
        """The initializer of one array, read when it is written."""
        name = f"{self.name}/{suffix}" if suffix else self.name

        def load() -> ir.TensorProtocol:
            array = self.parts()[suffix]
            return ir.tensor(array.astype(_STORED[dtype]) if dtype in _STORED else array, name=name)

        lazy = ir.LazyTensor(load, dtype=dtype, shape=ir.Shape(shape), name=name, cache=False)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=lazy)
        self.graph.initializers[name] = value
        return value

    def scale(self, shape: tuple[int, ...]) -> ir.Value:
        return self.part("scale", ir.DataType.FLOAT, shape)

    def node(
        self, operator: str, inputs: list[ir.Value], label: str, attributes: list[ir.Attr] | None = None
    ) -> ir.Value:
        node = ir.Node("", operator, inputs, attributes or [], num_outputs=1, name=f"{self.name}/{label}")
        node.outputs[0].name = f"{self.name}/{label}:0"
        self.graph.insert_before(self.place, node)
        return node.outputs[0]

    def cast(self, value: ir.Value, dtype: ir.DataType, label: str) -> ir.Value:
        return self.node("Cast", [value], label, [ir.AttrInt64("to", int(dtype))])

    def shared_table(self, name: str) -> ir.Value:
        if name not in self.graph.initializers:
            table = _TABLES[name]
            self.graph.initializers[name] = ir.Value(
                name=name,
                type=ir.TensorType(ir.DataType.FLOAT),
                shape=ir.Shape(table.shape),
                const_value=ir.tensor(table, name=name),
            )
        return self.graph.initializers[name]

    def looked_up(self, table: ir.Value, codes: ir.Value, label: str, shape: tuple[int, ...]) -> ir.Value:
        """Rows of a table [256, n] for codes [K, N / n], as [K, N]."""
        wide = self.cast(codes, ir.DataType.INT32, f"{label}_wide")
        rows = self.node("Gather", [table, wide], f"{label}_rows", [ir.AttrInt64("axis", 0)])
        name = f"quantization/shape_{'x'.join(map(str, shape))}"
        if name not in self.graph.initializers:
            sides = ir.tensor(np.array(shape, np.int64), name=name)
            self.graph.initializers[name] = ir.Value(
                name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(shape)]), const_value=sides
            )
        return self.node("Reshape", [rows, self.graph.initializers[name]], label)

    def dequantize(self, codes: ir.Value, scales: ir.Value, axis: int, block: int | None) -> None:
        attributes = [ir.AttrInt64("axis", axis)] + ([ir.AttrInt64("block_size", block)] if block else [])
        inputs = [codes, scales]
        node = ir.Node("", "DequantizeLinear", inputs, attributes, num_outputs=1, name=f"{self.name}{DEQUANTIZE}")
        result = node.outputs[0]
        result.name = f"{self.name}/dequantized"
        result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), self.layer.value.shape
        self.graph.insert_before(self.place, node)
        for use_node, index in self.uses:
            use_node.replace_input_with(index, result)

    def table(self) -> None:
        """Gather(table, ids) becomes Cast(Gather(codes, ids)) · Gather(scales, ids): never expanded as a whole."""
        codes = self.part("", ir.DataType.INT8, self.layer.shape)
        scales = self.scale((self.layer.shape[0], 1))
        for node, _ in self.uses:
            ids, old, name_of = node.inputs[1], node.outputs[0], node.name
            rows_axis, to_float = [ir.AttrInt64("axis", 0)], [ir.AttrInt64("to", int(ir.DataType.FLOAT))]
            made = [
                ir.Node("", "Gather", [source, ids], rows_axis, num_outputs=1, name=f"{name_of}/{part}")
                for part, source in (("codes", codes), ("scales", scales))
            ]
            looked_up, factors = (part.outputs[0] for part in made)
            cast = ir.Node("", "Cast", [looked_up], to_float, num_outputs=1, name=f"{name_of}/float32")
            scaled = ir.Node("", "Mul", [cast.outputs[0], factors], num_outputs=1, name=f"{name_of}/scale")
            for part in (*made, cast):
                part.outputs[0].name = f"{part.name}/output"
            new = scaled.outputs[0]
            new.name, new.type, new.shape = old.name, old.type, old.shape
            self.graph.insert_before(node, [*made, cast, scaled])
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            self.graph.remove(node, safe=True)

"""Weights in 8 or 4 bits, and int8 arithmetic for the layers where it pays.

A quantized weight is `DequantizeLinear(codes, scales)` in the canonical graph: per output channel for 8 bits, in blocks
along the input axis for 4. A table that is looked up keeps its codes until after the look-up, so that it is never
expanded as a whole. Rounding is to the nearest code; scales are searched for the least squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

__all__ = ["PRESETS", "Form", "Int8MatMul", "QuantizeWeights", "codes_and_scales", "form_of"]

Float = npt.NDArray[np.float32]

SMALLEST = 4096
"""Weights with fewer elements keep their type: biases, norms and small tables weigh nothing."""
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Shares of a channel's largest weight that are tried as the largest code."""


@dataclass(frozen=True)
class Form:
    """How the matrices of a component are stored: `bits` 8 or 4, `block` weights to a scale along the input axis (None:
    one scale an output channel), and whether activations are quantized as well, per tensor, as they come."""

    bits: int
    block: int | None = None
    int8_activations: bool = False


_W8, _W4, _W8A8 = Form(8), Form(4, 64), Form(8, int8_activations=True)

PRESETS: Mapping[str, Mapping[str, Form]] = {
    "w8": {"transformer": _W8, "text_encoder": _W8, "decoder": _W8, "encoder": _W8},
    "w4": {"transformer": _W4, "text_encoder": _W4, "decoder": _W8, "encoder": _W8},
    "w8a8": {"transformer": _W8A8, "text_encoder": _W8, "decoder": _W8, "encoder": _W8},
}
"""Preset to the form of each component. Text encoders keep float activations: theirs have outliers of a thousand."""


def form_of(preset: str, component: str) -> Form | None:
    """The form of a component's weights, None where the preset is a float type."""
    return PRESETS[preset][component] if preset in PRESETS else None


def codes_and_scales(weight: Float, bits: int, axis: int) -> tuple[npt.NDArray[np.int8], Float]:
    """Symmetric codes of `weight` with one scale for each slice along all axes but `axis`.

    Args:
        weight: float32, any shape.
        bits: 8 or 4.
        axis: the axis, or axes merged by the caller, over which a scale is shared.

    Returns:
        int8 codes in [-127, 127] or [-7, 7], and float32 scales with that axis kept at length 1.
    """
    top = float(2 ** (bits - 1) - 1)
    peak = np.abs(weight).max(axis=axis, keepdims=True)
    best_error = np.full(peak.shape, np.inf, np.float32)
    best_scale = np.ones(peak.shape, np.float32)
    for clip in _CLIPS if bits < 8 else _CLIPS[:1]:
        scale = np.where(peak > 0, peak * (clip / top), 1).astype(np.float32)
        codes = np.clip(np.rint(weight / scale), -top, top)
        error = ((codes * scale - weight) ** 2).sum(axis=axis, keepdims=True)
        better = error < best_error
        best_error, best_scale = np.where(better, error, best_error), np.where(better, scale, best_scale)
    return np.clip(np.rint(weight / best_scale), -top, top).astype(np.int8), best_scale


def _block(rows: int, wanted: int) -> int | None:
    """The largest block up to `wanted` that divides the input axis, at least 16."""
    return next((size for size in (128, 64, 32, 16) if size <= wanted and rows % size == 0), None)


class QuantizeWeights(ir.passes.InPlacePass):
    """Store the matrices, convolutions and look-up tables of a component in the bits of a form.

    `changes` says for each weight what became of it: "8 bits per channel", "4 bits, blocks of 64". Weights stay lazy.
    """

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.changes: dict[str, str] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for name, value in list(model.graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < SMALLEST:
                continue
            uses = {(use.node.op_type, use.idx) for use in value.uses()}
            if uses == {("MatMul", 1)} and len(tensor.shape) == 2:
                self._matrix(model.graph, name, value)
            elif uses == {("Conv", 1)}:
                self._per_channel(model.graph, name, value, axis=0)
            elif uses == {("Gather", 0)} and len(tensor.shape) == 2:
                self._table(model.graph, name, value)
        return ir.passes.PassResult(model, modified=bool(self.changes))

    def _matrix(self, graph: ir.Graph, name: str, value: ir.Value) -> None:
        rows = _shape(value)[0]
        block = None if self.form.block is None else _block(rows, self.form.block)
        if self.form.bits == 8 or block is None:
            self._per_channel(graph, name, value, axis=1)
            return
        rows, columns = _shape(value)

        def quantized(weight: Float) -> tuple[npt.NDArray[np.int8], Float]:
            codes, scales = codes_and_scales(weight.reshape(rows // block, block, columns), 4, axis=1)
            return codes.reshape(rows, columns), scales.reshape(rows // block, columns)

        self._replace(graph, name, value, quantized, ir.DataType.INT4, (rows // block, columns), 0, block)
        self.changes[name] = f"4 bits, blocks of {block}"

    def _per_channel(self, graph: ir.Graph, name: str, value: ir.Value, *, axis: int) -> None:
        channels = _shape(value)[axis]

        def quantized(weight: Float) -> tuple[npt.NDArray[np.int8], Float]:
            flat = np.moveaxis(weight, axis, 0).reshape(channels, -1)
            codes, scales = codes_and_scales(flat, 8, axis=1)
            moved = codes.reshape(np.moveaxis(weight, axis, 0).shape)
            return np.ascontiguousarray(np.moveaxis(moved, 0, axis)), scales.reshape(channels)

        self._replace(graph, name, value, quantized, ir.DataType.INT8, (channels,), axis, 0)
        self.changes[name] = "8 bits per channel"

    def _replace(
        self,
        graph: ir.Graph,
        name: str,
        value: ir.Value,
        quantized: Callable[[Float], tuple[npt.NDArray[np.int8], Float]],
        dtype: ir.DataType,
        scale_shape: tuple[int, ...],
        axis: int,
        block: int,
    ) -> None:
        codes, scales = _stored(graph, name, value, quantized, dtype, scale_shape)
        attributes = [ir.AttrInt64("axis", axis)] + ([ir.AttrInt64("block_size", block)] if block else [])
        node = ir.Node("", "DequantizeLinear", [codes, scales], attributes, num_outputs=1, name=f"{name}/dequantize")
        result = node.outputs[0]
        result.name, result.type, result.shape = f"{name}/dequantized", ir.TensorType(ir.DataType.FLOAT), value.shape
        first = next(iter(use.node for use in value.uses()))
        graph.insert_before(next(iter(graph)) if len(list(value.uses())) > 1 else first, node)
        for use_node, index in [(use.node, use.idx) for use in value.uses()]:
            use_node.replace_input_with(index, result)

    def _table(self, graph: ir.Graph, name: str, value: ir.Value) -> None:
        """Gather(table, ids) becomes Cast(Gather(codes, ids)) · Gather(scales, ids)."""
        rows = _shape(value)[0]
        users = [use.node for use in value.uses()]
        if any("axis" in node.attributes and node.attributes["axis"].as_int() != 0 for node in users):
            return

        def quantized(weight: Float) -> tuple[npt.NDArray[np.int8], Float]:
            return codes_and_scales(weight, 8, axis=1)

        codes, scales = _stored(graph, name, value, quantized, ir.DataType.INT8, (rows, 1))
        for node in users:
            ids, old, name_of = node.inputs[1], node.outputs[0], node.name
            rows_axis, to_float = [ir.AttrInt64("axis", 0)], [ir.AttrInt64("to", int(ir.DataType.FLOAT))]
            parts = [
                ir.Node("", "Gather", [source, ids], rows_axis, num_outputs=1, name=f"{name_of}/{part}")
                for part, source in (("codes", codes), ("scales", scales))
            ]
            looked_up, factors = (part.outputs[0] for part in parts)
            cast = ir.Node("", "Cast", [looked_up], to_float, num_outputs=1, name=f"{name_of}/float32")
            scaled = ir.Node("", "Mul", [cast.outputs[0], factors], num_outputs=1, name=f"{name_of}/scale")
            for made in (*parts, cast):
                made.outputs[0].name = f"{made.name}/output"
            new = scaled.outputs[0]
            new.name, new.type, new.shape = old.name, old.type, old.shape
            graph.insert_before(node, [*parts, cast, scaled])
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            graph.remove(node, safe=True)
        self.changes[name] = "8 bits per row"


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(int(side) for side in value.shape.numpy())


def _stored(
    graph: ir.Graph,
    name: str,
    value: ir.Value,
    quantized: Callable[[Float], tuple[npt.NDArray[np.int8], Float]],
    dtype: ir.DataType,
    scale_shape: tuple[int, ...],
) -> tuple[ir.Value, ir.Value]:
    """Initializers for codes (under the weight's own name) and scales, in the place of the weight's."""
    tensor = value.const_value
    assert tensor is not None

    def load_codes() -> ir.TensorProtocol:
        codes, _ = quantized(tensor.numpy().astype(np.float32, copy=False))
        return ir.tensor(codes.astype(ml_dtypes.int4) if dtype == ir.DataType.INT4 else codes, name=name)

    def load_scales() -> ir.TensorProtocol:
        return ir.tensor(quantized(tensor.numpy().astype(np.float32, copy=False))[1], name=f"{name}/scale")

    parts = []
    for label, load, kind, shape in (
        (name, load_codes, dtype, value.shape),
        (f"{name}/scale", load_scales, ir.DataType.FLOAT, ir.Shape(scale_shape)),
    ):
        assert shape is not None
        lazy = ir.LazyTensor(load, dtype=kind, shape=shape, name=label, cache=False)
        parts.append(ir.Value(name=label, type=ir.TensorType(kind), shape=shape, const_value=lazy))
    del graph.initializers[name]
    for part in parts:
        assert part.name is not None
        graph.initializers[part.name] = part
    return parts[0], parts[1]


class Int8MatMul(ir.passes.InPlacePass):
    """The CPU form of 8-bit matrices with 8-bit activations: one `DynamicQuantizeMatMul` of ONNX Runtime each.

    Activations become uint8 with the range of the tensor at hand. Only matrices inside blocks are taken: what
    conditions them (timestep, text projection) has few rows and is worth its precision.
    """

    def __init__(self) -> None:
        super().__init__()
        self.changes = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        for node in list(graph):
            source = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] is not None else None
            if source is None or source.op_type != "DequantizeLinear" or "block_size" in source.attributes:
                continue
            codes, scales = source.inputs
            if codes is None or "blocks." not in (codes.name or ""):
                continue
            fused = ir.Node(
                "com.microsoft", "DynamicQuantizeMatMul", [node.inputs[0], codes, scales], num_outputs=1, name=node.name
            )
            old, new = node.outputs[0], fused.outputs[0]
            new.name, new.type, new.shape = old.name, old.type, old.shape
            graph.insert_before(node, fused)
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            graph.remove(node, safe=True)
            if not list(source.outputs[0].uses()):
                graph.remove(source, safe=True)
            self.changes += 1
        if self.changes:
            graph.opset_imports["com.microsoft"] = 1
        return ir.passes.PassResult(model, modified=bool(self.changes))

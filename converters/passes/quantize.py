"""Weights as codes, and int8 arithmetic for the layers where it pays.

A quantized weight is `DequantizeLinear(codes, scales)` in the canonical graph: per output channel for 8 bits, in blocks
along the input axis below. A table that is looked up keeps its codes until after the look-up, so that it is never
expanded as a whole. Which layer has which form is a recipe's business (`edgedit.converters.quantization`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgedit.converters.passes.int8_pointwise import is_pointwise, remove_unused, tokens_product
from edgedit.converters.passes.int8_tokens import per_token_product
from edgedit.converters.quantization.encode import Encoded, encode
from edgedit.converters.quantization.form import Form
from edgedit.converters.quantization.layers import Layer, find_layers, fitted, layer_name
from edgedit.converters.quantization.rounding import codes_and_scales
from edgedit.converters.quantization.store import DEQUANTIZE, store
from edgedit.errors import ConversionError

__all__ = ["Encode", "Form", "Int8MatMul", "QuantizeWeights", "check_finite", "codes_and_scales", "plain_encode"]

Encode = Callable[[Layer, Form, npt.NDArray[np.float32]], Encoded]
"""Rounds a layer's weight into a form."""


def plain_encode(layer: Layer, form: Form, weight: npt.NDArray[np.float32]) -> Encoded:
    """Without calibration. Raises ConversionError for a weight with values that are not numbers."""
    check_finite(layer, weight)
    return encode(weight, form, layer.kind)


def check_finite(layer: Layer, weight: npt.NDArray[np.float32]) -> None:
    """Raises ConversionError, with the layer's name, for a weight with values that are not numbers."""
    if not np.isfinite(weight).all():
        raise ConversionError(
            f"layer {layer.name} holds values that are not numbers and cannot be quantized; "
            "check the checkpoint, or give the layer 32 bits in a recipe"
        )


class QuantizeWeights(ir.passes.InPlacePass):
    """Store matrices, convolutions and look-up tables in the bits of a form, one for all or one a layer.

    `changes` says for each weight what became of it: "8 bits per channel", "4 bits, blocks of 64". Weights stay lazy.

    Args:
        forms: by layer name (layers that are absent keep their type), or one for every layer.
        encode: what rounds; by default to the nearest codes.
    """

    def __init__(self, forms: Form | Mapping[str, Form], encode: Encode = plain_encode) -> None:
        super().__init__()
        self.forms, self.encode = forms, encode
        self.changes: dict[str, str] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for name, layer in find_layers(model).items():
            form = self.forms if isinstance(self.forms, Form) else self.forms.get(name)
            if form is None or not form.is_coded:
                continue
            form = fitted(form, layer)
            store(model, layer, form, _loader(layer, form, self.encode))
            row_wise = layer.kind == "table"
            self.changes[layer.value.name or name] = "8 bits per row" if row_wise else form.describe()
        return ir.passes.PassResult(model, modified=bool(self.changes))


def _loader(layer: Layer, form: Form, encode: Encode) -> Callable[[], Mapping[str, npt.NDArray[np.generic]]]:
    tensor = layer.value.const_value
    assert tensor is not None
    return lambda: encode(layer, form, tensor.numpy().astype(np.float32, copy=False)).parts


class Int8MatMul(ir.passes.InPlacePass):
    """The CPU form of matrices and 1×1 convolutions with 8-bit activations.

    Activations become uint8 with the range of the tensor at hand (one `DynamicQuantizeMatMul` of ONNX Runtime each), or
    with the range of each token (see `int8_tokens`). Weights of fewer bits are expanded to int8 when the
    graph is opened.

    Args:
        layers: names of those to take; None takes what 8-bit matrices there are inside blocks.
        per_token: names of those whose tokens have a range each.
    """

    def __init__(self, layers: Collection[str] | None = None, per_token: Collection[str] = ()) -> None:
        super().__init__()
        self.layers, self.per_token = layers, per_token
        self.changes = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        for node in list(graph):
            is_product = node.op_type == "MatMul" or is_pointwise(node)
            source = node.inputs[1].producer() if is_product and node.inputs[1] is not None else None
            if source is None or source.op_type != "DequantizeLinear" or not self._takes(source):
                continue
            self.changes += 1
            per_token = layer_name((source.name or "").removesuffix(DEQUANTIZE)) in self.per_token
            if node.op_type == "Conv":
                codes, scales = source.inputs[:2]
                assert codes is not None
                assert scales is not None
                tokens_product(graph, node, codes, scales, per_token=per_token)
                remove_unused(graph, source)
                continue
            codes, scales = _int8_codes(graph, source)
            made = _maker(graph, node)
            x = node.inputs[0]
            assert x is not None
            if per_token:
                new = per_token_product(made, x, codes, scales, None)
            else:
                new = made("DynamicQuantizeMatMul", [x, codes, scales], domain="com.microsoft")
            producer, old = new.producer(), node.outputs[0]
            assert producer is not None
            producer.name = node.name
            new.name, new.type, new.shape = old.name, old.type, old.shape
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            graph.remove(node, safe=True)
            remove_unused(graph, source)
        if self.changes:
            graph.opset_imports["com.microsoft"] = 1
        return ir.passes.PassResult(model, modified=bool(self.changes))

    def _takes(self, source: ir.Node) -> bool:
        weight = (source.name or "").removesuffix(DEQUANTIZE)
        if self.layers is None:
            return "block_size" not in source.attributes and "blocks." in weight
        return layer_name(weight) in self.layers


def _maker(graph: ir.Graph, node: ir.Node) -> Callable[..., ir.Value]:
    """Makes nodes before `node`, named after it."""
    count = 0

    def made(operator: str, inputs: list[ir.Value | None], *attributes: ir.Attr, domain: str = "") -> ir.Value:
        nonlocal count
        new = ir.Node(domain, operator, inputs, list(attributes), num_outputs=1, name=f"{node.name}/{operator}_{count}")
        new.outputs[0].name = f"{new.name}:0"
        count += 1
        graph.insert_before(node, new)
        return new.outputs[0]

    return made


def _int8_codes(graph: ir.Graph, source: ir.Node) -> tuple[ir.Value, ir.Value]:
    """int8 weights [K, N] and a scale a channel [N] for what a DequantizeLinear makes."""
    codes, scales = source.inputs[:2]
    assert codes is not None
    assert scales is not None
    if "block_size" not in source.attributes:
        return codes, scales
    block = source.attributes["block_size"].as_int()
    product = scales.producer()
    assert product is not None
    factors, channel = product.inputs
    assert factors is not None
    assert channel is not None
    name = (source.name or "").removesuffix(DEQUANTIZE)

    def made(operator: str, inputs: list[ir.Value | None], label: str, *attributes: ir.Attr) -> ir.Value:
        node = ir.Node("", operator, inputs, list(attributes), num_outputs=1, name=f"{name}/{label}")
        node.outputs[0].name = f"{name}/{label}:0"
        graph.insert_before(source, node)
        return node.outputs[0]

    def constant(values: list[int], label: str) -> ir.Value:
        return made("Constant", [], label, ir.AttrInt64s("value_ints", values))

    wide = made("Cast", [codes], "wide", ir.AttrInt64("to", int(ir.DataType.FLOAT)))
    rows, columns = (int(side) for side in source.outputs[0].shape.numpy())  # type: ignore[union-attr]
    grouped = made("Reshape", [wide, constant([rows // block, block, columns], "groups")], "grouped")
    each = made("Unsqueeze", [factors, constant([1], "axis")], "each")
    whole = made("Reshape", [made("Mul", [grouped, each], "multiplied"), constant([rows, columns], "sides")], "whole")
    return made("Cast", [whole], "int8", ir.AttrInt64("to", int(ir.DataType.INT8))), channel

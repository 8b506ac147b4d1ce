"""1×1 convolutions with 8-bit activations as products of tokens, for ONNX Runtime's CPU provider.

It has no fast integer kernel for convolutions of maps in channels-first order, but one for matrix products. SANA's
mix-FFN is two such convolutions around a depthwise one, and most of the arithmetic of its block.
"""

from __future__ import annotations

import onnx_ir as ir

from edgedit.converters.passes.int8_tokens import per_token_product

__all__ = ["is_pointwise", "remove_unused", "tokens_product"]

_TO_TOKENS = (0, 2, 1)


def is_pointwise(node: ir.Node) -> bool:
    """Whether a node is a 1×1 convolution of stride 1 without groups."""
    if node.op_type != "Conv" or node.inputs[1] is None or node.inputs[1].shape is None:
        return False
    sides = node.inputs[1].shape.numpy()[2:]
    group = node.attributes["group"].as_int() if "group" in node.attributes else 1
    ones = [
        value for key in ("strides", "dilations") if key in node.attributes for value in node.attributes[key].as_ints()
    ]
    pads = node.attributes["pads"].as_ints() if "pads" in node.attributes else ()
    return all(side == 1 for side in (*sides, *ones)) and len(sides) == 2 and group == 1 and not any(pads)


def tokens_product(
    graph: ir.Graph, node: ir.Node, codes: ir.Value, scales: ir.Value, *, per_token: bool = False
) -> None:
    """Replace a pointwise convolution by an int8 product of tokens [B, H·W, C].

    Tokens that were made into a map for it, or are made of its map right after, are taken and given as they are.

    Args:
        codes: int8 weights [out, in, 1, 1].
        scales: a scale for each output channel [out].
        per_token: whether each token has a range of its own, and not the tensor one.
    """
    x, bias = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
    assert x is not None
    assert codes.shape is not None
    outputs, inputs = (int(side) for side in codes.shape.numpy()[:2])

    def made(operator: str, values: list[ir.Value | None], *attributes: ir.Attr, domain: str = "") -> ir.Value:
        new = ir.Node(domain, operator, values, list(attributes), num_outputs=1)
        new.name = f"{node.name}/{operator}_{len(names)}"
        new.outputs[0].name = f"{new.name}:0"
        names.append(new.name)
        graph.insert_before(node, new)
        return new.outputs[0]

    def constant(*values: int) -> ir.Value:
        return made("Constant", [], ir.AttrInt64s("value_ints", values))

    def swapped(value: ir.Value) -> ir.Value:
        return made("Transpose", [value], ir.AttrInt64s("perm", _TO_TOKENS))

    names: list[str] = []
    matrix = made("Transpose", [made("Reshape", [codes, constant(outputs, inputs)])], ir.AttrInt64s("perm", (1, 0)))
    source = _tokens_before(x)
    tokens = swapped(made("Reshape", [x, constant(0, inputs, -1)])) if source is None else source[0]
    if per_token:
        y = per_token_product(made, tokens, matrix, scales, bias)
    else:
        y = made("DynamicQuantizeMatMul", [tokens, matrix, scales, None, bias], domain="com.microsoft")
    y.type = ir.TensorType(ir.DataType.FLOAT)
    after = _tokens_after(node.outputs[0])
    if after is not None:
        _take_place(after, y)
        (reshape,) = [use.node for use in node.outputs[0].uses()]
        graph.remove([after.producer(), reshape, node], safe=True)  # type: ignore[list-item]
    else:
        if source is None:
            sides = made("Shape", [x], ir.AttrInt64("start", 2), ir.AttrInt64("end", 4))
        else:
            sides = made("Slice", [source[1], constant(2), constant(4)])
        back = made("Reshape", [swapped(y), made("Concat", [constant(0, outputs), sides], ir.AttrInt64("axis", 0))])
        _take_place(node.outputs[0], back)
        graph.remove(node, safe=True)
    maker = x.producer()
    if maker is not None:
        remove_unused(graph, maker)


def _take_place(old: ir.Value, new: ir.Value) -> None:
    new.name, new.type, new.shape = old.name, old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _swaps(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == _TO_TOKENS


def _tokens_before(x: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """The tokens [B, N, C] that were made into the map `x`, and the map's shape; None where there are none."""
    reshape = x.producer()
    if reshape is None or reshape.op_type != "Reshape" or reshape.inputs[0] is None or reshape.inputs[1] is None:
        return None
    swap = reshape.inputs[0].producer()
    if swap is None or not _swaps(swap) or swap.inputs[0] is None:
        return None
    return swap.inputs[0], reshape.inputs[1]


def _tokens_after(y: ir.Value) -> ir.Value | None:
    """The tokens [B, N, C] that the map `y` is made into, where that is all that becomes of it."""
    uses = list(y.uses())
    if len(uses) != 1 or uses[0].node.op_type != "Reshape" or uses[0].idx != 0 or y.is_graph_output():
        return None
    flat = uses[0].node.outputs[0]
    following = list(flat.uses())
    if len(following) != 1 or not _swaps(following[0].node) or flat.is_graph_output():
        return None
    return following[0].node.outputs[0]


def remove_unused(graph: ir.Graph, node: ir.Node) -> None:
    """Remove a node that nobody uses, and what was there for it alone."""
    if any(output.uses() or output.is_graph_output() for output in node.outputs):
        return
    producers = [value.producer() for value in node.inputs if value is not None]
    graph.remove(node, safe=True)
    for producer in dict.fromkeys(producers):
        if producer is not None and producer.graph is graph:
            remove_unused(graph, producer)

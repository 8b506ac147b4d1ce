"""The walk that every lowering shares: a canonical graph, concrete input shapes, a table of one backend's operators.

A lowering is a table, operator name → rule, and this driver calls the rules in the graph's order:

    table = {"Add": lambda node, a, b: backend.add(dense(a), b), ...}
    outputs = lower(model, table, {"latents": value, "timestep": value}, backend="MLX")

* A **backend value** is whatever the rules return; all that is asked of it is `.shape`, a sequence of whole numbers.
* A **static value** is known now: `np.ndarray` (a constant, or what was folded), `Weight` (an initializer, read only
  when somebody calls `.numpy()`) or `Quantized` (a DequantizeLinear of an initializer, its codes untouched). Rules must
  take any of them in any place; `dense(value)` gives the array, `is_static(value)` tells them from backend values. An
  absent optional input is None.
* A node whose inputs are all static is **folded** with the ONNX reference evaluator, and `Shape` of anything is static,
  so arithmetic on shapes never reaches a table. `Identity` is passed through. An input of the graph that is given as an
  array is static like a constant.
* A rule is called as `rule(node, *inputs)`; `node` has the name, the attributes as plain Python values, and the names
  of its outputs. It returns one value, or a list of as many as the node has outputs.
* Every value is dropped after its last use, so that what is held is what is live.

An operator of another domain than ONNX's own has the key "domain:Operator" and is never folded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from edgedit.errors import ConversionError, EdgeditError

__all__ = ["NodeInfo", "Quantized", "Rule", "Static", "Weight", "dense", "is_static", "lower", "reshaped"]


@dataclass(frozen=True, eq=False)
class Weight:
    """An initializer that is read when it is asked for, and not kept; a Cast or Unsqueeze of one is a Weight too."""

    name: str
    shape: tuple[int, ...]
    dtype: ir.DataType
    tensor: ir.TensorProtocol

    def numpy(self) -> np.ndarray:
        """Its values; ml_dtypes for bfloat16 and the 4-bit types."""
        return np.asarray(self.tensor.numpy()).reshape(self.shape).astype(self.dtype.numpy(), copy=False)


@dataclass(frozen=True, eq=False)
class Quantized:
    """A DequantizeLinear of an initializer: (codes - zero_point) * scale, in blocks of `block` along `axis`.

    Attributes:
        name: of the initializer that holds the codes.
        codes: int8 or uint8 values of `bits` bits each, in the shape of the weight.
        scale: one value per block; the weight's shape with `axis` divided by `block`. One scale for a whole tensor or
            per channel is brought to that form: `block` is then the length of `axis`.
        zero_point: like `scale`, int8 or uint8, or None for 0.
        axis: the axis along which blocks run.
    """

    name: str
    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None
    axis: int
    block: int
    bits: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.codes.shape)

    @property
    def signed(self) -> bool:
        """Whether the codes are two's complement."""
        return bool(self.codes.dtype == np.int8)

    def numpy(self) -> np.ndarray:
        """The dequantized weight, in the scale's type."""
        values = self.codes.astype(np.float32)
        if self.zero_point is not None:
            values -= self._spread(self.zero_point.astype(np.float32))
        values *= self._spread(self.scale.astype(np.float32))
        return values.astype(self.scale.dtype, copy=False)

    def _spread(self, blocks: np.ndarray) -> np.ndarray:
        along = np.repeat(blocks, self.block, axis=self.axis).take(range(self.codes.shape[self.axis]), axis=self.axis)
        return np.broadcast_to(along, self.codes.shape)


Static = np.ndarray | Weight | Quantized


@dataclass(frozen=True)
class NodeInfo:
    """What a rule is told of its node."""

    name: str
    op_type: str
    attributes: Mapping[str, Any]
    outputs: tuple[str, ...]
    domain: str = ""
    input_names: tuple[str, ...] = field(default=())

    def get(self, name: str, default: Any) -> Any:
        """An attribute, or `default` where the node does not state it."""
        return self.attributes.get(name, default)


Rule = Callable[..., Any]


def is_static(value: object) -> bool:
    """Whether `value` is known without running anything."""
    return isinstance(value, (np.ndarray, np.generic, Weight, Quantized))


def dense(value: Static) -> np.ndarray:
    """The array of a static value; weights are read now, codes dequantized."""
    return value.numpy() if isinstance(value, (Weight, Quantized)) else np.asarray(value)


def reshaped(current: Sequence[int], wanted: Sequence[int], *, allow_zero: bool = False) -> list[int]:
    """The shape that ONNX's Reshape gives: 0 keeps a dimension, -1 takes what is left."""
    shape = [int(current[i]) if int(v) == 0 and not allow_zero else int(v) for i, v in enumerate(wanted)]
    if -1 in shape:
        known = int(np.prod([v for v in shape if v != -1]))
        shape[shape.index(-1)] = int(np.prod([int(v) for v in current])) // max(1, known)
    return shape


def lower(model: ir.Model, table: Mapping[str, Rule], inputs: Mapping[str, Any], *, backend: str) -> dict[str, Any]:
    """Hand every node of `model` that is not static to its rule; the graph's outputs by name.

    Args:
        table: rules by operator name.
        inputs: a backend value, or an array to fold, for every input of the graph.
        backend: its name, for messages.

    Raises:
        ConversionError: the table lacks an operator (both named), an input is missing, or a rule refused its node.
    """
    graph = model.graph
    missing = [value.name for value in graph.inputs if value.name not in inputs]
    if missing:
        raise ConversionError(f"{backend}: the graph takes {missing[0]!r}, which was not given")
    values: dict[ir.Value, Any] = {value: inputs[str(value.name)] for value in graph.inputs}
    uses: Counter[ir.Value] = Counter(graph.outputs)
    for node in graph:
        uses.update(value for value in node.inputs if value is not None)
    opset = model.opset_imports.get("", 1)

    def read(value: ir.Value | None) -> Any:
        if value is None or value.name == "":
            return None
        if value not in values:
            values[value] = _initializer(value, backend)
        return values[value]

    for node in graph:
        arguments = [read(value) for value in node.inputs]
        while arguments and arguments[-1] is None:
            arguments.pop()
        for value, result in zip(node.outputs, _evaluate(node, arguments, table, opset, backend), strict=False):
            values[value] = result
        for used in {*node.inputs}:
            if used is not None:
                uses[used] -= node.inputs.count(used)
                if uses[used] == 0:
                    values.pop(used, None)
        for value in node.outputs:
            if uses[value] == 0:
                values.pop(value, None)
    return {str(value.name): read(value) for value in graph.outputs}


def _initializer(value: ir.Value, backend: str) -> Weight:
    if value.const_value is None:
        raise ConversionError(f"{backend}: {value.name} has no value; bind the graph to a checkpoint first")
    tensor = value.const_value
    return Weight(str(value.name), tuple(int(d) for d in tensor.shape.numpy()), tensor.dtype, tensor)


def _info(node: ir.Node) -> NodeInfo:
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    return NodeInfo(
        name=node.name or str(node.outputs[0].name),
        op_type=node.op_type,
        attributes=attributes,
        outputs=tuple(str(value.name) for value in node.outputs),
        domain="" if node.domain == "ai.onnx" else node.domain,
        input_names=tuple("" if value is None else str(value.name) for value in node.inputs),
    )


def _evaluate(
    node: ir.Node, arguments: list[Any], table: Mapping[str, Rule], opset: int, backend: str
) -> Sequence[Any]:
    info = _info(node)
    if not info.domain:
        if info.op_type == "Identity":
            return [arguments[0]]
        if info.op_type == "Shape":
            return [np.array([int(d) for d in arguments[0].shape][_extent(info)], np.int64)]
        if info.op_type == "Cast" and isinstance(arguments[0], Weight):
            return [replace(arguments[0], dtype=ir.DataType(info.attributes["to"]))]
        if info.op_type == "Unsqueeze" and isinstance(arguments[0], Weight) and is_static(arguments[1]):
            shape = np.expand_dims(np.empty(arguments[0].shape, bool), tuple(int(v) for v in dense(arguments[1]))).shape
            return [replace(arguments[0], shape=shape)]
        if info.op_type == "DequantizeLinear" and all(is_static(value) for value in arguments):
            return [_quantized(info, arguments)]
        if all(value is None or is_static(value) for value in arguments):
            return _fold(node, arguments, opset)
    key = f"{info.domain}:{info.op_type}" if info.domain else info.op_type
    if key not in table:
        raise ConversionError(f"{backend} has no lowering for operator {key} of node {info.name}")
    try:
        result = table[key](info, *arguments)
    except EdgeditError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConversionError(f"{backend} cannot express node {info.name} ({key}): {reason}") from error
    return result if isinstance(result, (list, tuple)) else [result]


def _extent(info: NodeInfo) -> slice:
    return slice(info.get("start", 0), info.get("end", None))


def _quantized(info: NodeInfo, arguments: list[Static]) -> Quantized:
    codes, scale = arguments[0], dense(arguments[1])
    zero = dense(arguments[2]) if len(arguments) > 2 and arguments[2] is not None else None
    dtype = codes.dtype if isinstance(codes, Weight) else ir.DataType.from_numpy(np.asarray(codes).dtype)
    signed, bits = dtype in (ir.DataType.INT2, ir.DataType.INT4, ir.DataType.INT8), round(8 * dtype.itemsize)
    if not signed and dtype not in (ir.DataType.UINT2, ir.DataType.UINT4, ir.DataType.UINT8):
        raise ConversionError(f"node {info.name} dequantizes {dtype.name}; 2, 4 and 8 bit integers can be lowered")
    plain = np.int8 if signed else np.uint8
    array = dense(codes).astype(plain)
    axis = int(info.get("axis", 1)) % max(1, array.ndim)
    block = int(info.get("block_size", 0)) or (array.shape[axis] if array.ndim else 1)
    if not info.get("block_size", 0):
        # Per tensor or per channel: `axis` is then the axis of the channels, and blocks run along all of another one.
        channels, axis = axis, _whole_axis(array.ndim, axis)
        shape = [1] * array.ndim
        if scale.size > 1:
            shape[channels] = scale.size
        block = array.shape[axis] if array.ndim else 1
        scale = scale.reshape(shape)
        zero = None if zero is None else zero.reshape(shape)
    return Quantized(info.input_names[0], array, scale, None if zero is None else zero.astype(plain), axis, block, bits)


def _whole_axis(rank: int, channels: int) -> int:
    """An axis other than that of the channels: the input axis of a [in, out] or [out, in, …] weight."""
    return 0 if rank < 2 or channels != 0 else 1


def _fold(node: ir.Node, arguments: list[Static | None], opset: int) -> list[Any]:
    """Run one node with the ONNX reference evaluator."""
    feeds, inputs, names = {}, [], []
    for index, value in enumerate(arguments):
        names.append("" if value is None else f"i{index}")
        if value is not None:
            array = dense(value)
            feeds[names[-1]] = array
            inputs.append(onnx.helper.make_tensor_value_info(names[-1], ir.DataType.from_numpy(array.dtype), None))
    proto = ir.serde.serialize_node(node)
    del proto.input[:]
    proto.input.extend(names)
    outputs = [onnx.helper.make_tensor_value_info(name, 0, None) for name in proto.output if name]
    graph = onnx.helper.make_graph([proto], "folded", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    return [np.asarray(result) for result in ReferenceEvaluator(model).run(None, feeds)]

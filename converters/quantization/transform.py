"""Changes of weights that stay on disk until they are needed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

__all__ = ["change_weight", "constant_of", "insert_constant"]

Float = npt.NDArray[np.float32]


def change_weight(value: ir.Value, change: Callable[[Float], Float]) -> None:
    """Let a weight be `change` of what it was, when it is read. Its shape stays."""
    before = value.const_value
    assert before is not None
    assert value.shape is not None
    name = value.name

    def load() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(change(before.numpy().astype(np.float32)), np.float32), name=name)

    value.const_value = ir.LazyTensor(
        load, dtype=ir.DataType.FLOAT, shape=ir.Shape(value.shape), name=name, cache=False
    )


def constant_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node; None for any other value."""
    if value is None:
        return None
    if value.is_initializer():
        return value.const_value
    producer = value.producer()
    if producer is not None and producer.op_type == "Constant" and "value" in producer.attributes:
        return producer.attributes["value"].as_tensor()
    return None


def insert_constant(graph: ir.Graph, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
    """An initializer, the one of that name if it is there."""
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(array.shape)
        graph.initializers[name] = ir.Value(name=name, type=kind, shape=shape, const_value=tensor)
    return graph.initializers[name]

"""Store weights as float16; arithmetic stays float32.

Each stored weight is followed by a Cast, which runtimes fold when they open the graph. Norms, linear-attention
normalisers and text encoders therefore keep float32 range, and the only loss is the rounding of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import onnx_ir as ir

__all__ = ["StoreHalf"]

#: Weights with fewer elements stay float32: biases and norms cost nothing and carry the scale of everything.
SMALLEST = 1024
FLOAT16_MAX = 65504.0


class StoreHalf(ir.passes.InPlacePass):
    """Turn float32 initializers into float16 ones followed by a Cast; `changes` counts them.

    Weights stay lazy: they are read and rounded when the model is written, and one beyond the range of float16 raises
    OverflowError with its name then.

    Args:
        keep: names of weights that stay float32.
    """

    def __init__(self, keep: Collection[str] = ()) -> None:
        super().__init__()
        self.keep = keep
        self.changes = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        for name, value in list(graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < SMALLEST or name in self.keep:
                continue
            users = [(use.node, use.idx) for use in value.uses()]
            shape = value.shape
            if not users or shape is None:
                continue
            stored = ir.Value(
                name=name,
                type=ir.TensorType(ir.DataType.FLOAT16),
                shape=shape,
                const_value=ir.LazyTensor(
                    _half(tensor, name), dtype=ir.DataType.FLOAT16, shape=shape, name=name, cache=False
                ),
            )
            cast = ir.Node(
                "",
                "Cast",
                [stored],
                [ir.AttrInt64("to", int(ir.DataType.FLOAT))],
                num_outputs=1,
                name=f"{name}/float32",
            )
            cast.outputs[0].name = f"{name}/float32"
            cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), value.shape
            graph.insert_before(next(iter(graph)), cast)
            for node, index in users:
                node.replace_input_with(index, cast.outputs[0])
            del graph.initializers[name]
            graph.initializers[name] = stored
            self.changes += 1
        return ir.passes.PassResult(model, modified=bool(self.changes))


def _half(tensor: ir.TensorProtocol, name: str) -> Callable[[], ir.TensorProtocol]:
    def load() -> ir.TensorProtocol:
        array = tensor.numpy()
        if np.abs(array).max(initial=0.0) > FLOAT16_MAX:
            raise OverflowError(name)
        return ir.tensor(array.astype(np.float16), name=name)

    return load

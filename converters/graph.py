"""Canonical graphs: built from `onnxscript.nn` modules, checked, and bound to a checkpoint's tensors lazily."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder, nn

from edgedit.converters.accounting import Accounting, account
from edgedit.converters.tensors import TensorRef
from edgedit.errors import ConversionError

__all__ = ["ALLOWED_OPERATORS", "OPSET", "Component", "TensorSpec", "bind", "build", "validate"]

OPSET = 23
IR_VERSION = 11

#: Standard ONNX operators that a canonical graph may use. Every lowering has an entry for each of them.
ALLOWED_OPERATORS = frozenset(
    """
    Add And Attention Cast Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos DepthToSpace DequantizeLinear Div
    Equal Erf Expand Gather Gelu GroupNormalization Identity LayerNormalization Less Log MatMul Max Min Mul Neg Pad Pow
    RMSNormalization Range ReduceMean ReduceSum Relu Reshape Resize RotaryEmbedding Shape Sigmoid Sin Slice Softmax
    SpaceToDepth Split Sqrt Squeeze Sub Tanh Transpose Unsqueeze Where
    """.split()
)

#: Key of `ir.Value.metadata_props` that says how a parameter is laid out against the checkpoint's tensor.
LAYOUT = "edgedit.layout"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a component: its name, numpy dtype name and shape (a string is a symbolic dimension)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Component:
    """A component as its architecture file describes it, before weights are bound.

    `module.forward(op, *inputs)` returns one value per entry of `outputs`. `drop` lists checkpoint keys that the graph
    does not need, as (regular expression over the whole key, reason). `runtime` is what a runtime must know of the
    configuration; it goes into the manifest.
    """

    name: str
    architecture: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    drop: tuple[tuple[str, str], ...] = ()
    runtime: Mapping[str, Any] = field(default_factory=dict)


_DTYPES = {
    "float32": ir.DataType.FLOAT,
    "int64": ir.DataType.INT64,
    "int32": ir.DataType.INT32,
    "bool": ir.DataType.BOOL,
}


def _value(spec: TensorSpec) -> ir.Value:
    return ir.Value(name=spec.name, type=ir.TensorType(_DTYPES[spec.dtype]), shape=ir.Shape(spec.shape))


def build(component: Component) -> ir.Model:
    """Run the component's `forward` once and return its canonical graph; parameters have no values yet."""
    inputs = [_value(spec) for spec in component.inputs]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": OPSET}, name=component.name)
    builder = GraphBuilder(graph)
    result = component.module(builder.op, *inputs)
    results = list(result) if isinstance(result, (tuple, list)) else [result]
    if len(results) != len(component.outputs):
        raise ConversionError(
            f"{component.architecture} returned {len(results)} outputs, {len(component.outputs)} declared"
        )
    for value, spec in zip(results, component.outputs, strict=True):
        value.name = spec.name
        value.type = ir.TensorType(_DTYPES[spec.dtype])
        value.shape = ir.Shape(spec.shape)
        graph.outputs.append(value)
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="edgedit")
    validate(model)
    return model


def validate(model: ir.Model) -> None:
    """Raise ConversionError when a graph uses an operator outside `ALLOWED_OPERATORS` (domain "" only)."""
    for node in model.graph.all_nodes():
        if node.domain not in ("", "ai.onnx") or node.op_type not in ALLOWED_OPERATORS:
            raise ConversionError(
                f"operator {node.domain}:{node.op_type} of node {node.name} is not in the canonical set"
            )


def _stored_shape(value: ir.Value) -> tuple[int, ...]:
    """Shape that the checkpoint's tensor must have for this parameter."""
    assert value.shape is not None
    shape = tuple(int(d) for d in value.shape.numpy())
    return shape[::-1] if value.metadata_props.get(LAYOUT) == "transposed" else shape


def _loader(ref: TensorRef, *, transposed: bool, name: str) -> Callable[[], ir.TensorProtocol]:
    def load() -> ir.TensorProtocol:
        array = ref.load().astype(np.float32, copy=False)
        return ir.tensor(np.ascontiguousarray(array.T if transposed else array), name=name)

    return load


def bind(
    model: ir.Model,
    tensors: Mapping[str, TensorRef],
    *,
    drop: Sequence[tuple[str, str]] = (),
    config: Mapping[str, Any] | None = None,
) -> Accounting:
    """Give every parameter of `model` its tensor, as a lazy fp32 tensor that is read from disk when it is written.

    Strict: every key of `tensors` is consumed or matches `drop`; every parameter is filled with the right shape.
    `config` lets the message name the field that disagrees with the weights. Raises ConversionError with the list
    otherwise.
    """
    parameters = {name: value for name, value in model.graph.initializers.items() if value.const_value is None}
    result = account(
        {name: _stored_shape(value) for name, value in parameters.items()}, tensors, drop=drop, config=config
    )
    for name, value in parameters.items():
        transposed = value.metadata_props.get(LAYOUT) == "transposed"
        value.const_value = ir.LazyTensor(
            _loader(tensors[name], transposed=transposed, name=name),
            dtype=ir.DataType.FLOAT,
            shape=value.shape,  # type: ignore[arg-type]
            name=name,
            cache=False,
        )
    return result

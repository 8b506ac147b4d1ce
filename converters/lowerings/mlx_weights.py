"""How a component's weights are stored for MLX: in the layouts of `mlx.nn`, half or quantized, in one safetensors file.

A matrix that tokens are multiplied with is stored [out, in] as `nn.Linear` holds it, a kernel OHWI as `nn.Conv2d` does;
a quantized weight is three tensors NAME, NAME with `.scales` and NAME with `.biases` in place of `.weight`, as
`nn.QuantizedLinear` has them. What depends on weights only is worked out here, once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgedit.converters.lowerings.driver import Quantized, dense, lower
from edgedit.converters.lowerings.mlx_quantization import MlxQuantization, carry_over, pack
from edgedit.converters.passes.store_half import FLOAT16_MAX, SMALLEST
from edgedit.converters.safetensors_writer import TensorPlace
from edgedit.errors import ConversionError

__all__ = ["FORM", "Form", "StoredWeight", "take_weights"]

#: Key of `ir.Value.metadata_props` that says how a weight, which is an input of the stored graph, lies in the file.
FORM = "edgedit.mlx"
#: Types that a file or MLX lacks, and the next larger one.
_NARROW = {"int4": "int8", "uint4": "uint8", "int2": "int8", "uint2": "uint8", "float64": "float32"}
#: Consumers that fix a weight's layout, by operator and input.
_LAYOUTS = {("MatMul", 1): "linear", ("Conv", 1): "conv"}


@dataclass(frozen=True)
class Form:
    """How one weight lies in the file: `layout` as in `mlx_values.Stored`, and its quantized form if it has one."""

    layout: str
    quantization: MlxQuantization | None = None

    def to_json(self) -> str:
        """For the stored graph."""
        return json.dumps(
            {"layout": self.layout, "weights": None if self.quantization is None else self.quantization.name}
        )

    @classmethod
    def from_json(cls, text: str) -> Form:
        """Raises ConversionError, KeyError or ValueError when `text` is not what `to_json` writes."""
        found = json.loads(text)
        name = found["weights"]
        return cls(str(found["layout"]), None if name is None else MlxQuantization.parse(name))

    def tensors(self, name: str) -> list[str]:
        """Names of the weight's tensors in the file."""
        if self.quantization is None:
            return [name]
        stem = name.removesuffix(".weight")
        return [name, *(f"{stem}.{part}" for part in ("scales", "biases")[: 2 if self.is_affine else 1])]

    @property
    def is_affine(self) -> bool:
        """Whether there are biases."""
        return self.quantization is not None and self.quantization.mode == "affine"


@dataclass(frozen=True)
class StoredWeight:
    """A weight on its way into the file; `load` reads it and brings it into its form."""

    places: tuple[TensorPlace, ...]
    load: Callable[[], list[np.ndarray]]


def take_weights(
    model: ir.Model, *, half: bool, quantization: MlxQuantization | None, keep: frozenset[str] = frozenset()
) -> list[StoredWeight]:
    """Turn every weight of `model` into an input of its graph, in place, and return what goes into the file.

    Weights with their own codes (DequantizeLinear) keep them where MLX has a form for them.

    Args:
        half: store float32 weights of 1024 elements or more as float16.
        quantization: for the matrices that tokens are multiplied with and for embeddings, where it fits.
        keep: weights that stay float32.

    Raises:
        ConversionError: a weight has no value.
    """
    graph = model.graph
    taken: set[str] = {str(value.name) for value in graph.inputs}
    found_all = [
        _Weight(value, model, half and value.name not in keep, quantization, taken) for value in _boundary(model)
    ]
    weights = [found.stored() for found in found_all]
    for found in found_all:
        # What was an initializer, or came out of one, is now asked for by name.
        fresh = ir.Value(
            name=found.name,
            type=ir.TensorType(ir.DataType.from_numpy(np.dtype(found.dtype))),
            shape=ir.Shape(found.shape),
            metadata_props={FORM: found.form.to_json()},
        )
        ir.convenience.replace_all_uses_with(found.value, fresh, replace_graph_outputs=True)
        graph.inputs.append(fresh)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
    RemoveUnusedNodesPass()(model)
    return weights


def _boundary(model: ir.Model) -> Iterator[ir.Value]:
    """Values that depend on at least one weight and on no input, and that something else is computed from."""
    static: set[ir.Value] = set()
    weighty: dict[ir.Value, None] = {}
    for value in model.graph.initializers.values():
        if value.const_value is None:
            raise ConversionError(f"MLX: {value.name} has no value; bind the graph to a checkpoint first")
        static.add(value)
        if not _is_setting(value):
            weighty[value] = None
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        if not all(value in static for value in inputs) or node.op_type == "Shape":
            continue
        # Codes that MLX has no form for stay codes, and are dequantized when they are used.
        if node.op_type == "DequantizeLinear" and _carried(node.outputs[0], model) is None:
            continue
        static.update(node.outputs)
        if any(value in weighty for value in inputs):
            weighty.update(dict.fromkeys(node.outputs))
    for value in weighty:
        if value.is_graph_output() or any(not set(use.node.outputs) & static for use in value.uses()):
            yield value


def _is_setting(value: ir.Value) -> bool:
    """Whether an initializer is part of the graph rather than a weight: a scalar, a shape, the factors of a Resize."""
    tensor, uses = value.const_value, value.uses()
    assert tensor is not None
    if len(tensor.shape) == 0:
        return True
    if any(use.node.op_type == "DequantizeLinear" for use in uses):
        return False
    settings = all(use.node.op_type in ("Resize", "Pad", "Clip") and use.idx > 0 for use in uses)
    return settings or not tensor.dtype.is_floating_point()


def _layout(value: ir.Value, shape: tuple[int, ...]) -> str:
    """The layout that all consumers agree on."""
    layouts = {_LAYOUTS.get((use.node.op_type, use.idx), "plain") for use in value.uses()}
    layout = layouts.pop() if len(layouts) == 1 else "plain"
    return layout if len(shape) == {"linear": 2, "conv": 4, "plain": len(shape)}[layout] else "plain"


def _carried(value: ir.Value, model: ir.Model) -> MlxQuantization | None:
    """The form that holds the codes of a DequantizeLinear's result; None when it is none, or MLX has no such form."""
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return None
    weight = _reader(value, model)()
    if not isinstance(weight, Quantized) or _layout(value, weight.shape) != "linear":
        return None
    return carry_over(weight)


class _Weight:
    """One value of the boundary: its name, layout and form. `taken` holds the names that are given away."""

    def __init__(
        self, value: ir.Value, model: ir.Model, half: bool, quantization: MlxQuantization | None, taken: set[str]
    ) -> None:
        self.value, self.half = value, half
        self.read = _reader(value, model)
        self.carried = _carried(value, model)
        sources = _sources(value)
        # A weight that was only reshaped, shifted or dequantized keeps its name in the checkpoint.
        whole = self.carried is not None or len(sources) == 1
        self.name = str(sources[0].name if whole and str(sources[0].name) not in taken else value.name)
        taken.add(self.name)
        self.dtype, self.shape = self._signature()
        self.form = self._choose(quantization)

    def _signature(self) -> tuple[str, tuple[int, ...]]:
        tensor = self.value.const_value
        if self.value.producer() is None and tensor is not None:
            return _plain_type(tensor.dtype.numpy()), tuple(int(d) for d in tensor.shape.numpy())
        found = self.read()
        dtype = found.scale.dtype if isinstance(found, Quantized) else dense(found).dtype
        return _plain_type(dtype), tuple(int(d) for d in found.shape)

    @property
    def _stored_type(self) -> str:
        big = math.prod(self.shape) >= SMALLEST
        return "float16" if self.half and big and self.dtype == "float32" else self.dtype

    def _choose(self, quantization: MlxQuantization | None) -> Form:
        layout = _layout(self.value, self.shape)
        if self.carried is not None:
            return Form(layout, self.carried)
        uses = {(use.node.op_type, use.idx) for use in self.value.uses()}
        is_table = len(self.shape) == 2 and uses == {("Gather", 0)}
        if quantization is None or self.dtype != "float32" or not (layout == "linear" or is_table):
            return Form(layout)
        fits = math.prod(self.shape) >= SMALLEST and quantization.fits(_in_file(self.shape, layout))
        return Form(layout, quantization if fits else None)

    def stored(self) -> StoredWeight:
        shape = _in_file(self.shape, self.form.layout)
        names, dtype, form = self.form.tensors(self.name), self._stored_type, self.form.quantization
        if form is None:
            return StoredWeight((TensorPlace(names[0], dtype, shape),), lambda: [self._array(dtype)])
        scales = (shape[0], shape[1] // form.group_size)
        kind = dtype if self.form.is_affine else "uint8"
        places = [TensorPlace(names[0], "uint32", (shape[0], form.words(shape[1])))]
        places += [TensorPlace(name, kind, scales) for name in names[1:]]
        if self.carried is not None:
            return StoredWeight(tuple(places), lambda: pack(self.read(), form, dtype))
        return StoredWeight(tuple(places), lambda: form.apply(self._array(dtype)))

    def _array(self, dtype: str) -> np.ndarray:
        array = dense(self.read())
        if array.dtype.name in _NARROW:
            array = array.astype(_NARROW[array.dtype.name])
        if dtype == "float16" and array.dtype != np.float16 and np.abs(array).max(initial=0.0) > FLOAT16_MAX:
            raise ConversionError(f"weight {self.name} does not fit into float16; convert with --dtype fp32")
        array = array.astype(dtype, copy=False)
        if self.form.layout == "linear":
            array = array.T
        elif self.form.layout == "conv":
            array = np.moveaxis(array, 1, -1)
        return np.ascontiguousarray(array)


def _plain_type(dtype: Any) -> str:
    name = str(np.dtype(dtype).name)
    return _NARROW.get(name, name)


def _in_file(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    if layout == "linear":
        return shape[::-1]
    return (shape[0], *shape[2:], shape[1]) if layout == "conv" else shape


def _sources(value: ir.Value) -> list[ir.Value]:
    """The initializers that a value is made of, the first one first."""
    node = value.producer()
    if node is None:
        return [value]
    found: dict[ir.Value, None] = {}
    for part in node.inputs:
        if part is not None and (part.producer() is not None or part.const_value is not None):
            found.update(dict.fromkeys(s for s in _sources(part) if s.is_initializer()))
    return list(found)


def _reader(value: ir.Value, model: ir.Model) -> Callable[[], Any]:
    """What reads a static value and works it out, each time anew; the graph may be changed or taken apart meanwhile.

    The driver does the work: each node on the way becomes a graph of its own.
    """
    node = value.producer()
    if node is None:
        tensor = value.const_value
        assert tensor is not None
        return lambda: np.asarray(tensor.numpy())
    parts: list[ir.Value | None] = []
    readers: dict[str, Callable[[], Any]] = {}
    for index, part in enumerate(node.inputs):
        name = f"i{index}"
        if part is None:
            parts.append(None)
        elif part.producer() is None:
            parts.append(ir.Value(name=str(part.name), const_value=part.const_value))
        else:
            parts.append(ir.Value(name=name))
            readers[name] = _reader(part, model)
    copy = ir.Node(node.domain, node.op_type, parts, node.attributes.values(), num_outputs=len(node.outputs))
    for index, output in enumerate(copy.outputs):
        output.name = f"o{index}"
    wanted = f"o{list(node.outputs).index(value)}"
    inputs = [part for part in parts if part is not None and part.name in readers]
    graph = ir.Graph(inputs, copy.outputs, nodes=[copy], opset_imports=model.opset_imports)
    alone = ir.Model(graph, ir_version=model.ir_version)

    def read() -> Any:
        feeds = {name: dense(reader()) for name, reader in readers.items()}
        return lower(alone, {}, feeds, backend="MLX")[wanted]

    return read

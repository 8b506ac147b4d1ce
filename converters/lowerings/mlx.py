"""Lowering to MLX: the canonical graph without its weights, the weights as MLX lays them out, and programs over both.

A graph has sizes that vary and MLX computes with shapes that do not, so a `Program` is made for each set of shapes:
the graph is walked once, what is static is folded away, and the calls of the table that are left are kept to be
replayed, compiled or exported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgedit.converters.lowerings.driver import NodeInfo, Rule, is_static, lower
from edgedit.converters.lowerings.mlx_quantization import MlxQuantization
from edgedit.converters.lowerings.mlx_table import table
from edgedit.converters.lowerings.mlx_values import Array, Packed, Stored, Values
from edgedit.converters.lowerings.mlx_weights import FORM, Form, take_weights
from edgedit.converters.passes.quantize import QuantizeWeights
from edgedit.converters.quantization.backends import in_whole_codes
from edgedit.converters.quantization.layers import find_layers
from edgedit.converters.quantization.record import Quantization
from edgedit.converters.safetensors_writer import write_safetensors
from edgedit.errors import BundleError
from edgedit.manifest import Exported

__all__ = ["DTYPES", "Description", "MlxArtefact", "Program", "read", "write"]

DTYPES = ("fp32", "fp16")
#: Key of the stored graph's metadata: the type of its matrix products, "float16" or "float32".
_ARITHMETIC = "edgedit.mlx.arithmetic"
#: Components whose products run in float16 when their weights are. Text encoders overflow there, and so do some
#: autoencoders (that of SDXL, which PixArt-Sigma uses).
_HALF_ARITHMETIC = ("transformer",)


@dataclass(frozen=True)
class MlxArtefact:
    """Files of one component, relative to the bundle."""

    precision: str
    graph: str
    files: tuple[str, ...]
    exported: Exported | None = None


def write(
    model: ir.Model,
    root: Path,
    component: str,
    *,
    dtype: str,
    quantization: MlxQuantization | None = None,
    recipe: Quantization | None = None,
    folder: str = "mlx",
    on_tensor: Callable[[int, int], None] | None = None,
) -> MlxArtefact:
    """Write FOLDER/COMPONENT.onnx (the graph) and FOLDER/COMPONENT.safetensors under `root`, one weight at a time.

    Args:
        model: a bound canonical graph. Its weights become inputs: it cannot be used for anything else afterwards.
        dtype: "fp32", or "fp16" for weights stored as float16; a transformer then computes its products in it too; or
            the name of `recipe`, with which everything that it does not quantize is as with "fp16".
        quantization: of the matrices that tokens are multiplied with, and of embeddings; None leaves them in `dtype`.
        recipe: forms and codes of the layers.
        on_tensor: told (weights written, weights in all).

    Raises:
        ConversionError: a weight does not fit into float16.
    """
    half = dtype != "fp32"
    keep: frozenset[str] = frozenset()
    if recipe is not None:
        keep = frozenset(str(x.value.name) for n, x in find_layers(model).items() if n in recipe.float32_layers)
        QuantizeWeights(*in_whole_codes(recipe.forms, recipe.encode))(model)
    weights = take_weights(model, half=half, quantization=quantization, keep=keep)
    model.metadata_props[_ARITHMETIC] = "float16" if half and component in _HALF_ARITHMETIC else "float32"
    place = root / folder
    place.mkdir(parents=True, exist_ok=True)
    graph, data = place / f"{component}.onnx", place / f"{component}.safetensors"

    def arrays() -> Iterator[np.ndarray]:
        for done, weight in enumerate(weights, 1):
            yield from weight.load()
            if on_tensor is not None:
                on_tensor(done, len(weights))

    write_safetensors(data, [part for weight in weights for part in weight.places], arrays(), {"format": "mlx"})
    ir.save(model, graph)
    return MlxArtefact(
        precision=dtype if recipe is not None or quantization is None else quantization.name,
        graph=graph.relative_to(root).as_posix(),
        files=tuple(path.relative_to(root).as_posix() for path in (graph, data)),
    )


@dataclass(frozen=True, eq=False)
class Description:
    """A stored graph: its inputs by name, the form of its weights, and whether products run in float16."""

    model: ir.Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    forms: Mapping[str, Form]
    half: bool

    @property
    def tensors(self) -> set[str]:
        """Names of all tensors in the weights file."""
        return {tensor for name, form in self.forms.items() for tensor in form.tensors(name)}


def read(graph: Path) -> Description:
    """Open a graph that `write` wrote. Raises BundleError when it is damaged."""
    try:
        model = ir.load(graph)
        forms = {
            str(value.name): Form.from_json(value.metadata_props[FORM])
            for value in model.graph.inputs
            if FORM in value.metadata_props
        }
        half = model.metadata_props[_ARITHMETIC] == "float16"
    except Exception as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise BundleError(f"{graph.name}: not a graph for MLX ({reason[0][:200]}); convert the model again") from error
    return Description(
        model=model,
        inputs=tuple(str(value.name) for value in model.graph.inputs if value.name not in forms),
        outputs=tuple(str(value.name) for value in model.graph.outputs),
        forms=forms,
        half=half,
    )


@dataclass(frozen=True)
class _Call:
    """One call of a rule: inputs are slots of earlier values (int), or static values as they are."""

    rule: Rule
    node: NodeInfo
    arguments: tuple[tuple[int | None, Any], ...]
    results: tuple[int, ...]


class Program:
    """A graph for one set of input shapes.

    Args:
        description: the graph.
        weights: its tensors by name; only their shapes and types matter here.
        inputs: an array for each input of the graph; only their shapes and types matter.

    Raises:
        ConversionError: the graph has an operator, or asks something of it, that the table lacks.
    """

    def __init__(self, description: Description, weights: Mapping[str, Array], inputs: Mapping[str, Array]) -> None:
        self.description = description
        self._calls: list[_Call] = []
        self._slots: dict[int, int] = {}
        self._count = 0
        # Identities are only told apart while all that they belong to is alive.
        self._kept: list[Any] = []
        rules = {name: self._recorded(rule) for name, rule in table(Values(half=description.half)).items()}
        start = self._start(weights, inputs)
        self._first = {name: self._slot(value) for name, value in start.items()}
        self._values = Values(half=description.half)
        found = lower(description.model, rules, start, backend="MLX")
        self._last = [self._argument(found[name]) for name in description.outputs]
        self._kept.clear()
        self._slots.clear()

    def __call__(self, inputs: Mapping[str, Array], weights: Mapping[str, Array]) -> list[Array]:
        """The graph's outputs in order, not yet evaluated. Shapes and types must be those that it was made for."""
        slots: list[Any] = [None] * self._count
        for name, value in self._start(weights, inputs).items():
            slots[self._first[name]] = value
        for call in self._calls:
            result = call.rule(call.node, *(slots[s] if s is not None else static for s, static in call.arguments))
            results = result if isinstance(result, (list, tuple)) else [result]
            for slot, value in zip(call.results, results, strict=False):
                slots[slot] = value
        return [self._values.array(slots[s] if s is not None else static) for s, static in self._last]

    def _start(self, weights: Mapping[str, Array], inputs: Mapping[str, Array]) -> dict[str, Any]:
        start: dict[str, Any] = {name: inputs[name] for name in self.description.inputs}
        for name, form in self.description.forms.items():
            parts = [weights[tensor] for tensor in form.tensors(name)]
            if form.quantization is None:
                start[name] = Stored(parts[0], form.layout)
                continue
            q = form.quantization
            biases = parts[2] if form.is_affine else None
            start[name] = Packed(parts[0], parts[1], biases, q.mode, q.bits, q.group_size, form.layout)
        return start

    def _slot(self, value: Any) -> int:
        self._kept.append(value)
        self._slots[id(value)] = self._count
        self._count += 1
        return self._count - 1

    def _argument(self, value: Any) -> tuple[int | None, Any]:
        if value is None or is_static(value):
            return None, value
        return self._slots[id(value)], None

    def _recorded(self, rule: Rule) -> Rule:
        def record(node: NodeInfo, *inputs: Any) -> Any:
            arguments = tuple(self._argument(value) for value in inputs)
            result = rule(node, *inputs)
            results: Sequence[Any] = result if isinstance(result, (list, tuple)) else [result]
            self._calls.append(_Call(rule, node, arguments, tuple(self._slot(value) for value in results)))
            return result

        return record

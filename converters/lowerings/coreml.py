"""Lowering to Core ML: an `.mlpackage` with one function of fixed shapes for every size, all over the same weights.

The package is an ML Program for iOS 18 and macOS 15 or later. Inputs and outputs are float32 and int32; what is
computed in float16 inside is decided operator by operator (`mil.islands`), so coremltools' own pass for it never runs.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgedit.converters.graph import TensorSpec
from edgedit.converters.lowerings.driver import dense, is_static, lower
from edgedit.converters.lowerings.mil import attention, elementwise, movement, networks
from edgedit.converters.lowerings.mil.builder import MilBuilder, shape_of
from edgedit.converters.lowerings.mil.chunks import cut
from edgedit.converters.lowerings.mil.codes import Coded
from edgedit.converters.lowerings.mil.compression import WeightForm
from edgedit.converters.lowerings.mil.islands import find_islands, whole
from edgedit.converters.quantization.form import Form
from edgedit.converters.quantization.layers import Layer, find_layers, fitted
from edgedit.converters.quantization.record import Quantization, stored_bytes
from edgedit.errors import ConversionError
from edgedit.runtimes.coreml_engine import coremltools
from edgedit.runtimes.mil_report import ISLANDS

__all__ = ["PRECISIONS", "TARGETS", "CoremlArtefact", "CoremlFunction", "CoremlOptions", "write"]

RULE_MODULES = (attention, elementwise, movement, networks)

#: "fp32"; "fp16": float16 outside islands; "fp16-weights": float16 weights, everything computed in float32.
PRECISIONS = ("fp32", "fp16", "fp16-weights")

#: Deployment targets by the names that people use.
TARGETS = ("iOS18", "iOS26")

#: Attention in the Neural Engine's form has at most this many bytes of scores at a time: its memory is small.
NEURAL_SCORES = 32 << 20

#: Core ML maps a package's weights as one buffer, and those end at 4 GiB.
CHUNK_BYTES = 4 << 30

#: Arguments of fewer values are looked through for equal ones.
_SHARED = 64

#: What a chunk gives later ones: a shape and "fp32", "int32" or "bool", or an array that is known already.
Carried = Any

#: coremltools' passes that run on a program that is already in the form that it is wanted in.
_PASSES = [
    "common::noop_elimination",
    "common::sanitize_input_output_names",
    "common::dead_code_elimination",
    "common::dedup_op_and_var_names",
]


@dataclass(frozen=True)
class CoremlFunction:
    """One function of a package: its name, and the size of every symbolic dimension of the component."""

    name: str
    dims: Mapping[str, int]


@dataclass(frozen=True)
class CoremlOptions:
    """How a component is lowered.

    Attributes:
        precision: one of PRECISIONS.
        target: one of TARGETS.
        neural: the Neural Engine's form; see `MilBuilder`.
        fused_attention: `scaled_dot_product_attention`, or its parts written out.
        whole_reason: with precision "fp16-weights", why nothing is computed in float16.
        form: how large weights of linear layers and convolutions are stored.
        quantization: forms and codes of the layers by a recipe; None, or `form` is.
        islands: nodes to compute in float32 besides those that the graph's structure shows, with the reason.
        chunk_bytes: weights of one package at most; a larger component becomes several.
    """

    precision: str = "fp32"
    target: str = "iOS18"
    neural: bool = False
    fused_attention: bool = True
    whole_reason: str = "asked for"
    form: WeightForm | None = None
    quantization: Quantization | None = None
    islands: Mapping[str, str] = field(default_factory=dict)
    chunk_bytes: int = CHUNK_BYTES


@dataclass(frozen=True)
class CoremlArtefact:
    """A package in the bundle.

    Attributes:
        precision: of the weights: "fp32", "fp16", or the name of a compressed form or of a recipe.
        graph: the package's folder, relative to the bundle.
        files: everything in it, relative to the bundle.
        functions: one for each size.
        islands: node → why it is computed in float32; empty in a float32 package.
        origins: MIL operation → node of the graph.
        chunks: the packages that run one after the other, `graph` first; empty where there is one only.
    """

    precision: str
    graph: str
    files: tuple[str, ...]
    functions: tuple[CoremlFunction, ...]
    islands: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    chunks: tuple[str, ...] = ()


def write(
    model: ir.Model,
    root: Path,
    component: str,
    *,
    inputs: Sequence[TensorSpec],
    functions: Sequence[CoremlFunction],
    options: CoremlOptions | None = None,
    folder: str = "coreml",
) -> CoremlArtefact:
    """Write FOLDER/COMPONENT.mlpackage under `root`, COMPONENT in CamelCase.

    Args:
        model: a canonical graph whose weights are bound; it is not changed.
        inputs: the component's inputs; every symbolic dimension is in each function's `dims`.
        functions: at least one; the first is what the package runs when no function is named.

    Raises:
        ConversionError: an operator that Core ML cannot express, named with its node.
        RuntimeUnavailableError: coremltools is not installed.
    """
    options = options or CoremlOptions()
    if options.precision not in PRECISIONS:
        raise ConversionError(f"unknown precision {options.precision!r}; choose from: {', '.join(PRECISIONS)}")
    if options.target not in TARGETS:
        raise ConversionError(f"unknown Core ML target {options.target!r}; choose from: {', '.join(TARGETS)}")
    library = coremltools()
    islands = _islands(model, options)
    sizes = _bytes_of(model, options)
    parts = cut(model, options.chunk_bytes, sizes)
    carried: list[dict[str, Carried]] = [{} for _ in functions]
    title = component.title().replace("_", "")
    packages: list[Path] = []
    origins: dict[str, str] = {}
    found: dict[str, str] = {}
    for index, part in enumerate(parts):
        builder = _builder(part, options, islands)
        program = _program(builder, part, inputs, functions, carried, getattr(library.target, options.target))
        package = root / folder / (f"{title}_{index}.mlpackage" if len(parts) > 1 else f"{title}.mlpackage")
        package.parent.mkdir(parents=True, exist_ok=True)
        own = {str(node.name) for node in part.graph}
        reasons = {k: v for k, v in {**builder.islands, **builder.norms}.items() if k in own} if builder.half else {}
        try:
            converted = _convert(library, program, options.target)
            if reasons:
                converted.user_defined_metadata[ISLANDS] = json.dumps(_by_reason(reasons), separators=(",", ":"))
            converted.save(str(package))
        except (ValueError, RuntimeError, NotImplementedError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConversionError(f"{component}: coremltools refuses the program: {reason}") from error
        packages.append(package)
        found |= reasons
        origins |= _origins(part, builder)
    files = sorted(path for package in packages for path in package.rglob("*") if path.is_file())
    paths = [package.relative_to(root).as_posix() for package in packages]
    return CoremlArtefact(
        precision=_stored(options),
        graph=paths[0],
        files=tuple(path.relative_to(root).as_posix() for path in files),
        functions=tuple(functions),
        islands=found,
        origins=origins,
        chunks=tuple(paths) if len(paths) > 1 else (),
    )


def _bytes_of(model: ir.Model, options: CoremlOptions) -> Callable[[ir.Value], int]:
    """Bytes that a weight takes in its package."""
    layers = {str(layer.value.name): layer for layer in find_layers(model).values()}

    def size(value: ir.Value) -> int:
        tensor = value.const_value
        assert tensor is not None
        layer = layers.get(str(value.name))
        if layer is not None and options.quantization is not None and layer.name in options.quantization.forms:
            return stored_bytes(fitted(options.quantization.forms[layer.name], layer), layer)
        if layer is not None and options.form is not None and layer.kind != "table":
            return int(tensor.size) * options.form.bits // 8
        return int(tensor.size) * (4 if options.precision == "fp32" else 2)

    return size


def _islands(model: ir.Model, options: CoremlOptions) -> dict[str, str]:
    """Of the whole graph: a chunk does not show what its values are for."""
    if options.precision == "fp32":
        return {}
    if options.precision == "fp16-weights":
        return whole(model, options.whole_reason)
    return {**options.islands, **find_islands(model)}


def _origins(model: ir.Model, builder: MilBuilder) -> dict[str, str]:
    nodes = {str(node.name) for node in model.graph}
    return {name: origin for name, origin in builder.origins.items() if origin in nodes}


def _by_reason(islands: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for node, reason in islands.items():
        found.setdefault(reason, []).append(node)
    return found


def _builder(model: ir.Model, options: CoremlOptions, islands: Mapping[str, str]) -> MilBuilder:
    stored: dict[str, Any] = {
        "fused_attention": options.fused_attention,
        "form": options.form,
        "neural": options.neural,
    }
    if options.neural:
        stored["score_bytes"] = NEURAL_SCORES
    if options.quantization is not None:
        stored["codes"] = _codes(model, options.quantization)
        stored["keep32"] = frozenset(
            str(layer.value.name)
            for name, layer in find_layers(model).items()
            if name in options.quantization.float32_layers
        )
    if options.precision == "fp32":
        return MilBuilder(**stored)
    everything = options.precision == "fp16-weights"
    return MilBuilder(half=True, islands=dict(islands), store_half=everything, **stored)


def _codes(model: ir.Model, quantization: Quantization) -> dict[str, Coded]:
    """What the recipe stores, by the name of the weight; nothing is rounded yet."""
    found = {}
    for name, layer in find_layers(model).items():
        form = quantization.forms.get(name)
        if form is None or not (form.is_coded or form.sparsity is not None):
            continue
        peak = quantization.input_peaks.get(name) if form.int8_activations else None
        found[str(layer.value.name)] = Coded(
            fitted(form, layer), layer.kind, _parts(quantization, layer, form), None if peak is None else peak / 127
        )
    return found


def _parts(quantization: Quantization, layer: Layer, form: Form) -> Callable[[], Mapping[str, Any]]:
    tensor = layer.value.const_value
    assert tensor is not None

    def load() -> Mapping[str, Any]:
        return quantization.encode(layer, fitted(form, layer), tensor.numpy().astype(np.float32, copy=False)).parts

    return load


def _stored(options: CoremlOptions) -> str:
    if options.quantization is not None:
        return options.quantization.recipe.name
    if options.form is not None:
        return options.form.name
    return "fp32" if options.precision == "fp32" else "fp16"


def _program(
    builder: MilBuilder,
    model: ir.Model,
    inputs: Sequence[TensorSpec],
    functions: Sequence[CoremlFunction],
    carried: Sequence[dict[str, Carried]],
    target: Any,
) -> Any:
    """One chunk's functions. `carried` has what earlier chunks gave each function, and takes in what this one gives."""
    from coremltools.converters.mil.mil import Function, Program

    program = Program()
    specs = {spec.name: spec for spec in inputs}
    taken = [str(value.name) for value in model.graph.inputs]
    # A graph that was not cut takes all that the component does, whether it uses it or not.
    taken = taken if any(carried) or set(taken) < set(specs) else list(specs)
    final = {str(value.name) for value in model.graph.outputs if not str(value.name).startswith("cut_")}
    for wanted, known in zip(functions, carried, strict=True):
        builder.begin()
        placeholders, static = {}, {}
        for name in taken:
            if name in specs:
                kind, shape = _kind(builder, specs[name]), _shape(specs[name], wanted)
                placeholders[name] = builder.mb.placeholder(shape, dtype=kind)
            elif isinstance(known[name], np.ndarray):
                static[name] = known[name]
            else:
                shape, kind_name = known[name]
                kind = builder.types.fp32 if kind_name == "fp32" else builder.types.int32
                placeholders[name] = builder.mb.placeholder(shape, dtype=kind)
        function = Function(placeholders, opset_version=target)
        with function:
            given = dict(function.inputs)
            for name in given:
                if name in known and known[name][1] == "bool":
                    given[name] = builder.cast(given[name], "bool")
            found = lower(model, builder.table, {**given, **static}, backend="Core ML")
            outputs = []
            for name, value in found.items():
                if is_static(value):
                    if name in final:
                        raise ConversionError(f"Core ML: the output {name} does not depend on any input")
                    known[name] = dense(value)
                    continue
                result = builder.var(value)
                kind_name = "fp32" if builder.is_float(value) else builder.types.builtin_to_string(result.dtype)
                result = builder.cast(result, "int32" if kind_name == "bool" else kind_name)
                known[name] = shape_of(result), kind_name
                outputs.append(builder.mb.identity(x=result, name=name))
            function.set_outputs(outputs)
        _shorten(function, len(program.functions), builder.origins)
        program.add_function("main" if len(functions) == 1 else wanted.name, function)
    if len(functions) > 1:
        program.default_function_name = functions[0].name
        program.export_as_multifunction = True
    return program


def _shorten(function: Any, number: int, origins: dict[str, str]) -> None:
    """Numbers for the names of arguments, which repeat those of their operations, and in all functions but the first
    for all names: the first one's say what the operations are, in the same order. `origins` learns the new names.

    Equal arguments become one: every operation comes with some ten of them.
    """
    known: dict[Any, Any] = {}
    kept = set(function.outputs)
    for index, operation in enumerate(list(function.operations)):
        value = operation.outputs[0]
        if operation.op_type != "const":
            if number and not kept.intersection(operation.outputs):
                short = f"f{number}_{index}"
                if operation.name in origins:
                    origins[short] = origins[operation.name]
                operation.name = short
                for place, output in enumerate(operation.outputs):
                    output.name = f"{short}_{place}" if place else short
            continue
        if not hasattr(operation, "weight_id") or operation.weight_id is None:
            array = np.asarray(value.val)
            key = (value.dtype, array.shape, array.dtype.str, array.tobytes() if array.size < _SHARED else index)
            if key in known and array.dtype.kind != "U":
                function.replace_uses_of_var_after_op(anchor_op=known[key].op, old_var=value, new_var=known[key])
                function.remove_ops([operation])
                continue
            known[key] = value
        operation.name = value.name = f"c{index}"


def _convert(library: Any, program: Any, target: str) -> Any:
    pipeline = library.PassPipeline.EMPTY
    pipeline.passes = _PASSES
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        return library.convert(
            program,
            source="milinternal",
            convert_to="mlprogram",
            minimum_deployment_target=getattr(library.target, target),
            compute_precision=library.precision.FLOAT32,
            pass_pipeline=pipeline,
            skip_model_load=True,
        )


def _shape(spec: TensorSpec, function: CoremlFunction) -> tuple[int, ...]:
    missing = [d for d in spec.shape if isinstance(d, str) and d not in function.dims]
    if missing:
        raise ConversionError(f"{function.name}: no size is given for the dimension {missing[0]!r} of {spec.name}")
    return tuple(d if isinstance(d, int) else int(function.dims[d]) for d in spec.shape)


def _kind(builder: MilBuilder, spec: TensorSpec) -> Any:
    """MIL has neither int64 nor bool inputs: whole numbers come as int32."""
    return builder.types.fp32 if np.dtype(spec.dtype).kind == "f" else builder.types.int32

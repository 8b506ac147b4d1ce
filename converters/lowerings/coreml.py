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
from edgedit.converters.lowerings.driver import is_static, lower
from edgedit.converters.lowerings.mil import attention, elementwise, movement, networks
from edgedit.converters.lowerings.mil.builder import MilBuilder
from edgedit.converters.lowerings.mil.codes import Coded
from edgedit.converters.lowerings.mil.compression import WeightForm
from edgedit.converters.lowerings.mil.islands import find_islands, whole
from edgedit.converters.quantization.form import Form
from edgedit.converters.quantization.layers import Layer, find_layers, fitted
from edgedit.converters.quantization.record import Quantization
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
    """

    precision: str = "fp32"
    target: str = "iOS18"
    neural: bool = False
    fused_attention: bool = True
    whole_reason: str = "asked for"
    form: WeightForm | None = None
    quantization: Quantization | None = None
    islands: Mapping[str, str] = field(default_factory=dict)


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
    """

    precision: str
    graph: str
    files: tuple[str, ...]
    functions: tuple[CoremlFunction, ...]
    islands: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)


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
    builder = _builder(model, options)
    program = _program(builder, model, inputs, functions, getattr(library.target, options.target))
    package = root / folder / (component.title().replace("_", "") + ".mlpackage")
    package.parent.mkdir(parents=True, exist_ok=True)
    islands = {**builder.islands, **builder.norms} if builder.half else {}
    try:
        converted = _convert(library, program, options.target)
        if islands:
            converted.user_defined_metadata[ISLANDS] = json.dumps(_by_reason(islands), separators=(",", ":"))
        converted.save(str(package))
    except (ValueError, RuntimeError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConversionError(f"{component}: coremltools refuses the program: {reason}") from error
    files = sorted(path for path in package.rglob("*") if path.is_file())
    return CoremlArtefact(
        precision=_stored(options),
        graph=package.relative_to(root).as_posix(),
        files=tuple(path.relative_to(root).as_posix() for path in files),
        functions=tuple(functions),
        islands=islands,
        origins=_origins(model, builder),
    )


def _origins(model: ir.Model, builder: MilBuilder) -> dict[str, str]:
    nodes = {str(node.name) for node in model.graph}
    return {name: origin for name, origin in builder.origins.items() if origin in nodes}


def _by_reason(islands: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for node, reason in islands.items():
        found.setdefault(reason, []).append(node)
    return found


def _builder(model: ir.Model, options: CoremlOptions) -> MilBuilder:
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
    return MilBuilder(
        half=True,
        islands=whole(model, options.whole_reason) if everything else {**options.islands, **find_islands(model)},
        store_half=everything,
        **stored,
    )


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
    target: Any,
) -> Any:
    from coremltools.converters.mil.mil import Function, Program

    program = Program()
    for wanted in functions:
        builder.begin()
        placeholders = {
            spec.name: builder.mb.placeholder(_shape(spec, wanted), dtype=_kind(builder, spec)) for spec in inputs
        }
        function = Function(placeholders, opset_version=target)
        with function:
            found = lower(model, builder.table, dict(function.inputs), backend="Core ML")
            outputs = []
            for name, value in found.items():
                if is_static(value):
                    raise ConversionError(f"Core ML: the output {name} does not depend on any input")
                result = builder.cast(builder.var(value), "fp32") if builder.is_float(value) else builder.var(value)
                outputs.append(builder.mb.identity(x=result, name=name))
            function.set_outputs(outputs)
        program.add_function("main" if len(functions) == 1 else wanted.name, function)
    if len(functions) > 1:
        program.default_function_name = functions[0].name
        program.export_as_multifunction = True
    return program


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

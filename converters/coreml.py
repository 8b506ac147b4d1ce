"""How a conversion makes Core ML packages: for which sizes, in which precision, with which weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgedit.converters.checkpoint import Checkpoint
from edgedit.converters.families import Family
from edgedit.converters.fixed_sizes import FixedSizes, fixed_sizes
from edgedit.converters.graph import Component
from edgedit.converters.lowerings import coreml as lowering
from edgedit.converters.lowerings.coreml import CoremlArtefact, CoremlFunction
from edgedit.converters.lowerings.mil.compression import WeightForm, parse_form
from edgedit.converters.lowerings.mil.measured import more_islands
from edgedit.converters.quantization.record import Quantization
from edgedit.converters.reference import reference_inputs
from edgedit.converters.tokenizer import CheckpointTokenizer, prompt_recipe
from edgedit.errors import ConversionError
from edgedit.manifest import Function, TensorSpec
from edgedit.runtimes.base import Session
from edgedit.runtimes.coreml import CoremlSession
from edgedit.runtimes.coreml_engine import InterpreterEngine, chained, coremltools

__all__ = ["CoremlOptions", "CoremlPlan", "plan_coreml"]

#: Pictures of more pixels are not drawn with the interpreter to measure a package, unless that is asked for.
MEASURE_PIXELS = 512 * 512

#: Times that a package in float16 is written and measured at most.
ROUNDS = 4

Opener = Callable[[], Session]


@dataclass(frozen=True)
class CoremlOptions:
    """What a user may choose.

    Attributes:
        target: "iOS18" (with macOS 15) or "iOS26" (with macOS 26).
        attention: "fused" is Core ML's operator, "written" a product, a softmax and a product. None: "fused", but
            "written" for the Neural Engine.
        weights: how the transformer and the text encoder are stored: "int8", "int4" (blocks of 32 inputs, or as in
            "int4-b64"), "palette4" (or 1, 2, 3, 6, 8; "palette4-g16": one for 16 outputs). None: `dtype`.
        compute_units: "ne" for the form that the Neural Engine takes: four axes at most, 1x1 convolutions, attention in
            parts; "all" for the one that suits a GPU.
        chunk_bytes: weights of one package at most; a larger component becomes several that run one after the other.
    """

    target: str = "iOS18"
    attention: str | None = None
    weights: str | None = None
    compute_units: str = "all"
    chunk_bytes: int = lowering.CHUNK_BYTES

    def __post_init__(self) -> None:
        if self.target not in lowering.TARGETS:
            raise ConversionError(f"unknown Core ML target {self.target!r}; choose from: {', '.join(lowering.TARGETS)}")
        if self.attention not in (None, "fused", "written"):
            raise ConversionError(f"unknown attention {self.attention!r}; choose from: fused, written")
        if self.compute_units not in ("all", "ne"):
            raise ConversionError(f"unknown compute units {self.compute_units!r}; choose from: all, ne")
        if self.compute_units == "ne" and self.attention == "fused":
            raise ConversionError("attention is written out for the Neural Engine; leave the fused one out")
        if self.weights is not None:
            parse_form(self.weights)

    @property
    def fused(self) -> bool:
        """Whether attention is Core ML's operator."""
        return self.compute_units != "ne" and self.attention != "written"


@dataclass(frozen=True)
class CoremlPlan:
    """The packages of one model."""

    sizes: FixedSizes
    options: CoremlOptions

    def as_dict(self) -> dict[str, Any]:
        """For the manifest's provenance."""
        attention = "fused" if self.options.fused else "written"
        return {**asdict(self.options), "attention": attention, "sizes": [list(size) for size in self.sizes.pictures]}

    def _form(self, component: str) -> WeightForm | None:
        """Autoencoders stay whole: they are small, and the eye sees what they do."""
        if self.options.weights is None or component not in ("transformer", "text_encoder"):
            return None
        return parse_form(self.options.weights)

    def measured(self, asked: bool | None) -> bool:
        """Whether packages are run at conversion: when that is asked for, or nothing is said and pictures are small."""
        width, height = min(self.sizes.pictures, key=lambda size: size[0] * size[1])
        return bool(asked) or (asked is None and width * height <= MEASURE_PIXELS)

    def reference_sizes(self, component: str) -> dict[str, Any]:
        """Arguments of `example_inputs` for inputs that a package takes: those of the smallest picture."""
        rows, columns = self.sizes.smallest_grid()
        patch = self.sizes.patch_size if component == "transformer" else 1
        room = self.sizes.encoder_length if component == "text_encoder" else self.sizes.text_length
        return {"tokens": (rows // patch, columns // patch), "length": min(9, room)}

    def write(
        self,
        component: Component,
        model: ir.Model,
        root: Path,
        *,
        dtype: str,
        quantization: Quantization | None = None,
        check: bool = False,
    ) -> tuple[CoremlArtefact, list[Opener]]:
        """Write the package of a component; what opens it with the interpreter, as it is and with float16 emulated.

        dtype: "fp32", "fp16", or the name of `quantization`, with which everything else is as with "fp16".
        check: run a package in float16, and compute in float32 where it overflows or loses too much.
        """
        options = lowering.CoremlOptions(
            precision=precision_of(component, dtype),
            target=self.options.target,
            neural=self.options.compute_units == "ne",
            fused_attention=self.options.fused,
            whole_reason=_reason(component),
            form=self._form(component.name),
            quantization=quantization,
            chunk_bytes=self.options.chunk_bytes,
        )
        inputs = reference_inputs(component, **self.reference_sizes(component.name)) if check else None
        artefact = self._write(component, model, root, options, inputs)
        named = len(artefact.functions) > 1
        functions = [Function(f.name if named else None, f.dims) for f in artefact.functions]
        specs = [[TensorSpec(s.name, s.dtype, s.shape) for s in part] for part in (component.inputs, component.outputs)]

        def opened(emulate: bool) -> Session:
            paths = [root / path for path in artefact.chunks or [artefact.graph]]
            engine = chained([(path, InterpreterEngine(path, emulate_fp16=emulate)) for path in paths])
            return CoremlSession(engine, specs[0], specs[1], functions, component.name)

        return artefact, [partial(opened, emulate) for emulate in ((False,) if dtype == "fp32" else (False, True))]

    def _write(
        self,
        component: Component,
        model: ir.Model,
        root: Path,
        options: lowering.CoremlOptions,
        inputs: Mapping[str, np.ndarray] | None,
    ) -> CoremlArtefact:
        """The package, written again while what is measured on `inputs` asks for more islands."""
        functions = self.sizes.functions(component.name)
        for _ in range(ROUNDS):
            artefact = lowering.write(
                model, root, component.name, inputs=component.inputs, functions=functions, options=options
            )
            if inputs is None or options.precision != "fp16" or artefact.chunks:
                break
            fitting = _padded(component, functions, inputs)
            if fitting is None:
                break
            name, given = fitting
            package = root / artefact.graph
            found = more_islands(package, artefact.origins, given, name if len(functions) > 1 else None)
            if set(found) <= set(options.islands):
                break
            options = replace(options, islands={**found, **options.islands})
            shutil.rmtree(package)
        else:
            artefact = lowering.write(
                model, root, component.name, inputs=component.inputs, functions=functions, options=options
            )
        return artefact


def _padded(
    component: Component, functions: Sequence[CoremlFunction], inputs: Mapping[str, np.ndarray]
) -> tuple[str, dict[str, np.ndarray]] | None:
    """The function that inputs are for, and the inputs with their text filled up to its length."""
    for function in functions:
        given = {}
        for spec in component.inputs:
            value = np.asarray(inputs[spec.name])
            shape = [d if isinstance(d, int) else function.dims[d] for d in spec.shape]
            room = [(0, want - have) for want, have in zip(shape, value.shape, strict=True)]
            if any(after < 0 or (after and d != "length") for d, (_, after) in zip(spec.shape, room, strict=True)):
                break
            given[spec.name] = np.pad(value, room)
        else:
            return function.name, given
    return None


def precision_of(component: Component, dtype: str) -> str:
    """The lowering's precision: text encoders, and autoencoders that say so, compute in float32."""
    if dtype == "fp32":
        return "fp32"
    return "fp16-weights" if _reason(component) else "fp16"


def _reason(component: Component) -> str:
    if component.name == "text_encoder":
        return "a text encoder: its activations pass float16's range"
    if component.runtime.get("force_upcast"):
        return "force_upcast: the autoencoder's configuration asks for float32"
    return ""


def plan_coreml(
    checkpoint: Checkpoint,
    family: Family,
    components: Mapping[str, Component],
    tokenizer: CheckpointTokenizer | None,
    sizes: Sequence[tuple[int, int]] | None,
    options: CoremlOptions | None,
) -> CoremlPlan:
    """What to write for `components`. Checks that coremltools is here before anything is written.

    Raises:
        ConversionError: sizes that the model cannot draw.
        RuntimeUnavailableError: coremltools is not installed.
    """
    coremltools()
    max_length = checkpoint.own.max_length or family.template.max_length
    prompt = None
    if tokenizer is not None:
        prompt = prompt_recipe(tokenizer, max_length=max_length, instruction=family.template.instruction)
    runtime = {name: component.runtime for name, component in components.items()}
    wanted = sizes
    if wanted is None and (listed := checkpoint.own.recommended.get("sizes")):
        wanted = [(int(width), int(height)) for width, height in listed]
    return CoremlPlan(fixed_sizes(wanted, runtime, prompt, max_length=max_length), options or CoremlOptions())

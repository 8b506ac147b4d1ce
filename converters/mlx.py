"""How a conversion makes MLX artefacts: with which weights, and with functions of which sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from edgedit.converters.checkpoint import Checkpoint
from edgedit.converters.families import Family
from edgedit.converters.fixed_sizes import FixedSizes, fixed_sizes
from edgedit.converters.graph import Component
from edgedit.converters.lowerings.mlx_quantization import MlxQuantization
from edgedit.converters.manifest import guidance_of
from edgedit.converters.quantization.record import Quantization
from edgedit.converters.tokenizer import CheckpointTokenizer, prompt_recipe
from edgedit.errors import ConversionError, RuntimeUnavailableError
from edgedit.manifest import Exported
from edgedit.runtimes.base import Session

if TYPE_CHECKING:
    from edgedit.converters.lowerings.mlx import MlxArtefact

__all__ = ["MlxPlan", "function_sizes", "plan_mlx"]

#: Components whose matrices are quantized; an autoencoder is small, and its convolutions stay as they are.
QUANTIZED_COMPONENTS = ("transformer", "text_encoder")
#: Pictures that a transformer with guidance predicts at once: one, and one with and one without the prompt.
GUIDED_BATCHES = (1, 2)

Opener = Callable[[], Session]


@dataclass(frozen=True)
class MlxPlan:
    """The artefacts of one model.

    Attributes:
        weights: the form of the transformer's and the text encoder's matrices; None leaves them in the dtype.
        pictures: (width, height) in pixels that functions are exported for; none by default.
        functions: every named size of each function's inputs, by component; empty where none are exported.
    """

    weights: MlxQuantization | None
    pictures: tuple[tuple[int, int], ...]
    functions: Mapping[str, Sequence[Mapping[str, int]]]

    def as_dict(self) -> dict[str, Any]:
        """For the manifest's provenance."""
        weights = None if self.weights is None else self.weights.name
        return {"weights": weights, "sizes": [list(size) for size in self.pictures]}

    def _form(self, component: str) -> MlxQuantization | None:
        return self.weights if component in QUANTIZED_COMPONENTS else None

    def precision(self, component: str, dtype: str) -> str:
        """What the manifest will call the precision of a component."""
        form = self._form(component)
        return dtype if form is None else form.name

    def write(
        self,
        component: Component,
        model: ir.Model,
        root: Path,
        *,
        dtype: str,
        check: bool,
        quantization: Quantization | None = None,
        on_tensor: Callable[[int, int], None] | None = None,
    ) -> tuple[MlxArtefact, list[Opener]]:
        """Write a component's graph, weights and functions; what opens it on this machine's best device.

        quantization: the forms of the layers; `dtype` is then its name.
        check: read the exported functions back and run them.
        """
        lowering = import_module("edgedit.converters.lowerings.mlx")
        artefact: MlxArtefact = lowering.write(
            model,
            root,
            component.name,
            dtype=dtype,
            quantization=self._form(component.name),
            recipe=quantization,
            on_tensor=on_tensor,
        )
        graph, weights = (root / path for path in artefact.files)
        runtime = import_module("edgedit.runtimes.mlx")
        gpu = runtime.has_gpu()
        device = "gpu" if gpu else "cpu"
        opener = partial(runtime.MlxSession, graph, weights, device=device, compiled=gpu, label=component.name)
        functions = self.functions.get(component.name)
        if functions:
            target = Path(artefact.graph).with_suffix(".mlxfn")
            import_module("edgedit.converters.lowerings.mlx_functions").export(
                graph, weights, root / target, component.inputs, functions, check=check
            )
            exported = Exported(target.as_posix(), tuple(functions))
            artefact = replace(artefact, files=(*artefact.files, exported.path), exported=exported)
        return artefact, [opener]


def function_sizes(
    sizes: FixedSizes, component: Component, prompt: Mapping[str, Any] | None, guidance: Mapping[str, Any] | None
) -> list[dict[str, int]]:
    """Every named size of `component`'s inputs, for each function that drawing pictures of `sizes` calls.

    Args:
        prompt, guidance: the manifest's sections.

    Raises:
        ConversionError: prompts without a fixed length.
    """
    name = component.name
    named = {size for spec in component.inputs for size in spec.shape if isinstance(size, str)}
    batches = GUIDED_BATCHES if name == "transformer" and (guidance or {}).get("kind") == "cfg" else (1,)
    lengths = _lengths(prompt, selected=name == "transformer") if "length" in named else [0]
    every = [
        {**function.dims, "length": length, "batch": batch}
        for function in sizes.functions(name)
        for length in lengths
        for batch in batches
    ]
    wanted = [{key: value for key, value in one.items() if key in named} for one in every]
    return list({tuple(one.items()): one for one in wanted}.values())


def _lengths(prompt: Mapping[str, Any] | None, *, selected: bool) -> list[int]:
    """Text tokens on either side of guidance: those that are encoded, or those of them that the transformer sees."""
    if prompt is None or prompt["padding"] != "max_length":
        raise ConversionError("prompts of this model have no fixed length; leave the sizes out for MLX")
    lengths = []
    for side in (prompt["positive"], prompt["negative"]):
        select = side["select"] if selected else None
        lengths.append(int(side["max_length"]) if select is None else int(select["first"]) + int(select["last"]))
    return list(dict.fromkeys(lengths))


def plan_mlx(
    checkpoint: Checkpoint,
    family: Family,
    components: Mapping[str, Component],
    tokenizer: CheckpointTokenizer | None,
    sizes: Sequence[tuple[int, int]] | None,
    weights: str | None,
) -> MlxPlan:
    """What to write for `components`. Checks that MLX is here before anything is written.

    Args:
        sizes: (width, height) in pixels that functions are exported for.
        weights: as `MlxQuantization.parse` reads it.

    Raises:
        ConversionError: an unknown form of weights, or sizes that the model cannot draw.
        RuntimeUnavailableError: MLX is not installed.
    """
    form = None if weights is None else MlxQuantization.parse(weights)
    try:
        import_module("mlx.core")
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"converting for MLX needs MLX itself ({error}); run: pip install 'edgedit[mlx]'"
        ) from error
    if not sizes:
        return MlxPlan(form, (), {})
    max_length = checkpoint.own.max_length or family.template.max_length
    prompt = None
    if tokenizer is not None:
        prompt = prompt_recipe(tokenizer, max_length=max_length, instruction=family.template.instruction)
    runtime = {name: component.runtime for name, component in components.items()}
    guidance = guidance_of(checkpoint, family, runtime)
    fixed = fixed_sizes(sizes, runtime, prompt, max_length=max_length)
    functions = {name: function_sizes(fixed, part, prompt, guidance) for name, part in components.items()}
    return MlxPlan(form, fixed.pictures, functions)

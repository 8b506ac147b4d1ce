"""The components of a checkpoint on their way into a bundle."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from edgedit.converters.checkpoint import Checkpoint, ComponentSource
from edgedit.converters.families import BUILDERS, Family, builder, components_of, family_of
from edgedit.converters.graph import Component, bind, build
from edgedit.converters.manifest import Artefact, Section, Written
from edgedit.converters.quantization.layers import Layer
from edgedit.converters.quantization.record import Quantization
from edgedit.converters.tokenizer import CheckpointTokenizer, read_tokenizer
from edgedit.errors import CheckpointError, ConversionError

__all__ = ["Job", "OnProgress", "canonical", "family_of_jobs", "plan_jobs", "tokenizer_of_jobs"]

#: Told a stage, what is done of it, and what there is in all.
OnProgress = Callable[[str, int, int], None]
#: Components with fewer weight bytes are run after they are written, to measure their agreement. Running a larger one
#: takes more memory than converting it; `edgedit verify` and `measure=True` do it on request.
MEASURE_BELOW = 256 << 20


@dataclass
class Job:
    """One component on its way into the bundle."""

    name: str
    source: ComponentSource
    component: Component
    model: ir.Model
    dropped: list[tuple[str, str]]
    artefacts: dict[str, Artefact] = field(default_factory=dict)
    parity: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    precisions: dict[str, str] = field(default_factory=dict)
    quantization: Quantization | None = None
    layers: Mapping[str, Layer] = field(default_factory=dict)
    prepare: Callable[[ir.Model], tuple[Quantization, Mapping[str, Layer]]] | None = None

    @property
    def section(self) -> Section:
        written = {backend: Written(artefact, self.parity.get(backend)) for backend, artefact in self.artefacts.items()}
        return Section(self.component, self.parameters, written)

    @property
    def parameters(self) -> int:
        return sum(math.prod(ref.shape) for key, ref in self.source.tensors.items() if key not in dict(self.dropped))

    def is_measured(self, asked: bool | None) -> bool:
        """Whether its agreement is recorded: when that is asked for, or nothing is said and it is small."""
        return bool(asked) or (asked is None and 4 * self.parameters < MEASURE_BELOW)


def plan_jobs(checkpoint: Checkpoint, wanted: Sequence[str] | None) -> list[Job]:
    """Build and bind the graphs of the wanted components. Nothing is read from disk but headers."""
    makes: dict[str, ComponentSource] = {}
    for source in checkpoint.components.values():
        if source.class_name not in BUILDERS:
            if wanted is None or source.name in wanted:
                raise ConversionError(
                    f"{source.name}: class {source.class_name} is not supported; "
                    f"convert understands: {', '.join(BUILDERS)}"
                )
            continue
        for component in components_of(source.class_name, source.name):
            makes[component] = source
    for component in wanted or ():
        if component not in makes:
            raise ConversionError(
                f"the checkpoint makes no component {component!r}; it makes: {', '.join(makes) or 'none'}"
            )
    if not makes:
        raise CheckpointError(f"{checkpoint.source} holds no component that can be converted")
    jobs = []
    for component, source in makes.items():
        if wanted is None or component in wanted:
            jobs.append(Job(component, source, *canonical(source, component)))
    return jobs


def canonical(source: ComponentSource, name: str) -> tuple[Component, ir.Model, list[tuple[str, str]]]:
    """A component, a fresh canonical graph with lazy weights, and the keys that it drops with their reasons."""
    component = builder(source.class_name, name)(source.config)
    model = build(component)
    accounting = bind(model, source.tensors, drop=component.drop, config=source.config)
    return component, model, [*source.dropped.items(), *accounting.dropped.items()]


def family_of_jobs(checkpoint: Checkpoint, jobs: list[Job]) -> Family:
    transformer = next((job.source for job in jobs if job.name == "transformer"), None)
    config: Mapping[str, Any] = transformer.config if transformer else {}
    return family_of(checkpoint.pipeline_class, transformer.class_name if transformer else None, config)


def tokenizer_of_jobs(checkpoint: Checkpoint, jobs: list[Job]) -> CheckpointTokenizer | None:
    if not any(job.name == "text_encoder" for job in jobs):
        return None
    folders = checkpoint.tokenizer_dirs
    if "tokenizer" in folders:
        return read_tokenizer(folders["tokenizer"])
    if checkpoint.pipeline_class is None:
        return None
    raise CheckpointError(f"{checkpoint.source} has a text encoder but no tokenizer folder; fetch the whole checkpoint")

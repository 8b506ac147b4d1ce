"""Checkpoint → bundle. Weights are read one at a time; the bundle is written whole or not at all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgedit.bundle_writer import BundleWriter
from edgedit.converters import reference
from edgedit.converters.checkpoint import Checkpoint, ComponentSource, open_checkpoint
from edgedit.converters.families import BUILDERS, Family, builder, family_of
from edgedit.converters.graph import Component, bind, build
from edgedit.converters.lowerings import onnx as onnx_lowering
from edgedit.converters.manifest import Section, describe
from edgedit.converters.measure import fit_preview, measure_onnx
from edgedit.converters.tiling.write import TILED, write_pieces
from edgedit.converters.tokenizer import CheckpointTokenizer, read_tokenizer
from edgedit.errors import CheckpointError, ConversionError

__all__ = ["TARGETS", "ComponentReport", "ConversionReport", "convert"]

#: Backends that `to` may name.
TARGETS = ("onnx",)
#: Components with fewer weight bytes are run after they are written, to measure their agreement. Running a larger one
#: takes more memory than converting it; `edgedit verify` and `measure=True` do it on request.
MEASURE_BELOW = 256 << 20

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ComponentReport:
    """What became of one component.

    `size` is bytes in the bundle, 0 in a dry run; `parity` is None when not measured.
    """

    name: str
    architecture: str
    class_name: str
    parameters: int
    size: int
    precision: str
    dropped: list[tuple[str, str]]
    parity: dict[str, Any] | None


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did. `bundle` is None in a dry run."""

    bundle: Path | None
    family: str
    pipeline_class: str | None
    components: list[ComponentReport]
    notes: list[str]
    seconds: float

    @property
    def size(self) -> int:
        """Bytes of all components in the bundle."""
        return sum(component.size for component in self.components)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "bundle": None if self.bundle is None else str(self.bundle), "size": self.size}


@dataclass
class _Job:
    """One component on its way into the bundle."""

    name: str
    source: ComponentSource
    component: Component
    model: ir.Model
    dropped: list[tuple[str, str]]
    section: Section | None = None
    parity: dict[str, Any] | None = None
    size: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        return sum(math.prod(ref.shape) for key, ref in self.source.tensors.items() if key not in dict(self.dropped))


def convert(
    source: str | Path,
    bundle: str | Path,
    *,
    to: Sequence[str] = ("onnx",),
    dtype: str = "fp32",
    components: Sequence[str] | None = None,
    revision: str | None = None,
    offline: bool = False,
    variant: str | None = None,
    name: str | None = None,
    overwrite: bool = False,
    measure: bool | None = None,
    dry_run: bool = False,
    on_progress: OnProgress | None = None,
) -> ConversionReport:
    """Convert a checkpoint into a bundle.

    Args:
        source: a diffusers folder, one component's folder, a weights file, or a Hub id.
        bundle: the folder to write, usually NAME.edgedit.
        to: backends to make artefacts for.
        dtype: "fp32", or "fp16" for weights stored as float16 (arithmetic stays float32).
        components: bundle components to convert ("transformer", "text_encoder", "decoder", "encoder"); all by default.
        revision, offline, variant: which files of the source to take; see `open_checkpoint`.
        name: the model's name in the manifest; the bundle's file name by default.
        overwrite: replace an existing bundle.
        measure: run every component after writing it and record its agreement with the fp32 graph; None does so for
            components below 256 MiB.
        dry_run: check everything, write nothing.
        on_progress: told (component, tensors written, tensors in all).

    Raises:
        CheckpointError: the source is missing, damaged or unsafe.
        ConversionError: a class, option or weight that cannot be converted, or no room on the disk.
        BundleError: the target exists or cannot be written.
    """
    started = time.perf_counter()
    for target in to:
        if target not in TARGETS:
            raise ConversionError(f"unknown target {target!r}; choose from: {', '.join(TARGETS)}")
    if dtype not in onnx_lowering.DTYPES:
        raise ConversionError(f"unknown dtype {dtype!r}; choose from: {', '.join(onnx_lowering.DTYPES)}")
    checkpoint = open_checkpoint(source, revision=revision, offline=offline, variant=variant)
    jobs = _plan(checkpoint, components)
    family = _family(checkpoint, jobs)
    tokenizer = _tokenizer(checkpoint, jobs)
    notes = [*checkpoint.notes]
    options = {"to": list(to), "dtype": dtype, "components": [job.name for job in jobs], "variant": variant}
    if dry_run:
        return _report(None, family, checkpoint, jobs, notes, started, dtype)

    with BundleWriter(bundle, overwrite=overwrite) as writer:
        preview = None
        for job in jobs:
            artefact = onnx_lowering.write(
                job.model, writer.root, job.name, dtype=dtype, on_tensor=_counter(job.name, on_progress)
            )
            if job.name in TILED:
                stride = int(job.component.runtime["scale_factor"]) if job.name == "encoder" else 1
                artefact = write_pieces(writer.root, job.name, artefact, stride)
            job.size = sum((writer.root / path).stat().st_size for path in artefact.files)
            small = 4 * job.parameters < MEASURE_BELOW
            if measure or (measure is None and small):
                fresh = None if dtype == "fp32" else _canonical(job.source, job.name)[1]
                job.parity = measure_onnx(writer.root, job.component, artefact, fresh)
                if job.name == "decoder":
                    preview = fit_preview(writer.root, job.component, artefact)
            else:
                inputs = reference.reference_inputs(job.component)
                reference.save(writer.root / "reference" / f"{job.name}.npz", inputs, {})
            if measure is None and not small:
                notes.append(
                    f"{job.name}: agreement not measured (over 256 MiB); measure with: edgedit convert --measure"
                )
            job.section = Section(job.component, job.parameters, artefact, job.parity)
        if tokenizer is not None:
            folder = writer.root / "tokenizer"
            folder.mkdir()
            (folder / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
        manifest = describe(
            checkpoint,
            family,
            {job.name: job.section for job in jobs if job.section is not None},
            tokenizer=tokenizer,
            preview=preview,
            name=name or Path(bundle).name.removesuffix(".edgedit"),
            options=options,
        )
        writer.finish(manifest)
    return _report(Path(bundle), family, checkpoint, jobs, notes, started, dtype)


def _report(
    bundle: Path | None,
    family: Family,
    checkpoint: Checkpoint,
    jobs: list[_Job],
    notes: list[str],
    started: float,
    dtype: str,
) -> ConversionReport:
    return ConversionReport(
        bundle=bundle,
        family=family.name,
        pipeline_class=checkpoint.pipeline_class,
        components=[
            ComponentReport(
                name=job.name,
                architecture=job.component.architecture,
                class_name=job.source.class_name,
                parameters=job.parameters,
                size=job.size,
                precision=dtype,
                dropped=job.dropped,
                parity=job.parity,
            )
            for job in jobs
        ],
        notes=notes,
        seconds=time.perf_counter() - started,
    )


def _plan(checkpoint: Checkpoint, wanted: Sequence[str] | None) -> list[_Job]:
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
        for component in BUILDERS[source.class_name]:
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
            jobs.append(_Job(component, source, *_canonical(source, component)))
    return jobs


def _canonical(source: ComponentSource, name: str) -> tuple[Component, ir.Model, list[tuple[str, str]]]:
    """A component, a fresh canonical graph with lazy weights, and the keys that it drops with their reasons."""
    component = builder(source.class_name, name)(source.config)
    model = build(component)
    accounting = bind(model, source.tensors, drop=component.drop, config=source.config)
    return component, model, [*source.dropped.items(), *accounting.dropped.items()]


def _family(checkpoint: Checkpoint, jobs: list[_Job]) -> Family:
    transformer = next((job.source for job in jobs if job.name == "transformer"), None)
    config: Mapping[str, Any] = transformer.config if transformer else {}
    return family_of(checkpoint.pipeline_class, transformer.class_name if transformer else None, config)


def _tokenizer(checkpoint: Checkpoint, jobs: list[_Job]) -> CheckpointTokenizer | None:
    if not any(job.name == "text_encoder" for job in jobs):
        return None
    folders = checkpoint.tokenizer_dirs
    if "tokenizer" in folders:
        return read_tokenizer(folders["tokenizer"])
    if checkpoint.pipeline_class is None:
        return None
    raise CheckpointError(f"{checkpoint.source} has a text encoder but no tokenizer folder; fetch the whole checkpoint")


def _counter(component: str, on_progress: OnProgress | None) -> Callable[[int, int], None] | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(component, done, total)

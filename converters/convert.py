"""Checkpoint → bundle. Weights are read one at a time; the bundle is written whole or not at all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgedit.bundle_writer import BundleWriter
from edgedit.converters import reference
from edgedit.converters.checkpoint import Checkpoint, ComponentSource, open_checkpoint
from edgedit.converters.coreml import CoremlOptions, CoremlPlan, plan_coreml
from edgedit.converters.families import BUILDERS, Family, builder, components_of, family_of
from edgedit.converters.graph import Component, bind, build
from edgedit.converters.lowerings import onnx as onnx_lowering
from edgedit.converters.manifest import Artefact, Section, Written, describe, guidance_of
from edgedit.converters.measure import Opener, canonical_form, fit_preview, measure_forms, onnx_sessions
from edgedit.converters.mlx import MlxPlan, plan_mlx
from edgedit.converters.parts import CUT, write_parts
from edgedit.converters.prompts import read_prompts
from edgedit.converters.quantization.backends import check_backends
from edgedit.converters.quantization.calibrate import NEEDED, Calibration
from edgedit.converters.quantization.layers import Layer, find_layers
from edgedit.converters.quantization.prepare import is_slow, prepare
from edgedit.converters.quantization.presets import recipe_of
from edgedit.converters.quantization.recipe import Recipe
from edgedit.converters.quantization.record import Quantization, write_record
from edgedit.converters.quantization.workspace import Workspace
from edgedit.converters.tiling.write import TILED, write_pieces
from edgedit.converters.tokenizer import CheckpointTokenizer, read_tokenizer
from edgedit.errors import CheckpointError, ConversionError

__all__ = ["TARGETS", "ArtefactReport", "ComponentReport", "ConversionReport", "convert"]

#: Backends that `to` may name.
TARGETS = ("onnx", "coreml", "mlx")
#: Components with fewer weight bytes are run after they are written, to measure their agreement. Running a larger one
#: takes more memory than converting it; `edgedit verify` and `measure=True` do it on request.
MEASURE_BELOW = 256 << 20

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ArtefactReport:
    """One backend's form of a component: bytes in the bundle, 0 in a dry run; `parity` is None when not measured."""

    backend: str
    precision: str
    size: int
    parity: dict[str, Any] | None


@dataclass(frozen=True)
class ComponentReport:
    """What became of one component: `artefacts` by backend, and their total size.

    `precision` and `parity` are those of the first backend; `parity` is None when not measured.
    """

    name: str
    architecture: str
    class_name: str
    parameters: int
    size: int
    precision: str
    dropped: list[tuple[str, str]]
    parity: dict[str, Any] | None
    artefacts: list[ArtefactReport]


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


def convert(
    source: str | Path,
    bundle: str | Path,
    *,
    to: Sequence[str] = ("onnx",),
    dtype: str = "fp32",
    calibration: str | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    coreml: CoremlOptions | None = None,
    mlx_weights: str | None = None,
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
        dtype: "fp32"; "fp16" for weights stored as float16 (arithmetic stays float32); "w8", "w4", "w3" or "w2" for
            weights in so many bits, "fp4" for 4-bit floats; "w8a8" or "w4a8" for int8 arithmetic in the transformer's
            blocks as well; or the .toml file of a recipe. Every backend gets the same codes; a form that one lacks is
            refused. Of what has no codes Core ML computes in float16 where it can, and MLX in a transformer.
        calibration: a file of prompts, one a line, or "self" for eight of the checkpoint's own or of a general list.
            The model draws them, and what its layers saw on the way makes quantized weights lose less. An
            interrupted conversion goes on where it was when it is given again with the same options.
        sizes: (width, height) in pixels that fixed shapes are made for: packages of Core ML, by default of the model's
            own size, and functions of MLX (`.mlxfn`), by default none.
        coreml: how Core ML packages are made.
        mlx_weights: quantize the matrices of the transformer and the text encoder for MLX: "q2" to "q8" with "-g32",
            "-g64" or "-g128" after it, "mxfp4", "mxfp8" or "nvfp4"; None leaves them in `dtype`.
        components: bundle components to convert ("transformer", "text_encoder", "decoder", "encoder",
            "tiny_decoder"); all by default.
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
        RuntimeUnavailableError: a backend that is needed to convert for it is not on this machine.
    """
    started = time.perf_counter()
    for target in to:
        if target not in TARGETS:
            raise ConversionError(f"unknown target {target!r}; choose from: {', '.join(TARGETS)}")
    recipe = recipe_of(dtype, calibrated=calibration is not None, ranges="coreml" in to)
    if not to:
        raise ConversionError(f"no target given; choose from: {', '.join(TARGETS)}")
    if recipe is not None and ((coreml and coreml.weights) or mlx_weights):
        raise ConversionError(f"dtype {dtype} says how weights are stored; leave the Core ML or MLX weights out")
    if "coreml" not in to and coreml:
        raise ConversionError("Core ML options need the target coreml; add it to the targets")
    if "mlx" not in to and mlx_weights is not None:
        raise ConversionError("MLX weights need the target mlx; add it to the targets")
    if sizes and not {"coreml", "mlx"} & set(to):
        raise ConversionError("sizes need the target coreml or mlx; add it to the targets")
    checkpoint = open_checkpoint(source, revision=revision, offline=offline, variant=variant)
    jobs = _plan(checkpoint, components)
    family = _family(checkpoint, jobs)
    guidance_of(checkpoint, family, {job.name: job.component.runtime for job in jobs})
    tokenizer = _tokenizer(checkpoint, jobs)
    notes = [*checkpoint.notes]
    names = [job.name for job in jobs]
    dtype = dtype if recipe is None else recipe.name
    options: dict[str, Any] = {"to": list(to), "dtype": dtype, "components": names, "variant": variant}
    if recipe is not None:
        for job in jobs:
            layers = find_layers(job.model)
            resolved = recipe.resolve(job.name, layers)
            check_backends(recipe.name, job.name, resolved, layers, to, calibrated=calibration is not None)
    prompts = [] if calibration is None else _prompts(calibration, checkpoint)
    options |= {"calibration": calibration} if calibration is not None else {}
    plan, mlx = None, None
    planned = {job.name: job.component for job in jobs}
    if "coreml" in to:
        plan = plan_coreml(checkpoint, family, planned, tokenizer, sizes, coreml)
        options["coreml"] = plan.as_dict()
    if "mlx" in to:
        mlx = plan_mlx(checkpoint, family, planned, tokenizer, sizes, mlx_weights)
        options["mlx"] = mlx.as_dict()
    for job in jobs:
        job.precisions = dict.fromkeys(to, dtype)
        if mlx is not None:
            job.precisions["mlx"] = mlx.precision(job.name, dtype)
    if dry_run:
        return _report(None, family, checkpoint, jobs, notes, started)

    with BundleWriter(bundle, overwrite=overwrite) as writer:
        preview = None
        work = _quantize(recipe, checkpoint, family, jobs, Path(bundle), prompts, options, on_progress)
        for job in jobs:
            if job.quantization is not None:
                check_backends(dtype, job.name, job.quantization.forms, job.layers, to, calibrated=bool(prompts))
                write_record(writer.root, job.name, job.quantization, job.layers)
            forms = _lower(job, writer.root, to, dtype, plan, mlx, measure, _counter(job.name, on_progress))
            fitted = _measure(job, writer.root, forms, plan, measure, own=dtype == "fp32")
            preview = fitted or preview
            notes += job.notes
            job.sizes = {
                backend: sum((writer.root / path).stat().st_size for path in artefact.files)
                for backend, artefact in job.artefacts.items()
            }
        if tokenizer is not None:
            folder = writer.root / "tokenizer"
            folder.mkdir()
            (folder / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
        manifest = describe(
            checkpoint,
            family,
            {job.name: job.section for job in jobs},
            tokenizer=tokenizer,
            preview=preview,
            name=name or Path(bundle).name.removesuffix(".edgedit"),
            options=options,
        )
        writer.finish(manifest)
    if work is not None:
        work.remove()
    return _report(Path(bundle), family, checkpoint, jobs, notes, started)


def _lower(
    job: _Job,
    root: Path,
    to: Sequence[str],
    dtype: str,
    plan: CoremlPlan | None,
    mlx: MlxPlan | None,
    measure: bool | None,
    on_tensor: Callable[[int, int], None] | None,
) -> dict[str, list[Opener]]:
    """Write a component for every target; what opens each form again. A lowering takes its graph apart."""
    forms: dict[str, list[Opener]] = {}
    for index, target in enumerate(dict.fromkeys(to)):
        model = job.model if index == 0 else _canonical(job.source, job.name)[1]
        if index and job.prepare is not None:
            job.prepare(model)
        if target == "onnx":
            written = onnx_lowering.write(
                model, root, job.name, dtype=dtype, quantization=job.quantization, on_tensor=on_tensor
            )
            if job.name in TILED:
                stride = int(job.component.runtime["scale_factor"]) if job.name == "encoder" else 1
                written = write_pieces(root, job.name, written, stride)
            if job.name in CUT:
                written = write_parts(root, job.name, written)
            forms[target], job.artefacts[target] = onnx_sessions(root, written), written
        elif target == "mlx" and mlx is not None:
            job.artefacts[target], forms[target] = mlx.write(
                job.component,
                model,
                root,
                dtype=dtype,
                quantization=job.quantization,
                check=job.is_measured(measure),
                on_tensor=on_tensor,
            )
        elif target == "coreml" and plan is not None:
            package, openers = plan.write(
                job.component,
                model,
                root,
                dtype=dtype,
                quantization=job.quantization,
                check=job.is_measured(measure) and plan.measured(measure),
            )
            forms[target], job.artefacts[target] = openers, package
    return forms


def _measure(
    job: _Job,
    root: Path,
    forms: Mapping[str, list[Opener]],
    plan: CoremlPlan | None,
    measure: bool | None,
    *,
    own: bool,
) -> dict[str, Any] | None:
    """Record a component's reference inputs and, where it is small enough or asked for, outputs and agreement.

    `own`: the ONNX form is the fp32 graph itself. Returns the preview that a decoder allows.
    """
    sizes = plan.reference_sizes(job.name) if plan is not None and plan.measured(measure) else None
    run = {backend: opened for backend, opened in forms.items() if backend != "coreml" or sizes is not None}
    preview = None
    if run and job.is_measured(measure):
        fresh = None if own and "onnx" in run else _canonical(job.source, job.name)[1]
        compressed = [b for b, artefact in job.artefacts.items() if artefact.precision not in ("fp32", "fp16")]
        job.parity = measure_forms(root, job.component, run, fresh, sizes, compressed)
        if job.name == "decoder":
            if "onnx" in run:
                preview = fit_preview(job.component, run["onnx"][0])
            else:
                with canonical_form(root, job.component, _canonical(job.source, job.name)[1]) as form:
                    preview = fit_preview(job.component, form)
    else:
        reference.save(
            root / "reference" / f"{job.name}.npz", reference.reference_inputs(job.component, **(sizes or {})), {}
        )
    if measure is None and not job.is_measured(None):
        job.notes.append(f"{job.name}: agreement not measured (over 256 MiB); measure with: edgedit convert --measure")
    elif measure is None and len(run) < len(forms):
        job.notes.append(
            f"{job.name}: the Core ML package was not run (pictures over 512x512 take the interpreter minutes); "
            "run it with: edgedit convert --measure"
        )
    return preview


def _report(
    bundle: Path | None,
    family: Family,
    checkpoint: Checkpoint,
    jobs: list[_Job],
    notes: list[str],
    started: float,
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
                size=sum(job.sizes.values()),
                precision=artefacts[0].precision,
                dropped=job.dropped,
                parity=artefacts[0].parity,
                artefacts=artefacts,
            )
            for job, artefacts in ((job, _artefacts(job)) for job in jobs)
        ],
        notes=notes,
        seconds=time.perf_counter() - started,
    )


def _artefacts(job: _Job) -> list[ArtefactReport]:
    return [
        ArtefactReport(
            backend,
            job.artefacts[backend].precision if backend in job.artefacts else precision,
            job.sizes.get(backend, 0),
            job.parity.get(backend),
        )
        for backend, precision in job.precisions.items()
    ]


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
            jobs.append(_Job(component, source, *_canonical(source, component)))
    return jobs


def _canonical(source: ComponentSource, name: str) -> tuple[Component, ir.Model, list[tuple[str, str]]]:
    """A component, a fresh canonical graph with lazy weights, and the keys that it drops with their reasons."""
    component = builder(source.class_name, name)(source.config)
    model = build(component)
    accounting = bind(model, source.tensors, drop=component.drop, config=source.config)
    return component, model, [*source.dropped.items(), *accounting.dropped.items()]


#: Prompts of a checkpoint's own list that a calibration draws.
OWN_PROMPTS = 8


def _prompts(source: str, checkpoint: Checkpoint) -> list[str]:
    found = read_prompts(source, checkpoint.path)
    every = max(1, len(found) // OWN_PROMPTS)
    return found[::every][:OWN_PROMPTS] if source == "self" else found


def _quantize(
    recipe: Recipe | None,
    checkpoint: Checkpoint,
    family: Family,
    jobs: list[_Job],
    bundle: Path,
    prompts: list[str],
    options: Mapping[str, Any],
    on_progress: OnProgress | None,
) -> Workspace | None:
    """Say how each component is quantized, in its job; the workspace of slow recipes."""
    if recipe is None:
        return None
    work, calibration = None, None
    if is_slow(recipe) or prompts:
        files = [path.stat() for path in sorted(checkpoint.path.rglob("*")) if path.is_file()]
        rules = {c: {r.pattern: r.form.as_dict() for r in lines} for c, lines in recipe.rules.items()}
        state = {"source": str(checkpoint.path), "files": [[s.st_size, s.st_mtime_ns] for s in files]}
        # Another budget goes on from the same measurements.
        dtype = recipe.name if recipe.budget is None else "mixed"
        work = Workspace(bundle, {**state, **options, "dtype": dtype, "rules": rules, "prompts": prompts})
    if work is not None and prompts:
        calibration = _calibration(checkpoint, family, prompts, work, on_progress)
    for job in jobs:
        job.prepare = partial(
            prepare, recipe, job.name, work=work, calibration=calibration, ranges="coreml" in options["to"]
        )
        job.quantization, job.layers = job.prepare(job.model)
    return work


def _calibration(
    checkpoint: Checkpoint, family: Family, prompts: list[str], work: Workspace, on_progress: OnProgress | None
) -> Calibration:
    """The whole pipeline, whatever is converted of it: calibration draws pictures."""
    try:
        jobs = _plan(checkpoint, NEEDED)
    except ConversionError as error:
        raise ConversionError(f"calibration draws pictures and needs the whole pipeline: {error}") from error
    tokenizer = _tokenizer(checkpoint, jobs)
    assert tokenizer is not None
    for job in jobs:
        path = f"onnx/{job.name}.onnx"
        job.artefacts = {"onnx": onnx_lowering.OnnxArtefact("fp32", path, None, (path,))}
    manifest = describe(
        checkpoint,
        family,
        {job.name: job.section for job in jobs},
        tokenizer=tokenizer,
        preview=None,
        name="calibration",
        options={},
    )
    sources = {job.name: job.source for job in jobs}
    return Calibration(
        manifest, tokenizer.json, lambda name: _canonical(sources[name], name)[1], prompts, work, on_progress
    )


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

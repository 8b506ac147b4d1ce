"""Checkpoint → bundle. Weights are read one at a time; the bundle is written whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgedit.bundle_writer import BundleWriter
from edgedit.converters.checkpoint import open_checkpoint
from edgedit.converters.coreml import CoremlOptions, plan_coreml
from edgedit.converters.jobs import OnProgress, family_of_jobs, plan_jobs, tokenizer_of_jobs
from edgedit.converters.manifest import describe, guidance_of
from edgedit.converters.mlx import plan_mlx
from edgedit.converters.quantization.backends import check_backends
from edgedit.converters.quantization.layers import find_layers
from edgedit.converters.quantization.presets import recipe_of
from edgedit.converters.quantization.record import write_record
from edgedit.converters.quantize_jobs import calibration_prompts, quantize_jobs
from edgedit.converters.report import ConversionReport, report_on
from edgedit.converters.write_jobs import lower, measure_job
from edgedit.errors import ConversionError

__all__ = ["TARGETS", "convert"]

#: Backends that `to` may name.
TARGETS = ("onnx", "coreml", "mlx")


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
    jobs = plan_jobs(checkpoint, components)
    family = family_of_jobs(checkpoint, jobs)
    guidance_of(checkpoint, family, {job.name: job.component.runtime for job in jobs})
    tokenizer = tokenizer_of_jobs(checkpoint, jobs)
    notes = [*checkpoint.notes]
    names = [job.name for job in jobs]
    dtype = dtype if recipe is None else recipe.name
    options: dict[str, Any] = {"to": list(to), "dtype": dtype, "components": names, "variant": variant}
    if recipe is not None:
        for job in jobs:
            layers = find_layers(job.model)
            resolved = recipe.resolve(job.name, layers)
            check_backends(recipe.name, job.name, resolved, layers, to, calibrated=calibration is not None)
    prompts = [] if calibration is None else calibration_prompts(calibration, checkpoint)
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
        return report_on(None, family, checkpoint, jobs, notes, started)

    with BundleWriter(bundle, overwrite=overwrite) as writer:
        preview = None
        work = quantize_jobs(recipe, checkpoint, family, jobs, Path(bundle), prompts, options, on_progress)
        for job in jobs:
            if job.quantization is not None:
                check_backends(dtype, job.name, job.quantization.forms, job.layers, to, calibrated=bool(prompts))
                write_record(writer.root, job.name, job.quantization, job.layers)
            forms = lower(job, writer.root, to, dtype, plan, mlx, measure, _counter(job.name, on_progress))
            fitted = measure_job(job, writer.root, forms, plan, measure, own=dtype == "fp32")
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
    return report_on(Path(bundle), family, checkpoint, jobs, notes, started)


def _counter(component: str, on_progress: OnProgress | None) -> Callable[[int, int], None] | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(component, done, total)

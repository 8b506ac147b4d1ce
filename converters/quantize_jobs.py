"""How each component is quantized, with what calibration finds where a recipe asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from edgedit.converters.checkpoint import Checkpoint
from edgedit.converters.families import Family
from edgedit.converters.jobs import Job, OnProgress, canonical, plan_jobs, tokenizer_of_jobs
from edgedit.converters.lowerings import onnx as onnx_lowering
from edgedit.converters.manifest import describe
from edgedit.converters.prompts import read_prompts
from edgedit.converters.quantization.calibrate import NEEDED, Calibration
from edgedit.converters.quantization.prepare import is_slow, prepare
from edgedit.converters.quantization.recipe import Recipe
from edgedit.converters.quantization.workspace import Workspace
from edgedit.errors import ConversionError

__all__ = ["calibration_prompts", "quantize_jobs"]


#: Prompts of a checkpoint's own list that a calibration draws.
OWN_PROMPTS = 8


def calibration_prompts(source: str, checkpoint: Checkpoint) -> list[str]:
    found = read_prompts(source, checkpoint.path)
    every = max(1, len(found) // OWN_PROMPTS)
    return found[::every][:OWN_PROMPTS] if source == "self" else found


def quantize_jobs(
    recipe: Recipe | None,
    checkpoint: Checkpoint,
    family: Family,
    jobs: list[Job],
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
        jobs = plan_jobs(checkpoint, NEEDED)
    except ConversionError as error:
        raise ConversionError(f"calibration draws pictures and needs the whole pipeline: {error}") from error
    tokenizer = tokenizer_of_jobs(checkpoint, jobs)
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
        manifest, tokenizer.json, lambda name: canonical(sources[name], name)[1], prompts, work, on_progress
    )

"""Writes components in the forms of the targets, and measures how they agree with the canonical graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgedit.converters import reference
from edgedit.converters.coreml import CoremlPlan
from edgedit.converters.jobs import Job, canonical
from edgedit.converters.lowerings import onnx as onnx_lowering
from edgedit.converters.measure import Opener, canonical_form, fit_preview, measure_forms, onnx_sessions
from edgedit.converters.mlx import MlxPlan
from edgedit.converters.parts import CUT, write_parts
from edgedit.converters.tiling.write import TILED, write_pieces

__all__ = ["lower", "measure_job"]


def lower(
    job: Job,
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
        model = job.model if index == 0 else canonical(job.source, job.name)[1]
        if index and job.prepare is not None:
            job.prepare(model)
        if target == "onnx":
            written = onnx_lowering.write(
                model, root, job.name, dtype=dtype, quantization=job.quantization, on_tensor=on_tensor
            )
            if job.name in TILED:
                stride = int(job.component.runtime["scale_factor"]) if job.name == "encoder" else 1
                ranges = None if job.quantization is None else job.quantization.map_ranges
                written = write_pieces(root, job.name, written, stride, ranges)
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


def measure_job(
    job: Job,
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
        fresh = None if own and "onnx" in run else canonical(job.source, job.name)[1]
        compressed = [b for b, artefact in job.artefacts.items() if artefact.precision not in ("fp32", "fp16")]
        job.parity = measure_forms(root, job.component, run, fresh, sizes, compressed)
        if job.name == "decoder":
            if "onnx" in run:
                preview = fit_preview(job.component, run["onnx"][0])
            else:
                with canonical_form(root, job.component, canonical(job.source, job.name)[1]) as form:
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

"""Run what was written and say how far it is from the canonical fp32 graph."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgedit.converters import reference
from edgedit.converters.graph import Component
from edgedit.converters.lowerings import onnx as onnx_lowering
from edgedit.converters.lowerings.onnx import OnnxArtefact
from edgedit.metrics import Agreement, compare
from edgedit.noise import make_noise
from edgedit.runtimes.onnx import CPU, OnnxSession

__all__ = ["fit_preview", "measure_onnx"]

AGAINST = "canonical fp32 graph, ONNX Runtime on the CPU"


def measure_onnx(
    root: Path, component: Component, artefact: OnnxArtefact, canonical: ir.Model | None
) -> dict[str, Any]:
    """Compare every graph of `artefact`, read back from disk, with the canonical fp32 graph; the worst figures count.

    Writes the reference inputs and outputs into the bundle. `canonical` is the fp32 graph with lazy weights, or None
    when the artefact's own graph is it.
    """
    inputs = reference.reference_inputs(component)
    if canonical is None:
        outputs = _run(root / artefact.graph, inputs)
    else:
        place = root / ".canonical"
        try:
            whole = onnx_lowering.write(canonical, root, component.name, dtype="fp32", folder=place.name)
            outputs = _run(root / whole.graph, inputs)
        finally:
            shutil.rmtree(place, ignore_errors=True)
    reference.save(root / "reference" / f"{component.name}.npz", inputs, outputs)
    graphs = [artefact.graph] + ([artefact.fused_graph] if artefact.fused_graph else [])
    found = [_worst(_run(root / graph, inputs), outputs) for graph in graphs]
    worst = max(found, key=lambda a: a.relative_l2)
    return {"against": AGAINST, **worst.as_dict(), "psnr_db": None if worst.max_abs == 0 else worst.psnr_db}


def _run(graph: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = OnnxSession(graph, [CPU], None, None, graph.stem)
    try:
        return session.run(inputs)
    finally:
        session.close()


def _worst(values: dict[str, np.ndarray], references: dict[str, np.ndarray]) -> Agreement:
    return max((compare(values[name], references[name]) for name in references), key=lambda a: a.relative_l2)


def fit_preview(root: Path, component: Component, artefact: OnnxArtefact) -> dict[str, Any] | None:
    """Least-squares map from latents to the mean colour of what they decode to: a preview without a decoder.

    The latents are patches of constant noise, four by four, because a decoder answers white noise with texture.
    """
    channels, factor = int(component.runtime["latent_channels"]), int(component.runtime["scale_factor"])
    scale = float(component.runtime.get("scaling_factor") or 1.0)
    side, patches = 16, 4
    noise = make_noise("philox", 0)
    session = OnnxSession(root / artefact.graph, [CPU], None, None, component.name)
    rows, colours = [], []
    try:
        for _ in range(max(4, -(-4 * channels // patches**2))):
            latents = np.repeat(
                np.repeat(noise.normal((1, channels, patches, patches)), side // patches, 2), side // patches, 3
            )
            picture = session.run({"latents": (latents / np.float32(scale)).astype(np.float32)})["image"][0]
            means = np.clip(picture, -1, 1).reshape(3, side, factor, side, factor).mean((2, 4))
            rows.append(latents[0].reshape(channels, -1).T)
            colours.append(means.reshape(3, -1).T)
    finally:
        session.close()
    x, y = np.concatenate(rows), np.concatenate(colours)
    solution, *_ = np.linalg.lstsq(np.c_[x, np.ones(len(x))].astype(np.float64), y.astype(np.float64), rcond=None)
    if not np.isfinite(solution).all():
        return None
    return {"factors": solution[:-1].round(6).tolist(), "bias": solution[-1].round(6).tolist()}

"""Run what was written and say how far it is from the canonical fp32 graph."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
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
from edgedit.runtimes.base import Session
from edgedit.runtimes.onnx import CPU, OnnxSession

__all__ = ["Opener", "canonical_form", "fit_preview", "measure_forms", "onnx_sessions"]

AGAINST = "canonical fp32 graph, ONNX Runtime on the CPU"

#: Opens a form of a component that was just written.
Opener = Callable[[], Session]


def onnx_sessions(root: Path, artefact: OnnxArtefact) -> list[Opener]:
    """The graph and its CPU form."""
    graphs = [artefact.graph] + ([artefact.fused_graph] if artefact.fused_graph else [])
    return [partial(OnnxSession, root / graph, [CPU], None, None, Path(graph).stem) for graph in graphs]


@contextmanager
def canonical_form(root: Path, component: Component, model: ir.Model) -> Iterator[Opener]:
    """The fp32 graph with lazy weights as something to open, written beside the bundle's files while the block runs."""
    place = root / ".canonical"
    try:
        whole = onnx_lowering.write(model, root, component.name, dtype="fp32", folder=place.name)
        yield onnx_sessions(root, whole)[0]
    finally:
        shutil.rmtree(place, ignore_errors=True)


def measure_forms(
    root: Path,
    component: Component,
    written: Mapping[str, Sequence[Opener]],
    canonical: ir.Model | None,
    sizes: Mapping[str, Any] | None = None,
    compressed: Collection[str] = (),
) -> dict[str, dict[str, Any]]:
    """Compare every form of a component, read back from disk, with the canonical fp32 graph.

    Writes the reference inputs and outputs into the bundle.

    Args:
        written: the forms by backend; the worst of a backend counts.
        canonical: the fp32 graph with lazy weights, or None when the first form of "onnx" is it.
        sizes: of the reference inputs, as `example_inputs` takes them, where a form takes no others.
        compressed: backends whose weights lose so much that their own outputs are recorded too: how far they are from
            the fp32 graph's says little of whether they are whole.

    Returns:
        the manifest's parity by backend.
    """
    inputs = reference.reference_inputs(component, **(sizes or {}))
    if canonical is None:
        outputs = _run(written["onnx"][0](), inputs)
    else:
        with canonical_form(root, component, canonical) as form:
            outputs = _run(form(), inputs)
    found, own = {}, {}
    for backend, forms in written.items():
        results = [_run(form(), inputs) for form in forms]
        worst = max((_worst(result, outputs) for result in results), key=lambda a: a.relative_l2)
        if backend in compressed:
            own[backend] = results[-1]  # the one that a machine runs: fused, or with float16 rounded
        found[backend] = {
            "against": AGAINST,
            **worst.as_dict(),
            "psnr_db": None if worst.max_abs == 0 else worst.psnr_db,
        }
    reference.save(root / "reference" / f"{component.name}.npz", inputs, outputs, own)
    return found


def _run(session: Session, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    try:
        return session.run(inputs)
    finally:
        session.close()


def _worst(values: dict[str, np.ndarray], references: dict[str, np.ndarray]) -> Agreement:
    return max((compare(values[name], references[name]) for name in references), key=lambda a: a.relative_l2)


def fit_preview(component: Component, decoder: Opener) -> dict[str, Any] | None:
    """Least-squares map from latents to the mean colour of what they decode to: a preview without a decoder.

    The latents are patches of constant noise, four by four, because a decoder answers white noise with texture.
    """
    channels, factor = int(component.runtime["latent_channels"]), int(component.runtime["scale_factor"])
    scale = float(component.runtime.get("scaling_factor") or 1.0)
    side, patches = 16, 4
    noise = make_noise("philox", 0)
    session = decoder()
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

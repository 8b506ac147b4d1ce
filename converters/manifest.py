"""The manifest of a bundle, from a checkpoint's configurations and its family's record."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from edgedit import __version__
from edgedit.converters.checkpoint import Checkpoint
from edgedit.converters.families import Family
from edgedit.converters.graph import Component, TensorSpec
from edgedit.converters.lowerings.onnx import OnnxArtefact
from edgedit.converters.tokenizer import CheckpointTokenizer, prompt_recipe
from edgedit.errors import CheckpointError
from edgedit.manifest import FORMAT_VERSION
from edgedit.schedules import schedule_config_from_diffusers

__all__ = ["Section", "describe", "overrides"]


@dataclass(frozen=True)
class Section:
    """What the manifest says of one component."""

    component: Component
    parameters: int
    artefact: OnnxArtefact
    parity: Mapping[str, Any] | None


def describe(
    checkpoint: Checkpoint,
    family: Family,
    sections: Mapping[str, Section],
    *,
    tokenizer: CheckpointTokenizer | None,
    preview: Mapping[str, Any] | None,
    name: str,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """The manifest as JSON, without `files`, which the writer fills.

    Sections that a lone component cannot fill are None. An `edgedit.json` beside the checkpoint's `model_index.json`
    may state the model's own `recommended` settings, prompt `max_length` and `licence`; see `overrides`.
    """
    own = overrides(checkpoint)
    runtime = {key: section.component.runtime for key, section in sections.items()}
    latents = _latents(family, runtime, preview)
    schedule = _schedule(checkpoint)
    max_length = int(own.get("prompt", {}).get("max_length", family.template.max_length))
    positions = runtime.get("transformer", {}).get("positions")
    return {
        "format_version": FORMAT_VERSION,
        "name": name,
        "family": family.name,
        "pipeline_class": checkpoint.pipeline_class,
        "components": {key: _component(section) for key, section in sections.items()},
        "schedule": schedule,
        "guidance": dict(family.guidance) if "transformer" in sections else None,
        "latents": latents,
        "positions": None if positions is None else dict(positions),
        "conditioning": {"resolution_aspect_ratio": bool(runtime.get("transformer", {}).get("resolution_aspect_ratio"))}
        if "transformer" in sections
        else None,
        "prompt": None
        if tokenizer is None
        else prompt_recipe(tokenizer, max_length=max_length, instruction=family.template.instruction),
        "recommended": _recommended(checkpoint, family, runtime, latents, schedule, own.get("recommended", {})),
        "provenance": {
            "source": checkpoint.source,
            "revision": checkpoint.revision,
            "licence": own.get("licence"),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "options": dict(options),
            "versions": {
                "edgedit": __version__,
                **{p: metadata.version(p) for p in ("onnx", "onnx-ir", "onnxscript", "numpy")},
            },
        },
    }


def overrides(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's own `edgedit.json`, {} when it has none.

    Raises CheckpointError when it is not what it should be.
    """
    path = Path(checkpoint.path) / "edgedit.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        recommended, prompt = found.get("recommended", {}), found.get("prompt", {})
        known = set(found) <= {"recommended", "prompt", "licence"}
        known &= set(recommended) <= {"steps", "guidance_scale", "sampler", "sizes"} and set(prompt) <= {"max_length"}
    except (ValueError, AttributeError, TypeError):
        known = False
    if not known:
        raise CheckpointError(
            f"{path}: expected an object with recommended (steps, guidance_scale, sampler, sizes), "
            "prompt (max_length) and licence"
        )
    return found  # type: ignore[no-any-return]


def _component(section: Section) -> dict[str, Any]:
    artefact = section.artefact
    fused = artefact.fused_graph
    return {
        "architecture": section.component.architecture,
        "config": dict(section.component.runtime),
        "parameters": section.parameters,
        "inputs": [_tensor(spec) for spec in section.component.inputs],
        "outputs": [_tensor(spec) for spec in section.component.outputs],
        "artefacts": {
            "onnx": {
                "precision": artefact.precision,
                "graph": artefact.graph,
                "fused_graph": None if fused is None else {"path": fused, "for": ["CPUExecutionProvider"]},
                "tiles": artefact.tiles,
                "files": list(artefact.files),
                "parity": None if section.parity is None else dict(section.parity),
            }
        },
    }


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}


def _latents(
    family: Family, runtime: Mapping[str, Mapping[str, Any]], preview: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    if "transformer" not in runtime or not ({"decoder", "encoder"} & set(runtime)):
        return None
    space = runtime.get("decoder") or runtime["encoder"]
    patch = int(runtime["transformer"]["patch_size"])
    shift = space.get("shift_factor") if family.uses_shift_factor else None
    return {
        "channels": int(space["latent_channels"]),
        "scale_factor": int(space["scale_factor"]),
        "patch_size": patch,
        "size_multiple": int(space["scale_factor"]) * patch,
        "scaling_factor": float(space.get("scaling_factor") or 1.0),
        "shift_factor": float(shift or 0.0),
        "preview": preview,
    }


def _schedule(checkpoint: Checkpoint) -> dict[str, Any] | None:
    if checkpoint.scheduler is None:
        return None
    return schedule_config_from_diffusers(checkpoint.scheduler.class_name, checkpoint.scheduler.config)


def _recommended(
    checkpoint: Checkpoint,
    family: Family,
    runtime: Mapping[str, Mapping[str, Any]],
    latents: Mapping[str, Any] | None,
    schedule: Mapping[str, Any] | None,
    own: Mapping[str, Any],
) -> dict[str, Any] | None:
    if latents is None or schedule is None or checkpoint.scheduler is None:
        return None
    side = int(runtime["transformer"]["sample_size"]) * int(latents["scale_factor"])
    steps, scale = family.few_steps.get(checkpoint.scheduler.class_name, (family.steps, family.guidance_scale))
    return {
        "steps": int(own.get("steps", steps)),
        "width": side,
        "height": side,
        "guidance_scale": float(own.get("guidance_scale", scale)),
        "sampler": str(own.get("sampler", schedule["sampler"])),
        "sizes": [list(pair) for pair in own.get("sizes", [[side, side]])],
    }

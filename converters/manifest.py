"""The manifest of a bundle, from a checkpoint's configurations and its family's record."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Protocol

from edgedit import __version__
from edgedit.converters.checkpoint import Checkpoint
from edgedit.converters.families import Family
from edgedit.converters.few_steps import few_steps_of
from edgedit.converters.graph import Component, TensorSpec
from edgedit.converters.tokenizer import CheckpointTokenizer, prompt_recipe
from edgedit.converters.trained_sizes import trained_sizes
from edgedit.errors import ConversionError
from edgedit.manifest import FORMAT_VERSION
from edgedit.schedules import own_steps, schedule_config_from_diffusers

__all__ = ["Section", "Written", "describe", "guidance_of"]

#: Backend → the package that writes its artefacts.
_WRITTEN_BY = {"coreml": "coremltools", "mlx": "mlx"}


class Artefact(Protocol):
    """What a lowering says that it wrote; paths are relative to the bundle."""

    @property
    def precision(self) -> str: ...
    @property
    def graph(self) -> str: ...
    @property
    def files(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Written:
    """One backend's form of a component, and how it agrees with the canonical graph, if that was measured."""

    artefact: Artefact
    parity: Mapping[str, Any] | None


@dataclass(frozen=True)
class Section:
    """What the manifest says of one component: its artefacts by backend."""

    component: Component
    parameters: int
    written: Mapping[str, Written]


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

    Sections that a lone component cannot fill are None. What the checkpoint states in its own record
    (`edgedit.converters.own_record`) goes before what its family's record says.
    """
    own = checkpoint.own
    runtime = {key: section.component.runtime for key, section in sections.items()}
    latents = _latents(family, runtime, preview)
    schedule = _schedule(checkpoint, family, runtime)
    guidance = guidance_of(checkpoint, family, runtime)
    max_length = own.max_length or family.template.max_length
    positions = runtime.get("transformer", {}).get("positions")
    return {
        "format_version": FORMAT_VERSION,
        "name": name,
        "family": family.name,
        "pipeline_class": checkpoint.pipeline_class,
        "components": {key: _component(section) for key, section in sections.items()},
        "schedule": schedule,
        "guidance": guidance,
        "latents": latents,
        "positions": None if positions is None else dict(positions),
        "conditioning": {"resolution_aspect_ratio": bool(runtime.get("transformer", {}).get("resolution_aspect_ratio"))}
        if "transformer" in sections
        else None,
        "prompt": None
        if tokenizer is None
        else prompt_recipe(tokenizer, max_length=max_length, instruction=family.template.instruction),
        "recommended": _recommended(checkpoint, family, runtime, latents, schedule, guidance),
        "provenance": {
            "source": checkpoint.source,
            "revision": checkpoint.revision,
            "licence": own.licence,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "options": dict(options),
            "versions": {
                "edgedit": __version__,
                **{p: metadata.version(p) for p in ("onnx", "onnx-ir", "onnxscript", "numpy", *_libraries(sections))},
            },
        },
    }


def _libraries(sections: Mapping[str, Section]) -> list[str]:
    """Packages that wrote artefacts of their own backend."""
    backends = {backend for section in sections.values() for backend in section.written}
    return [package for backend, package in _WRITTEN_BY.items() if backend in backends]


def _component(section: Section) -> dict[str, Any]:
    return {
        "architecture": section.component.architecture,
        "config": dict(section.component.runtime),
        "parameters": section.parameters,
        "inputs": [_tensor(spec) for spec in section.component.inputs],
        "outputs": [_tensor(spec) for spec in section.component.outputs],
        "artefacts": {backend: _artefact(written) for backend, written in section.written.items()},
    }


def _artefact(written: Written) -> dict[str, Any]:
    artefact = written.artefact
    fused = getattr(artefact, "fused_graph", None)
    return {
        "precision": artefact.precision,
        "graph": artefact.graph,
        "fused_graph": None if fused is None else {"path": fused, "for": ["CPUExecutionProvider"]},
        "files": list(artefact.files),
        "parity": None if written.parity is None else dict(written.parity),
        "tiles": getattr(artefact, "tiles", None),
        "parts": getattr(artefact, "parts", None),
        **_functions(artefact),
        **_exported(artefact),
        **({"chunks": list(chunks)} if (chunks := getattr(artefact, "chunks", ())) else {}),
    }


def _functions(artefact: Artefact) -> dict[str, Any]:
    """The fixed sizes of an artefact that has such; reason → how many nodes of it are float32 for that reason."""
    functions = getattr(artefact, "functions", ())
    named = len(functions) > 1
    listed = [{"name": f.name if named else None, "sizes": dict(f.dims)} for f in functions]
    islands = Counter(getattr(artefact, "islands", {}).values())
    return {"functions": listed, "islands": dict(islands)} if listed else {}


def _exported(artefact: Artefact) -> dict[str, Any]:
    exported = getattr(artefact, "exported", None)
    if exported is None:
        return {}
    return {"exported": {"path": exported.path, "sizes": [dict(one) for one in exported.sizes]}}


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


def _schedule(
    checkpoint: Checkpoint, family: Family, runtime: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    if checkpoint.own.schedule is not None:
        return dict(checkpoint.own.schedule)
    if checkpoint.scheduler is None:
        return None
    schedule = schedule_config_from_diffusers(checkpoint.scheduler.class_name, checkpoint.scheduler.config)
    few = few_steps_of(checkpoint)
    if few is not None:
        schedule.update(few.schedule)
    scale = float(runtime.get("transformer", {}).get("timestep_scale") or 1.0)
    return {**schedule, "timestep_scale": scale} if family.scales_timestep and scale != 1 else schedule


def guidance_of(
    checkpoint: Checkpoint, family: Family, runtime: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The manifest's guidance: what the checkpoint states, else that of the few-step model that it is, else the
    family's; None without a transformer.

    runtime: what each component's graph says of its configuration. Raises ConversionError for a stated kind that the
    transformer has no input for.
    """
    if "transformer" not in runtime:
        return None
    few = few_steps_of(checkpoint)
    usual = family.guidance if few is None or few.guidance is None else few.guidance
    guidance = dict(usual if checkpoint.own.guidance is None else checkpoint.own.guidance)
    kind, embeds = guidance.setdefault("kind", "cfg"), bool(runtime["transformer"].get("guidance_embeds"))
    if checkpoint.own.guidance is not None and (kind == "embedded") != embeds:
        able = (
            "embedded, for the transformer takes the scale" if embeds else "cfg or none, for the transformer takes none"
        )
        raise ConversionError(f"edgedit.json has guidance of kind {kind!r}: it must be {able}")
    return guidance


def _recommended(
    checkpoint: Checkpoint,
    family: Family,
    runtime: Mapping[str, Mapping[str, Any]],
    latents: Mapping[str, Any] | None,
    schedule: Mapping[str, Any] | None,
    guidance: Mapping[str, Any] | None,
) -> dict[str, Any] | None:
    if latents is None or schedule is None or guidance is None or checkpoint.scheduler is None:
        return None
    own, few = checkpoint.own.recommended, few_steps_of(checkpoint)
    side = int(runtime["transformer"]["sample_size"]) * int(latents["scale_factor"])
    steps, scale = (family.steps, family.guidance_scale) if few is None else (few.steps[0], few.guidance_scale)
    return {
        "steps": int(own.get("steps") or next(iter(own_steps(schedule)), steps)),
        "width": side,
        "height": side,
        "guidance_scale": 1.0 if guidance["kind"] == "none" else float(own.get("guidance_scale", scale)),
        "sampler": str(own.get("sampler", schedule["sampler"])),
        "sizes": [list(pair) for pair in own.get("sizes", trained_sizes(family.bucketed, side))],
    }

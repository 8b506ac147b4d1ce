"""Opening a checkpoint: a diffusers folder, one component's folder, a single file, or a repository on the Hub.

Nothing in a checkpoint is trusted: no code of it runs, no path of it leads out of its folder, and every header is
checked before it is believed. Weights stay on disk until they are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgedit.converters import hub
from edgedit.converters.component import ComponentSource, class_of, component_name, read_component
from edgedit.converters.folder import Folder
from edgedit.converters.layout import (
    CONFIG,
    MODEL_INDEX,
    SCHEDULER_CONFIG,
    choose_weights,
    pipeline_parts,
    plan_files,
)
from edgedit.converters.own_record import OwnRecord, read_own_record
from edgedit.converters.single_file import read_single_file
from edgedit.converters.strict_json import read_object
from edgedit.converters.tensors import TensorRef, quoted
from edgedit.converters.weights_file import is_weights_name
from edgedit.errors import CheckpointError

__all__ = ["Checkpoint", "ComponentSource", "SchedulerSource", "TensorRef", "open_checkpoint"]


@dataclass(frozen=True)
class SchedulerSource:
    """The scheduler a pipeline names: its class and the content of its scheduler_config.json."""

    class_name: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; its weights are still on disk.

    Attributes:
        source: what the user gave: a path or ORG/NAME.
        path: where it lies on this machine.
        revision: the commit, for a repository of the Hub.
        pipeline_class: "PixArtSigmaPipeline" …; None for a component's folder or a single file.
        components: the networks, by name.
        scheduler: None unless the pipeline has one.
        tokenizer_dirs: the folders of the tokenizers, by name.
        model_index: the content of model_index.json; empty without one.
        notes: choices the user should hear of, one line each (which variant, which state dict).
        own: what its `edgedit.json` states. The operators of its `attention` are in the transformer's configuration
            too, as `self_attention`.
    """

    source: str
    path: Path
    revision: str | None
    pipeline_class: str | None
    components: Mapping[str, ComponentSource]
    scheduler: SchedulerSource | None = None
    tokenizer_dirs: Mapping[str, Path] = field(default_factory=dict)
    model_index: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    own: OwnRecord = field(default_factory=OwnRecord)


def open_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    variant: str | None = None,
    components: Sequence[str] | None = None,
    config: Path | None = None,
) -> Checkpoint:
    """Opens a checkpoint without reading its weights.

    Args:
        source: a diffusers pipeline's folder; the folder of one of its components; a `.safetensors`, `.pth`, `.pt`,
            `.bin` or `.ckpt` file with the key names of diffusers or of PixArt's and SANA's own repositories; or
            ORG/NAME, a repository on the Hub. A path that exists is taken before a repository of that name.
        revision: branch, tag or commit on the Hub ("main" when None). Refused for a path.
        offline: ask nothing of the network; the Hub's local cache must have everything.
        variant: "fp16", "bf16" …: the weights files with that name, and the plain ones for components that lack them.
            None: the plain weights, or the only variant there is.
        components: open these networks only, and what belongs to them.
        config: a config.json for a single file or a component's folder. For a single file its fields complete and
            override what the weights tell.

    Raises CheckpointError, one line with what is wrong and what to do, for anything that is missing, partial, damaged,
    dangerous or unknown.
    """
    path = Path(source).expanduser()
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}): check the path and its permissions."
        ) from None
    if not exists:
        return _open_repository(str(source), revision, offline, variant, components, config)
    if revision is not None:
        raise CheckpointError(f"{path} is a path here, which has no revision: leave the revision out.")
    if is_folder:
        return _open_folder(str(source), path, None, variant, components, config)
    if variant is not None:
        raise CheckpointError(f"{path} is a single file, which has no variants: leave the variant out.")
    component, notes = read_single_file(path, config)
    own = read_own_record(path.parent) if (path.parent / CONFIG).is_file() else OwnRecord()
    networks = _with_operators({component.name: component}, own)
    return _only(components, Checkpoint(str(source), path, None, None, networks, notes=notes, own=own))


def _open_repository(
    source: str,
    revision: str | None,
    offline: bool,
    variant: str | None,
    components: Sequence[str] | None,
    config: Path | None,
) -> Checkpoint:
    if not hub.is_repository_id(source) or is_weights_name(source):
        raise CheckpointError(
            f"{quoted(source)} does not exist: give a diffusers folder, a weights file, or ORG/NAME on the Hub."
        )
    snapshot = hub.fetch(source, revision=revision, offline=offline, variant=variant, components=components)
    return _open_folder(source, snapshot.path, snapshot.revision, variant, components, config)


def _open_folder(
    source: str,
    path: Path,
    revision: str | None,
    variant: str | None,
    components: Sequence[str] | None,
    config: Path | None,
) -> Checkpoint:
    folder = Folder(path)
    if MODEL_INDEX in folder.files:
        if config is not None:
            raise CheckpointError(f"{path} is a whole pipeline with its own configurations: leave the config out.")
        return _open_pipeline(source, folder, revision, variant, components)
    if CONFIG not in folder.files and config is None:
        plan_files(folder, variant, components)  # raises, and says what this folder is instead
    own_config = read_object(config) if config is not None else folder.read_json(CONFIG)
    weights = choose_weights(folder.files, variant, folder.name)
    if variant is not None and weights.variant != variant:
        raise CheckpointError(f"{path} has no weights of the variant {variant}: leave the variant out.")
    library, class_name = class_of(own_config, str(config or path / CONFIG))
    name = component_name(path, library, class_name)
    component, notes = read_component(name, library, class_name, own_config, folder, weights)
    notes = ((weights.note,) if weights.note else ()) + notes
    own = read_own_record(path)
    networks = _with_operators({name: component}, own)
    return _only(components, Checkpoint(source, path, revision, None, networks, notes=notes, own=own))


def _open_pipeline(
    source: str, folder: Folder, revision: str | None, variant: str | None, components: Sequence[str] | None
) -> Checkpoint:
    index = folder.read_json(MODEL_INDEX)
    pipeline_class = index.get("_class_name")
    if not isinstance(pipeline_class, str):
        raise CheckpointError(
            f"{folder.root / MODEL_INDEX} names no pipeline class of diffusers (it has "
            f"{quoted(pipeline_class)}); code that a checkpoint brings is not run: convert its components one by one."
        )
    notes = list(plan_files(folder, variant, components).notes)
    networks: dict[str, ComponentSource] = {}
    scheduler: SchedulerSource | None = None
    tokenizers: dict[str, Path] = {}
    for part in pipeline_parts(index, str(folder.root / MODEL_INDEX), components):
        if part.kind == "scheduler":
            scheduler = SchedulerSource(part.class_name, folder.read_json(f"{part.name}/{SCHEDULER_CONFIG}"))
        elif part.kind == "tokenizer":
            inside = folder.below(part.name)
            for name in inside.files:
                inside.path(name)
            tokenizers[part.name] = inside.root
        else:
            inside = folder.below(part.name)
            config = inside.read_json(CONFIG)
            weights = choose_weights(inside.files, variant, inside.name)
            component, more = read_component(part.name, part.library, part.class_name, config, inside, weights)
            networks[part.name] = component
            notes += more
    if not networks:
        raise CheckpointError(f"{folder.root / MODEL_INDEX} names no network: download the checkpoint again.")
    own = read_own_record(folder.root)
    networks = _with_operators(networks, own)
    return Checkpoint(
        source, folder.root, revision, pipeline_class, networks, scheduler, tokenizers, index, tuple(notes), own
    )


def _with_operators(networks: Mapping[str, ComponentSource], own: OwnRecord) -> dict[str, ComponentSource]:
    """The networks, the transformer told which self-attention operators it has."""
    told = dict(networks)
    if own.attention and "transformer" in told:
        source = told["transformer"]
        told["transformer"] = replace(source, config={**source.config, "self_attention": list(own.attention)})
    return told


def _only(components: Sequence[str] | None, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint of one component, unless another was asked for."""
    unknown = [name for name in components or () if name not in checkpoint.components]
    if unknown:
        have = ", ".join(checkpoint.components)
        raise CheckpointError(f"{checkpoint.path} has no component {quoted(unknown[0])}; it has {have}.")
    return checkpoint

"""One network of a checkpoint, from its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgedit.converters.folder import Folder
from edgedit.converters.layout import Weights, shard_map
from edgedit.converters.original_keys import modernise
from edgedit.converters.tensors import TensorRef, quoted
from edgedit.converters.weights_file import read_weights
from edgedit.errors import CheckpointError

__all__ = ["ComponentSource", "class_of", "component_name", "read_component"]

_FOLDER_NAMES = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "unet")


@dataclass(frozen=True)
class ComponentSource:
    """One network of a checkpoint.

    Attributes:
        name: "transformer", "vae", "text_encoder" …
        library: "diffusers" or "transformers", as model_index.json has it.
        class_name: the class in that library, by its present name ("PixArtTransformer2DModel").
        config: the content of its config.json, or what was inferred of it.
        tensors: its weights by the names that the class gives them today.
        path: the folder, or the single file.
        dropped: keys of the files that are not in `tensors`, with the reason.
    """

    name: str
    library: str
    class_name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorRef]
    path: Path
    dropped: Mapping[str, str] = field(default_factory=dict)


def read_component(
    name: str, library: str, class_name: str, config: Mapping[str, Any], folder: Folder, weights: Weights
) -> tuple[ComponentSource, tuple[str, ...]]:
    """The network in `folder` with the `weights` chosen there, and notes for the user.

    Raises CheckpointError for weights that are damaged, do not fit their index, or are quantized already.
    """
    if config.get("quantization_config"):
        raise CheckpointError(f"{folder.root} is quantized already: give the checkpoint it was made from.")
    tensors, dropped, notes = _read_chosen(folder, weights)
    class_name, tensors, more = modernise(class_name, config, tensors)
    return ComponentSource(name, library, class_name, config, tensors, folder.root, dropped | more), notes


def _read_chosen(folder: Folder, weights: Weights) -> tuple[dict[str, TensorRef], dict[str, str], tuple[str, ...]]:
    if not weights.sharded:
        file = read_weights(folder.path(weights.file))
        return file.tensors, file.dropped, file.notes
    where = str(folder.root / weights.file)
    placed = shard_map(folder.read_json(weights.file, strict=True), where)
    tensors: dict[str, TensorRef] = {}
    dropped: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    for shard in sorted(set(placed.values())):
        file = read_weights(folder.path(shard))
        for key in (*file.tensors, *file.dropped):
            if placed.get(key, shard) != shard:
                raise CheckpointError(f"{where}: {quoted(key)} is also in {shard}: download the checkpoint again.")
            if key in tensors:
                raise CheckpointError(f"{where}: {quoted(key)} is in two shards: download the checkpoint again.")
        tensors |= file.tensors
        dropped |= file.dropped
        notes += file.notes
    missing = sorted(placed.keys() - tensors.keys() - dropped.keys())
    if missing:
        raise CheckpointError(
            f"{where} names {quoted(missing[0])}, which {placed[missing[0]]} does not have: download it again."
        )
    return tensors, dropped, notes


def class_of(config: Mapping[str, Any], where: str) -> tuple[str, str]:
    """(library, class name) that a config.json states; `where` names it in the CheckpointError if it states none."""
    name = config.get("_class_name")
    if isinstance(name, str):
        return "diffusers", name
    architectures = config.get("architectures")
    if isinstance(architectures, list) and len(architectures) == 1 and isinstance(architectures[0], str):
        return "transformers", architectures[0]
    raise CheckpointError(
        f"{where} names no class (_class_name or architectures): give the component's own config.json."
    )


def component_name(path: Path, library: str, class_name: str) -> str:
    """The name of a component that comes alone: its folder's, if pipelines use that name, or what its class is for."""
    if path.is_dir() and path.resolve().name in _FOLDER_NAMES:
        return path.resolve().name
    if library == "transformers":
        return "text_encoder"
    return "vae" if class_name.startswith("Autoencoder") else "transformer"

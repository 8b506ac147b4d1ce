"""A single file of weights as a checkpoint: which model it is and, where nobody says so, its configuration."""

from __future__ import annotations

from pathlib import Path

from edgedit.converters.component import ComponentSource, class_of, component_name
from edgedit.converters.inferred_config import CLASSES, infer_config
from edgedit.converters.layout import CONFIG
from edgedit.converters.original_keys import family_of, from_original, modernise, strip_prefix
from edgedit.converters.strict_json import read_object
from edgedit.converters.tensors import quoted
from edgedit.converters.weights_file import read_weights
from edgedit.errors import CheckpointError

__all__ = ["read_single_file"]


def read_single_file(path: Path, config: Path | None) -> tuple[ComponentSource, tuple[str, ...]]:
    """The network in a weights file, and notes for the user.

    Args:
        path: safetensors or torch, with the key names of diffusers or of PixArt's and SANA's own repositories.
        config: a config.json; without one, that beside the file. For PixArt and SANA, whose weights tell most of their
            configuration, its fields complete and override what they tell; for any other class it must be whole.

    Raises CheckpointError when the file is unsound, or when it and its configuration do not tell what it is.
    """
    file = read_weights(path)
    tensors, prefix = strip_prefix(file.tensors)
    dropped = dict(file.dropped)
    notes = list(file.notes)
    if prefix:
        notes.append(f"{path.name}: every key begins with {prefix!r}, which was taken off")
    beside = path.parent / CONFIG
    if config is None and beside.is_file():
        config = beside
        notes.append(f"took the configuration {beside}")
    given = read_object(config) if config is not None else {}
    family = family_of(tensors)
    if family is None:
        if config is None:
            raise CheckpointError(
                f"{path} has no weights of PixArt or SANA: give the component's folder, or a config.json for the file."
            )
        library, class_name = class_of(given, str(config))
        class_name, tensors, more = modernise(class_name, given, tensors)
        source = ComponentSource(
            component_name(path, library, class_name), library, class_name, given, tensors, path, dropped | more
        )
        return source, tuple(notes)
    name, original = family
    set_aside = {}
    stated, _, _ = modernise(str(given.get("_class_name", CLASSES[name])), given, {})
    if stated != CLASSES[name]:
        raise CheckpointError(f"{config} is of {quoted(stated)}, the weights are of {CLASSES[name]}: give its own.")
    if original:
        renamed = from_original(name, tensors)
        tensors, set_aside = renamed.tensors, renamed.set_aside
        dropped |= renamed.dropped
        notes.append(f"{path.name}: key names of {name}'s own repository, read as {CLASSES[name]}")
    fields = {key: value for key, value in given.items() if key != "_class_name"}
    whole = infer_config(name, tensors, set_aside=set_aside, file_name=path.name, given=fields)
    return ComponentSource("transformer", "diffusers", CLASSES[name], whole, tensors, path, dropped), tuple(notes)
